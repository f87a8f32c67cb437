"""The registered ops: schemas, fakes, choice of the backend."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from ..common import backends
from ..common.registry import define_op

_WEIGHTS = "Tensor up, Tensor? gate, Tensor down, Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias"


def forward(xs, up, *rest):
    with _no_autocast(up):
        return backends.select("shared_ffn", up).forward(xs, up, *rest)


_AS_IT_IS = nullcontext()


def _no_autocast(tensor):
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _AS_IT_IS


def _forward_fake(xs, up, gate, down, up_bias, gate_bias, down_bias, activation, recompute):
    kept = {"none": 2, "activation": 1, "full": 0}[recompute] + (gate is not None and recompute != "full")
    outputs = [x.new_empty((x.shape[0], down.shape[0])) for x in xs]
    return outputs, [x.new_empty((x.shape[0], up.shape[0])) for x in xs for _ in range(kept)]


def backward(grads, xs, saved, up, *rest):
    with _no_autocast(up):
        return backends.select("shared_ffn", up).backward(grads, xs, saved, up, *rest)


def _backward_fake(grads, xs, saved, up, gate, down, up_bias, gate_bias, down_bias, activation, recompute, needs):
    weights = (up, gate, down, up_bias, gate_bias, down_bias)
    sum_dtype = torch.float64 if up.dtype == torch.float64 else torch.float32
    needed = (w for w, need in zip(weights, needs[1:], strict=True) if need)
    sums = [w.new_empty(w.shape, dtype=sum_dtype) for w in needed]
    return [x.new_empty(x.shape) for x in xs] if needs[0] else [], sums


forward_op = define_op(
    f"_shared_ffn_forward(Tensor[] xs, {_WEIGHTS}, str activation, str recompute) -> (Tensor[], Tensor[])",
    forward,
    _forward_fake,
)


backward_op = define_op(
    f"_shared_ffn_backward(Tensor[] grads, Tensor[] xs, Tensor[] saved, {_WEIGHTS}, str activation, str recompute,"
    " bool[] needs) -> (Tensor[], Tensor[])",
    backward,
    _backward_fake,
)
