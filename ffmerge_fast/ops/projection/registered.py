"""The registered ops: one projection P = S + Δ applied to rows, its adjoint, and the gradient of Δ (reference.py)."""

from __future__ import annotations

import torch

from ..common import backends
from ..common.registry import define_op


def _on_backend(name):
    def run(outs, *rest):
        backend = backends.select("projection", outs[0])
        with torch.autocast(outs[0].device.type, enabled=False):
            getattr(backend, name)(outs, *rest)

    return run


def _define(schema):
    name = schema.partition("(")[0]
    return define_op(schema, _on_backend(name.removeprefix("_")), lambda *arguments: None)


project_rows_ = _define(
    "_project_rows_(Tensor(a!)[] outs, Tensor[] xs, Tensor[] deltas, Tensor[] indices, Tensor[] kept,"
    " Tensor[] residuals) -> ()"
)
project_rows_adjoint_ = _define(
    "_project_rows_adjoint_(Tensor(a!)[] outs, Tensor[] ys, Tensor[] deltas, Tensor[] indices) -> ()"
)
project_rows_gradient_ = _define("_project_rows_gradient_(Tensor(a!)[] outs, Tensor[] ys, Tensor[] xs) -> ()")
