"""Damaged, foreign and missing folders: each is refused with one line that says what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffmerge_fast as ff
from tests.helpers.tiny_models import FAMILIES, tiny_model


def merged_model(name: str, layers: str = "1-3"):
    model = tiny_model(name)
    return ff.merge_(model, ff.plan(layers=layers, method="random", model=model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    ff.save_pretrained(merged_model("gpt2"), root / "one")
    ff.save_pretrained(merged_model("gpt2"), root / "many", max_shard_size="10KB")
    ff.save_pretrained(tiny_model("gpt2"), root / "unmerged")
    return root


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "one", tmp_path / "folder")


@pytest.fixture
def sharded(saved, tmp_path):
    return shutil.copytree(saved / "many", tmp_path / "sharded")


def edit(file, change) -> None:
    values = json.loads(file.read_text())
    values.pop("checksum", None)  # of ffmerge.json, as older versions wrote it
    change(values)
    file.write_text(json.dumps(values))


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(ff.FFMergeError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def assert_refused(folder, *words: str) -> None:
    """By `verify` and by `from_pretrained`."""
    for function in (ff.verify, ff.from_pretrained):
        message = refusal(function, folder)
        assert all(word in message for word in words), message


# --------------------------------------------------------------------------------------------------------- good folders


@pytest.mark.parametrize("name", FAMILIES)
def test_good_folder(name, tmp_path):
    model = merged_model(name)
    ff.save_pretrained(model, tmp_path / "folder")
    found = ff.verify(tmp_path / "folder")
    assert found["groups"] == [{"stack": stack, "layers": [1, 2, 3]} for stack in FAMILIES[name].stacks]
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["bytes"] == (tmp_path / "folder" / "model.safetensors").stat().st_size
    assert found["logit_difference"] == 0.0


def test_good_sharded_and_unmerged_folders(saved):
    assert ff.verify(saved / "many")["logit_difference"] == 0.0
    assert ff.verify(saved / "unmerged") | {"groups": []} == ff.verify(saved / "unmerged")


def test_verify_needs_our_manifest(folder):
    (folder / "ffmerge.json").unlink()
    assert "has no ffmerge.json" in refusal(ff.verify, folder)
    assert ff.is_merged(ff.from_pretrained(folder))


# -------------------------------------------------------------------------------------------------------------- weights


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(folder, str(file), "damaged or cut off")


@pytest.mark.parametrize("size", [0, 5, 200])
def test_file_cut_within_its_header(size, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert_refused(folder, str(file), "damaged or cut off")


@pytest.mark.parametrize("position", [-1, -5000, 40])
def test_flipped_bit(position, folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    assert_refused(folder, str(file))


def test_deleted_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(sharded, str(shard), "is missing")


def test_exchanged_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    first.rename(sharded / "t")
    second.rename(first)
    (sharded / "t").rename(second)
    assert_refused(sharded, str(first), "not what was saved")


@pytest.mark.parametrize("damage", ["deleted", "garbled", "pointing nowhere"])
def test_index_of_shards(damage, sharded):
    index = sharded / "model.safetensors.index.json"
    if damage == "deleted":
        index.unlink()
    elif damage == "garbled":
        index.write_text(index.read_text()[:50])
    else:
        edit(index, lambda i: i["weight_map"].update({"transformer.wte.weight": "model-nowhere.safetensors"}))
    assert_refused(sharded, str(sharded))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, str(folder), "holds no weights")


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"])
def test_missing_tensor_is_never_random(name, folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_refused(folder, "model.safetensors is not what was saved")
    (folder / "ffmerge.json").unlink()
    message = refusal(ff.from_pretrained, folder)
    assert "lacks weights of FFMergedGPT2LMHeadModel" in message and "at random" in message


def test_tensor_of_another_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(16, 48)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "ffmerge.json").unlink()
    assert "transformer.h.1.mlp.c_fc.weight and 0 more" in refusal(ff.from_pretrained, folder)


def test_weights_of_another_model(folder, tmp_path):
    ff.save_pretrained(merged_model("gpt2", layers="0-2"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")
    assert_refused(folder, "model.safetensors is not what was saved")


# -------------------------------------------------------------------------------------------------- config and manifest


def groups(config: dict) -> dict:
    return config["ffmerge"]["groups"][0]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: groups(c).update(layers=[0, 1, 2, 3]), "layers"),  # too many
        (lambda c: groups(c).update(layers=[1, 2]), "lacks weights"),  # too few
        (lambda c: groups(c).update(layers=[0, 2, 3]), "share FFNs"),  # others
        (lambda c: groups(c).update(layers=[1, 2, 9]), "cannot be loaded"),
        (lambda c: groups(c).update(modules=["h.{i}.nothing"]), "nothing`: these shared FFNs were saved with"),
        (lambda c: c.pop("ffmerge"), "ffmerge"),
        (lambda c: c.update(activation_function="relu"), "logits differ"),
        (lambda c: c.update(n_inner=48), "has other shapes of FFMergedGPT2LMHeadModel, transformer.h.0.mlp.c_fc.bias"),
        (lambda c: c.update(n_layer=5), "lacks weights"),
        (lambda c: c.update(architectures=["Nonsense"]), "Nonsense"),
        (lambda c: c.update(architectures=[]), "architecture"),
        (lambda c: c.update(architectures=["FFMergedNonsense"]), "FFMergedNonsense"),
        (
            lambda c: c.update(model_type="ffmerge_nonsense"),
            "family 'nonsense' is not known here",
        ),
        (lambda c: c.update(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "layers share FFNs here"),
    ],
)
def test_edited_config(change, words, folder):
    """Found by its hash; where an older version wrote none, by what it does."""
    edit(folder / "config.json", change)
    assert_refused(folder, str(folder / "config.json"), "is not what was saved")
    edit(folder / "ffmerge.json", lambda manifest: manifest.pop("parsed"))
    assert words in refusal(ff.verify, folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\x01"])
def test_garbled_config(text, folder):
    (folder / "config.json").write_text(text)
    assert_refused(folder, str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\x00"])
def test_garbled_manifest(text, folder):
    (folder / "ffmerge.json").write_text(text)
    assert_refused(folder, "ffmerge.json cannot be read")
    assert ff.is_merged(ff.from_pretrained(folder, check=False))


def test_manifest_that_is_no_text(folder):
    (folder / "ffmerge.json").write_bytes(b"\xff\xfe\x80")
    assert_refused(folder, "ffmerge.json cannot be read")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m["files"].update({"model.safetensors": "0" * 64}), "model.safetensors is not what was saved"),
        (lambda m: m["files"].update({"more.safetensors": "0" * 64}), "more.safetensors is missing"),
        (lambda m: m["shared"].update(dict.fromkeys(m["shared"], "0" * 64)), "shared tensors differ"),
        (lambda m: m["shared"].update({"transformer.h.2.mlp.c_fc.weight": "0" * 64}), "h.2.mlp.c_fc.weight is not"),
        (lambda m: m["groups"][0].update(layers=[1, 2]), "share FFNs"),
        (lambda m: m.update(groups=[]), "share FFNs"),
        (lambda m: m["reference"].update(logits=[v + 1 for v in m["reference"]["logits"]]), "logits differ by 1"),
        (lambda m: m["reference"].update(logits=[0.0]), "logits differ"),
        (lambda m: m["reference"].update(logits="many"), "cannot be read"),
        (lambda m: m["reference"].pop("logits"), "cannot be read"),
        (lambda m: m.update(groups=[1]), "cannot be read"),
        (lambda m: m.update(files=[]), "cannot be read"),
        (lambda m: m["files"].update({"/dev/zero": "0" * 64}), "'/dev/zero', which is no file of this folder"),
        (lambda m: m["parsed"].update({"../config.json": "0" * 64}), "'../config.json', which is no file"),
        (lambda m: m.update(version=99), "update"),
    ],
)
def test_edited_manifest(change, words, folder):
    edit(folder / "ffmerge.json", change)
    assert words in refusal(ff.verify, folder)


def test_travelling_code_belongs_to_the_folder(folder):
    code = folder / "modeling_ffmerge.py"
    text = code.read_text()
    code.write_text(text + "# edited\n")
    assert_refused(folder, str(code), "not what was saved")
    code.unlink()
    assert_refused(folder, str(code), "is missing")
    code.write_text(text)
    ff.verify(folder)


# ------------------------------------------------------------------------------------------------------- not our folder


def test_missing_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FFMERGE_ONLINE", raising=False)
    assert_refused(tmp_path / "nowhere", "nowhere is not a folder")
    assert "check the path" in refusal(ff.from_pretrained, tmp_path / "nowhere")


def test_hub_id_offline(monkeypatch):
    monkeypatch.delenv("FFMERGE_ONLINE", raising=False)
    message = refusal(ff.from_pretrained, "openai-community/gpt2")
    assert "not a folder" in message and "--online" in message and "FFMERGE_ONLINE=1" in message


def test_a_path_is_never_looked_up_online(tmp_path, monkeypatch):
    monkeypatch.setenv("FFMERGE_ONLINE", "1")
    for path in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        message = refusal(ff.from_pretrained, path)
        assert "is not a folder; check the path" in message and "--online" not in message


def test_file_instead_of_a_folder(folder):
    assert_refused(folder / "model.safetensors", "is not a folder")


@pytest.mark.parametrize("files", [[], ["config.json"], ["config.json", "ffmerge.json"]])
def test_folder_without_weights(files, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in files:
        shutil.copy(folder / name, tmp_path / "empty" / name)
    assert "holds no weights" in refusal(ff.from_pretrained, tmp_path / "empty")


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert_refused(folder, str(folder / "config.json"), "is missing")
    edit(folder / "ffmerge.json", lambda manifest: manifest.pop("parsed"))
    assert_refused(folder, "no config.json")
