"""What a batch can be, and what is said of one that the model cannot run."""

import pytest
import torch
from torch.nn.utils import prune

import ffmerge_fast as ff
from tests.helpers.tiny_models import VOCABULARY, tiny_model

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"input_ids": torch.tensor([[5, VOCABULARY]])}], f"input_ids: got token {VOCABULARY}, wanted one"),
        ([torch.tensor([[5, -1]])], "input_ids: got token -1, wanted one of the model's"),
        ([{"input_ids": [[5, 6]]}], "got lists for input_ids, wanted tensors"),
        ({"input_ids": torch.ones(2, 8, dtype=torch.long)}, "batches: got one dict, wanted an iterable"),
        (torch.ones(2, 8, dtype=torch.long), "batches: got one Tensor, wanted an iterable"),
        ([torch.ones(2, 400, dtype=torch.long)], r"the model fails on a batch of 0 \[2, 400\] \(IndexError"),
    ],
)  # fmt: skip
def test_batches_that_cannot_run(batches, message):
    with pytest.raises(ff.FFMergeError, match=message):
        ff.collect(tiny_model("gpt2"), batches, window=2)


def test_weights_that_are_not_there():
    with pytest.raises(ff.FFMergeError, match="is not in memory .*load the model without device_map"):
        ff.collect(tiny_model("llama").to("meta"), [], window=2)


def test_masks_of_pruning():
    model = tiny_model("llama")
    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5)
    with pytest.raises(ff.FFMergeError, match=r"layers.1.mlp.up_proj is masked .*prune.remove"):
        ff.find_ffns(model)


def test_float8():
    model = tiny_model("llama")
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ff.FFMergeError, match="is quantised"):
        ff.find_ffns(model)


def test_tied_by_hand(tmp_path):
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ff.FFMergeError, match="weights that are one tensor"):
        ff.save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointers_of_git_lfs(tmp_path, name):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ff.FFMergeError, match="is a pointer of git LFS, .*git lfs pull"):
        ff.from_pretrained(tmp_path)


def test_max_shard_size(tmp_path):
    with pytest.raises(ff.FFMergeError, match="max_shard_size: got 'much', want a number of bytes"):
        ff.save_pretrained(tiny_model("llama"), tmp_path / "out", max_shard_size="much")
    ff.save_pretrained(tiny_model("llama"), tmp_path / "out", max_shard_size="20kB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
