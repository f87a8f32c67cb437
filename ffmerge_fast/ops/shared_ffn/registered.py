"""The registered ops: schemas, fakes, choice of the backend."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from ..common import backends
from ..common.registry import define_op
from . import reference
from .weights import FFNWeights

_WEIGHTS = "Tensor up, Tensor? gate, Tensor down, Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias"


def forward(xs, weights: FFNWeights, activation, recompute):
    """By the backend of the weights' device; arguments and results as `reference.forward`'s."""
    with _no_autocast(weights.up):
        return _backend(weights).forward(xs, weights, activation, recompute)


def backward(grads, xs, saved, weights: FFNWeights, activation, recompute, needs, into=None):
    """By the backend of the weights' device; arguments and results as `reference.backward`'s."""
    with _no_autocast(weights.up):
        return _backend(weights).backward(grads, xs, saved, weights, activation, recompute, needs, into)


def _backend(weights: FFNWeights):
    """The reference where a weight has no elements: kernels would have neither work nor addresses."""
    empty = 0 in (*weights.up.shape, len(weights.down))
    return reference if empty else backends.select("shared_ffn", weights.up)


_AS_IT_IS = nullcontext()


def _no_autocast(tensor):
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _AS_IT_IS


def _forward_fake(xs, weights: FFNWeights, activation, recompute):
    kept = {"none": weights.halves + 1, "activation": weights.halves, "full": 0}[recompute]
    outputs = [x.new_empty((x.shape[0], weights.down.shape[0])) for x in xs]
    return outputs, [x.new_empty((x.shape[0], weights.up.shape[0])) for x in xs for _ in range(kept)]


def _backward_fake(grads, xs, saved, weights: FFNWeights, activation, recompute, needs):
    sum_dtype = torch.float64 if weights.up.dtype == torch.float64 else torch.float32
    needed = (w for w, need in zip(weights, needs[1:], strict=True) if need)
    sums = [w.new_empty(w.shape, dtype=sum_dtype) for w in needed]
    return [x.new_empty(x.shape) for x in xs] if needs[0] else [], sums


def _packing(function, lists: int):
    """The function for a flat schema, which has the six weights behind `lists` lists of tensors."""

    def flat(*arguments):
        packed = FFNWeights(*arguments[lists : lists + 6])
        return function(*arguments[:lists], packed, *arguments[lists + 6 :])

    return flat


forward_op = define_op(
    f"_shared_ffn_forward(Tensor[] xs, {_WEIGHTS}, str activation, str recompute) -> (Tensor[], Tensor[])",
    _packing(forward, 1),
    _packing(_forward_fake, 1),
)


backward_op = define_op(
    f"_shared_ffn_backward(Tensor[] grads, Tensor[] xs, Tensor[] saved, {_WEIGHTS}, str activation, str recompute,"
    " bool[] needs) -> (Tensor[], Tensor[])",
    _packing(backward, 3),
    _packing(_backward_fake, 3),
)
