"""What the tests of streamed models share."""

import contextlib
import re

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.tiny_models import tiny_inputs, tiny_model

FAMILIES = ("gpt2", "llama", "vit", "marian")
PLACES = ("host", "disk")


def model_of(family, merged=False, layers=6):
    """With `merged`, the FFNs of layers 1 to 3 (of each stack) are one."""
    model = tiny_model(family, layers)
    if not merged:
        return model
    plan = ff.plan(ff.collect(model, [tiny_inputs(model, batch=8)], window=3), layers="1-3")
    return ff.merge_(model, plan)


def needs(model):
    """Bytes for one layer at a time, and for the next one loaded meanwhile, from the error's text."""
    with pytest.raises(ff.FFMergeError) as error:
        ff.stream_(model, device="cpu", budget=1)
    assert "\n" not in str(error.value)
    found = re.search(r"wanted at least ([\d,]+): .*; ([\d,]+) to load the next layer meanwhile", str(error.value))
    return [int(group.replace(",", "")) for group in found.groups()]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def block_bytes(model):
    """Bytes of the weights of all blocks, each once."""
    blocks = [model.get_submodule(ffn.path) for ffn in ff.find_ffns(model)]
    return sum(p.nbytes for p in {p: None for block in blocks for p in block.parameters()})


@contextlib.contextmanager
def refused(text):
    with pytest.raises(ff.FFMergeError, match=text) as error:
        yield
    assert "\n" not in str(error.value)
