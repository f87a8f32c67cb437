"""The assignment op: optimal, certified, deterministic; errors."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

import ffmerge_fast as ff
from ffmerge_fast.ops.assignment import op, reference


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def is_permutation(p):
    return torch.equal(p.sort(-1).values, torch.arange(p.shape[-1]).expand_as(p))


@pytest.mark.parametrize("d", [1, 63, 100, 431])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("maximize", [True, False])
def test_equals_scipy_and_is_certified(d, dtype, maximize):
    scores = (noise(d, d) * 2 - 1).to(dtype)
    result = ff.ops.assign(scores, maximize=maximize)
    rows, columns = linear_sum_assignment(scores.double().numpy(), maximize=maximize)
    assert is_permutation(result.permutation) and result.permutation.dtype == torch.int64
    assert result.objective == pytest.approx(scores.double().numpy()[rows, columns].sum(), rel=1e-12)
    assert isinstance(result.objective, float) and 0 <= result.gap < 1e-12


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5).flatmap(lambda d: arrays(np.float32, (d, d), elements=st.floats(-1e3, 1e3, width=32))))
def test_equals_brute_force(matrix):
    d = len(matrix)
    best = max(sum(float(matrix[i, p[i]]) for i in range(d)) for p in permutations(range(d)))
    result = ff.ops.assign(torch.from_numpy(matrix))
    assert result.objective == pytest.approx(best, rel=1e-12, abs=1e-9)
    assert result.gap < 1e-11


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 3), st.integers(0, 10**6))
def test_gap_bounds_what_a_worse_permutation_loses(d, levels, seed):
    scores = noise(d, d, seed=seed)
    if levels:  # heavy ties
        scores = (scores * levels).round()
    best = ff.ops.assign(scores)
    worse = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    objective = scores[torch.arange(d), worse].double().sum().item()
    gap = reference.gap(scores[None], worse[None], True).item()
    assert best.objective - objective <= gap * max(abs(objective), scores.max().item()) + 1e-9
    assert best.gap < 1e-11


def test_recovers_a_planted_permutation_of_correlated_features():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 100, generator=g)
    planted = torch.randperm(100, generator=g)
    y = torch.empty_like(x)
    y[:, planted] = x + 0.2 * torch.randn(500, 100, generator=g)
    state = ff.CorrelationState({"a": 100, "b": 100}, [("a", "b")])
    ff.ops.correlation_accumulate_(state, {"a": x, "b": y})
    assert torch.equal(ff.ops.assign(state.correlation("a", "b")).permutation, planted)


def test_batch_is_each_matrix_alone():
    scores = noise(3, 63, 63)
    batch = ff.ops.assign(scores)
    alone = [ff.ops.assign(matrix) for matrix in scores]
    assert torch.equal(batch.permutation, torch.stack([a.permutation for a in alone]))
    assert batch.objective == [a.objective for a in alone] and batch.gap == [a.gap for a in alone]
    empty = ff.ops.assign(torch.empty(0, 4, 4))
    assert empty.permutation.shape == (0, 4) and empty.objective == empty.gap == []
    assert ff.ops.assign(torch.empty(0, 0)).objective == 0.0


def test_ties_and_dead_neurons_are_deterministic():
    assert torch.equal(ff.ops.assign(torch.zeros(50, 50)).permutation, torch.arange(50))
    scores = noise(80, 80)
    scores[10:30] = 0
    scores[:, 5:25] = 0
    first, second = ff.ops.assign(scores), ff.ops.assign(scores.clone())
    assert torch.equal(first.permutation, second.permutation) and first.gap < 1e-12


def test_non_contiguous_scores_stay_untouched():
    scores = noise(63, 63)
    kept = scores.clone()
    transposed = ff.ops.assign(scores.T)
    assert transposed.objective == pytest.approx(ff.ops.assign(scores).objective, rel=1e-12)
    assert torch.equal(transposed.permutation, ff.ops.assign(scores.T.contiguous()).permutation)
    assert torch.equal(scores, kept)
    wide = noise(63, 126)
    assert torch.equal(ff.ops.assign(wide[:, ::2]).permutation, ff.ops.assign(wide[:, ::2].contiguous()).permutation)


@pytest.mark.parametrize(
    "scores, message",
    [
        (torch.tensor([[0.0, torch.nan], [1.0, 0.0]]), "NaN or Inf"),
        (torch.tensor([[0.0, torch.inf], [1.0, 0.0]]), "NaN or Inf"),
        (torch.zeros(2, 3), r"got shape \[2, 3\], want \[d, d\]"),
        (torch.zeros(4), r"got shape \[4\]"),
        (torch.zeros(2, 2, dtype=torch.int64), "got torch.int64, want a floating-point"),
        ([[1.0]], "got list"),
    ],
)
def test_bad_scores(scores, message):
    with pytest.raises(ff.FFMergeError, match=message) as error:
        ff.ops.assign(scores)
    assert "\n" not in str(error.value)


def test_opcheck():
    torch.library.opcheck(op._assign_op, (noise(2, 10, 10), True))
    torch.library.opcheck(op._assign_op, (noise(1, 7, 7).double(), False))
