"""Accelerated tied models under DDP and FSDP2, each rank with its own data: as one process with plain autograd."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch

pytest.importorskip("transformers")

from tests.helpers.accelerate_worker import DDP, FAMILIES, batch, tied, train, without_dropout  # noqa: E402
from tests.helpers.ranks import run_two_ranks  # noqa: E402

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank has: {(family, kind, case): (gradients of the first step, parameters at the end, ...)}."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks("tests.helpers.accelerate_worker", folder, timeout=200)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@cache
def alone(family, dtype=torch.float32):
    """The same in one process, without the op: the mean of the ranks' losses."""
    model = without_dropout(tied(family)).to(dtype)

    def loss(model, step, micro):
        return sum(model(**batch(model, step, 2 * rank + micro)).loss for rank in range(2)) / 2

    gradients = train(model, loss, lambda last: nullcontext())
    return gradients, dict(model.named_parameters())


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        error, largest = (got[name] - tensor).abs().max(), tensor.abs().max()
        floor = 5e-8  # of what cancels within attention: the gradient of a key's bias is 0
        assert error <= 1e-6 * largest + floor, f"{name}: {error:.2g} beside {largest:.2g}"


@pytest.mark.parametrize("case", [*DDP, "kept", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ddp(found, family, case):
    expected = alone(family)
    for rank in found:
        for got, wanted in zip(rank[family, "ddp", case], expected, strict=True):
            assert_same(got, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp2(found, family):
    expected = alone(family)
    for rank in found:
        *got, reductions = rank[family, "fsdp2", "fp32"]
        for ours, wanted in zip(got, expected, strict=True):
            assert_same(ours, wanted)
        assert reductions == rank[family, "fsdp2", "fp32 by autograd"][2] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp2_in_bfloat16_is_as_accurate_as_autograd(found, family):
    true, _ = alone(family, torch.float64)
    for rank in found:
        ours, _, reductions = rank[family, "fsdp2", "bf16"]
        autograd, _, expected = rank[family, "fsdp2", "bf16 by autograd"]
        assert reductions == expected > 0
        errors = [
            sum((got[name] - gradient).square().sum() for name, gradient in true.items()) for got in (ours, autograd)
        ]
        assert errors[0] <= 1.5**2 * errors[1]
