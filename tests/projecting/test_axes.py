"""The axes of every parameter, against tables written by hand."""

import re

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.projecting.axes import ModelAxes
from tests.helpers.tiny_models import FAMILIES, tiny_model

# Axes as stored: d residual stream, f FFN neurons, a attention channels (of a width that follows d_model), - neither.
# "ff" and "aaa" are stacked parts, "hhh" parts stacked inside each head. The first pattern that matches a name decides.
_LLAMA = [
    (r"embed_tokens|lm_head", "- d"), (r"[qkv]_proj\.weight", "- d"), (r"[qkv]_proj\.bias", "-"), (r"o_proj", "d -"),
    (r"(gate|up)_proj", "f d"), (r"down_proj", "d f"), (r"[qk]_norm", "-"), (r"norm", "d"),
]  # fmt: skip
_NORMS = (r"(?i)(norm|ln_.)", "d")
_BERT = [
    (r"(decoder|predictions|lm_head)\.bias", "-"), (r"embeddings\.weight|decoder\.weight", "- d"), _NORMS,
    (r"(query|key|value)\.weight", "a d"), (r"(query|key|value)\.bias", "a"),
    (r"attention\.output\.dense\.weight", "d a"), (r"intermediate\.dense\.weight", "f d"),
    (r"intermediate\.dense\.bias", "f"), (r"layer\.\d\.output\.dense\.weight", "d f"),
    (r"transform\.dense\.weight|lm_head\.dense\.weight", "d d"), (r"dense\.bias", "d"),
]  # fmt: skip
_SEQ2SEQ = [
    (r"shared|embed_tokens|lm_head|embed_positions", "- d"), _NORMS, (r"[qkv]_proj\.weight", "a d"),
    (r"[qkv]_proj\.bias", "a"), (r"out_proj\.weight", "d a"), (r"fc1\.weight", "f d"), (r"fc1\.bias", "f"),
    (r"fc2\.weight", "d f"), (r"bias", "d"),
]  # fmt: skip
_VIT = [
    (r"(cls|distillation)_token|position_embeddings", "- - d"), (r"projection\.weight", "d - - -"),
    (r"classifier\.weight", "- d"), (r"classifier\.bias", "-"), _NORMS, (r"[qkv]_proj\.weight", "a d"),
    (r"[qkv]_proj\.bias", "a"), (r"o_proj\.weight", "d a"), (r"fc1\.weight", "f d"), (r"fc1\.bias", "f"),
    (r"fc2\.weight", "d f"), (r"bias", "d"),
]  # fmt: skip
_VIT4 = [  # transformers 4
    (r"(query|key|value)\.weight", "a d"), (r"(query|key|value)\.bias", "a"),
    (r"attention\.output\.dense.weight", "d a"),
    (r"intermediate\.dense\.weight", "f d"), (r"intermediate\.dense\.bias", "f"), (r"output\.dense\.weight", "d f"),
]  # fmt: skip
_T5 = [
    (r"shared|embed_tokens|lm_head", "- d"), (r"relative", "- -"), (r"\.[qkv]\.", "- d"), (r"\.o\.", "d -"),
    (r"\.wi", "f d"), (r"\.wo", "d f"), (r"norm", "d"),
]  # fmt: skip
TABLES = {
    "gpt2": [
        (r"wte|wpe|lm_head", "- d"), _NORMS, (r"c_attn\.weight", "d aaa"), (r"c_attn\.bias", "aaa"),
        (r"attn\.c_proj\.weight", "a d"), (r"c_fc\.weight", "d f"), (r"c_fc\.bias", "f"),
        (r"mlp\.c_proj\.weight", "f d"), (r"bias", "d"),
    ],
    "opt": _SEQ2SEQ,
    "gpt_neox": [
        (r"embed_in|lm_head", "- d"), _NORMS, (r"query_key_value\.weight", "hhh d"), (r"query_key_value\.bias", "hhh"),
        (r"dense_h_to_4h\.weight", "f d"), (r"dense_h_to_4h\.bias", "f"), (r"dense_4h_to_h\.weight", "d f"),
        (r"attention\.dense\.weight", "d a"), (r"bias", "d"),
    ],
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "gemma2"), _LLAMA),
    "phi3": [(r"qkv_proj", "- d"), (r"gate_up_proj", "ff d"), *_LLAMA],
    **dict.fromkeys(("bert", "roberta"), _BERT),
    **dict.fromkeys(("vit", "deit"), _VIT4 + _VIT),
    **dict.fromkeys(("marian", "bart"), _SEQ2SEQ),
    **dict.fromkeys(("t5", "t5-gated"), _T5),
}  # fmt: skip


def codes(family, name, ndim):
    code = next(code for pattern, code in TABLES[family] if re.search(pattern, name)).split()
    assert len(code) == ndim, (name, code)
    return code


def code_of(axis):
    if axis is None:
        return "-"
    letters = {"model": "d", "ffn": "f", "attention": "h" if axis.by_head else "a"}
    return letters[axis.role] * len(axis.parts)


def test_every_projectable_family_has_a_table():
    assert set(FAMILIES) - set(TABLES) == {"whisper"}


@pytest.mark.parametrize("family", TABLES)
def test_axes_of_every_parameter(family):
    model = tiny_model(family, layers=2)
    layout = ModelAxes.of(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert [code_of(a) for a in layout.axes[name]] == codes(family, name, parameter.ndim), name


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_axes_that_happen_to_have_the_same_length(family, monkeypatch):
    values = FAMILIES[family].values
    for name in ("vocab_size", "n_positions", "max_position_embeddings", "n_inner", "intermediate_size"):
        if name in values:  # everything is as wide as the residual stream
            monkeypatch.setitem(values, name, 16)
    model = tiny_model(family, layers=1)
    layout = ModelAxes.of(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert [code_of(a) for a in layout.axes[name]] == codes(family, name, parameter.ndim), name


def test_reading_the_layout_changes_nothing():
    model = tiny_model("vit", layers=1)
    config, before = model.config.to_dict(), {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    ModelAxes.of(model)
    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_unknown_attention_is_refused():
    transformers = pytest.importorskip("transformers")
    ff.register_family("mpt", ff.FFNSpec("transformer.blocks", "ffn.up_proj", "ffn.down_proj", activation="ffn.act"))
    config = transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=64)
    with pytest.raises(ff.FFMergeError, match="no attention of a known form in transformer.blocks.0 of this 'mpt'"):
        ModelAxes.of(transformers.MptForCausalLM(config))


def test_fewer_keys_than_queries_in_one_matrix_are_refused():
    model = tiny_model("gpt_neox", layers=1)
    model.gpt_neox.layers[0].attention.query_key_value = torch.nn.Linear(16, 32)
    with pytest.raises(ff.FFMergeError, match="attention.query_key_value has not one query, key and value per head"):
        ModelAxes.of(model)


def test_plain_modules_are_refused():
    with pytest.raises(ff.FFMergeError, match="Sequential is not a transformers model"):
        ff.project(tiny_model("sequential"), d_ff=8)
