"""refit_(private=k): neurons of each layer's own beside the shared ones: chosen, fitted, trained, saved, expanded."""

import copy
import json

import pytest
import torch
from torch import nn

import ffmerge_fast as ff
from ffmerge_fast.calibration.least_squares import eliminated
from tests.helpers.tiny_models import ALL, D_FF, D_MODEL, logits, tiny_inputs, tiny_model
from tests.merging.recover.test_refit import FAMILIES, RIDGE, hidden, pair, recorded

K = 4


def with_neurons(name, k=K, dtype=torch.float64, **options):
    """(model, teacher, batches, report)."""
    model, teacher, batches = pair(name, dtype=dtype)
    report = ff.refit_(model, teacher, batches, private=k, **options)
    return model, teacher, batches, report


def own(model):
    """{path: projection} of those with neurons of their own."""
    paths = (path for f in ff.find_ffns(model) for path in f.projections.values())
    return {path: m for path in paths if hasattr(m := model.get_submodule(path), "private_weight")}


def missed(model, teacher, batches, stack, layers, unmerged_model=None):
    """Σ_i w_i mean ‖FFN_i(x_i) − y_i‖² on the teacher's own inputs, by the model's own modules."""
    total = 0.0
    for ffn in (f for f in ff.find_ffns(teacher) if f.stack == stack and f.index in layers):
        x, y, out = recorded(teacher, batches, ffn)
        with torch.no_grad():
            given = model.get_submodule(ffn.down_path)(hidden_of(model, ffn, x))
        total += (given - y).square().sum().item() / out.var(0, correction=0).mean().item()
    return total


def hidden_of(model, ffn, x):
    """What W_down gets, of shared and own neurons, [tokens, d_ff + k]."""
    if not ffn.fused:
        return hidden(model, ffn, x)
    gate, up = model.get_submodule(ffn.up_path)(x).chunk(2, -1)
    return nn.functional.silu(gate) * up


# ------------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_the_least_squares_solution(name):
    """No other W_down, shared or own, nor bias, has a smaller penalised error: the gradient is zero there."""
    model, teacher, batches, _ = with_neurons(name)
    for stack, layers in ff.shared_groups(model):
        ffns = [f for f in ff.find_ffns(teacher) if f.stack == stack and f.index in layers]
        merged = pair(name)[0]
        start = merged.get_submodule(ffns[0].down_path).weight.detach()
        rows = [recorded(teacher, batches, ffn) for ffn in ffns]
        w = torch.tensor([1 / out.var(0, correction=0).mean() for _, _, out in rows])
        w = w / w.mean()
        down = [model.get_submodule(f.down_path) for f in ffns]
        with torch.enable_grad():
            error, penalty = 0.0, 0.0
            for weight, module, ffn, (x, y, _) in zip(w, down, ffns, rows, strict=True):
                both = hidden_of(model, ffn, x).detach()
                error = error + weight * (module(both) - y).square().sum()
                centred = both - both.mean(0) if module.bias is not None else both
                squares = centred.square().sum(0)
                penalty = penalty + weight * RIDGE * squares[D_FF:].mean() * module.private_weight.square().sum()
            shift = RIDGE * sum(
                weight * centre(hidden_of(model, ffn, x).detach()[:, :D_FF], module.bias).square().sum(0).mean()
                for weight, module, ffn, (x, _, _) in zip(w, down, ffns, rows, strict=True)
            )
            penalty = penalty + shift * (down[0].weight - start).square().sum()
            wanted = [down[0].weight, *(p for m in down for p in (m.private_weight, m.private_bias) if p is not None)]
            scale = error.item()
            gradients = torch.autograd.grad(error + penalty, wanted)
        assert max(g.abs().max().item() for g in gradients) < 1e-6 * scale


def centre(x, bias):
    return x if bias is None else x - x.mean(0)


@pytest.mark.parametrize("name", FAMILIES)
def test_more_neurons_miss_less_and_the_report_says_what_is_missed(name):
    model, teacher, batches = pair(name)
    found = []
    for k in (0, 2, D_FF):
        made = copy.deepcopy(model)
        report = ff.refit_(made, teacher, batches, private=k, ridge=1e-6)
        groups = ff.shared_groups(made)
        found.append([missed(made, teacher, batches, *group) for group in groups])
        before = [missed(model, teacher, batches, *group) for group in groups]
        for g, old, new in zip(report.groups, before, found[-1], strict=True):
            assert g.after / g.before == pytest.approx(new / old, rel=1e-4, abs=1e-7)
            assert g.private_neurons == k and g.private_parameters == parameters(made, g, k)
    assert all(
        b < a for before, after in zip(found, found[1:], strict=False) for a, b in zip(before, after, strict=True)
    )
    assert max(a / b for a, b in zip(found[-1], before, strict=True)) < 1e-6  # all of a layer's neurons: the original


def parameters(model, group, k):
    ffn = next(f for f in ff.find_ffns(model) if f.stack == group.stack)
    halves = 2 if ffn.gated else 1
    each = k * (halves * D_MODEL + D_MODEL) + ((halves * k + D_MODEL) if ffn.bias else 0)
    return len(group.layers) * each if k else 0


def test_planted_neurons_are_found():
    """Layers that differ in two neurons only get these two back, and with them everything."""
    teacher = tiny_model("gpt2", layers=3).double()
    first = teacher.transformer.h[0].mlp
    with torch.no_grad():
        for i, block in enumerate(teacher.transformer.h[1:], start=1):
            kept = copy.deepcopy(first.state_dict())
            own_rows = block.mlp.c_fc.weight[:, :2] + 1
            block.mlp.load_state_dict(kept)
            block.mlp.c_fc.weight[:, 5 * i : 5 * i + 2] = own_rows
    model = ff.merge(teacher, ff.plan(layers="0-2", method="average", model=teacher))
    batches = [tiny_inputs(teacher, batch=4, length=12, seed=i) for i in range(6)]
    ff.refit_(model, teacher, batches, private=2, ridge=1e-9)
    for i, block in enumerate(model.transformer.h[1:], start=1):
        rows = teacher.transformer.h[i].mlp.c_fc.weight.T[5 * i : 5 * i + 2]
        torch.testing.assert_close(block.mlp.c_fc.private_weight.detach(), rows.detach(), atol=0, rtol=0)


def test_elimination_leaves_out_what_costs_least():
    """Of orthogonal inputs the largest effects stay; of two equal ones either goes, not both."""
    g = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(50, 6, generator=g).double()).Q
    x = torch.cat([x, x[:, :1] + 1e-3 * torch.randn(50, 1, generator=g).double()], 1)
    y = x[:, :6] @ torch.diag(torch.tensor([5.0, 0.1, 4, 0.2, 3, 0.3]).double())
    kept = eliminated(x.T @ x, x.T @ y, 3, 1e-6, "x", 50).tolist()
    assert kept in ([0, 2, 4], [2, 4, 6])


@pytest.mark.parametrize("inputs, rounds", [("merged", 0), ("original", 2)])
def test_rounds_go_on_from_the_neurons(inputs, rounds):
    """On the merged model's own stream; the best by the given score is kept."""
    model, teacher, batches = pair("gpt2")

    def evaluate(m):
        return sum((logits(m, b) - logits(teacher, b)).square().sum().item() for b in batches)

    report = ff.refit_(
        model, teacher, batches, private=K, inputs=inputs, rounds=rounds, weights="equal", evaluate=evaluate
    )
    assert len(report.scores) == 2 + rounds and report.best == report.scores.index(min(report.scores))
    assert evaluate(model) == pytest.approx(min(report.scores))


# ----------------------------------------------------------------------------------------------- what the model can do


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "sequential"])
def test_folders_and_expansion(name, tmp_path):
    model, teacher, _, _ = with_neurons(name, dtype=torch.float32)
    inputs = tiny_inputs(model)
    ff.save_pretrained(model, tmp_path / "folder")
    loaded = ff.from_pretrained(tmp_path / "folder")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs)) and len(own(loaded)) == len(own(model)) > 0
    checked = ff.verify(tmp_path / "folder")
    assert checked["logit_difference"] == 0.0 and {g["private_neurons"] for g in checked["groups"]} == {K}
    before = ff.shared_groups(loaded)
    expanded = ff.expand_(loaded)
    assert type(expanded) is type(teacher) and not ff.is_merged(expanded) and not own(expanded) and before
    stacks = {stack for stack, _ in before}
    assert {f.d_ff for f in ff.find_ffns(expanded) if f.stack in stacks} == {D_FF + K}
    torch.testing.assert_close(logits(expanded, inputs), logits(model, inputs), atol=1e-5, rtol=1e-5)
    expanded.save_pretrained(tmp_path / "full")
    again = ff.from_pretrained(tmp_path / "full")
    assert torch.equal(logits(again, inputs), logits(expanded, inputs)) and type(again) is type(teacher)


def test_folder_of_a_plain_module(tmp_path):
    model, _, batches, _ = with_neurons("sequential", dtype=torch.float32)
    ff.save_pretrained(model, tmp_path / "folder")
    fresh = ff.from_pretrained(tmp_path / "folder", model=tiny_model("sequential", layers=4, seed=1))
    assert torch.equal(logits(fresh, batches[0]), logits(model, batches[0]))
    before = logits(model, batches[0])
    torch.testing.assert_close(logits(ff.expand_(model), batches[0]), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "marian"])
def test_distillation_trains_the_neurons_along(name):
    model, teacher, batches, _ = with_neurons(name)
    before = {path: m.private_weight.clone() for path, m in own(model).items()}
    report = ff.local_distill_(model, teacher, batches, steps=30, lr=1e-3, judge="error")
    assert all(g.after < g.before for g in report.groups) and min(g.best for g in report.groups) > 0
    assert all(not torch.equal(m.private_weight, before[path]) for path, m in own(model).items())
    assert ff.shared_groups(model) == ff.shared_groups(pair(name)[0])


def test_distillation_judges_the_model_that_it_leaves():
    """The loss by which the best step is chosen is that of the merged model with what is trained in its place."""
    model, teacher, batches, _ = with_neurons("gpt2")
    report = ff.local_distill_(model, teacher, batches * 4, steps=20, lr=1e-3, judge="loss")
    (group,) = report.groups
    held = [b for i, b in enumerate(batches * 4) if i % 10 == 1]
    labels = [int((b["labels"] != -100).sum()) for b in held]
    with torch.no_grad():
        losses = [model(**b).loss.item() for b in held]
    found = sum(n * x for n, x in zip(labels, losses, strict=True)) / sum(labels)
    assert found == pytest.approx(dict(group.losses)[group.best], rel=1e-9)


def test_finetuning_a_copy_and_compiling():
    model, _, batches, _ = with_neurons("llama", dtype=torch.float32)
    inputs = {k: v for k, v in batches[0].items() if k != "labels"}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs), atol=1e-6, rtol=0)
    other = copy.deepcopy(model)
    ff.finetune(other, batches, steps=2, lr=1e-2)
    assert ff.shared_groups(other) == ff.shared_groups(model)
    assert all(not torch.equal(m.private_weight, own(model)[path].private_weight) for path, m in own(other).items())


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "private, message",
    [
        (-1, r"private: got -1, wanted 0 \(none\) to "),
        (2.5, r"private: got 2.5, wanted 0 \(none\) to "),
        (D_FF + 1, rf"private: got {D_FF + 1}, wanted 0 \(none\) to {D_FF}, the width of decoder.0"),
    ],
)
def test_bad_numbers_are_refused(private, message):
    model, teacher, batches = pair("gpt2")
    with pytest.raises(ff.FFMergeError, match=message):
        ff.refit_(model, teacher, batches, private=private)
    assert not own(model)


def test_neurons_are_not_given_twice_nor_deltas_beside_them():
    model, teacher, batches, _ = with_neurons("gpt2")
    for call in (
        lambda: ff.refit_(model, teacher, batches),
        lambda: ff.local_distill_(model, teacher, batches, delta_rank=2),
    ):
        with pytest.raises(ff.FFMergeError, match=f"have {K} neurons of its own for each layer already"):
            call()
    with pytest.raises(ff.FFMergeError, match="call expand_ first"):
        ff.project(model, 0.5)


def test_what_float16_cannot_hold_changes_nothing():
    model, teacher, batches = pair("gpt2", dtype=torch.float32)
    with torch.no_grad():
        for block in teacher.transformer.h:
            block.mlp.c_proj.weight *= 1e7
    model = model.half()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ff.FFMergeError, match="goes beyond torch.float16"):
        ff.refit_(model, teacher, batches, private=K)
    assert not own(model) and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_an_edited_number_of_neurons_is_found(tmp_path):
    model, _, _, _ = with_neurons("gpt2", dtype=torch.float32)
    ff.save_pretrained(model, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["ffmerge"]["groups"][0]["private_neurons"] = 2
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ff.FFMergeError, match="config.json is not what was saved"):
        ff.verify(tmp_path / "folder")
    with pytest.raises(ff.FFMergeError, match="has other shapes"):
        ff.from_pretrained(tmp_path / "folder", check=False)


def test_accelerate_leaves_such_layers_alone():
    model, _, batches, _ = with_neurons("llama", dtype=torch.float32)
    before = logits(model, batches[0])
    with pytest.warns(UserWarning, match="low-rank deltas or neurons of its own"):
        ff.accelerate_(model)
    torch.testing.assert_close(logits(model, batches[0]), before, atol=1e-5, rtol=1e-5)


def test_all_families_are_tried():
    assert set(FAMILIES) <= set(ALL)
