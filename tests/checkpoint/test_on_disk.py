"""What `ffmerge inspect` reads of a folder: all that loading the model would tell, without its memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffmerge_fast as ff
from ffmerge_fast.checkpoint.copying import write_weights
from ffmerge_fast.checkpoint.on_disk import open_on_disk, summarize
from ffmerge_fast.models.elsewhere import elsewhere
from ffmerge_fast.models.summary import ModelSummary
from ffmerge_fast.support.sealed import read_sealed_json, write_sealed_json
from ffmerge_fast.support.tensor_files import WeightEntry
from tests.helpers.tiny_models import FAMILIES, tiny_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[2]
LAYERS = {"marian": "encoder:1-2,decoder:0-1"}


def check(folder, on_meta=True, **options):
    """The summary is that of the loaded model; returns the model that came with it."""
    found, model = summarize(folder, **options)
    loaded = ff.from_pretrained(folder, **options)
    assert found == ModelSummary.of(loaded)
    assert ff.shared_groups(model) == ff.shared_groups(loaded)
    assert all(weight.is_meta for weight in model.parameters()) == on_meta
    return model


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "marian", "t5"])
def test_the_same_as_in_memory(tmp_path, name, merged, dtype):
    model = tiny_model(name)
    if merged:
        ff.merge_(model, ff.plan(None, LAYERS.get(name, "encoder:1-2" if name == "t5" else "1-2"), method="average",
                                 model=model))  # fmt: skip
    ff.save_pretrained(model, tmp_path / "model")
    check(tmp_path / "model", dtype=dtype)  # transformers 5 writes a stock ViT under the names of transformers 4


def test_deltas(tmp_path):
    model, teacher = tiny_model("gpt2"), tiny_model("gpt2")
    ff.merge_(model, ff.plan(None, "1-2", method="average", model=model))
    ids = torch.randint(0, 60, (8, 32), generator=torch.Generator().manual_seed(0))
    ff.local_distill_(model, teacher, [{"input_ids": ids}], steps=3, delta_rank=2)
    ff.save_pretrained(model, tmp_path / "model")
    check(tmp_path / "model")


def test_shards_and_other_files_beside_them(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    strange = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    save_file(strange, tmp_path / "consolidated.safetensors")
    check(tmp_path)


def test_with_and_without_the_base_models_prefix(tmp_path):
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "whole")
    for folder, architecture in (("base", "GPT2LMHeadModel"), ("whole", "GPT2Model")):
        config = json.loads((tmp_path / folder / "config.json").read_text()) | {"architectures": [architecture]}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        check(tmp_path / folder)


def test_weights_in_pickles_are_loaded(tmp_path):
    model = tiny_model("gpt2")
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    check(tmp_path, on_meta=False)


def test_refuses_what_loading_refuses(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ff.FFMergeError, match="lacks weights"):
        summarize(tmp_path)


@pytest.mark.slow
def test_memory_is_not_the_models(tmp_path):
    """A model of 0.8 GB, whose file is a hole, takes less than a fifth of that more than a tiny one."""
    tiny_model("gpt2").save_pretrained(tmp_path / "tiny")
    nbytes = write_hollow_gpt2(tmp_path / "large", n_layer=12, n_embd=1024, n_head=16)
    assert nbytes > 0.8e9
    tiny, large = (peak_of_inspect(tmp_path / name) for name in ("tiny", "large"))
    assert large - tiny < 0.2 * nbytes


def write_hollow_gpt2(folder, **sizes) -> int:
    """A GPT-2 of zeros that takes no space on disk; returns its bytes."""
    config = transformers.GPT2Config(architectures=["GPT2LMHeadModel"], dtype="float32", **sizes)
    with torch.device("meta"):
        weights = transformers.GPT2Model(config).state_dict()
    config.save_pretrained(folder)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, weight in weights.items():
        begin, end = end, end + weight.nbytes
        header[f"transformer.{name}"] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def peak_of_inspect(folder) -> int:
    """The most bytes of memory that `ffmerge inspect` had."""
    command = [sys.executable, "-m", "ffmerge_fast.cli", "inspect", str(folder), "-q"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


# ------------------------------------------------------------------------------------------------- folder to folder


def saved(tmp_path, name, dtype=torch.float32):
    """A tiny model's folder, and a plan for it."""
    model = tiny_model(name).to(dtype)
    ff.save_pretrained(model, tmp_path / "base")
    layers = "1-2" if len(FAMILIES[name].stacks) == 1 else LAYERS["marian"]
    return tmp_path / "base", ff.plan(None, layers, method="random", model=model, seed=1)


def opened(folder, **options):
    model = open_on_disk(folder, **options)
    assert all(weight.is_meta for weight in model.parameters())
    return model


def equal_folders(a, b):
    """Names and bytes of all files."""
    files = [{p.relative_to(x): p.read_bytes() for p in x.rglob("*") if p.is_file()} for x in (a, b)]
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_merge_writes_what_it_writes_from_memory(tmp_path, name, dtype):
    folder, plan = saved(tmp_path, name, dtype)
    for model, out in ((ff.from_pretrained(folder), "memory"), (opened(folder), "disk")):
        ff.merge_(model, plan)
        ff.save_pretrained(model, tmp_path / out, max_shard_size="20kB", source=folder)
    equal_folders(tmp_path / "memory", tmp_path / "disk")
    assert ff.verify(tmp_path / "disk")["logit_difference"] == 0
    for model, out in ((ff.from_pretrained(tmp_path / "disk"), "memory2"), (opened(tmp_path / "disk"), "disk2")):
        ff.expand_(model)
        ff.save_pretrained(model, tmp_path / out)
    equal_folders(tmp_path / "memory2", tmp_path / "disk2")


def test_several_groups_and_a_copy(tmp_path):
    folder, _ = saved(tmp_path, "gpt2")
    plan = ff.plan(None, "0-1,2-3", method="average", model=ff.from_pretrained(folder))
    model = opened(folder)
    merged = ff.merge(model, plan)
    assert ff.shared_groups(merged) and not ff.shared_groups(model)
    ff.save_pretrained(merged, tmp_path / "disk")
    ff.save_pretrained(ff.merge(ff.from_pretrained(folder), plan), tmp_path / "memory")
    equal_folders(tmp_path / "memory", tmp_path / "disk")


def test_another_dtype_is_written_as_it_was_asked_for(tmp_path):
    folder, plan = saved(tmp_path, "llama", torch.bfloat16)
    for load, out in ((ff.from_pretrained, "memory"), (opened, "disk")):
        ff.save_pretrained(ff.merge_(load(folder, dtype=torch.float32), plan), tmp_path / out)
    equal_folders(tmp_path / "memory", tmp_path / "disk")


def test_memory_is_that_of_one_matrix(tmp_path):
    """Every matrix that is read is let go of: the largest tensor alive is one average and one member."""
    folder, plan = saved(tmp_path, "llama")
    model, sizes = opened(folder), []
    read = WeightEntry.read
    alive = weakref.WeakSet()

    def counted(entry, pin=False):
        alive.add(tensor := read(entry, pin))
        sizes.append(sum(t.nbytes for t in alive))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightEntry, "read", counted)
        ff.merge_(model, plan)
        sizes.clear()
        hashes = write_weights(model, elsewhere(model), tmp_path, 1 << 30)
    largest = max(weight.nbytes for weight in model.parameters())
    assert hashes and sizes and max(sizes) <= 2 * largest


def test_nan_is_found_wherever_it_is(tmp_path):
    for name in ("lm_head.weight", "transformer.h.0.attn.c_proj.weight"):
        folder = tmp_path / name
        ff.save_pretrained(tiny_model("gpt2"), folder)
        (folder / "ffmerge.json").unlink()
        tensors = load_file(folder / "model.safetensors")
        name = name if name in tensors else "transformer.wte.weight"
        tensors[name][0, 0] = torch.nan
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        model = opened(folder)
        with pytest.raises(ff.FFMergeError, match=f"got NaN or Inf in {name}"):
            ff.save_pretrained(ff.expand_(model), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_file_that_goes_away_leaves_nothing(tmp_path):
    folder, plan = saved(tmp_path, "llama")
    model = ff.merge_(opened(folder), plan)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ff.FFMergeError, match=r"model: .*model.safetensors, which holds its weights, cannot be read"):
        ff.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out*")) == []


def test_a_manifest_of_version_1_is_read(tmp_path):
    folder, _ = saved(tmp_path, "gpt2")
    manifest = read_sealed_json(folder / "ffmerge.json")
    assert manifest["files"]["model.safetensors"].startswith("crc32:")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    older = manifest | {"version": 1, "files": {"model.safetensors": digest}}
    write_sealed_json(folder / "ffmerge.json", older)
    ff.verify(folder)
    write_sealed_json(folder / "ffmerge.json", older | {"files": {"model.safetensors": digest[::-1]}})
    with pytest.raises(ff.FFMergeError, match="its checksum differs"):
        ff.from_pretrained(folder)


def test_what_needs_the_weights_says_so_and_the_rest_works(tmp_path):
    folder, plan = saved(tmp_path, "llama")
    model, ids = opened(folder), torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids}]
    for action in (
        lambda: ff.collect(model, batches, window=2),
        lambda: ff.importance(model, batches),
        lambda: ff.project(model, keep=0.5),
        lambda: ff.hard_prune(model, keep=0.5),
        lambda: ff.accelerate_(model),
        lambda: ff.finetune(model, batches, steps=1),
        lambda: ff.tie_without_average(model, "1-2"),
    ):
        with pytest.raises(ff.FFMergeError, match="this model's weights are in the files of .*base; load it"):
            action()
    whole = ff.from_pretrained(folder)
    wanted, found = (ff.importance(m, method="magnitude") for m in (whole, model))
    assert found.fingerprint == wanted.fingerprint and all(
        map(torch.equal, *(i.scores.values() for i in (found, wanted)))
    )
    by_weights = [ff.plan(layers="1-3", method="weights", model=m) for m in (whole, model)]
    assert by_weights[0].to_dict() == by_weights[1].to_dict()
    with ff.stream_(model, "cpu", "disk", budget="1MB"):
        assert torch.equal(model(ids).logits, whole(ids).logits)
        stats = ff.collect(model, batches, window=2)
    assert torch.equal(stats.correlation(0, 1), ff.collect(whole, batches, window=2).correlation(0, 1))
    ff.save_pretrained(ff.merge_(model, plan), tmp_path / "merged")
    assert ff.verify(tmp_path / "merged")["logit_difference"] == 0
