"""Wrapped models are refused with what to pass instead."""

import pytest
import torch
from torch import nn

import ffmerge_fast as ff
from ffmerge_fast import FFMergeError
from tests.helpers.tiny_models import tiny_inputs, tiny_model


@pytest.mark.parametrize("wrap, inside", [(nn.DataParallel, "module"), (torch.compile, "_orig_mod")])
def test_wrappers_of_torch(wrap, inside, tmp_path):
    model = wrap(tiny_model("gpt2"))
    for call in (
        lambda: ff.find_ffns(model),
        lambda: ff.collect(model, [tiny_inputs(model)], window=2),
        lambda: ff.merge_(model, ff.plan(layers="0-1", method="average", model=tiny_model("gpt2"))),
        lambda: ff.save_pretrained(model, tmp_path / "out"),
    ):
        with pytest.raises(
            FFMergeError, match=f"got a {type(model).__name__}, wanted the model inside: give model.{inside}"
        ):
            call()
    assert not list(tmp_path.iterdir())


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(FFMergeError, match="got a PeftModel, wanted the model inside: merge its adapters"):
        ff.find_ffns(adapted)
    with pytest.raises(FFMergeError, match=r"q_proj is an adapter of peft \(Linear\): merge its adapters"):
        ff.save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    ff.save_pretrained(adapted.merge_and_unload(), tmp_path / "out")
