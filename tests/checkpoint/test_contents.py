"""What a folder may hold: one whole model, in files of its own, of which nothing is dropped."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffmerge_fast as ff
from ffmerge_fast.checkpoint.trusted import load_processor
from ffmerge_fast.cli.main import main
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("saved"), tiny_model("gpt2")
    model.generation_config.update(do_sample=True, top_k=7)
    model.save_pretrained(root / "stock")
    model.save_pretrained(root / "many", max_shard_size="10KB")
    tokenizer().save_pretrained(root / "stock")
    ff.merge_(model, ff.plan(layers="1-3", method="random", model=model))
    ff.save_pretrained(model, root / "merged", tokenizer())
    return root


@pytest.fixture
def copied(saved, tmp_path):
    return lambda name: shutil.copytree(saved / name, tmp_path / name)


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="b")


def edit(file, change) -> None:
    values = json.loads(file.read_text())
    values.pop("checksum", None)  # of ffmerge.json, as older versions wrote it
    change(values)
    file.write_text(json.dumps(values))


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(ff.FFMergeError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- nothing is dropped


@pytest.mark.parametrize("layers", [0, 2, 3])
def test_config_with_fewer_layers(layers, copied):
    folder = copied("stock")
    edit(folder / "config.json", lambda config: config.update(n_layer=layers))
    message = refusal(ff.from_pretrained, folder)  # 12 a layer; the class declares that it ignores *attn.bias
    assert "has weights that GPT2LMHeadModel has no place for, transformer.h." in message
    assert f"and {11 * (4 - layers) - 1} more" in message


def test_weights_without_a_place_are_dropped_by_name_only(copied):
    folder = copied("stock")
    more = {"v_head.summary.weight": torch.ones(1, 16), "mtp.layers.0.weight": torch.ones(4, 4)}
    change_tensors(folder, lambda tensors: tensors.update(more))
    assert "mtp.layers.0.weight and 1 more" in refusal(ff.from_pretrained, folder)
    assert "v_head.summary.weight and 0 more" in refusal(ff.from_pretrained, folder, leave_out=["mtp.*"])
    loaded = ff.from_pretrained(folder, leave_out=["mtp.*", "v_head.*"]).eval()
    assert torch.equal(logits(loaded, tiny_inputs(loaded)), logits(tiny_model("gpt2"), tiny_inputs(loaded)))
    export = ["export", str(folder), str(folder.with_name("out")), "-q"]
    assert main(export) == 1 and not folder.with_name("out").exists()
    assert main([*export, "--leave-out", "mtp.*", "--leave-out", "v_head.*"]) == 0


@pytest.mark.parametrize("name", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias", "h.2.attn.bias"])
def test_masks_of_older_checkpoints_are_no_weights(name, copied):
    folder = copied("stock")
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(1, 1, 8, 8, dtype=torch.uint8)}))
    ff.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_whole_numbers_are_no_weights(dtype, copied):
    folder, name = copied("stock"), "transformer.h.1.mlp.c_fc.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert f"{name} holds whole numbers, wanted float32" in refusal(ff.from_pretrained, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert f"{name} holds whole numbers, wanted float32" in refusal(ff.from_pretrained, folder)


def test_whole_numbers_in_a_plain_module(tmp_path):
    model = tiny_model("sequential")
    model.register_buffer("steps", torch.tensor([3]))
    ff.save_pretrained(model, tmp_path)
    fresh = tiny_model("sequential", seed=1)
    fresh.register_buffer("steps", torch.tensor([0]))
    assert ff.from_pretrained(tmp_path, fresh).steps == 3
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"0.ffn.0.weight": tensors["0.ffn.0.weight"].int()}, tmp_path / "model.safetensors")
    assert "0.ffn.0.weight is torch.int32, wanted torch.float32" in refusal(
        ff.from_pretrained, tmp_path, fresh, check=False
    )


# ----------------------------------------------------------------------------------------------------- files of its own


def test_adapter_beside_weights(copied):
    folder = copied("stock")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in ("adapter_model.safetensors", "model.safetensors"):  # beside the model, and alone
        shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
        assert "holds an adapter (adapter_config.json), wanted a whole model" in refusal(ff.from_pretrained, folder)
        (folder / name).unlink()


@pytest.mark.parametrize("outside", ["../stock/model.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "", 3])
def test_index_that_names_files_outside(outside, copied):
    copied("stock")
    folder = copied("many")
    index = folder / "model.safetensors.index.json"
    edit(index, lambda values: values["weight_map"].update({"transformer.wte.weight": outside}))
    message = refusal(ff.from_pretrained, folder)
    assert str(index) in message and ("wanted a file of its folder" in message or "has no weight_map" in message)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "more.safetensors"])
def test_named_pipes_and_devices(name, copied):
    folder = copied("stock")
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        for read in (ff.from_pretrained, load_processor):
            assert f"{folder / name} is a pipe, socket or device, wanted a file" in refusal(read, folder)


@pytest.mark.parametrize(
    "pattern", ["h.{i:>99999999999}.mlp", "h.{i.__class__}.mlp", "h.{i}.mlp.{i}", "{0}", "h.1.mlp", "h.{i}.", "h..{i}"]
)
def test_group_patterns_are_paths_and_nothing_else(pattern, copied):
    folder = copied("merged")
    edit(folder / "config.json", lambda config: config["ffmerge"]["groups"][0].update(modules=[pattern]))
    message = refusal(ff.from_pretrained, folder, check=False)
    assert f"got the path {pattern!r}, wanted one like 'h.{{i}}.mlp'" in message


# ------------------------------------------------------------------------------------------- configs and tokenizers


EDITS = {
    "config.json": [
        lambda c: c["ffmerge"]["groups"][0].update(layers=[1, 2]),
        lambda c: c.update(activation_function="relu"),
        lambda c: c.update(layer_norm_epsilon=1e-3),
        lambda c: c.update(n_head=4),
        lambda c: c.pop("scale_attn_weights"),
    ],
    "generation_config.json": [lambda c: c.update(top_k=1), lambda c: c.pop("top_k")],
    "tokenizer.json": [lambda t: t["model"]["vocab"].update(a=2, b=1), lambda t: t.update(pre_tokenizer=None)],
    "tokenizer_config.json": [lambda c: c.update(eos_token="a")],
}


@pytest.mark.parametrize(("name", "i"), [(name, i) for name, edits in EDITS.items() for i in range(len(edits))])
def test_edits_are_found(name, i, copied):
    folder = copied("merged")
    edit(folder / name, EDITS[name][i])
    for load in (ff.verify, ff.from_pretrained, load_processor):
        assert f"{folder / name} is not what was saved" in refusal(load, folder)
    edit(folder / "ffmerge.json", lambda manifest: manifest.pop("parsed"))  # as older versions wrote it
    load_processor(folder)


def test_what_a_save_changes_is_no_edit(copied):
    folder = copied("merged")
    ff.from_pretrained(folder).save_pretrained(folder)
    load_processor(folder).save_pretrained(folder)
    ff.verify(folder)
    again = {"transformers_version": "4.57.1", "_name_or_path": "elsewhere", "torch_dtype": "float32"}
    edit(folder / "config.json", lambda config: config.pop("dtype", None))
    edit(folder / "config.json", lambda config: config.update(again))
    edit(folder / "generation_config.json", lambda config: config.update(transformers_version="4.57.1"))
    text = json.dumps(dict(reversed(json.loads((folder / "config.json").read_text()).items())), indent=7)
    (folder / "config.json").write_text(text)
    ff.verify(folder)
    edit(folder / "config.json", lambda config: config.update(torch_dtype="float16"))
    assert "config.json is not what was saved" in refusal(ff.verify, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "list", "bytes"])
def test_damaged_tokenizer_or_generation_config(name, damage, copied, capsys):
    folder = copied("stock")
    text = (folder / name).read_bytes()
    (folder / name).write_bytes(
        {"cut": text[: len(text) // 2], "empty": b"", "list": b"[]", "bytes": b"\xff\x80"}[damage]
    )
    assert main(["export", str(folder), str(folder.with_name("out"))]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / name} cannot be read") and error.count("\n") == 1
    assert not folder.with_name("out").exists()


@pytest.mark.parametrize("content", [{}, {"version": "1.0"}, {"model": {"type": "WordLevel"}}])
def test_tokenizer_that_is_none(content, copied):
    folder = copied("stock")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    message = refusal(load_processor, folder)
    assert f"{folder}: its tokenizer (tokenizer.json, tokenizer_config.json) cannot be loaded" in message
    assert "or remove them" in message


def test_a_model_without_a_tokenizer_says_so_once(copied, capsys):
    folder = copied("stock")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    assert load_processor(folder) is None
    assert main(["export", str(folder), str(folder.with_name("out"))]) == 0
    assert capsys.readouterr().err == (
        f"warning: {folder} holds no tokenizer or image processor, nor does {folder.with_name('out')}\n"
    )
