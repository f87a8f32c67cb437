"""Starting from directions of the residual stream instead of coordinates: a truncated SVD (`project(init="svd")`).

A rotation may pass linear maps and a residual sum, not activations or heads: so one orthonormal Q [d_model', d_model]
takes the place of the selection S wherever a matrix reads or writes the stream, and neurons and heads stay selected.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .axes import MODEL, Axis, ModelAxes
from .matrices import ProjectedMatrix, Projection, project_
from .norms import gain_at_zero

_ROWS = 8192  # of a matrix in float64 at a time
_POSITIONS = 64  # of a constant table: the first ones occur most
_CONSTANTS = 10.0  # how much more they weigh than coordinates: they are added to every token, and cannot be fitted


@torch.no_grad()
def stream_basis(model: nn.Module, layout: ModelAxes, kept: Tensor, student: nn.Module | None = None) -> Tensor:
    """Q [d_model', d_model], float64 on the CPU, orthonormal rows.

    Its rows span the leading right singular vectors of all matrices along the residual stream, each divided by its
    Frobenius norm and stacked: of all subspaces the one that keeps most of them. Of the bases of that subspace it is
    the one nearest to the selection `kept` (orthogonal Procrustes), so that coordinates keep their meaning as far as
    possible for what acts on each alone: the norms. What the smaller class makes itself (sinusoids of positions), and Q
    cannot turn, weighs more: Q brings the model's own near to it.

    Args:
        student: the smaller model; None: constants are left out of account.
    """
    gram = torch.zeros(layout.d_model, layout.d_model, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        for dim, axis in enumerate(layout.axes[name]):
            if axis is not None and axis.role == MODEL and parameter.ndim >= 2:
                matrix = parameter.detach().transpose(dim, -1).reshape(-1, layout.d_model)
                squares = sum((rows.double().mT @ rows.double()).cpu() for rows in matrix.split(_ROWS))
                gram += squares / squares.trace().clamp_min(torch.finfo(torch.float64).tiny)
    leading = torch.linalg.eigh(gram).eigenvectors[:, -len(kept) :]
    wanted = leading[kept] / leading[kept].norm()
    for name, own in student.named_parameters() if student is not None else ():
        if not own.requires_grad and own.ndim == 2 and layout.axes[name][-1] == Axis(MODEL):
            table = model.get_parameter(name)[:_POSITIONS].detach().double().cpu()
            across = own[:_POSITIONS].detach().double().cpu().T @ table @ leading
            wanted += _CONSTANTS * across / across.norm().clamp_min(torch.finfo(torch.float64).tiny)
    u, _, vh = torch.linalg.svd(wanted)
    return u @ vh @ leading.T


@torch.no_grad()
def start_from_basis_(
    basis: Tensor,
    model: nn.Module,
    layout: ModelAxes,
    matrices: Iterable[ProjectedMatrix],
    plain: dict[str, nn.Parameter],
    stream: Iterable[Projection],
    kept: Tensor,
) -> dict[Projection, Tensor]:
    """Set a student's weights to what P = Q gives; returns Δ = Q - S of every projection of the residual stream.

    Vectors of the stream become Q v. A norm's gain g, which Q diag(g) Qᵀ would carry over, becomes that matrix's
    diagonal times sqrt(d_model / d_model'): the projected stream keeps its length and has fewer entries.
    """
    delta = basis.clone()
    delta[torch.arange(len(kept)), kept] -= 1
    deltas = dict.fromkeys(stream, delta[None])
    for matrix in matrices:
        dtype, device = torch.promote_types(matrix.weight.dtype, torch.float32), matrix.parameter.device
        of = {p: deltas.get(p, torch.zeros(p.shape)).to(device, dtype) for p in matrix.projections}
        project_([matrix], of)
    base = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in plain.items():
        for dim, axis in enumerate(layout.axes[name]):
            if axis is not None and axis.role == MODEL:
                of_base = base[name].detach().double().cpu()
                path, _, entry = name.rpartition(".")
                norm = model.get_submodule(path)
                if entry == "weight" and "norm" in type(norm).__name__.lower():
                    scale, offset = (layout.d_model / len(kept)) ** 0.5, gain_at_zero(norm)
                    parameter.copy_(scale * (basis.square() @ (of_base + offset)) - offset)
                else:
                    parameter.copy_(torch.tensordot(of_base, basis, dims=([dim], [1])).movedim(-1, dim))
    return deltas
