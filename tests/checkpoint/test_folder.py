"""What is on disk: every shared weight once, complete or absent, and back to a stock checkpoint."""

import errno
import json
import os

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import ffmerge_fast as ff
from ffmerge_fast.checkpoint import folder
from ffmerge_fast.support import files
from ffmerge_fast.support.files import new_folder
from tests.helpers.tiny_models import FAMILIES, PLAIN, logits, tiny_inputs, tiny_model

LAYERS = (1, 2, 3)  # of 4, in every stack


def merged_model(name: str) -> nn.Module:
    model = tiny_model(name)
    return ff.merge_(model, ff.plan(layers="1-3", method="random", model=model))


def tensors(folder) -> dict[str, int]:
    """{name: bytes} of every stored tensor, from the headers of the safetensors files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name in header.keys() - {"__metadata__"}:
            assert name not in found, f"{name} is stored twice"
            first, end = header[name]["data_offsets"]
            found[name] = end - first
    return found


def ffn_names(model: nn.Module, layer: int) -> set[str]:
    """Names of the FFN parameters of one layer index, in every stack."""
    paths = [path for ffn in ff.find_ffns(model) if ffn.index == layer for path in ffn.shared]
    return {f"{path}.{name}" for path in paths for name, _ in model.get_submodule(path).named_parameters()}


# ------------------------------------------------------------------------------------------------------ bytes on disk


@pytest.mark.parametrize("name", FAMILIES)
def test_file_shrinks_by_exactly_the_removed_ffns(name, tmp_path):
    model, family = tiny_model(name), FAMILIES[name]
    ff.save_pretrained(model, tmp_path / "full")
    plan = ff.plan(layers="1-3", method="random", model=model)
    before, size = tensors(tmp_path / "full"), sum(p.numel() for p in model.parameters())
    ff.save_pretrained(ff.merge_(model, plan), tmp_path / "merged")
    after = tensors(tmp_path / "merged")
    removed = 2 * family.parameters * len(family.stacks)  # two of three FFNs, in every stack
    assert sum(before.values()) - sum(after.values()) == 4 * removed
    assert size - sum(p.numel() for p in model.parameters()) == removed == plan.model.parameters - plan.parameters_after
    assert ffn_names(model, 1) <= after.keys()
    if name not in ("vit", "deit", "gpt_neox"):  # transformers 5 saves their stock classes under older names
        assert before.keys() - after.keys() == ffn_names(model, 2) | ffn_names(model, 3)
        assert after.keys() <= before.keys()


def test_bf16_folder_is_half_as_large(tmp_path):
    model = merged_model("llama")
    ff.save_pretrained(model, tmp_path / "fp32")
    ff.save_pretrained(model.to(torch.bfloat16), tmp_path / "bf16")
    fp32, bf16 = tensors(tmp_path / "fp32"), tensors(tmp_path / "bf16")
    assert {name: 2 * size for name, size in bf16.items()} == fp32
    ff.verify(tmp_path / "bf16")  # although .to() rounded Llama's rotary frequencies, and loading does not


def test_whisper_and_vit_are_saved_in_bf16(tmp_path):
    for name in ("whisper", "vit"):
        ff.save_pretrained(merged_model(name).to(torch.bfloat16), tmp_path / name)
        assert ff.verify(tmp_path / name)["logit_difference"] == 0.0


def test_shards_hold_every_tensor_once_and_load(tmp_path):
    model = merged_model("t5-gated")
    ff.save_pretrained(model, tmp_path / "one")
    ff.save_pretrained(model, tmp_path / "many", max_shard_size="20KB")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 24_000 for shard in shards)
    assert tensors(tmp_path / "many") == tensors(tmp_path / "one")
    ff.verify(tmp_path / "many")
    loaded = ff.from_pretrained(tmp_path / "many").eval()
    assert ff.shared_groups(loaded) == [("encoder", LAYERS), ("decoder", LAYERS)]
    assert torch.equal(logits(loaded, tiny_inputs(model)), logits(model, tiny_inputs(model)))


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = merged_model("gpt2").train()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.transformer.h[0].eval()
    ff.save_pretrained(model, tmp_path / "folder")
    assert model.training and not model.transformer.h[0].training and model.transformer.h[1].mlp.training
    assert model.transformer.h[3].mlp is model.transformer.h[1].mlp
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())


def test_extras_and_processor_are_saved_along(tmp_path):
    class Processor:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    ff.save_pretrained(merged_model("gpt2"), tmp_path / "folder", Processor(), extras={"plan.json": "{}"})
    assert (tmp_path / "folder" / "tokenizer.json").exists()
    assert (tmp_path / "folder" / "_ffmerge" / "plan.json").read_text() == "{}"
    (tmp_path / "folder" / "_ffmerge" / "plan.json").unlink()  # may be deleted
    ff.verify(tmp_path / "folder")


# ------------------------------------------------------------------------------------------------------------- expand


@pytest.mark.parametrize("name", FAMILIES)
def test_expanded_folder_is_a_stock_checkpoint_with_equal_logits(name, tmp_path):
    import transformers

    model = tiny_model(name)
    inputs = tiny_inputs(model)
    logits(model, inputs)  # image classifiers note in their config that they saw labels
    ff.save_pretrained(model, tmp_path / "full")
    ff.merge_(model, ff.plan(layers="1-3", method="random", model=model))
    expected = logits(model, inputs)
    ff.save_pretrained(model, tmp_path / "merged")
    expanded = ff.expand_(ff.from_pretrained(tmp_path / "merged"))
    assert not ff.is_merged(expanded)
    expanded.save_pretrained(tmp_path / "stock")
    assert tensors(tmp_path / "stock") == tensors(tmp_path / "full")
    full, stock = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("full", "stock"))
    assert stock == full
    assert "ffmerge" not in (tmp_path / "stock" / "config.json").read_text().lower()
    assert not list((tmp_path / "stock").glob("*.py"))
    loaded, info = getattr(transformers, FAMILIES[name].model).from_pretrained(
        tmp_path / "stock", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded.eval(), inputs), expected)


def test_expanded_model_can_be_merged_again(tmp_path):
    model = ff.expand_(merged_model("vit"))
    ff.merge_(model, ff.plan(layers="0-1", method="random", model=model))
    ff.save_pretrained(model, tmp_path / "folder")
    assert ff.verify(tmp_path / "folder")["groups"] == [{"stack": "encoder", "layers": [0, 1]}]


# ------------------------------------------------------------------------------------------------------- plain modules


@pytest.mark.parametrize("name", PLAIN)
def test_plain_module_is_saved_small_and_filled_again(name, tmp_path):
    model = merged_model(name)
    inputs = tiny_inputs(model)
    ff.save_pretrained(model, tmp_path / "folder")
    stored = sum(tensors(tmp_path / "folder").values())
    assert stored == sum(p.nbytes for p in model.parameters())
    fresh = tiny_model(name, seed=1)
    assert ff.from_pretrained(tmp_path / "folder", model=fresh) is fresh
    assert ff.shared_groups(fresh) == ff.shared_groups(model)
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))
    checked = ff.verify(tmp_path / "folder", model=tiny_model(name, seed=2))
    assert checked["bytes"] >= stored and checked["logit_difference"] is None


def test_unmerged_plain_module(tmp_path):
    model = tiny_model("sequential")
    ff.save_pretrained(model, tmp_path / "folder")
    fresh = ff.from_pretrained(tmp_path / "folder", model=tiny_model("sequential", seed=1))
    assert not ff.is_merged(fresh)
    assert torch.equal(logits(fresh, tiny_inputs(model)), logits(model, tiny_inputs(model)))


@pytest.mark.parametrize("layers", [3, 5])
def test_plain_folder_does_not_fit_another_model(layers, tmp_path):
    ff.save_pretrained(merged_model("sequential"), tmp_path / "folder")
    other = tiny_model("sequential", layers=layers)
    with pytest.raises(ff.FFMergeError, match="does not fit this Sequential: names or shapes differ"):
        ff.from_pretrained(tmp_path / "folder", model=other)
    assert not ff.is_merged(other)


def test_plain_folder_without_a_model_asks_for_one(tmp_path):
    ff.save_pretrained(merged_model("sequential"), tmp_path / "folder")
    with pytest.raises(ff.FFMergeError, match="model="):
        ff.from_pretrained(tmp_path / "folder")


# ---------------------------------------------------------------------------------------------------- low-rank deltas


def with_deltas(name: str, rank: int = 3) -> tuple[nn.Module, nn.Module]:
    """A merged model whose layers 1 to 3 have deltas, and the original."""
    teacher = tiny_model(name)
    model = ff.merge(teacher, ff.plan(layers="1-3", method="average", model=teacher))
    batches = [tiny_inputs(teacher, batch=4, seed=seed) for seed in range(3)]
    ff.local_distill_(model, teacher, batches, steps=5, delta_rank=rank)
    return model, teacher


@pytest.mark.parametrize("name", FAMILIES)
def test_deltas_cost_their_bytes_and_load_bit_equal(name, tmp_path):
    model, teacher = with_deltas(name)
    family, inputs = FAMILIES[name], tiny_inputs(model)
    ff.save_pretrained(teacher, tmp_path / "full")
    ff.save_pretrained(model, tmp_path / "folder")
    stored = tensors(tmp_path / "folder")
    deltas = {n: size for n, size in stored.items() if n.rpartition(".")[2].startswith("delta_")}
    projections = [p for f in ff.find_ffns(model) if f.index in LAYERS for p in f.projections.values()]
    assert len(deltas) == (2 + family.bias) * len(projections) and not any(".shared." in n for n in deltas)
    removed = 2 * family.parameters * len(family.stacks)
    assert sum(tensors(tmp_path / "full").values()) - sum(stored.values()) == 4 * removed - sum(deltas.values())
    assert {f"{p}.weight" for p in projections} & stored.keys() == {
        n for n in ffn_names(teacher, 1) if n.endswith("weight")
    }
    for loaded in (ff.from_pretrained(tmp_path / "folder"), ff.from_pretrained(tmp_path / "folder", dtype="float32")):
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
        assert ff.shared_groups(loaded) == ff.shared_groups(model)
        assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    checked = ff.verify(tmp_path / "folder")
    assert checked["logit_difference"] == 0.0 and {g["delta_rank"] for g in checked["groups"]} == {3}
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert {g["delta_rank"] for g in config["ffmerge"]["groups"]} == {3}
    ff.save_pretrained(loaded, tmp_path / "again")
    assert tensors(tmp_path / "again") == stored


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "marian", "t5"])
def test_expanded_deltas_are_a_stock_folder(name, tmp_path):
    model, teacher = with_deltas(name)
    ff.save_pretrained(model, tmp_path / "folder")
    expanded, inputs = ff.expand_(ff.from_pretrained(tmp_path / "folder")), tiny_inputs(model)
    expanded.save_pretrained(tmp_path / "full")
    loaded = ff.from_pretrained(tmp_path / "full")
    assert type(loaded) is type(teacher) and not hasattr(loaded.config, "ffmerge")
    assert torch.equal(logits(loaded, inputs), logits(expanded, inputs))
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), atol=1e-5, rtol=1e-5)


def test_deltas_in_a_plain_module(tmp_path):
    model, _ = with_deltas("sequential")
    inputs = tiny_inputs(model)
    ff.save_pretrained(model, tmp_path / "folder")
    assert sum(tensors(tmp_path / "folder").values()) == sum(p.nbytes for p in model.parameters())
    fresh = ff.from_pretrained(tmp_path / "folder", model=tiny_model("sequential", seed=1))
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))
    assert ff.shared_groups(fresh) == ff.shared_groups(model)
    assert ff.verify(tmp_path / "folder", model=tiny_model("sequential", seed=2))["groups"][0]["delta_rank"] == 3
    manifest = json.loads((tmp_path / "folder" / "ffmerge.json").read_text())
    manifest["groups"][0]["delta_rank"] = 2
    del manifest["checksum"]
    (tmp_path / "folder" / "ffmerge.json").write_text(json.dumps(manifest))
    with pytest.raises(ff.FFMergeError, match="does not hold the deltas or neurons that ffmerge.json names"):
        ff.from_pretrained(tmp_path / "folder", model=tiny_model("sequential", seed=1))


def test_deltas_in_bf16_and_in_shards(tmp_path):
    model, _ = with_deltas("gpt2")
    inputs = tiny_inputs(model)
    ff.save_pretrained(model.to(torch.bfloat16), tmp_path / "bf16", max_shard_size="8KB")
    assert len(list((tmp_path / "bf16").glob("*.safetensors"))) > 1
    loaded = ff.from_pretrained(tmp_path / "bf16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert ff.verify(tmp_path / "bf16")["logit_difference"] == 0.0


def test_an_edited_delta_is_found(tmp_path):
    model, _ = with_deltas("gpt2")
    ff.save_pretrained(model, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["ffmerge"]["groups"][0]["delta_rank"] = 2
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ff.FFMergeError, match="config.json is not what was saved"):
        ff.verify(tmp_path / "folder")
    with pytest.raises(ff.FFMergeError, match="has other shapes"):
        ff.from_pretrained(tmp_path / "folder", check=False)


# ----------------------------------------------------------------------------------------------------- atomic writing


def fail(error: Exception):
    def raise_it(*args, **kwargs):
        raise error

    return raise_it


def content(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


DISK_FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", DISK_FULL, ids=["OSError", "SafetensorError"])
@pytest.mark.parametrize("where", ["transformers", "plain", "manifest", "tokenizer"])
def test_full_disk_leaves_what_was_there(where, error, tmp_path, monkeypatch):
    model = merged_model("sequential" if where == "plain" else "gpt2")
    ff.save_pretrained(model, tmp_path / "old")
    before, tokenizer = content(tmp_path / "old"), None
    if where == "transformers":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail(error))
    elif where == "plain":
        monkeypatch.setattr("safetensors.torch.save_file", fail(error))
    elif where == "manifest":
        monkeypatch.setattr(folder, "describe", fail(error))
    else:
        tokenizer = type("Tokenizer", (), {"save_pretrained": fail(error)})()
    for target in ("old", "new", "deep/er/new"):
        with pytest.raises(ff.FFMergeError, match="could not be written .*No space left") as caught:
            ff.save_pretrained(model, tmp_path / target, tokenizer, overwrite=True)
        assert "\n" not in str(caught.value)
    assert content(tmp_path / "old") == before
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    model, target = merged_model("gpt2"), tmp_path / "folder"
    ff.save_pretrained(model, target)
    before, rename = content(target), type(target).rename
    monkeypatch.setattr(files, "_exchanged_at_once", lambda *folders: False)  # as on other systems

    def rename_but_not_the_new(self, to):
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", rename_but_not_the_new)
    with pytest.raises(ff.FFMergeError, match="Input/output error"):
        ff.save_pretrained(model, target, overwrite=True)
    assert content(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_any_other_error_leaves_nothing_either(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ff.save_pretrained(
            merged_model("gpt2"), tmp_path / "new", type("T", (), {"save_pretrained": fail(KeyboardInterrupt())})()
        )
    assert list(tmp_path.iterdir()) == []


def test_folder_with_content_needs_overwrite(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    ff.save_pretrained(merged_model("gpt2"), target)  # empty: taken
    before = content(target)
    with pytest.raises(ff.FFMergeError, match="exists and is not empty; .*overwrite"):
        ff.save_pretrained(merged_model("vit"), target)
    assert content(target) == before
    ff.save_pretrained(merged_model("vit"), target, overwrite=True, extras={"a.txt": "a"})
    assert type(ff.from_pretrained(target)).__name__ == "FFMergedViTForImageClassification"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    for foreign in ("notes.md", ".git/HEAD", "data/a.json", "table.csv", "config.json.orig"):
        (target / foreign).parent.mkdir(exist_ok=True)
        (target / foreign).write_text("mine")
        before = content(target)
        with pytest.raises(ff.FFMergeError, match=f"holds {foreign}, no part of a saved model"):
            ff.save_pretrained(merged_model("gpt2"), target, overwrite=True)
        assert content(target) == before and [p.name for p in tmp_path.iterdir()] == ["folder"]
        (target / foreign).unlink()
    ff.save_pretrained(merged_model("gpt2"), target, overwrite=True)
    assert type(ff.from_pretrained(target)).__name__ == "FFMergedGPT2LMHeadModel"


def test_a_folder_that_appears_meanwhile_stays(tmp_path):
    target = tmp_path / "folder"

    class Rival:  # as another process that is done first
        def save_pretrained(self, beside):
            target.mkdir()
            (target / "theirs").write_text("theirs")

    for overwrite, message in ((False, "exists and is not empty"), (True, "holds theirs, no part of a saved model")):
        with pytest.raises(ff.FFMergeError, match=message):
            ff.save_pretrained(merged_model("gpt2"), target, Rival(), overwrite=overwrite)
        assert content(target) == {"theirs": b"theirs"} and [p.name for p in tmp_path.iterdir()] == ["folder"]
        (target / "theirs").unlink()
        target.rmdir()


def test_linked_folder_is_replaced_where_it_lies(tmp_path):
    ff.save_pretrained(merged_model("gpt2"), tmp_path / "disk" / "folder")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    ff.save_pretrained(merged_model("vit"), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert type(ff.from_pretrained(tmp_path / "disk" / "folder")).__name__.startswith("FFMergedViT")


def test_relative_folders(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ff.save_pretrained(merged_model("gpt2"), "folder")
    ff.verify("folder")
    with pytest.raises(ff.FFMergeError, match="not empty"):
        ff.save_pretrained(merged_model("gpt2"), ".")


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for target, reason in (("file", "is a file"), ("file/folder", "file")):
        with pytest.raises(ff.FFMergeError, match=reason):
            ff.save_pretrained(merged_model("gpt2"), tmp_path / target, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("target", ["new", "deep/er/new", "old"])
def test_folder_without_write_permission_is_refused(target, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ff.FFMergeError, match="cannot be written: no permission in"):
        ff.save_pretrained(merged_model("gpt2"), tmp_path / target)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_process_killed_while_writing_leaves_the_old_folder(tmp_path):
    """Everything is written beside; only renames touch the old folder."""
    target = tmp_path / "folder"
    ff.save_pretrained(merged_model("gpt2"), target)
    before = content(target)
    with new_folder(target, overwrite=True) as beside:
        (beside / "half").write_text("written")
        assert beside.parent == target.parent and content(target) == before
    assert content(target) == {"half": b"written"}


def test_stored_weights_are_those_of_the_model(tmp_path):
    model = merged_model("opt")
    ff.save_pretrained(model, tmp_path / "folder")
    named = dict(model.named_parameters())  # shared ones under their first name only
    with safe_open(tmp_path / "folder" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == named.keys()
        assert all(torch.equal(file.get_tensor(name), named[name]) for name in named)
