"""Models with low-rank deltas: what can be done with them, and what says that it cannot."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ffmerge_fast as ff
from tests.helpers.tiny_models import ALL, D_FF, D_MODEL, logits, tiny_inputs, tiny_model
from tests.merging.recover.test_deltas import NAMES, with_deltas
from tests.merging.recover.test_distill import pair
from tests.merging.search.test_proxy import flows


def projections(model):
    """{path: module} of every layer's projections that have deltas."""
    paths = (path for f in ff.find_ffns(model) for path in f.projections.values())
    return {path: m for path in paths if hasattr(m := model.get_submodule(path), "delta_a")}


# -------------------------------------------------------------------------------------------------- what can be done


@pytest.mark.parametrize("name", NAMES)
def test_expand_gives_the_stock_model_of_the_same_function(name):
    model, teacher, batches = with_deltas(name, dtype=torch.float64)
    before, layers = logits(model, batches[0]), projections(model)
    generator = torch.get_rng_state()
    weights = {p: (m.weight.T if m.transposed else m.weight) + m.delta_a @ m.delta_b for p, m in layers.items()}
    assert len(layers) == 3 * len(ALL[name].stacks) * len(ff.find_ffns(teacher)[0].projections)
    assert ff.expand_(model) is model and type(model) is type(teacher) and not ff.is_merged(model)
    assert list(model.state_dict()) == list(teacher.state_dict()) and not projections(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in teacher.modules()]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in teacher.parameters())
    torch.testing.assert_close(logits(model, batches[0]), before, atol=1e-12, rtol=0)
    for path, weight in weights.items():
        module = model.get_submodule(path)
        assert torch.equal(module.weight.T if hasattr(module, "nf") else module.weight, weight)
        assert not module.training and module.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)


def test_low_precision_deltas_are_multiplied_out_in_float32_and_rounded_once():
    model = with_deltas("llama", dtype=torch.bfloat16)[0]
    wide = {p: (m.weight.float() + m.delta_a.float() @ m.delta_b.float()) for p, m in projections(model).items()}
    ff.expand_(model)
    for path, weight in wide.items():
        assert torch.equal(model.get_submodule(path).weight, weight.to(torch.bfloat16))


def test_a_layer_alone_is_that_layer():
    """Each layer's FFN, called on its own and in any order, has its own delta; the weights are one parameter."""
    model, teacher, batches = with_deltas("gpt2", dtype=torch.float64)
    x = flows(teacher, batches[:1], ff.find_ffns(teacher)[0])[0]
    mlps = [block.mlp for block in model.transformer.h[:3]]
    assert len({id(mlp) for mlp in mlps}) == 3 and len({id(mlp.c_fc.weight) for mlp in mlps}) == 1
    alone = [mlp(x) for mlp in mlps]
    assert all(torch.equal(mlps[i](x), alone[i]) for i in (2, 0, 1))
    assert min((alone[i] - alone[j]).abs().max() for i in range(3) for j in range(i)) > 0.1


def test_training_adds_up_in_the_weights_and_keeps_the_tie():
    model, _, batches = with_deltas("gpt2")
    full = ff.expand_(copy.deepcopy(model))
    for one in (model, full):
        one.eval()
        one(**batches[0]).loss.backward()
    of_layers = [block.mlp.c_fc.weight.grad for block in full.transformer.h[:3]]
    torch.testing.assert_close(model.transformer.h[0].mlp.c_fc.weight.grad, sum(of_layers), atol=1e-6, rtol=1e-4)
    for block, gradient in zip(model.transformer.h, of_layers, strict=False):
        fc = block.mlp.c_fc
        torch.testing.assert_close(fc.delta_a.grad, gradient.T @ fc.delta_b.T, atol=1e-6, rtol=1e-4)
    before = logits(model, batches[0])
    ff.finetune(model, batches, steps=2, lr=1e-2)
    assert ff.shared_groups(model) == [("decoder", (0, 1, 2))]
    assert not torch.equal(logits(model, batches[0]), before)


def test_copies_and_pickles():
    model, _, batches = with_deltas("gpt2")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert ff.shared_groups(other) == ff.shared_groups(model)
        assert torch.equal(logits(other, batches[0]), logits(model, batches[0]))
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


def test_compiles_whole():
    model, _, batches = with_deltas("llama")
    inputs = {k: v for k, v in batches[0].items() if k != "labels"}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs), atol=1e-6, rtol=0)


def test_parameters_are_printed(capsys):
    model, teacher, _ = with_deltas("gpt2")
    ff.print_parameters(model)
    full, stored = (sum(p.numel() for p in m.parameters()) for m in (teacher, model))
    extra = 3 * (2 * 3 + 1) * (D_MODEL + D_FF)
    out = capsys.readouterr().out
    assert f"parameters {stored:,} of {full:,} ({stored / full - 1:+.1%})" in out
    assert f"shared FFNs: decoder 0+1+2, with deltas of rank 3: {extra:,}" in out


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(delta_rank=-1), r"delta_rank: got -1, wanted 0 \(none\) to 16"),
        (dict(delta_rank=2.5), r"delta_rank: got 2.5, wanted 0 \(none\) to 16"),
        (dict(delta_rank=17), r"delta_rank: got 17, wanted 0 \(none\) to 16, the width of decoder.0"),
        (dict(model=tiny_model("gpt2")), "distill: this model has no merged FFNs"),
        (dict(model=with_deltas("gpt2")[0]), "distill: this model's layers have deltas of rank 3 already"),
        (dict(model=with_deltas("gpt2")[0], delta_rank=0), "distill: this model's layers have deltas of rank 3 alr"),
        (dict(lr=1e30), "decoder 0-2 is "),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(changes, message):
    model, teacher, batches = pair("gpt2", dtype=torch.float32)
    arguments = dict(model=model, teacher=teacher, batches=batches, steps=10, delta_rank=3) | changes
    before = copy.deepcopy(arguments["model"])
    with pytest.raises(ff.FFMergeError, match=message) as error:
        ff.local_distill_(**arguments)
    assert "\n" not in str(error.value)
    after = arguments["model"]
    assert type(after) is type(before) and list(after.state_dict()) == list(before.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))


class Quantised(nn.Linear):
    """As libraries make them: a subclass, by whose own forward the weight is unpacked."""


def test_quantised_projections_are_refused():
    model, teacher, batches = pair("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Quantised
    with pytest.raises(ff.FFMergeError, match="up_proj is a Quantised of Parameter, wanted a plain nn.Linear"):
        ff.local_distill_(model, teacher, batches, delta_rank=2)
    model, teacher, batches = pair("llama")
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ff.FFMergeError, match="up_proj is quantised"):
        ff.local_distill_(model, teacher, batches, delta_rank=2)


def test_a_block_that_reads_the_weights_itself_is_refused():
    model, teacher, batches = pair("transformer_encoder")
    with pytest.raises(ff.FFMergeError, match="layers.0 is a torch.nn.TransformerEncoderLayer, whose fast path"):
        ff.local_distill_(model, teacher, batches, delta_rank=2)


def test_inputs_that_are_not_finite_are_named():
    model, teacher, batches = pair("vit")
    batches[0]["pixel_values"][:] = float("nan")
    with pytest.raises(ff.FFMergeError, match="the error of encoder 0-2 is nan at step 0: its inputs"):
        ff.local_distill_(model, teacher, batches, delta_rank=2)
    assert all(p.isfinite().all() for p in model.parameters()) and not projections(model)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, t, b: ff.refit_(m, t, b), "refit: this model's layers have deltas of rank 3 already"),
        (lambda m, t, b: ff.local_distill_(t, m, b), "distill: this model has no merged FFNs"),
        (lambda m, t, b: ff.merge_(m, ff.plan(layers="0-1", method="average", model=m)), "merged already"),
        (lambda m, t, b: ff.tie_without_average(m, "0-1"), "merged already"),
        (lambda m, t, b: ff.collect(m, b, window=2), "merged already"),
        (lambda m, t, b: ff.project(m, keep=0.5), "project: layers of this model have deltas of rank 3; call expand_"),
        (lambda m, t, b: ff.importance(m, b), "project: layers of this model have deltas of rank 3; call expand_"),
        (lambda m, t, b: ff.hard_prune(m, keep=0.5), "have deltas of rank 3; call expand_"),
    ],
)
def test_what_cannot_handle_deltas_says_so(call, message):
    model, teacher, batches = with_deltas("gpt2")
    with pytest.raises(ff.FFMergeError, match=message) as error:
        call(model, teacher, batches)
    assert "\n" not in str(error.value)


def test_the_report_prints_what_deltas_cost():
    model, teacher, batches = pair("gpt2")
    report = ff.local_distill_(model, teacher, batches, steps=5, delta_rank=2)
    header, _, row = str(report).splitlines()
    assert header.split("  ")[-1].strip() == "delta parameters"
    assert row.split()[-2:] == ["2", str(report.groups[0].delta_parameters)]
    assert report.to_dict()["groups"][0]["delta_parameters"] == 3 * 5 * (D_MODEL + D_FF)


def test_models_of_other_tools_are_merged_in_memory_with_deltas():
    """A plain nn.Module has no config; its state dict holds the deltas."""
    model, _, batches = with_deltas("sequential")
    state = {n: t for n, t in model.state_dict().items() if "delta" in n and "shared" not in n}
    assert len(state) == 3 * 2 * 3
    inputs = tiny_inputs(model)
    before = logits(model, inputs)
    model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, inputs), before)
