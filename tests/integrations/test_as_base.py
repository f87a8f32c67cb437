"""Merged models answer as their base wherever a library asks for the name of a class, a model's type or its stacks."""

import copy
import json
import subprocess
import sys

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.ranks import REPOSITORY
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model

transformers = pytest.importorskip("transformers")
REMOTE = """
import json, sys
sys.modules["ffmerge_fast"] = None
import transformers
model, info = getattr(transformers, sys.argv[2]).from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True
)
print(json.dumps([type(model).__name__, sorted(info["missing_keys"]), model.config.model_type]))
"""


def merge(model, layers):
    return ff.merge_(model, ff.plan(layers=layers, method="average", model=model))


def load_without_us(folder, auto):
    """[class, missing keys, model type] of the model that a process without the package loads."""
    command = [sys.executable, "-c", REMOTE, str(folder), auto]
    return json.loads(subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, text=True).stdout)


def test_the_type_in_memory_is_the_base_ones_and_ours_on_disk(tmp_path):
    model = merge(tiny_model("gpt2"), "1-2")
    assert model.config.model_type == "gpt2"
    ff.save_pretrained(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "ffmerge_gpt2"
    assert ff.from_pretrained(tmp_path / "out").config.model_type == "gpt2"
    assert load_without_us(tmp_path / "out", "AutoModelForCausalLM") == ["FFMergedGPT2LMHeadModel", [], "gpt2"]
    model.config.save_pretrained(tmp_path / "config")
    assert json.loads((tmp_path / "config" / "config.json").read_text())["model_type"] == "ffmerge_gpt2"


def test_merging_leaves_the_config_of_other_models_alone():
    first = tiny_model("t5")
    second = type(first)(first.config)
    before = first.config.to_dict()
    merge(second, "encoder:0-1")
    assert first.config.to_dict() == before and not ff.is_merged(first)
    assert all(
        m.config is second.config for m in second.modules() if type(getattr(m, "config", None)) is type(second.config)
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_trainer_smooths_the_same_labels(name, tmp_path):
    pytest.importorskip("accelerate")
    merged = merge(tiny_model(name), "1-2")
    expanded = ff.expand_(copy.deepcopy(merged))
    rows = [{"input_ids": row, "labels": row} for row in tiny_inputs(merged, batch=4)["input_ids"]]
    options = transformers.TrainingArguments(
        tmp_path, label_smoothing_factor=0.1, report_to=[], disable_tqdm=True, use_cpu=True
    )
    losses = [
        transformers.Trainer(model, options, eval_dataset=rows).evaluate()["eval_loss"] for model in (merged, expanded)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_whisper_generates_as_whisper():
    merged = merge(tiny_model("whisper"), "decoder:1-2")
    expanded = ff.expand_(copy.deepcopy(merged))
    inputs = {"input_features": tiny_inputs(merged)["input_features"], "max_new_tokens": 5, "do_sample": False}
    prompts = torch.tensor([[3, 5, 7], [3, 5, 9]])
    for more in ({}, {"decoder_input_ids": prompts}):
        ours, wanted = (model.generate(**inputs, **more) for model in (merged, expanded))
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("with_us", [True, False])
def test_of_two_classes_behind_an_auto_class_the_saved_one_is_loaded(with_us, tmp_path):
    config = tiny_model("deit").config
    model = merge(transformers.DeiTForImageClassificationWithTeacher(config).eval(), "1-2")
    ff.save_pretrained(model, tmp_path / "out")
    name = "FFMergedDeiTForImageClassificationWithTeacher"
    if not with_us:
        assert load_without_us(tmp_path / "out", "AutoModelForImageClassification")[:2] == [name, []]
        return
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert type(loaded).__name__ == name == type(ff.from_pretrained(tmp_path / "out")).__name__
    inputs = {"pixel_values": tiny_inputs(model)["pixel_values"]}
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_a_class_that_no_auto_class_is_for_is_not_taken_for_the_base_model(tmp_path):
    model = merge(transformers.BertForPreTraining(tiny_model("bert").config).eval(), "1-2")
    ff.save_pretrained(model, tmp_path / "out")
    auto_map = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"].endswith(".FFMergedBertModel")
    assert auto_map["AutoModelForPreTraining"].endswith(".FFMergedBertForPreTraining")
    assert load_without_us(tmp_path / "out", "AutoModel")[:2] == ["FFMergedBertModel", []]


@pytest.mark.parametrize("layers", ["encoder:0-1,decoder:0-1", "encoder:0-1", "decoder:0-1"])
@pytest.mark.parametrize(
    "name, auto, part",
    [
        ("t5", "AutoModelForTextEncoding", "T5EncoderModel"),
        ("whisper", "AutoModelForCausalLM", "WhisperForCausalLM"),
    ],
)
def test_a_class_of_one_stack_leaves_the_groups_of_the_other_out(name, auto, part, layers, tmp_path):
    model = merge(tiny_model(name), layers)
    ff.save_pretrained(model, tmp_path / "out")
    loaded, info = getattr(transformers, auto).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded).__name__ == f"FFMerged{part}" and not info["missing_keys"]
    stack = "encoder" if "Encoding" in auto else "decoder"
    assert [s for s, _ in ff.shared_groups(loaded)] == ([stack] if stack in layers else [])
    loaded.save_pretrained(tmp_path / "again")
    again, info = getattr(transformers, auto).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and ff.shared_groups(again) == ff.shared_groups(loaded)


@pytest.mark.parametrize("name", ["marian", "bart"])
def test_a_decoder_whose_embedding_the_folder_lacks_is_not_offered(name, tmp_path):
    """transformers' own folders load as MarianForCausalLM with random embeddings."""
    ff.save_pretrained(merge(tiny_model(name), "decoder:0-1"), tmp_path / "out")
    auto_map = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert "AutoModelForSeq2SeqLM" in auto_map and "AutoModelForCausalLM" not in auto_map
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_peft_knows_what_to_adapt():
    peft = pytest.importorskip("peft")
    merged = merge(tiny_model("llama"), "1-2")
    adapted = peft.get_peft_model(merged, peft.LoraConfig(task_type="CAUSAL_LM"))
    found = {
        name.rpartition(".")[2] for name, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert found == {"q_proj", "v_proj"}
