"""merge_, merge, merged and expand_: the average, the tie, and the way back."""

import copy
import warnings

import pytest
import torch
from torch import nn

import ffmerge_fast as ff
from ffmerge_fast.merging.apply import merged, summary_of_unmerged
from ffmerge_fast.merging.plan import MergeGroup
from tests.helpers.tiny_models import (
    ALL,
    D_FF,
    D_MODEL,
    FAMILIES,
    PLAIN,
    logits,
    permute_ffn_,
    plant_copies_,
    tiny_inputs,
    tiny_model,
)

METHODS = ("average", "random", "weights")


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def assert_untouched(model, before):
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys() and all(torch.equal(p, before[name]) for name, p in after.items())
    assert not ff.is_merged(model)


def expected_ffn(model, made):
    """{shared path of the group's first layer + parameter: float64 average}, computed the slow way."""
    ffns = {(f.stack, f.index): f for f in ff.find_ffns(model)}
    found = {}
    for group in made.groups:
        permuted = copy.deepcopy(model)
        for i in group.layers:
            permute_ffn_(permuted, ffns[group.stack, i], group.permutations[i])
        first = ffns[group.stack, group.layers[0]]
        for part, path in enumerate(first.shared):
            for name, _ in model.get_submodule(path).named_parameters():
                parameters = [
                    permuted.get_submodule(ffns[group.stack, i].shared[part]).get_parameter(name) for i in group.layers
                ]
                found[f"{path}.{name}"] = torch.stack([p.detach().double() for p in parameters]).mean(0)
    return found


# ---------------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("name", ALL)
def test_merge_averages_the_permuted_layers_and_shares_the_modules(name):
    family, model = ALL[name], tiny_model(name)
    inputs, others = tiny_inputs(model, padded=True), weights(model)
    made = ff.plan(model=model, layers="1-3", method="random", seed=3)
    expected, ffns = expected_ffn(model, made), ff.find_ffns(model)
    before = sum(p.numel() for p in model.parameters())
    assert ff.merge_(model, made) is model
    for path, truth in expected.items():
        torch.testing.assert_close(model.get_parameter(path).double(), truth, atol=1e-6, rtol=0)
    for stack in family.stacks:
        _, one, two, three = (f for f in ffns if f.stack == stack)
        for paths in zip(one.shared, two.shared, three.shared, strict=True):
            first, second, third = map(model.get_submodule, paths)
            assert first is second is third
    assert ff.shared_groups(model) == [(stack, (1, 2, 3)) for stack in family.stacks] and ff.is_merged(model)
    removed = 2 * len(family.stacks) * family.parameters
    assert sum(p.numel() for p in model.parameters()) == before - removed == made.parameters_after
    shared = tuple(f"{path}." for f in ffns if f.index for path in f.shared)
    for path, p in model.named_parameters(remove_duplicate=False):  # attention, norms, layer 0: as they were
        assert path.startswith(shared) or torch.equal(p, others[path])
    assert logits(model, inputs).isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_merging_permuted_copies_by_weights_changes_nothing(name):  # acceptance facts 2 and 4
    model = tiny_model(name)
    plant_copies_(model)
    inputs = tiny_inputs(model, padded=True)
    before, original = logits(model, inputs), weights(model)
    ff.merge_(model, ff.plan(model=model, layers="0-3", method="weights"))
    for ffn in (f for f in ff.find_ffns(model) if f.index == 0):
        for path in ffn.shared:
            for parameter, p in model.get_submodule(path).named_parameters():
                assert torch.equal(p, original[f"{path}.{parameter}"])
    torch.testing.assert_close(logits(model, inputs), before)


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_the_layers_add_up_in_the_shared_weights(name):
    model = tiny_model(name)
    ff.merge_(model, ff.plan(model=model, layers="1-3", method="average"))
    full = ff.expand_(copy.deepcopy(model))
    inputs = tiny_inputs(model)
    for m in (model, full):
        out = m(**inputs)
        (out if isinstance(out, torch.Tensor) else out.logits).double().square().mean().backward()
    for stack in ALL[name].stacks:
        members = [f for f in ff.find_ffns(model) if f.stack == stack and f.index]
        for part, path in enumerate(members[0].shared):
            for parameter, p in model.get_submodule(path).named_parameters():
                grads = [full.get_submodule(f.shared[part]).get_parameter(parameter).grad for f in members]
                torch.testing.assert_close(p.grad, sum(grads), atol=1e-6, rtol=1e-4)
                assert all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("name", ALL)
def test_expand_gives_the_stock_model_with_equal_outputs(name):
    model = tiny_model(name)
    stock, total = type(model), sum(p.numel() for p in model.parameters())
    names = list(model.state_dict())
    ff.merge_(model, ff.plan(model=model, layers="0-1,2-3", method="random"))
    inputs = tiny_inputs(model, padded=True)
    before = logits(model, inputs)
    assert ff.expand_(model) is model and type(model) is stock and not ff.is_merged(model)
    assert sum(p.numel() for p in model.parameters()) == total and list(model.state_dict()) == names
    assert torch.equal(logits(model, inputs), before)
    again = ff.merge_(model, ff.plan(model=model, layers="0-1", method="average"))  # and can be merged again
    assert ff.shared_groups(again)[0][1] == (0, 1)


# ------------------------------------------------------------------------------------------------------- the average


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("anchor", ["first", "middle", "last"])
@pytest.mark.parametrize("layers", ["0-5", "0-2,3-5", "1+3+4", "0+5,1-2"])
def test_every_method_anchor_and_grouping(method, anchor, layers):
    model = tiny_model("llama", layers=6)
    made = ff.plan(model=model, layers=layers, method=method, anchor=anchor)
    expected = expected_ffn(model, made)
    ff.merge_(model, made)
    assert [layers for _, layers in ff.shared_groups(model)] == sorted(g.layers for g in made.groups)
    for path, truth in expected.items():
        torch.testing.assert_close(model.get_parameter(path).double(), truth, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layers", [2, 3, 5, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_layers_average_to_exactly_themselves(layers, dtype):  # acceptance fact 4
    model = tiny_model("gpt2", layers=layers).to(dtype)
    for block in model.transformer.h[1:]:
        block.mlp.load_state_dict(model.transformer.h[0].mlp.state_dict())
    before = weights(model)
    made = ff.plan(model=model, layers=[range(layers)], method="weights")
    assert all(torch.equal(p, torch.arange(D_FF)) for p in made.groups[0].permutations.values())
    ff.merge_(model, made)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_averaged_in_float32_and_rounded_once(dtype):
    model = tiny_model("llama", layers=6).to(dtype)
    made = ff.plan(model=model, layers="0-5", method="random")
    expected = expected_ffn(model, made)
    ff.merge_(model, made)
    for path, truth in expected.items():
        got = model.get_parameter(path).detach()
        assert got.dtype == dtype
        nearest = truth.to(dtype).double()  # a float32 average may fall on the other side of a tie, no further
        assert ((got.double() - truth).abs() <= (nearest - truth).abs() + 1e-7).all()
        assert (got.double() == nearest).float().mean() > 0.95


def test_requires_grad_mode_and_gradients_of_the_merged_module():
    model = tiny_model("gpt2").train()
    model(**tiny_inputs(model)).loss.backward()
    model.transformer.h[1].mlp.requires_grad_(False)
    ff.merge_(model, ff.plan(model=model, layers="1-2", method="average"))
    shared = model.transformer.h[2].mlp
    assert shared.training and all(p.grad is None and not p.requires_grad for p in shared.parameters())


# ---------------------------------------------------------------------------------------------------- copies, undoing


def test_merge_works_on_a_copy():
    model = tiny_model("t5")
    before, made = weights(model), ff.plan(model=tiny_model("t5"), layers="1-3", method="random")
    small = ff.merge(model, made)
    assert_untouched(model, before)
    assert ff.is_merged(small) and type(model).__name__ == "T5ForConditionalGeneration"
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}
    ff.merge_(model, made)
    assert all(torch.equal(p, q) for p, q in zip(small.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "phi3", "opt", "marian", "sequential"])
def test_merged_gives_the_very_same_modules_back(name):
    model = tiny_model(name)
    before, modules, stock = weights(model), dict(model.named_modules()), type(model)
    made, inputs = ff.plan(model=model, layers="0-1,2-3", method="random"), tiny_inputs(model)
    expected, full = logits(ff.merge(model, made), inputs), logits(model, inputs)
    with merged(model, made, summary_of_unmerged(model)) as inside:
        assert inside is model and ff.is_merged(model) and torch.equal(logits(model, inputs), expected)
    assert dict(model.named_modules()) == modules and type(model) is stock
    assert_untouched(model, before)
    with pytest.raises(KeyboardInterrupt), merged(model, made, summary_of_unmerged(model)):
        raise KeyboardInterrupt
    assert dict(model.named_modules()) == modules
    assert_untouched(model, before)
    assert torch.equal(logits(model, inputs), full)


# ------------------------------------------------------------------------------------------- classes, optimisers, print


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_model_is_an_instance_of_its_stock_class(name):
    model = tiny_model(name)
    stock = type(model)
    ff.merge_(model, ff.plan(model=model, layers="1-2", method="average"))
    assert isinstance(model, stock) and type(model).__name__ == f"FFMerged{stock.__name__}"
    assert type(model.config).__name__.startswith("FFMerged")
    first = ff.find_ffns(model)[1]
    assert model.config.ffmerge["groups"][0]["layers"] == [1, 2]
    patterns = [p.format(i=1) for p in model.config.ffmerge["groups"][0]["modules"]]
    assert [model.base_model.get_submodule(p) for p in patterns] == [model.get_submodule(p) for p in first.shared]
    other = tiny_model(name)  # of the same class in the same process: untouched
    assert type(other) is stock and not hasattr(other.config, "ffmerge")


def test_a_class_of_ones_own_is_merged_in_memory_with_a_warning():
    import transformers

    class Mine(transformers.LlamaForCausalLM):
        pass

    model = Mine(transformers.LlamaConfig(**FAMILIES["llama"].values, num_hidden_layers=3)).eval()
    made, config = ff.plan(model=model, layers="0-1", method="average"), type(model.config)
    with pytest.warns(UserWarning, match="merged in memory only: Mine is not a class of transformers itself"):
        ff.merge_(model, made)
    assert type(model) is Mine and type(model.config) is config and ff.shared_groups(model) == [("decoder", (0, 1))]
    assert not ff.is_merged(ff.expand_(model))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules_keep_their_class(name):
    model = tiny_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ff.merge_(model, ff.plan(model=model, layers="1-2", method="average"))
    assert type(model).__name__ == ALL[name].model and ff.is_merged(model)


def test_an_optimiser_has_one_state_per_shared_weight_and_the_tie_survives_steps():
    model = tiny_model("marian")
    ff.merge_(model, ff.plan(model=model, layers="0-3", method="average"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert len(optimiser.param_groups[0]["params"]) == len({id(p) for p in model.parameters()})
    for seed in range(2):
        model(**tiny_inputs(model, seed=seed)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert ff.shared_groups(model) == [("encoder", (0, 1, 2, 3)), ("decoder", (0, 1, 2, 3))]
    copied = copy.deepcopy(model)
    assert ff.shared_groups(copied) == ff.shared_groups(model)
    assert torch.equal(logits(copied, tiny_inputs(model)), logits(model, tiny_inputs(model)))


def test_generation_works_with_shared_ffns():
    model = tiny_model("llama")
    ff.merge_(model, ff.plan(model=model, layers="0-3", method="average"))
    ids = torch.tensor([[5, 6, 7]])
    made = model.generate(ids, max_new_tokens=5, do_sample=False)
    for length in range(3, made.shape[1]):
        assert logits(model, {"input_ids": made[:, :length]})[0, -1].argmax() == made[0, length]


def test_print_parameters_before_and_after(capsys):
    model = tiny_model("gpt2")
    total = sum(p.numel() for p in model.parameters())
    ff.print_parameters(model)
    assert f"parameters {total:,} of {total:,} (+0.0%)" in (before := capsys.readouterr().out) and "none" in before
    ff.merge_(model, ff.plan(model=model, layers="0+2,1+3", method="average"))
    ff.print_parameters(model)
    left = total - 2 * FAMILIES["gpt2"].parameters
    out = capsys.readouterr().out
    assert f"parameters {left:,} of {total:,} ({left / total - 1:+.1%})" in out
    assert "shared FFNs: decoder 0+2, decoder 1+3" in out


# ------------------------------------------------------------------------------------------------------------ refusals


def refuse(model, made, message, apply=ff.merge_):
    before, modules, stock, config = weights(model), dict(model.named_modules()), type(model), type(model.config)
    with pytest.raises(ff.FFMergeError, match=message) as error:
        apply(model, made)
    assert "\n" not in str(error.value)
    assert dict(model.named_modules()) == modules and (type(model), type(model.config)) == (stock, config)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters(remove_duplicate=False))


def enter(model, made):
    with merged(model, made, summary_of_unmerged(model)):
        raise AssertionError("not reached")


@pytest.mark.parametrize("apply", [ff.merge_, ff.merge, enter])
def test_a_plan_of_another_model_is_refused(apply):
    model = tiny_model("gpt2")
    for other in (tiny_model("gpt2", seed=1), tiny_model("gpt2", layers=3), tiny_model("llama")):
        made = ff.plan(model=other, layers="0-1", method="average")
        refuse(model, made, r"plan is of another model \(.*make it again from this model", apply)


@pytest.mark.parametrize("apply", [ff.merge_, ff.merge, enter])
def test_a_merged_model_is_refused(apply):
    model = tiny_model("gpt2")
    made = ff.plan(model=model, layers="0-1", method="average")
    ff.merge_(model, made)
    refuse(model, made, "merged already; start from the original, or call expand_ first", apply)


@pytest.mark.parametrize("apply", [ff.merge_, enter])
def test_ffns_whose_other_biases_or_dtypes_differ_are_refused(apply):
    model = tiny_model("opt")
    model.model.decoder.layers[2].fc2.bias = None
    made = ff.plan(model=model, layers="0-1,2-3", method="average")
    refuse(model, made, "FFNs decoder.2 and decoder.3 differ in parameters, dtype or device", apply)
    model = tiny_model("opt")
    made = ff.plan(model=model, layers="0-1,2-3", method="average")
    model.model.decoder.layers[3].fc1.bfloat16()
    refuse(model, made, "FFNs decoder.2 and decoder.3 differ in parameters, dtype or device", apply)


@pytest.mark.parametrize("change", ["width", "activation", "bias"])
def test_ffns_of_different_kinds_cannot_be_planned(change):
    model = tiny_model("opt")
    layer = model.model.decoder.layers[2]
    if change == "width":
        layer.fc1, layer.fc2 = nn.Linear(D_MODEL, 48), nn.Linear(48, D_MODEL)
    elif change == "activation":
        layer.activation_fn = nn.GELU()
    else:
        layer.fc1.bias = None
    with pytest.raises(ff.FFMergeError, match="FFNs decoder.1 and decoder.2 differ"):
        ff.plan(model=model, layers="1-3", method="average")
    ff.merge_(model, ff.plan(model=model, layers="0-1", method="average"))


def test_an_ffn_module_with_more_than_its_projections_is_refused():
    ff.register_family("Sequential", ff.FFNSpec("", "ffn.0", "ffn.2", module="ffn", activation="ffn.1"))
    model = nn.Sequential(*(nn.ModuleDict({"ffn": nn.Sequential(
        nn.Linear(D_MODEL, D_FF), nn.GELU(), nn.Linear(D_FF, D_MODEL), nn.LayerNorm(D_MODEL))}) for _ in range(2))
    )  # fmt: skip
    modules = dict(model.named_modules())
    with pytest.raises(ff.FFMergeError, match="has a parameter of shape .* besides its projections"):
        ff.merge_(model, ff.plan(model=model, layers="0-1", method="average"))
    assert dict(model.named_modules()) == modules


def test_a_group_knows_what_each_layer_becomes():
    """The meaning of a permutation: merged neuron j is the layer's neuron permutation[j] (paper A's col_ind)."""
    model = tiny_model("gpt2", layers=2)
    made = ff.plan(model=model, layers="0-1", method="average")
    shift = torch.arange(D_FF).roll(1)
    made.groups[0] = MergeGroup("decoder", (0, 1), 0, {0: torch.arange(D_FF), 1: shift}, {})
    a, b = (model.transformer.h[i].mlp.c_fc.bias.detach().clone() for i in (0, 1))
    ff.merge_(model, made)
    torch.testing.assert_close(model.transformer.h[1].mlp.c_fc.bias, (a + b[shift]) / 2)
