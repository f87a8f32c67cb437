"""The registered ops: schemas, fakes, choice of the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import backends
from ..common.registry import define_op


def _accumulate_layer_(x: Tensor, *rest) -> Tensor:
    return backends.select("correlation", x).accumulate_layer_(x, *rest)


def _accumulate_layer_fake(x, mask, count, pivot, sum_, sumsq, activation, compute, set_pivot):
    return x.new_empty(x.shape, dtype=torch.bfloat16 if compute == "bf16" else pivot.dtype)


def _accumulate_pair_(a: Tensor, b: Tensor, products: Tensor) -> None:
    backends.select("correlation", products).accumulate_pair_(a, b, products)


accumulate_layer_ = define_op(
    "_correlation_accumulate_layer_(Tensor x, Tensor? mask, Tensor(a!) count, Tensor(b!) pivot, Tensor(c!) sum,"
    " Tensor(d!) sumsq, str? activation, str compute, bool set_pivot) -> Tensor",
    _accumulate_layer_,
    _accumulate_layer_fake,
)


accumulate_pair_ = define_op(
    "_correlation_accumulate_pair_(Tensor a, Tensor b, Tensor(a!) products) -> ()",
    _accumulate_pair_,
    lambda a, b, products: None,
)


def _accumulate_ring_(x: Tensor, *rest) -> None:
    backends.select("correlation", x).accumulate_ring_(x, *rest)


accumulate_ring_ = define_op(
    "_correlation_accumulate_ring_(Tensor x, Tensor? at, Tensor signs, Tensor pivot, Tensor(a!) rows, int first,"
    " Tensor(b!) sum, Tensor(c!) sumsq, str? activation) -> ()",
    _accumulate_ring_,
    lambda *arguments: None,
)
