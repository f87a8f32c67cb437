"""AdamW against torch's, 8-bit numbers against their definition, and the bytes of a state."""

import math

import pytest
import torch

from ffmerge_fast.projecting.optimizer import adamw
from ffmerge_fast.projecting.optimizer.adamw import adamw_, new_moments
from ffmerge_fast.projecting.optimizer.blockwise import BLOCK, _values, dequantize, quantize

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def gradients(shape, count, seed=0, dtype=torch.float32):
    """Of very different sizes from row to row and step to step."""
    g = torch.Generator().manual_seed(seed)
    rows = 10 ** torch.linspace(-4, 0, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return [
        (torch.randn(shape, generator=g) * rows * (0.1 + torch.rand(1, generator=g))).to(dtype) for _ in range(count)
    ]


def run(shape, state, grads, dtype=torch.float32):
    value = torch.linspace(-1, 1, math.prod(shape), dtype=dtype).view(shape).clone()
    moments = new_moments(shape, dtype, value.device, state)
    for gradient in grads:
        adamw_(value, gradient, moments, **OPTIONS)
    return value, moments


def run_torch(shape, grads, dtype=torch.float32):
    value = torch.linspace(-1, 1, math.prod(shape), dtype=dtype).view(shape).clone().requires_grad_()
    optimizer = torch.optim.AdamW([value], foreach=False, fused=False, **OPTIONS)
    for gradient in grads:
        value.grad = gradient.clone()
        optimizer.step()
    return value.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (63, 65), (2, 3, 11)])
def test_is_torchs_adamw(shape, dtype):
    grads = gradients(shape, 20, dtype=dtype)
    value, moments = run(shape, "fp32", grads, dtype)
    torch.testing.assert_close(value, run_torch(shape, grads, dtype), atol=1e-6, rtol=1e-6)
    assert moments["step"] == 20


def test_a_gradient_in_another_memory_order():
    grads = gradients((65, 63), 3)
    turned = [g.T.contiguous().T for g in grads]
    assert torch.equal(run((65, 63), "fp32", turned)[0], run((65, 63), "fp32", grads)[0])
    assert torch.equal(run((65, 63), "8bit", turned)[0], run((65, 63), "8bit", grads)[0])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed):
    values = _values(signed, torch.device("cpu"))
    assert len(values.unique()) == 256 and 0 in values and values.max() == 1
    assert values.min() == pytest.approx(-1 + 0.9 / 128 if signed else 0)
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(1000, generator=g) * 10.0**-e for e in range(9)])
    x = x if signed else x.abs()
    codes, scales = quantize(x, signed)
    assert codes.dtype == torch.uint8 and scales.shape == (math.ceil(len(x) / BLOCK),)
    found, wanted = dequantize(codes, scales, signed).split(BLOCK), x.split(BLOCK)
    for block, restored, scale in zip(wanted, found, scales, strict=True):
        assert scale == block.abs().max()
        best = (scale * values - block[:, None]).abs().amin(1)
        beside = 2**-7 * block.abs() + 4e-7 * scale  # at the boundary of two bfloat16; what would have become 0
        assert ((restored - block).abs() <= best + beside).all()


def test_what_is_not_zero_stays_so():
    """A second moment of zero beside a first one that is not would make a step of any size."""
    x = torch.tensor([1.0, 1e-5, 1e-12, 1e-30, 0.0])
    codes, scales = quantize(x, signed=False)
    assert (dequantize(codes, scales, False) > 0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("shape", [(64, 64), (1, 65, 67), (4096, 1)])
def test_zeros(shape):
    zeros = new_moments(shape, torch.float32, torch.device("cpu"), "8bit")
    value, moments = run(shape, "8bit", [torch.zeros(shape)] * 3)
    assert torch.equal(value, run(shape, "fp32", [torch.zeros(shape)] * 3)[0])
    assert all(torch.equal(moments[k], zeros[k]) for k in zeros if k != "step")
    assert (moments["exp_avg"].dtype == torch.uint8) == (shape != (4096, 1))  # a vector


@pytest.mark.parametrize("shape", [(70, 61), (1, 130, 65)])  # blocks and pieces that do not come out even
def test_8bit_moments_stay_near(shape, monkeypatch):
    monkeypatch.setitem(adamw._PIECE, "cpu", 1024)
    grads = gradients(shape, 30)
    start = run(shape, "fp32", [])[0]
    wanted, found = (run(shape, state, grads)[0] - start for state in ("fp32", "8bit"))
    assert (found - wanted).norm() < 0.06 * wanted.norm()
    assert (found - wanted).abs().max() < 0.35 * wanted.abs().max()


def test_pieces_change_nothing(monkeypatch):
    grads = gradients((70, 61), 3)
    whole, moments = run((70, 61), "8bit", grads)
    monkeypatch.setitem(adamw._PIECE, "cpu", 512)
    pieces, others = run((70, 61), "8bit", grads)
    assert torch.equal(whole, pieces) and all(torch.equal(moments[k], others[k]) for k in moments)


def test_bytes_of_a_state():
    def nbytes(state):
        moments = new_moments((1, 512, 1024), torch.float32, torch.device("cpu"), state)
        return sum(t.nbytes for t in moments.values())

    numel = 512 * 1024
    assert nbytes("fp32") == 8 * numel + 4
    assert nbytes("8bit") == 2 * numel + 2 * 4 * numel // 256 + 4
