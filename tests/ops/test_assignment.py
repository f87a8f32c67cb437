"""The assignment op on every backend and instruction set: optimal, certified, deterministic; errors."""

import os
from functools import cache
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

import ffmerge_fast as ff
from ffmerge_fast.ops.assignment import reference, registered
from ffmerge_fast.ops.common import backends
from ffmerge_fast.support import machine

# The backend fixture sets the same thing for every example.
each = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True, params=["reference", "portable", "avx2", "avx512"])
def backend(request, monkeypatch):
    """Every test runs on scipy and on the C++ backend at each instruction set of this CPU, forced in turn."""
    monkeypatch.setattr(backends, "_forced", "reference" if request.param == "reference" else "cpp")
    if request.param != "reference":
        if reason := machine.why_no_extension():
            pytest.skip(reason)
        if request.param not in machine.extension().cpu_isas():
            pytest.skip(f"this CPU has no {request.param}")
        monkeypatch.setenv("FFMERGE_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def cpp(backend):
    if backend == "reference":
        pytest.skip("a property of the C++ backend")
    return backend


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def is_permutation(p):
    return torch.equal(p.sort(-1).values, torch.arange(p.shape[-1]).expand_as(p))


def check_optimal(scores, maximize=True, gap=1e-9):
    """The same objective as scipy, by a permutation, certified."""
    exact = scores.double().numpy()
    result = ff.ops.assign(scores, maximize=maximize)
    best = exact[linear_sum_assignment(exact, maximize=maximize)].sum()
    assert is_permutation(result.permutation)
    chosen = exact[np.arange(len(exact)), result.permutation.numpy()].sum()
    scale = max(abs(best), abs(exact).max(initial=0))
    assert result.objective == pytest.approx(chosen, rel=1e-12, abs=1e-12 * scale)
    assert abs(result.objective - best) <= 1e-9 * scale
    assert 0 <= result.gap <= gap


def dead(rng, d, share):
    scores = 0.1 * rng.standard_normal((d, d))
    scores[rng.permutation(d)[: int(share * d)]] = 0
    scores[:, rng.permutation(d)[: int(share * d)]] = 0
    return scores


def outliers(rng, d, where):
    scores = rng.standard_normal((d, d))
    scores[where(rng, d)] *= 1e6
    return scores


def low_rank(rng, d):
    """Correlations as between two layers: few directions, and columns that suit many rows (hubs)."""
    rank = max(2, d // 8)
    rows, shared = rng.standard_normal((d, rank)), np.arange(1, rank + 1) ** -0.5
    columns = rows[rng.permutation(d)] + 0.7 * rng.standard_normal((d, rank))
    columns[: d // 20] += 2 * rng.standard_normal(rank)
    rows, columns = rows * shared, columns * shared
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ (columns / np.linalg.norm(columns, axis=1, keepdims=True)).T


KINDS = {
    "normal": lambda rng, d: rng.standard_normal((d, d)),
    "uniform": lambda rng, d: rng.random((d, d)),
    "negative": lambda rng, d: -1 - rng.random((d, d)),
    "tiny": lambda rng, d: 1e-35 * rng.standard_normal((d, d)),
    "huge": lambda rng, d: 1e35 * rng.standard_normal((d, d)),
    "offset": lambda rng, d: 1000 + rng.random((d, d)),
    "low rank": low_rank,
    "dead": lambda rng, d: dead(rng, d, 0.1),
    "half dead": lambda rng, d: dead(rng, d, 0.5),
    "dead rows": lambda rng, d: rng.standard_normal((d, d)) * (rng.random((d, 1)) > 0.2),
    "dead columns": lambda rng, d: rng.standard_normal((d, d)) * (rng.random((1, d)) > 0.2),
    "constant": lambda rng, d: np.full((d, d), -2.5),
    "constant rows": lambda rng, d: np.repeat(rng.standard_normal((d, 1)), d, 1),
    "constant columns": lambda rng, d: np.repeat(rng.standard_normal((1, d)), d, 0),
    "binary": lambda rng, d: rng.integers(0, 2, (d, d)),
    "sparse binary": lambda rng, d: rng.random((d, d)) < 2 / d,
    "integers": lambda rng, d: rng.integers(-5, 5, (d, d)),
    "many integers": lambda rng, d: rng.integers(0, 1000, (d, d)),
    "identity": lambda rng, d: np.eye(d),
    "equal rows": lambda rng, d: rng.standard_normal((d, d))[rng.integers(0, d // 8 + 1, d)],
    "equal columns": lambda rng, d: rng.standard_normal((d, d))[:, rng.integers(0, d // 8 + 1, d)],
    "sum": lambda rng, d: rng.standard_normal((d, 1)) + rng.standard_normal((1, d)),
    "product": lambda rng, d: np.outer(np.arange(d), np.arange(d)) / d,
    "rank one": lambda rng, d: np.outer(rng.standard_normal(d), rng.standard_normal(d)),
    "distances": lambda rng, d: np.abs(np.sort(rng.random(d))[:, None] - np.sort(rng.random(d))),
    "triangle": lambda rng, d: np.tril(rng.random((d, d))),
    "wide range": lambda rng, d: np.exp(6 * rng.standard_normal((d, d))),
    "outliers": lambda rng, d: outliers(rng, d, lambda rng, d: rng.random((d, d)) < 1e-3),
    "outlier row": lambda rng, d: outliers(rng, d, lambda rng, d: 0),
    "outlier column": lambda rng, d: outliers(rng, d, lambda rng, d: (slice(None), 0)),
}
SIZES = [1, 2, 17, 63, 64, 81, 100, 200, 431, 600]


def matrix(kind, d, seed=0):
    return torch.from_numpy(np.asarray(KINDS[kind](np.random.default_rng(seed), d), dtype=np.float32))


@pytest.mark.parametrize("d", [1, 63, 100, 431])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maximize", [True, False])
def test_equals_scipy_and_is_certified(d, dtype, maximize):
    scores = (noise(d, d) * 2 - 1).to(dtype)
    result = ff.ops.assign(scores, maximize=maximize)
    rows, columns = linear_sum_assignment(scores.double().numpy(), maximize=maximize)
    assert is_permutation(result.permutation) and result.permutation.dtype == torch.int64
    assert result.objective == pytest.approx(scores.double().numpy()[rows, columns].sum(), rel=1e-12)
    assert isinstance(result.objective, float) and 0 <= result.gap < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_matrix(backend, kind):
    for d in SIZES:
        if backend == "reference" and d > 100:
            break  # its certificate is slow
        check_optimal(matrix(kind, d), maximize=True)
        check_optimal(matrix(kind, d, seed=1), maximize=False)


@settings(each, max_examples=200, derandomize=True)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 300), st.booleans(), st.integers(0, 2**32))
def test_random_kind_and_size(backend, kind, d, maximize, seed):
    check_optimal(matrix(kind, d % 60 + 1 if backend == "reference" else d, seed), maximize)


@settings(each, max_examples=60)
@given(st.integers(1, 5).flatmap(lambda d: arrays(np.float32, (d, d), elements=st.floats(-1e3, 1e3, width=32))))
def test_equals_brute_force(matrix):
    d = len(matrix)
    best = max(sum(float(matrix[i, p[i]]) for i in range(d)) for p in permutations(range(d)))
    result = ff.ops.assign(torch.from_numpy(matrix))
    assert result.objective == pytest.approx(best, rel=1e-12, abs=1e-9)
    assert result.gap < 1e-11


@settings(each, max_examples=25)
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


@cache
def related(d):
    """Correlations of GELU features of two layers that read nearly the same low-rank input, and the best objective."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * d, d // 4, generator=generator) * torch.arange(1, d // 4 + 1) ** -0.5

    def features(x):
        weight = torch.randn(d // 4, d, generator=generator)
        y = torch.nn.functional.gelu(x @ weight + torch.randn(d, generator=generator))
        y -= y.mean(0)
        return y / y.norm(dim=0)

    scores = features(inputs).T @ features(
        inputs + 0.3 * inputs.std(0) * torch.randn(inputs.shape, generator=generator)
    )
    return scores, scores.double().numpy()[linear_sum_assignment(scores.numpy(), maximize=True)].sum()


@pytest.mark.xdist_group("related")  # which is dear
@pytest.mark.parametrize(
    "d", [1536, pytest.param(3072, marks=pytest.mark.slow), pytest.param(5120, marks=pytest.mark.slow)]
)
def test_correlations_as_large_as_a_model_s(cpp, d):
    scores, best = related(d)
    result = ff.ops.assign(scores)
    assert is_permutation(result.permutation)
    assert result.objective == pytest.approx(best, rel=1e-9) and result.gap < 1e-9
    assert ff.ops.assign(scores.T).objective == pytest.approx(best, rel=1e-9)


@pytest.mark.real
def test_correlations_of_a_real_model(shared):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(shared / "models" / "gpt2-pystdlib").eval()
    text = torch.frombuffer(
        bytearray((shared / "models" / "gpt2-pystdlib" / "eval.txt").read_bytes()), dtype=torch.uint8
    )
    batches = [{"input_ids": (text[: 8 * 128].long() % model.config.vocab_size).view(8, 128)}]
    with ff.use_backend(None):
        stats = ff.collect(model, batches, pairs=[(0, 1), (0, 5)])
    for pair in [(0, 1), (0, 5)]:
        check_optimal(stats.correlation(*pair))


def test_recovers_a_planted_permutation_of_correlated_features():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 100, generator=g)
    planted = torch.randperm(100, generator=g)
    y = torch.empty_like(x)
    y[:, planted] = x + 0.2 * torch.randn(500, 100, generator=g)
    with ff.use_backend(None):
        state = ff.CorrelationState({"a": 100, "b": 100}, [("a", "b")])
        ff.ops.correlation_accumulate_(state, {"a": x, "b": y})
        scores = state.correlation("a", "b")
    assert torch.equal(ff.ops.assign(scores).permutation, planted)


@pytest.mark.parametrize("d", [1, 70, 200])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_and_with_a_conflict(d, maximize, dtype):
    """Every row's best column is another one; the last row's conflict and what is not finite are seen as well."""
    order = torch.randperm(d, generator=torch.Generator().manual_seed(d))
    easy = noise(d, d).to(dtype)
    easy[torch.arange(d), order] += 2 if maximize else -2
    for scores, expected in ((easy, order), (easy.T, order.argsort())):
        found = ff.ops.assign(scores, maximize=maximize)
        assert torch.equal(found.permutation, expected) and found.gap == 0
        check_optimal(scores, maximize)
    if d > 1:
        last = easy.clone()
        last[-1] = easy[0]
        check_optimal(last, maximize)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        broken = easy.clone()
        broken[-1, 0] = wrong
        with pytest.raises(ff.FFMergeError):
            ff.ops.assign(broken, maximize=maximize)


def test_batch_is_each_matrix_alone():
    scores = noise(3, 163, 163)
    for batched in (scores, scores.mT, noise(6, 163, 163)[::2], noise(1, 163, 163).expand(3, 163, 163)):
        batch = ff.ops.assign(batched)
        alone = [ff.ops.assign(matrix) for matrix in batched]
        assert torch.equal(batch.permutation, torch.stack([a.permutation for a in alone]))
        assert batch.objective == [a.objective for a in alone] and batch.gap == [a.gap for a in alone]
    empty = ff.ops.assign(torch.empty(0, 4, 4))
    assert empty.permutation.shape == (0, 4) and empty.objective == empty.gap == []
    nothing = ff.ops.assign(torch.empty(0, 0))
    assert nothing.objective == nothing.gap == 0.0 and nothing.permutation.shape == (0,)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_number_of_threads_changes_nothing(threads):
    kinds = ["normal", "dead", "binary", "many integers", "low rank", "equal rows", "outliers"]
    scores = torch.stack([matrix(kind, 100) for kind in kinds])
    one = ff.ops.assign(scores)
    for count in (2, 3, 16):
        threads(count)
        many = ff.ops.assign(scores)
        assert torch.equal(one.permutation, many.permutation)
        assert one.objective == many.objective and one.gap == many.gap


@pytest.mark.parametrize("kind", ["normal", "dead", "half dead", "binary", "many integers", "product", "equal columns"])
@pytest.mark.parametrize("d", [63, 200])
def test_instruction_set_changes_nothing(cpp, monkeypatch, kind, d):
    here = ff.ops.assign(matrix(kind, d))
    monkeypatch.setenv("FFMERGE_CPU_ISA", "portable")
    portable = ff.ops.assign(matrix(kind, d))
    assert torch.equal(here.permutation, portable.permutation) and here.objective == portable.objective


def test_ties_and_dead_neurons_are_deterministic():
    for d in (1, 50, 200):
        assert torch.equal(ff.ops.assign(torch.zeros(d, d)).permutation, torch.arange(d))
        assert torch.equal(ff.ops.assign(torch.full((d, d), -3.0), maximize=False).permutation, torch.arange(d))
    scores = noise(180, 180)
    scores[10:30] = 0
    scores[:, 5:25] = 0
    first, second = ff.ops.assign(scores), ff.ops.assign(scores.clone())
    assert torch.equal(first.permutation, second.permutation) and first.gap < 1e-12


@pytest.mark.parametrize("d", [63, 163])
def test_non_contiguous_scores_stay_untouched(d):
    scores = noise(d, d)
    kept = scores.clone()
    transposed = ff.ops.assign(scores.T)
    assert transposed.objective == pytest.approx(ff.ops.assign(scores).objective, rel=1e-12)
    assert torch.equal(transposed.permutation, ff.ops.assign(scores.T.contiguous()).permutation)
    assert torch.equal(scores, kept)
    wide = noise(d, 2 * d)
    for view in (wide[:, :d], wide[:, ::2], wide[:, :d].T, wide[:, 1::2].T, noise(1, d).expand(d, d)):
        result, copy = ff.ops.assign(view), ff.ops.assign(view.contiguous())
        assert result.objective == pytest.approx(copy.objective, rel=1e-12) and result.gap < 1e-12


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from /proc")
def test_little_extra_memory_and_no_copy(cpp):
    def peak(field="VmHWM"):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

    scores = noise(2048, 2048)
    ff.ops.assign(scores[:200, :200])
    for view in (scores, scores.T):
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts anew
        except OSError as error:
            pytest.skip(f"peak memory cannot be reset: {error}")
        before = peak("VmRSS")
        ff.ops.assign(view)
        assert peak() - before < 4e6  # a copy would be 16.8e6; 10e6 at 8192


@pytest.mark.parametrize(
    "scores, message",
    [
        (torch.tensor([[0.0, torch.nan], [1.0, 0.0]]), "NaN or Inf"),
        (torch.tensor([[0.0, torch.inf], [1.0, 0.0]]), "NaN or Inf"),
        (torch.tensor([[[0.0, 1.0], [1.0, -torch.inf]]]).bfloat16(), "NaN or Inf"),
        (torch.full((70, 70), torch.nan).T, "NaN or Inf"),
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


def test_instruction_set_that_the_cpu_lacks(cpp, monkeypatch):
    monkeypatch.setenv("FFMERGE_CPU_ISA", "sse9")
    with pytest.raises(ff.FFMergeError, match="FFMERGE_CPU_ISA='sse9' is not an instruction set: use one of portable"):
        ff.ops.assign(noise(3, 3))


def test_opcheck():
    torch.library.opcheck(registered.assign_op, (noise(2, 10, 10), True))
    torch.library.opcheck(registered.assign_op, (noise(1, 7, 7).double(), False))
