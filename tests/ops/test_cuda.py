"""The four ops on CUDA tensors agree with float64 on the CPU."""

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.projection import chain
from ffmerge_fast.testing import nan_poisoned_empty

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_correlation(dtype, masked):
    x = {0: random(431, 63, seed=1, dtype=dtype) + 50, 1: random(431, 100, seed=2, dtype=dtype)}
    mask = torch.arange(431, device="cuda") % 3 > 0 if masked else None
    state = ff.CorrelationState({0: 63, 1: 100}, [(0, 1)], device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        for rows in (slice(0, 100), slice(100, 431)):
            part = None if mask is None else mask[rows]
            ff.ops.correlation_accumulate_(state, {key: value[rows] for key, value in x.items()}, part)
    kept = [value.double() if mask is None else value[mask].double() for value in x.values()]
    expected = torch.corrcoef(torch.cat(kept, 1).T)[:63, 63:]
    assert (state.correlation(0, 1) - expected).abs().max() <= 5e-6  # "auto" splits into bfloat16 halves
    back = ff.CorrelationState({0: 63, 1: 100}, [(0, 1)]).load_state_dict_(state.state_dict())
    assert (back.correlation(0, 1) - expected.cpu()).abs().max() <= 5e-6
    assert state.merge_(back).count(0) == 2 * len(kept[0])
    with pytest.raises(ff.FFMergeError, match="but the state is on cuda:0"):
        state.push(0, x[0].cpu())


def correlated(tokens, widths, mean=0.0, dtype=torch.float32):
    """{layer: [tokens, width]} on the GPU; layers share directions."""
    common = random(tokens, 16, seed=99)
    x = {}
    for key, width in enumerate(widths):
        shift = mean * random(width, seed=3 * key).sign()
        x[key] = (
            common @ random(16, width, seed=3 * key + 1) / 4 + 0.5 * random(tokens, width, seed=3 * key + 2) + shift
        )
    return {key: value.to(dtype) for key, value in x.items()}


def accumulated(x, pairs, splits=(), **options):
    state = ff.CorrelationState({key: value.shape[1] for key, value in x.items()}, pairs, device="cuda", **options)
    bounds = [0, *splits, len(x[0])]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        ff.ops.correlation_accumulate_(state, {key: value[start:stop] for key, value in x.items()})
    return state


def correlation_errors(state, x):
    centred = {key: value.double() - value.double().mean(0) for key, value in x.items()}
    units = {key: value / value.norm(dim=0) for key, value in centred.items()}
    return [(state.correlation(a, b) - units[a].T @ units[b]).abs().max().item() for a, b in state.pairs]


def require_triton():
    reason = ff.backends()["correlation"]["triton"]
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("widths", [(1, 63, 100), (300, 257, 520), (3072, 768, 3072)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute, tolerance", [("auto", 5e-6), ("bf16x3", 5e-6), ("bf16", 3e-3), ("fp32", 1e-6)])
def test_correlation_by_triton(widths, dtype, compute, tolerance):
    require_triton()
    x = correlated(3000, widths, mean=20.0, dtype=dtype)
    pairs = [(0, 1), (0, 2), (1, 2), (1, 1), (2, 2)]
    with ff.use_backend("triton"), nan_poisoned_empty():
        state = accumulated(x, pairs, splits=(1000, 1063), compute=compute)
        errors = correlation_errors(state, x)
        again = accumulated(x, pairs, splits=(1000, 1063), compute=compute)
    assert max(errors) <= tolerance
    assert all(torch.equal(state.correlation(*pair), again.correlation(*pair)) for pair in pairs)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "relu2", "quick_gelu"])
def test_correlation_activations_by_triton(activation):
    require_triton()
    x = correlated(2500, (300, 200), dtype=torch.bfloat16)
    states = []
    for backend in ("triton", "reference"):
        with ff.use_backend(backend):
            states.append(accumulated(x, [(0, 1)], splits=(70,), activation=activation))
    ours, theirs = (state.correlation(0, 1) for state in states)
    assert (ours - theirs).abs().max() <= 5e-6


def test_float32_correlation_stays_float32_where_tf32_is_allowed():
    require_triton()
    x = correlated(1000, (200, 300))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert max(correlation_errors(accumulated(x, [(0, 1)], compute="fp32"), x)) <= 1e-6
    finally:
        torch.set_float32_matmul_precision(before)


def test_one_large_pair_may_go_to_cublas():
    require_triton()
    x = correlated(600, (14336, 14336), dtype=torch.bfloat16)
    state = accumulated(x, [(0, 1)], compute="bf16")
    some = torch.arange(0, 14336, 97, device="cuda")
    a, b = (value.double() - value.double().mean(0) for value in (x[0][:, some], x[1][:, some]))
    expected = (a / a.norm(dim=0)).T @ (b / b.norm(dim=0))
    assert (state.correlation(0, 1)[some][:, some] - expected).abs().max() <= 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_sketches_are_those_of_the_cpu(dtype, masked):
    on_cpu = {key: torch.randn(5000, width).to(dtype) for key, width in ((0, 300), (1, 520))}
    mask = torch.rand(5000) < 0.7 if masked else None
    found = []
    for device in ("cpu", "cuda", "cuda"):
        state = ff.CorrelationState({0: 300, 1: 520}, [(0, 1)], device, activation="gelu", sketch=256)
        for rows in (slice(0, 1300), slice(1300, 5000)):
            part = None if mask is None else mask[rows].to(device)
            ff.ops.correlation_accumulate_(state, {k: v[rows].to(device) for k, v in on_cpu.items()}, part)
        found.append(state.correlation(0, 1).cpu())
    assert (found[0] - found[1]).abs().max() <= 2e-3 and torch.equal(found[1], found[2])  # TF32 where it is allowed


def test_correlation_in_a_cuda_graph():
    require_triton()
    x = correlated(4096, (300, 520), dtype=torch.bfloat16)
    half = {key: value[:2048].clone() for key, value in x.items()}
    state = accumulated(half, [(0, 1)])  # compiles, sets the pivot, makes the schedule
    graph = torch.cuda.CUDAGraph()
    batch = {key: value.clone() for key, value in half.items()}
    with torch.cuda.graph(graph):
        for key, value in batch.items():
            state.push(key, value)
    for key, value in batch.items():
        value.copy_(x[key][2048:])
    graph.replay()
    state.end_batch()
    assert state.count(0) == 4096
    assert max(correlation_errors(state, x)) <= 5e-6


def test_correlation_on_the_second_gpu():
    require_triton()
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = {key: value.to("cuda:1") for key, value in correlated(2100, (64, 100)).items()}
    state = ff.CorrelationState({0: 64, 1: 100}, [(0, 1)], device="cuda:1")
    ff.ops.correlation_accumulate_(state, x)
    assert state.correlation(0, 1).device == torch.device("cuda:1")
    assert max(correlation_errors(state, x)) <= 5e-6


def test_assignment():
    scores = random(3, 100, 100)
    ours, expected = ff.ops.assign(scores), ff.ops.assign(scores.cpu())
    assert ours.permutation.is_cuda and torch.equal(ours.permutation.cpu(), expected.permutation)
    assert ours.objective == expected.objective and max(ours.gap) < 1e-12


@pytest.mark.parametrize("gated", [False, True])
def test_shared_ffn(gated):
    up, down = random(100, 63, seed=1), random(63, 100, seed=2)
    gate = random(100, 63, seed=3) if gated else None
    results = []
    for to in ({"device": "cuda"}, {"device": "cpu", "dtype": torch.float64}):
        tensors = [None if t is None else t.to(**to).requires_grad_() for t in (random(2, 50, 63), up, down, gate)]
        y = ff.ops.shared_ffn(*tensors)
        results.append([y, *torch.autograd.grad(y.square().sum(), [t for t in tensors if t is not None])])
    for ours, expected in zip(*results, strict=True):
        assert (ours.cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_project_weight():
    results = []
    for to in ({"device": "cuda"}, {"device": "cpu", "dtype": torch.float64}):
        weight, p_out, p_in = (random(*s, seed=i).to(**to) for i, s in enumerate([(63, 100), (31, 63), (100, 50)]))
        y = ff.ops.project_weight(weight, p_out.requires_grad_(), p_in.requires_grad_())
        results.append([y, *torch.autograd.grad(y.square().sum(), [p_out, p_in])])
    for ours, expected in zip(*results, strict=True):
        assert (ours.cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()


def split_projection(device, dtype, out, in_, r_out, r_in):
    """(problem, R, gradient of W_C) on a device; Δ and R in float32 or better."""
    wide = torch.promote_types(dtype, torch.float32)
    sides = []
    for seed, (kept, width) in enumerate([(r_out, out), (r_in, in_)]):
        index = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:kept].sort().values
        sides.append(chain.Side(random(1, kept, width, seed=10 + seed).mul(1e-2).to(device, wide), index.to(device)))
    weight, grad = (random(*s, seed=i).bfloat16().to(device, dtype) for i, s in enumerate([(out, in_), (r_out, r_in)]))
    return chain.Problem(weight, *sides), random(r_out, r_in, seed=3).to(device, wide), grad


@pytest.mark.parametrize("shape", [(63, 100, 31, 50), (1280, 5120, 640, 2560), (5120, 1280, 2560, 640)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 5e-3), (torch.float32, 1e-6)])
def test_split_projection_by_triton(shape, dtype, tolerance):
    reason = ff.backends()["projection"]["triton"]
    if reason:
        pytest.skip(reason)
    found = []
    for device, kind, times in (("cuda", dtype, 2), ("cpu", torch.float64, 1)):
        problem, residual, grad = split_projection(device, kind, *shape)
        for _ in range(times):
            outs = [torch.empty(problem.shape, dtype=residual.dtype, device=device) for _ in range(3)]
            inner = chain.project_([problem] * 3, outs, [residual] * 3)
            rows, columns = chain.gradients([problem] * 3, [grad] * 3, inner)
            assert all(torch.equal(a, b) for a, b in ((outs[0], outs[2]), (rows[0], rows[2])))
            found.append([outs[0], rows[0], columns[0]])
    for first, again, exact in zip(*found, strict=True):
        assert torch.equal(first, again)
        assert (first.cpu() - exact).norm() <= tolerance * exact.norm()
