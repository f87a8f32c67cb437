"""What was written is read back before it gets its name: headers, ties, hashes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffmerge_fast as ff
from ffmerge_fast.checkpoint import folder as folder_module
from tests.helpers.tiny_models import ALL, tiny_model


def merged(name="gpt2"):
    model = tiny_model(name)
    return ff.merge_(model, ff.plan(layers="1-3", method="random", model=model))


@pytest.mark.parametrize("name", ALL)
def test_what_every_family_writes_is_the_model(name, tmp_path, monkeypatch):
    """Not passed by for want of something to compare: each shared weight is found in the files by its name."""
    from ffmerge_fast.checkpoint import written

    read, digest = [], written.digest
    monkeypatch.setattr(written, "digest", lambda t: read.append(t) or digest(t))
    for stage, model in (("merged", merged(name)), ("whole", tiny_model(name))):
        read.clear()
        ff.save_pretrained(model, tmp_path / stage)
        manifest = json.loads((tmp_path / stage / "ffmerge.json").read_text())
        assert len(read) == len(manifest["shared"]) and bool(read) == (stage == "merged")


def change_weights(change):
    def damage(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return damage


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["ffmerge"]["groups"][0]["layers"] = [0, 1]
    (folder / "config.json").write_text(json.dumps(config))


UP, OTHER = "transformer.h.1.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_weights(lambda t: t.pop(OTHER)), r"lack 1 tensors, the first of shape \[16, 32\]"),
        (change_weights(lambda t: t.update({OTHER: t[OTHER].half()})), "1 tensors.*float(16|32)"),
        (change_weights(lambda t: t.update({OTHER: t[OTHER][:-1].clone()})), r"1 tensors.*\[1[56], 32\]"),
        (change_weights(lambda t: t.update(twice=t[UP].clone())), "have too many 1 tensors"),
        (change_weights(lambda t: t[UP].view(-1)[7:8].add_(1e-6)), f"{UP} has other values"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "lack .* tensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lack .* tensors"),
        (change_config, "config.json groups other layers"),
    ],
)
def test_a_writer_that_wrote_something_else_leaves_nothing(damage, message, tmp_path, monkeypatch):
    """As with adapters, where save_pretrained writes these only; the folder that was there stays."""
    model, write = merged(), folder_module.write_sealed_json
    ff.save_pretrained(model, tmp_path / "old")
    before = (tmp_path / "old" / "model.safetensors").read_bytes()

    def damaging(path, value, **options):
        write(path, value, **options)
        damage(path.parent)

    monkeypatch.setattr(folder_module, "write_sealed_json", damaging)
    for name, options in (("new", {}), ("old", {"overwrite": True})):
        with pytest.raises(ff.FFMergeError, match=f"^folder: .*{message}.*nothing was kept") as error:
            ff.save_pretrained(model, tmp_path / name, **options)
        assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == before


def test_several_files_and_low_precision(tmp_path):
    model = merged("llama").to(torch.bfloat16)
    ff.save_pretrained(model, tmp_path / "m", max_shard_size="8KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert ff.verify(tmp_path / "m")["groups"] == [{"stack": "decoder", "layers": [1, 2, 3]}]


def test_an_invalid_generation_config_is_said_and_nothing_is_left(tmp_path):
    model = tiny_model("gpt2")
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.5
    with pytest.raises(ff.FFMergeError, match="model.generation_config cannot be saved .*correct it"):
        ff.save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
