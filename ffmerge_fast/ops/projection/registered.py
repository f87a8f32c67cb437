"""The registered ops: one projection P = S + Δ applied to rows, its adjoint, and the gradient of Δ (reference.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...support.errors import FFMergeError
from ..common import backends
from ..common.registry import define_op


def _on_backend(name):
    def run(outs, *rest):
        if name != "project_rows_gradient_":  # outs, xs, deltas, indices, ... or outs, ys, deltas, indices
            _check_indices(outs if name == "project_rows_" else rest[0], rest[2])
        backend = backends.select("projection", outs[0])
        with torch.autocast(outs[0].device.type, enabled=False):
            getattr(backend, name)(outs, *rest)

    return run


def _check_indices(selected: list[Tensor], indices: list[Tensor]) -> None:
    """Raise FFMergeError unless there is an int64 [rows], contiguous, for each of the selected rows, or none at all.

    Values out of range are an IndexError on CPUs, as torch's own; on GPUs nothing checks them.
    """
    for rows, index in zip(selected, indices, strict=False):
        if index.dtype != torch.int64 or index.shape != rows.shape[:1] or not index.is_contiguous():
            raise FFMergeError(
                f"indices: got {index.dtype} {list(index.shape)}, wanted contiguous torch.int64 {list(rows.shape[:1])}"
            )


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
