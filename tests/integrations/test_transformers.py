"""Merged models inside transformers: loading anywhere, saving by its own means, and everything users do in between."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ffmerge_fast as ff
from ffmerge_fast.models.projections import own_parameters
from tests.helpers.tiny_models import FAMILIES, logits, tiny_inputs, tiny_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("folders")  # the fixtures of the fresh processes are dear

AUTO = {
    **dict.fromkeys(FAMILIES, "AutoModelForCausalLM"),
    **dict.fromkeys(("bert", "roberta"), "AutoModelForMaskedLM"),
    **dict.fromkeys(("vit", "deit"), "AutoModelForImageClassification"),
    **dict.fromkeys(("marian", "bart", "t5", "t5-gated"), "AutoModelForSeq2SeqLM"),
    "whisper": "AutoModelForSpeechSeq2Seq",
}


DELTAS = {f"{name} with deltas": name for name in ("gpt2", "llama", "phi3", "vit", "marian", "t5-gated")}
NEURONS = {f"{name} with neurons": name for name in ("gpt2", "phi3", "marian")}
FOLDERS = dict.fromkeys(FAMILIES) | DELTAS | NEURONS  # name of the folder: family, if not that


def merged_model(name: str, layers: str = "1-3") -> torch.nn.Module:
    if name in FAMILIES:
        model = tiny_model(name)
        return ff.merge_(model, ff.plan(layers=layers, method="random", model=model))
    teacher = tiny_model(FOLDERS[name])
    model = ff.merge(teacher, ff.plan(layers=layers, method="average", model=teacher))
    batches = [tiny_inputs(teacher, batch=8)]
    if name in DELTAS:
        ff.local_distill_(model, teacher, batches, steps=2, delta_rank=3)
    else:
        ff.refit_(model, teacher, batches, private=3)
    return model


def tied_modules(model) -> list[list[str]]:
    """Paths of the modules that must be one object each."""
    ffns = {(f.stack, f.index): f for f in ff.find_ffns(model)}
    tied = []
    for stack, layers in ff.shared_groups(model):
        first, *others = (ffns[stack, i] for i in layers)
        own = bool(own_parameters(model.get_submodule(first.down_path)))
        for i, path in enumerate(first.projections.values() if own else first.shared):
            same = [f"{[*f.projections.values()][i]}.shared" if own else f.shared[i] for f in others]
            tied.append([path, *same])
    return tied


def assert_tied(model, paths: list[list[str]]) -> None:
    for first, *others in paths:
        assert all(model.get_submodule(other) is model.get_submodule(first) for other in others)


def weight_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------- in fresh processes


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    """A merged folder of every family, with inputs and logits; CASES.json for load_folders.py."""
    root, cases = tmp_path_factory.mktemp("folders"), []
    for name, family in FOLDERS.items():
        model = merged_model(name)
        inputs = tiny_inputs(model)
        ff.save_pretrained(model, root / name)
        save_file(inputs | {"logits": logits(model, inputs).contiguous()}, root / f"{name}.inputs")
        family = family or name
        case = dict(name=name, folder=str(root / name), auto=AUTO[family], stock=FAMILIES[family].model)
        cases.append(case | dict(tensors=str(root / f"{name}.inputs"), tied=tied_modules(model)))
    file = root / "cases.json"
    file.write_text(json.dumps(cases))
    return file


def fresh_process(mode: str, cases: Path, *flags: str) -> dict:
    script = Path(__file__).with_name("load_folders.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HOME"] = str(cases.parent / f"hf-{mode}")
    if "-I" not in flags:
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    found = cases.parent / f"found-{mode}.json"
    done = subprocess.run(
        [sys.executable, *flags, str(script), mode, str(cases), str(found)],
        cwd=cases.parent, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(found.read_text())


@pytest.fixture(scope="module")
def without_package(cases) -> dict:
    return fresh_process("remote", cases, "-I")


@pytest.fixture(scope="module")
def package_first(cases) -> dict:
    return fresh_process("after", cases)


def assert_same_model(found: dict, name: str, cases: Path) -> None:
    saved = weight_bytes(cases.parent / name)
    for loaded in (found, found["again"]):
        assert loaded["class"] == "FFMerged" + FAMILIES[FOLDERS[name] or name].model
        assert (loaded["missing"], loaded["unexpected"]) == ([], [])
        assert loaded["difference"] == 0.0
        assert loaded["tied"]
    assert abs(found["again"]["bytes"] - saved) < 256  # file headers may differ, tensors not


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_loads_where_the_package_is_absent(name, cases, without_package):
    found = without_package[name]
    assert found["package"] == "absent" and found["imported"] == []
    assert_same_model(found, name, cases)


@pytest.mark.parametrize("name", FOLDERS)
def test_stock_class_and_untrusted_load_refuse(name, without_package):
    assert without_package[name]["stock class"].startswith("refused")
    assert "load with trust_remote_code=True, or import ffmerge_fast first" in without_package[name]["stock class"]
    assert without_package[name]["untrusted"].startswith("refused")
    assert "trust_remote_code" in without_package[name]["untrusted"]


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_loads_with_no_flag_after_import_of_the_package(name, cases, package_first):
    assert_same_model(package_first[name], name, cases)


def test_folder_loads_with_no_flag_where_transformers_was_imported_first(cases):
    some = cases.with_name("some.json")
    some.write_text(json.dumps([c for c in json.loads(cases.read_text()) if c["name"] in ("gpt2", "vit", "t5")]))
    for name, found in fresh_process("before", some).items():
        assert_same_model(found, name, cases)


# ---------------------------------------------------------------------------------------------------- in this process


def test_transformers_own_save_pretrained_writes_a_small_folder_that_loads(tmp_path):
    model = merged_model("llama")
    inputs, tied = tiny_inputs(model), tied_modules(model)
    model.save_pretrained(tmp_path / "plain")
    ff.save_pretrained(model, tmp_path / "ours")
    assert weight_bytes(tmp_path / "plain") == weight_bytes(tmp_path / "ours")
    for loaded in (
        ff.from_pretrained(tmp_path / "plain"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", trust_remote_code=True),
    ):
        assert_tied(loaded, tied)
        assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))


def test_model_of_the_travelling_code_works_with_the_package(tmp_path):
    """As loaded by somebody with trust_remote_code, before this package came in."""
    model = merged_model("gpt2")
    inputs, tied = tiny_inputs(model), tied_modules(model)
    ff.save_pretrained(model, tmp_path / "first")
    code = transformers.dynamic_module_utils.get_class_from_dynamic_module(
        "modeling_ffmerge.FFMergedGPT2LMHeadModel", str(tmp_path / "first")
    )
    loaded = code.from_pretrained(tmp_path / "first").eval()
    assert type(loaded) is not type(model) and ff.shared_groups(loaded) == [("decoder", (1, 2, 3))]
    with pytest.raises(ff.FFMergeError, match="merged already"):
        ff.merge_(loaded, ff.plan(layers="0-1", method="random", model=loaded))
    ff.save_pretrained(loaded, tmp_path / "second")
    ff.verify(tmp_path / "second")
    again = ff.from_pretrained(tmp_path / "second").eval()
    assert_tied(again, tied)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    ff.save_pretrained(ff.expand_(loaded), tmp_path / "stock")
    assert type(ff.from_pretrained(tmp_path / "stock")) is transformers.GPT2LMHeadModel


def test_deepcopy_and_dtype_keep_the_tie(tmp_path):
    model = merged_model("bert")
    inputs, tied = tiny_inputs(model), tied_modules(model)
    twin = copy.deepcopy(model)
    assert_tied(twin, tied)
    assert twin.bert.encoder.layer[1].output.dense is not model.bert.encoder.layer[1].output.dense
    twin.to(torch.bfloat16)
    assert_tied(twin, tied)
    ff.save_pretrained(twin, tmp_path / "bf16")
    assert 2 * parameter_bytes(twin) == parameter_bytes(model)
    loaded = ff.from_pretrained(tmp_path / "bf16").eval()
    assert loaded.dtype == loaded.config.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, inputs), logits(twin, inputs))
    assert ff.from_pretrained(tmp_path / "bf16", dtype=torch.float32).dtype == torch.float32
    auto = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bf16", dtype=torch.float16)
    assert auto.dtype == torch.float16
    assert_tied(auto, tied)


def parameter_bytes(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_state_dict_loads_strictly(tmp_path):
    model, other = merged_model("gpt2"), merged_model("gpt2")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other, inputs), logits(model, inputs))
    torch.save(model.state_dict(), tmp_path / "weights.pt")  # torch stores a shared storage once
    assert (tmp_path / "weights.pt").stat().st_size < 1.3 * parameter_bytes(model) + 20_000


@pytest.mark.parametrize("name", ["gpt2", "marian", "t5", "whisper"])
def test_generate(name, tmp_path):
    model = merged_model(name)
    inputs = {k: v for k, v in tiny_inputs(model).items() if k != "labels"}
    ff.save_pretrained(model, tmp_path / "folder")
    loaded = getattr(transformers, AUTO[name]).from_pretrained(tmp_path / "folder").eval()
    expanded = ff.expand_(copy.deepcopy(model))
    options = dict(max_new_tokens=6, do_sample=False, num_beams=2, pad_token_id=1)
    tokens = model.generate(**inputs, **options)
    assert tokens.shape[1] > 2
    assert torch.equal(loaded.generate(**inputs, **options), tokens)
    assert torch.equal(expanded.generate(**inputs, **options), tokens)


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # of dropout
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["gpt2", "vit", "t5"])
def test_gradient_checkpointing_sums_the_layers_gradients_alike(name):
    model = merged_model(name)
    inputs, model = tiny_inputs(model), model.train()
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients(model, inputs)
    assert plain.keys() == checkpointed.keys()
    for gradient in plain:
        torch.testing.assert_close(checkpointed[gradient], plain[gradient])


def test_gradient_of_a_shared_weight_is_the_sum_over_its_layers():
    model = merged_model("llama")
    inputs = tiny_inputs(model)
    shared, separate = gradients(model, inputs), gradients(ff.expand_(copy.deepcopy(model)), inputs)
    for weight in ("gate_proj", "up_proj", "down_proj"):
        parts = [separate[f"model.layers.{i}.mlp.{weight}.weight"] for i in (1, 2, 3)]
        torch.testing.assert_close(shared[f"model.layers.1.mlp.{weight}.weight"], sum(parts))


@pytest.mark.parametrize("name, backend", [("gpt2", "eager"), ("vit", "aot_eager")])
def test_compile(name, backend):
    model = merged_model(name)
    inputs = tiny_inputs(model)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))


def test_resized_vocabulary_is_saved(tmp_path):
    model = merged_model("gpt2")
    inputs, tied = tiny_inputs(model), tied_modules(model)
    model.resize_token_embeddings(70)
    ff.save_pretrained(model, tmp_path / "folder")
    ff.verify(tmp_path / "folder")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert loaded.get_input_embeddings().weight.shape[0] == 70
    assert_tied(loaded, tied)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("trusted", [None, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_merged_base_takes_another_head(name, trusted, tmp_path):
    model = merged_model(name)
    ff.save_pretrained(model, tmp_path / "folder")
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "folder", num_labels=3, output_loading_info=True, trust_remote_code=trusted
    )
    assert type(loaded).__name__.startswith("FFMerged") and type(loaded).__name__.endswith("ForSequenceClassification")
    assert_tied(loaded, tied_modules(model))
    base, weights = loaded.base_model.state_dict(), model.base_model.state_dict()
    assert {k for k in base if k not in weights} <= {"pooler.dense.weight", "pooler.dense.bias"}  # BERT's head's
    assert all(torch.equal(base[k], weights[k]) for k in weights)
    assert all(k.startswith(("score", "classifier", "bert.pooler")) for k in info["missing_keys"])
    loaded.config.pad_token_id = 1
    loaded.save_pretrained(tmp_path / "head")
    again = ff.from_pretrained(tmp_path / "head")
    assert type(again) is type(ff.from_pretrained(tmp_path / "head")) and again.num_labels == 3
    assert_tied(again, tied_modules(model))


def test_headless_auto_model_and_from_config(tmp_path):
    model = merged_model("gpt2")
    inputs = {"input_ids": tiny_inputs(model)["input_ids"]}
    ff.save_pretrained(model, tmp_path / "folder")
    base = transformers.AutoModel.from_pretrained(tmp_path / "folder").eval()
    assert type(base).__name__ == "FFMergedGPT2Model"
    with torch.no_grad():
        assert torch.equal(base(**inputs)[0], model.transformer(**inputs)[0])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
    assert_tied(transformers.AutoModelForCausalLM.from_config(config), tied_modules(model))


def test_several_groups_and_a_late_anchor_are_stored_under_the_lowest_layers(tmp_path):
    model = tiny_model("llama", layers=6)
    plan = ff.plan(layers="0+2+5,1+4", anchor="last", method="random", model=model)
    ff.save_pretrained(ff.merge_(model, plan), tmp_path / "folder")
    stored = {n.split(".")[2] for n in stored_names(tmp_path / "folder") if ".mlp." in n}
    assert stored == {"0", "1", "3"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert ff.shared_groups(loaded) == [("decoder", (0, 2, 5)), ("decoder", (1, 4))]
    assert torch.equal(logits(loaded, tiny_inputs(model)), logits(model, tiny_inputs(model)))


def stored_names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_a_family_registered_later_loads_with_no_flag(tmp_path):
    ff.register_family("biogpt", ff.FFNSpec("layers", "fc1", "fc2", activation="activation_fn"))
    config = transformers.BioGptConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40,
    )  # fmt: skip
    model = transformers.BioGptForCausalLM(config).eval()
    ff.merge_(model, ff.plan(layers="1-2", method="random", model=model))
    ff.save_pretrained(model, tmp_path / "folder")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert ff.shared_groups(loaded) == [("decoder", (1, 2))]
    assert torch.equal(logits(loaded, tiny_inputs(model)), logits(model, tiny_inputs(model)))


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, ffmerge_fast; sys.exit('transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_a_class_of_ones_own_is_merged_in_memory_and_saved_expanded_only(tmp_path):
    class Mine(transformers.GPT2LMHeadModel):
        pass

    model = Mine(tiny_model("gpt2").config).eval()
    with pytest.warns(UserWarning, match="Mine is not a class of transformers itself"):
        ff.merge_(model, ff.plan(layers="1-2", method="random", model=model))
    assert ff.is_merged(model) and type(model.config) is transformers.GPT2Config
    with pytest.raises(ff.FFMergeError, match="Mine is merged in memory only.*expand_"):
        ff.save_pretrained(model, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
    ff.save_pretrained(ff.expand_(model), tmp_path / "folder")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "folder").eval()
    assert torch.equal(logits(loaded, tiny_inputs(model)), logits(model, tiny_inputs(model)))
