"""local_distill_(delta_rank=): the best first deltas, the right gradients, models that everything else can handle."""

import copy

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import ffmerge_fast as ff
from ffmerge_fast.merging.recover.deltas import _nearest, compute, nearest_deltas, unfused
from ffmerge_fast.models.ffn_weights import ffn_weights
from ffmerge_fast.ops.shared_ffn.weights import FFNWeights
from tests.helpers.tiny_models import D_FF, D_MODEL, logits, tiny_model
from tests.merging.recover.test_distill import FAMILIES, by_error_, members, pair
from tests.merging.search.test_proxy import apply, flows

NAMES = [name for name in FAMILIES if name != "transformer_encoder"]


def with_deltas(name, rank=3, steps=10, dtype=torch.float32, **options):
    """(model, teacher, batches)."""
    model, teacher, batches = pair(name, dtype=dtype)
    by_error_(model, teacher, batches, steps=steps, lr=3e-3, delta_rank=rank, **options)
    return model, teacher, batches


# ---------------------------------------------------------------------------------------------------- the first deltas


def left_over(delta, residual, shift, x):
    """Σ_x ‖(R − AB) x + s − c‖²."""
    missed = x @ (residual - delta.a @ delta.b).T
    return (missed if shift is None else missed + shift - delta.bias).square().sum().item()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (9, 9), (1, 14)])
@pytest.mark.parametrize("tokens", [200, 6])
def test_no_delta_of_the_rank_is_closer(shape, centred, tokens):
    g = torch.Generator().manual_seed(0)
    residual, shift = torch.randn(shape, generator=g).double(), torch.randn(shape[0], generator=g).double()
    x = (torch.randn(tokens, shape[1], generator=g) @ torch.randn(shape[1], shape[1], generator=g) + 3).double()
    shift = shift if centred else None
    for rank in (1, min(shape) // 2 + 1, min(shape)):
        delta = _nearest(x, (residual, shift), rank)
        assert delta.a.shape == (shape[0], rank) and delta.b.shape == (rank, shape[1])
        seen = x - x.mean(0) if centred else x
        best = torch.linalg.svdvals(residual @ seen.T)[rank:].square().sum().item()  # Eckart and Young
        found = left_over(delta, residual, shift, x)
        assert found == pytest.approx(best, rel=1e-9, abs=1e-9 * x.square().sum().item())
        assert delta.a.norm(dim=0).tolist() == pytest.approx(delta.b.norm(dim=1).tolist())
        for size in (1e-3, 1e-1):
            moved = [
                t if t is None else t + size * t.abs().max() * torch.randn(t.shape, generator=g).double() for t in delta
            ]
            assert left_over(type(delta)(*moved), residual, shift, x) > found


def test_without_weighting_by_the_inputs_it_would_be_worse():
    g = torch.Generator().manual_seed(0)
    residual = torch.randn(8, 20, generator=g).double()
    x = torch.randn(500, 20, generator=g).double() * torch.logspace(0, -3, 20, dtype=torch.float64)
    u, s, v = torch.linalg.svd(residual)
    plain = type(_nearest(x, (residual, None), 2))(u[:, :2] * s[:2], v[:2], None)
    assert left_over(_nearest(x, (residual, None), 2), residual, None, x) < 0.6 * left_over(plain, residual, None, x)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
def test_neurons_are_aligned_before_weights_are_compared(name):
    """The original is the shared FFN, permuted, plus something of rank 2: deltas of rank 2 give it back."""
    model = tiny_model(name, layers=2).double()
    ours, other = ff.find_ffns(model)
    g = torch.Generator().manual_seed(0)
    shared, theirs = ffn_weights(model, ours), ffn_weights(model, other)
    order = torch.randperm(D_FF, generator=g)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x, right = normal(400, D_MODEL), normal(2, D_MODEL)  # of a fused projection both halves have one B
    with torch.no_grad():
        for own, their in ((shared.up, theirs.up), (shared.gate, theirs.gate)):
            if own is not None:
                their.copy_((own + 0.1 * normal(D_FF, 2) @ right)[order])
        theirs.down.copy_((shared.down + 0.1 * normal(D_MODEL, 2) @ normal(2, D_FF))[:, order])
        deltas = nearest_deltas(ours, theirs, shared, x, 2)
        found = compute(x, shared, unfused(deltas) if ours.fused else deltas, ours.activation)
    assert set(deltas) == ({"up", "down"} if ours.fused or not ours.gated else {"up", "gate", "down"})
    torch.testing.assert_close(found, apply(model, other, x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_gives_the_original_model_back(name):
    model, teacher, batches = pair(name, count=10)
    group = by_error_(model, teacher, batches, steps=1, lr=1e-30, delta_rank=D_MODEL).groups[0]
    assert group.before > 0.1 and group.history[0][1] < 1e-20
    torch.testing.assert_close(logits(model, batches[0]), logits(teacher, batches[0]), atol=1e-10, rtol=0)
    for ffn in ff.find_ffns(model):
        x, y, _ = flows(teacher, batches[:1], ffn)
        torch.testing.assert_close(apply(model, ffn, x), y, atol=1e-10, rtol=0)


# ------------------------------------------------------------------------------------------------------- the training


def reference_start_(model, teacher, stack, layers, of_ranks, rank):
    """The first deltas by formulas of our own, as full matrices: [{"up": (ΔW, Δb), ...}, ...] of each layer."""
    found = []
    for ffn in members(teacher, stack, layers):
        parts = [flows(teacher, batches, ffn)[0] for batches in of_ranks]
        x = torch.cat([part[: len(part) - -(-len(part) // 10)] for part in parts])
        ours, theirs = (ffn_weights(m, f) for m, f in ((model, members(model, stack, layers)[0]), (teacher, ffn)))
        features = theirs.hidden(x, ffn.activation).detach()
        ours, theirs = ours._asdict(), theirs._asdict()
        ones = x - x.mean(0) if ffn.bias else x
        keys = [key for key in ("gate", "up") if ours[key] is not None]
        scores = torch.zeros(D_FF, D_FF, dtype=torch.float64)
        with torch.no_grad():
            for key in keys:
                scores += (ones @ ours[key].T).T @ (ones @ theirs[key].T) / (ones @ theirs[key].T).square().sum()
            weights = theirs["down"] * features.square().mean(0)
            scores += ours["down"].T @ weights / (weights * theirs["down"]).sum()
            order = torch.as_tensor(linear_sum_assignment(scores.numpy(), maximize=True)[1])
            h = features[:, order]
            rows = {"up": keys} if ffn.fused else {key: [key] for key in keys}
            deltas = {}
            for name, parts in (rows | {"down": ["down"]}).items():
                axis = 1 if name == "down" else 0
                residual = torch.cat([theirs[key].index_select(axis, order) - ours[key] for key in parts])
                seen = h if name == "down" else x
                middle = seen.mean(0) if ffn.bias else torch.zeros(seen.shape[1], dtype=torch.float64)
                u = torch.linalg.svd(residual @ (seen - middle).T, full_matrices=False).U[:, :rank]
                change = u @ u.T @ residual
                shift = None
                if ffn.bias:
                    biases = [theirs[f"{k}_bias"] if name == "down" else theirs[f"{k}_bias"][order] for k in parts]
                    shift = torch.cat(biases) - torch.cat([ours[f"{k}_bias"] for k in parts])
                    shift += (residual - change) @ middle
                deltas[name] = (change, shift)
        found.append(deltas)
    return found


def outputs(model, ffn, x, deltas):
    """A layer's FFN with deltas given as full matrices."""
    w = ffn_weights(model, ffn)._asdict()
    if ffn.fused:
        (gate, up), (gate_bias, up_bias) = deltas["up"][0].chunk(2), (None, None)
        deltas = {"gate": (gate, gate_bias), "up": (up, up_bias), "down": deltas["down"]}
    for name, (change, shift) in deltas.items():
        w[name] = w[name] + change
        if shift is not None:
            w[f"{name}_bias"] = w[f"{name}_bias"] + shift
    return nn.functional.linear(FFNWeights(**w).hidden(x, ffn.activation), w["down"], w["down_bias"])


def shares_at_start(model, teacher, of_ranks, rank):
    """{stack: share of the held-out outputs missed with the first deltas}."""
    shares = {}
    for stack, layers in ff.shared_groups(model):
        starts = reference_start_(model, teacher, stack, layers, of_ranks, rank)
        missed = total = 0.0
        for ffn, deltas in zip(members(model, stack, layers), starts, strict=True):
            parts = [flows(teacher, batches, ffn) for batches in of_ranks]
            w = 1 / torch.cat([out for _, _, out in parts]).var(0, correction=0).mean()
            x, y = (torch.cat([p[i][len(p[i]) - -(-len(p[i]) // 10) :] for p in parts]) for i in (0, 1))
            with torch.no_grad():
                missed += w * (outputs(model, ffn, x, deltas) - y).square().sum()
            total += w * (y - y.mean(0)).square().sum()
        shares[stack] = (missed / total).item()
    return shares


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_at_the_best_deltas_and_improves_on_them(name):
    model, teacher, batches = pair(name, count=10)
    expected = shares_at_start(model, teacher, [batches], rank=3)
    plain = by_error_(copy.deepcopy(model), teacher, batches, steps=30, lr=3e-3)
    report = by_error_(model, teacher, batches, steps=30, lr=3e-3, delta_rank=3)
    for group, without in zip(report.groups, plain.groups, strict=True):
        assert group.history[0] == (0, pytest.approx(expected[group.stack], rel=1e-6))
        assert group.before == without.before and group.after < 0.9 * group.history[0][1]
        assert group.after < 0.7 * without.after


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "vit", "marian"])
def test_gradients_are_those_of_full_weights(name):
    """Of one step of Adam, from the gradients that autograd gives through W + A B."""
    model, teacher, batches = pair(name)
    start, lr = copy.deepcopy(model), 1e-7
    by_error_(start, teacher, batches, steps=1, lr=1e-30, delta_rank=3, batch_tokens=10_000)
    by_error_(model, teacher, batches, steps=1, lr=lr, delta_rank=3, batch_tokens=10_000)
    for stack, layers in ff.shared_groups(start):
        errors, weights = [], []
        for ffn in members(start, stack, layers):
            x, y, out = flows(teacher, batches, ffn)
            cut = len(x) - -(-len(x) // 10)
            full = {}
            for role, path in ffn.projections.items():
                module = start.get_submodule(path)
                full[role] = (module.delta_a @ module.delta_b, module.delta_bias)
            missed = outputs(start, ffn, x[:cut], full) - y[:cut]
            weights.append(1 / out.var(0, correction=0).mean())
            errors.append(weights[-1] * missed.square().mean())
        (sum(errors) / (sum(weights) / len(weights))).backward()
    moved = dict(model.named_parameters())
    trained = [n for n, p in start.named_parameters() if p.grad is not None]
    assert {n for n in trained if "delta" in n} == {n for n in moved if "delta" in n} != set()
    for n in trained:
        gradient = start.get_parameter(n).grad
        change = moved[n] - start.get_parameter(n)
        torch.testing.assert_close(change, -lr * gradient / (gradient.abs() + 1e-8), atol=1e-6 * lr, rtol=0)


def test_a_higher_rank_is_closer_and_counted():
    after = []
    for rank in (0, 1, 4, 8):
        model, teacher, batches = pair("gpt2", count=10)
        size = sum(p.numel() for p in model.parameters())
        group = by_error_(model, teacher, batches, steps=40, lr=3e-3, delta_rank=rank).groups[0]
        after.append(group.after)
        wanted = 3 * 2 * rank * (D_MODEL + D_FF) + 3 * (D_FF + D_MODEL) * bool(rank)
        assert (group.delta_rank, group.delta_parameters) == (rank, wanted)
        assert sum(p.numel() for p in model.parameters()) == size + wanted
    assert after == sorted(after, reverse=True) and after[-1] < 0.2 * after[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_ffns_change_and_everything_stays_as_it_was(dtype):
    model, teacher, batches = pair("marian", dtype=dtype)
    model.train()
    before, original = copy.deepcopy(model), copy.deepcopy(teacher)
    groups, generator = ff.shared_groups(model), torch.get_rng_state()
    by_error_(model, teacher, batches, steps=20, delta_rank=2)
    assert ff.shared_groups(model) == groups and all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    kept = dict(model.named_parameters())
    moved = {n for n, p in before.named_parameters() if not torch.equal(p, kept[n])}
    shared = {f"model.{s}.layers.0.fc{i}.{w}" for s, _ in groups for i in (1, 2) for w in ("weight", "bias")}
    assert moved == shared and kept.keys() >= shared
    assert {n for n in kept if n not in dict(before.named_parameters())} == {
        f"model.{s}.layers.{i}.fc{j}.delta_{w}"
        for s, _ in groups for i in (0, 1, 2) for j in (1, 2) for w in ("a", "b", "bias")
    }  # fmt: skip
    assert {p.dtype for p in kept.values()} == {dtype} and all(kept[n].requires_grad for n in kept if "delta" in n)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), original.parameters(), strict=True))


def test_a_seed_gives_one_result():
    first, other, third = (with_deltas("gpt2", batch_tokens=16, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[n], other[n]) for n in first)
    assert any(not torch.equal(first[n], third[n]) for n in first)
