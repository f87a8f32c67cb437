"""find_ffns on every family, specs of one's own, and what is refused."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ffmerge_fast as ff
from ffmerge_fast.models import families
from ffmerge_fast.models.sublayers import base_model_type
from ffmerge_fast.models.summary import ModelSummary
from tests.helpers.tiny_models import (
    ALL,
    D_FF,
    D_MODEL,
    FAMILIES,
    features_of,
    logits,
    permute_ffn_,
    tiny_inputs,
    tiny_model,
)

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture(autouse=True)
def _families_as_before(monkeypatch):
    monkeypatch.setattr("ffmerge_fast.models.families._FAMILIES", dict(families._FAMILIES))


@pytest.mark.parametrize("name", ALL)
def test_facts_of_every_family(name):
    family, model = ALL[name], tiny_model(name, layers=3)
    ffns = ff.find_ffns(model)
    assert [f.key for f in ffns] == [f"{stack}.{i}" for stack in family.stacks for i in range(3)]
    for ffn in ffns:
        assert (ffn.d_model, ffn.d_ff, ffn.activation) == (D_MODEL, D_FF, family.activation)
        assert (ffn.gated, ffn.bias, ffn.fused) == (family.gated, family.bias, family.fused)
        assert (ffn.parameters, ffn.nbytes) == (family.parameters, 4 * family.parameters)
        assert len(ffn.shared) == family.parts and all(path.startswith(ffn.path + ".") for path in ffn.shared)
        shared = {p for path in ffn.shared for p in model.get_submodule(path).parameters()}
        assert sum(p.numel() for p in shared) == family.parameters
    assert (
        len({id(model.get_submodule(path)) for f in ffns for path in f.shared}) == 3 * len(family.stacks) * family.parts
    )


@pytest.mark.parametrize("name", ALL)
def test_activation_and_gate_are_what_the_model_computes(name):
    model = tiny_model(name, layers=2)
    with features_of(model) as seen:
        logits(model, tiny_inputs(model))
    for ffn in ff.find_ffns(model):
        up, hidden, act = seen.up[ffn.key][0], seen.down[ffn.key][0], ACTIVATIONS[ffn.activation]
        if ffn.fused:
            gate, up = up.chunk(2, dim=-1)
        elif ffn.gated:
            gate = seen.gate[ffn.key][0]
        torch.testing.assert_close(act(gate) * up if ffn.gated else act(up), hidden.reshape(up.shape))


@pytest.mark.parametrize("name", ALL)
def test_permuting_the_neurons_of_one_layer_changes_nothing(name):  # acceptance fact 2
    model = tiny_model(name, layers=2)
    inputs = tiny_inputs(model, padded=True)
    before = logits(model, inputs)
    for seed, ffn in enumerate(ff.find_ffns(model)):
        up = model.get_submodule(ffn.up_path).weight.clone()
        permute_ffn_(model, ffn, torch.randperm(D_FF, generator=torch.Generator().manual_seed(seed)))
        assert not torch.equal(up, model.get_submodule(ffn.up_path).weight)
    torch.testing.assert_close(logits(model, inputs), before)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "marian", "t5", "vit", "opt"])
def test_base_models_without_a_head(name):
    model = tiny_model(name, layers=2)
    base, prefix = model.base_model, model.base_model_prefix + "."
    assert base is not model or name == "t5"  # T5's prefix is "transformer", but its head holds the stacks itself
    inside = [f.up_path for f in ff.find_ffns(base)]
    assert inside == [f.up_path.removeprefix(prefix) for f in ff.find_ffns(model)]


def test_expert_layers_are_refused_with_the_reason():
    import transformers

    values = FAMILIES["llama"].values | dict(num_hidden_layers=2, num_local_experts=2)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**values))
    with pytest.raises(ff.FFMergeError, match=r"model\.layers\.0\.mlp is a mixture of experts .* only dense FFNs") as e:
        ff.find_ffns(model)
    assert "\n" not in str(e.value)


def test_one_expert_layer_among_dense_ones_is_refused():
    model = tiny_model("sequential", layers=2)
    model[1].ffn = type("SparseMoE", (nn.Module,), {})()
    with pytest.raises(ff.FFMergeError, match="mixture of experts"):
        ff.find_ffns(model)


class Alien(nn.Module):
    """A model of an unknown family: gated, with blocks in a list that is not called layers."""

    def __init__(self, gate_width=6, up_width=6):
        super().__init__()
        self.trunk = nn.ModuleList()
        for _ in range(2):
            block = nn.ModuleDict({"g": nn.Linear(4, gate_width), "u": nn.Linear(4, up_width), "d": nn.Linear(6, 4)})
            block.act = nn.SiLU()
            self.trunk.append(block)


def test_an_unknown_model_gets_the_spec_to_write():
    with pytest.raises(ff.FFMergeError, match=r"for .Alien.*register_family\('Alien', FFNSpec\(") as e:
        ff.find_ffns(Alien())
    assert "\n" not in str(e.value)


def test_a_registered_spec_is_used_by_class_name_and_by_subclasses():
    ff.register_family("Alien", ff.FFNSpec("trunk", up="u", down="d", gate="g"))
    assert "Alien" in ff.supported_families()
    for cls in (Alien, type("Heir", (Alien,), {})):
        first, second = ff.find_ffns(cls())
        assert (first.key, second.key) == ("decoder.0", "decoder.1")
        assert second.shared == ("trunk.1.g", "trunk.1.u", "trunk.1.d")
        assert (first.d_model, first.d_ff, first.activation, first.gated, first.bias) == (4, 6, "silu", True, True)
        assert first.parameters == 3 * 4 * 6 + 6 + 6 + 4


def test_a_spec_whose_paths_do_not_exist_says_what_it_expects():
    ff.register_family("Alien", ff.FFNSpec("trunk", up="no.such", down="d"))
    with pytest.raises(ff.FFMergeError, match=r"'Alien' expects trunk\.<i>\.no\.such"):
        ff.find_ffns(Alien())


def test_widths_that_do_not_fit_are_refused():
    ff.register_family("Alien", ff.FFNSpec("trunk", up="u", down="d"))
    with pytest.raises(ff.FFMergeError, match="u gives 10 features but d takes 6"):
        ff.find_ffns(Alien(up_width=10))
    ff.register_family("Alien", ff.FFNSpec("trunk", up="u", down="d", gate="g"))
    with pytest.raises(ff.FFMergeError, match="g gives 12 features but d takes 6"):
        ff.find_ffns(Alien(gate_width=12))


def test_layers_of_different_kinds_keep_their_index():
    model = Alien()
    model.trunk.insert(1, nn.LayerNorm(4))  # a block without an FFN, as in hybrid models
    ff.register_family("Alien", ff.FFNSpec("trunk", up="u", down="d", gate="g"))
    assert [f.index for f in ff.find_ffns(model)] == [0, 2]


def test_contradictory_specs_are_refused():
    with pytest.raises(ff.FFMergeError, match="wanted 'encoder' or 'decoder'"):
        ff.FFNSpec("layers", "up", "down", stack="middle")
    with pytest.raises(ff.FFMergeError, match="not both"):
        ff.FFNSpec("layers", "up", "down", gate="gate", fused=True)


def test_quantised_and_adapted_projections_are_refused():
    model = tiny_model("llama", layers=2)
    up = model.model.layers[1].mlp.up_proj
    up.weight = nn.Parameter(torch.zeros(D_FF, D_MODEL, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ff.FFMergeError, match=r"layers\.1\.mlp\.up_proj is quantised \(torch\.int8\)"):
        ff.find_ffns(model)
    model = tiny_model("llama", layers=2)
    wrapper = nn.Module()
    wrapper.base_layer = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = wrapper
    with pytest.raises(ff.FFMergeError, match=r"layers\.1\.mlp\.up_proj is wrapped by an adapter"):
        ff.find_ffns(model)


def fingerprint(model):
    return ModelSummary.of(model).fingerprint


def test_fingerprint_knows_the_model_and_not_its_dtype():
    model = tiny_model("gpt2")
    mark = fingerprint(model)
    assert mark == fingerprint(tiny_model("gpt2")) == fingerprint(tiny_model("gpt2").bfloat16())
    assert mark != fingerprint(tiny_model("gpt2", seed=1))
    assert mark != fingerprint(tiny_model("gpt2", layers=3))
    assert mark == fingerprint(model.transformer)
    model.transformer.wte.weight.data += 1
    assert mark == fingerprint(model)


def test_a_summary_is_plain_values_and_back():
    summary = ModelSummary.of(tiny_model("marian"))
    values = summary.to_dict()
    assert type(values["ffns"]) is list and all(type(ffn) is dict for ffn in values["ffns"])
    again = ModelSummary.from_dict(json.loads(json.dumps(values)))
    assert again == summary and again.ffns.at("decoder", 1) == summary.ffns.at("decoder", 1)


def test_fingerprint_sees_every_value_and_the_order_of_neurons():
    model = tiny_model("gpt2")
    mlp, attention = (getattr(model.transformer.h[2], name) for name in ("mlp", "attn"))
    marks, changes = {fingerprint(model)}, 0
    with torch.no_grad():
        for weight in (mlp.c_fc.weight, mlp.c_proj.weight, mlp.c_fc.bias, attention.c_attn.weight):
            flat = weight.view(-1)
            for position in {*range(0, flat.numel(), 1 + flat.numel() // 40), flat.numel() - 1}:
                kept = flat[position].clone()
                flat[position] += 0.01 * kept.abs() + 1e-6
                marks.add(fingerprint(model))
                changes += 1
                flat[position] = kept
        for weight, dim in ((mlp.c_fc.weight, 1), (mlp.c_proj.weight, 0)):
            kept = weight.clone()
            weight.copy_(weight.roll(1, dim))
            marks.add(fingerprint(model))
            changes += 1
            weight.copy_(kept)
    assert len(marks) == changes + 1


def test_base_model_type_is_the_stock_one_also_after_merging():
    model = tiny_model("gpt2")
    assert base_model_type(model) == "gpt2" and base_model_type(nn.Sequential()) == "Sequential"
    ff.merge_(model, ff.plan(model=model, layers="0-1", method="average"))
    assert type(model.config).__name__ == "FFMergedGPT2Config" and base_model_type(model) == "gpt2"
