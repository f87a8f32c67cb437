"""Problems for the ops that project rows, and what plain torch makes of them in any dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = {  # blocks, r, n, m: y = (S + Δ) x, Δ [B, r, n], x [B·n, m]
    "one": (1, 1, 1, 1),
    "odd": (1, 31, 63, 100),
    "tall": (1, 100, 431, 7),
    "tiles and tails": (1, 130, 200, 129),
    "heads": (6, 5, 8, 20),
    "column": (1, 17, 40, 1),
}


@dataclass
class Rows:
    """Problems of one shape; matrices may be stored transposed."""

    xs: list[Tensor]
    ys: list[Tensor]
    deltas: list[Tensor]
    indices: list[Tensor]
    residuals: list[Tensor]
    stored: str  # "rows", "columns", or "gaps": every second row of something larger

    def laid_out(self, t: Tensor) -> Tensor:
        if self.stored == "columns":
            return t.T.contiguous().T
        return t.repeat_interleave(2, 0)[::2] if self.stored == "gaps" else t

    def outs(self, rows: int, dtype: torch.dtype) -> list[Tensor]:
        return [self.laid_out(torch.full((rows, x.shape[1]), torch.nan, dtype=dtype)) for x in self.xs]


def rows(shape, dtype, count=1, select=True, residual=True, stored="rows", learned=True) -> Rows:
    blocks, r, n, m = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    made = Rows([], [], [], [], [], stored)
    for _ in range(count):
        made.xs.append(made.laid_out(torch.randn(blocks * n, m, generator=g).to(dtype)))
        made.ys.append(made.laid_out(torch.randn(blocks * r, m, generator=g).to(dtype)))
        made.deltas.append(0.1 * torch.randn(blocks, r, n, generator=g) if learned else torch.zeros(blocks, r, n))
        if select:
            inner = torch.stack([torch.randperm(n, generator=g)[:r].sort().values for _ in range(blocks)])
            made.indices.append((torch.arange(blocks)[:, None] * n + inner).flatten())
        if residual:
            made.residuals.append(made.laid_out(torch.randn(blocks * r, m, generator=g)))
    return made


def projected(p: Rows, i: int, dtype: torch.dtype) -> Tensor:
    """S x + Δ x + R of problem i, with the product in `dtype`."""
    delta, x = p.deltas[i].to(dtype), p.xs[i].to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.bmm(delta, x.unflatten(0, (len(delta), -1))).flatten(0, 1).to(wide)
    if p.indices:
        total = total + x[p.indices[i]]
    return total + p.residuals[i] if p.residuals else total


def adjoint(p: Rows, i: int, dtype: torch.dtype) -> Tensor:
    delta, y = p.deltas[i].to(dtype), p.ys[i].to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.bmm(delta.mT, y.unflatten(0, (len(delta), -1))).flatten(0, 1).to(wide)
    return total.index_add(0, p.indices[i], y.to(wide)) if p.indices else total


def gradient(p: Rows, i: int, dtype: torch.dtype) -> Tensor:
    x, y = (t.to(dtype).unflatten(0, (len(p.deltas[i]), -1)) for t in (p.xs[i], p.ys[i]))
    return torch.bmm(y, x.mT)
