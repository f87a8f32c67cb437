"""The four ops on CUDA tensors agree with float64 on the CPU."""

import pytest
import torch

import ffmerge_fast as ff

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
    assert (state.correlation(0, 1) - expected).abs().max() <= 1e-6
    back = ff.CorrelationState({0: 63, 1: 100}, [(0, 1)]).load_state_dict_(state.state_dict())
    assert (back.correlation(0, 1) - expected.cpu()).abs().max() <= 1e-6
    assert state.merge_(back).count(0) == 2 * len(kept[0])
    with pytest.raises(ff.FFMergeError, match="but the state is on cuda:0"):
        state.push(0, x[0].cpu())


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
