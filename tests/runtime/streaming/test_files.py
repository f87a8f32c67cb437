"""Streamed models and files: read in place, written and removed, and one line when they are lost."""

import gc
import os
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffmerge_fast as ff
from tests.helpers.streaming import PLACES, equal, model_of, needs
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model


def test_the_models_own_folder_is_read_in_place(tmp_path):
    model_of("llama", merged=True).save_pretrained(tmp_path)
    model = ff.from_pretrained(tmp_path).eval()
    wanted = logits(model, tiny_inputs(model))
    with ff.stream_(model, "cpu", "disk", needs(model)[0]) as stream:
        assert torch.equal(logits(model, tiny_inputs(model)), wanted)
        assert {e.file.path for e in stream._source._entries.values()} == {tmp_path / "model.safetensors"}
        assert stream.read_bytes > 0


def test_what_the_folder_does_not_hold_is_written_and_removed(tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    model = ff.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    wanted = logits(model, tiny_inputs(model))
    stream = ff.stream_(model, "cpu", "disk", needs(model)[1])
    files = {e.file.path for e in stream._source._entries.values()}
    (written,) = files - {tmp_path / "model.safetensors"}
    assert load_file(written).keys() == {"model.layers.2.mlp.up_proj.weight"}
    assert torch.equal(logits(model, tiny_inputs(model)), wanted)
    ff.unstream_(model)
    assert not written.parent.exists() and torch.equal(logits(model, tiny_inputs(model)), wanted)


def test_the_memory_is_let_go_of_and_a_dropped_model_leaves_no_file():
    model = tiny_model("gpt2")
    blocks = [weakref.ref(p.untyped_storage()) for p in model.transformer.h.parameters()]
    stream = ff.stream_(model, "cpu", "disk", needs(model)[1])
    assert not any(ref() for ref in blocks)
    (folder,) = {e.file.path.parent for e in stream._source._entries.values()}
    logits(model, tiny_inputs(model))
    del model, stream
    end = time.monotonic() + 10
    while folder.exists() and time.monotonic() < end:  # what is being read ahead holds it for a moment
        gc.collect()
        time.sleep(0.01)
    assert not folder.exists()


def test_weights_on_meta_come_from_the_folder(tmp_path):
    import transformers

    original = tiny_model("gpt2")
    original.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(original.config).eval()
    with pytest.raises(ff.FFMergeError, match=r"stream_: \S+ is on meta and the model has no folder; give folder="):
        ff.stream_(model, "cpu", "disk", "1MB")
    with pytest.raises(ff.FFMergeError, match="is on meta and .*empty does not hold it"):
        ff.stream_(model, "cpu", "disk", "1MB", folder=tmp_path / "empty")
    for place in PLACES:
        with ff.stream_(model, "cpu", place, needs(model)[1], folder=tmp_path):
            assert torch.equal(logits(model, tiny_inputs(model)), logits(original, tiny_inputs(original)))
            assert equal(model.state_dict(), original.state_dict())
        assert all(p.is_meta for p in model.parameters()) and model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("how", ["removed", "cut short", "overwritten", "replaced"])
@pytest.mark.parametrize("when", ["between passes", "in a pass"])
def test_a_file_that_goes_away(how, when, tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    model = ff.from_pretrained(tmp_path).eval()
    for parameter in model.parameters():  # of its own: those that stay would be maps of the file
        parameter.data = parameter.data.clone()
    file = tmp_path / "model.safetensors"
    backup = file.read_bytes()

    def damage(*_):
        if how == "removed":
            file.unlink()
        elif how == "cut short":
            os.truncate(file, 2000)
        elif how == "overwritten":
            file.write_bytes(backup[:-64] + b"\xff" * 64)
        else:
            save_file({name: t * 2 for name, t in load_file(file).items()}, tmp_path / "other")
            (tmp_path / "other").replace(file)

    stream = ff.stream_(model, "cpu", "disk", needs(model)[1])
    logits(model, tiny_inputs(model))
    if when == "in a pass":
        model.model.layers[2].register_forward_hook(damage)
    else:
        damage()
    for _ in range(2):  # the next pass tells it, too
        with pytest.raises(ff.FFMergeError, match=f"stream_: {file}, which holds weights of the model, ") as error:
            for _ in range(2):
                logits(model, tiny_inputs(model))
        assert "\n" not in str(error.value)
    with pytest.raises(ff.FFMergeError, match="which holds weights of the model"):
        ff.unstream_(model)
    assert stream.streamed_bytes and model._weight_stream is stream
