"""The registered op: schema, fake, choice of the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import backends
from ..common.registry import define_op


def _assign(scores: Tensor, maximize: bool) -> tuple[Tensor, Tensor, Tensor]:
    permutation, objective, gap = backends.select("assignment", scores).assign(scores, maximize)
    return permutation.to(scores.device), objective, gap


def _assign_fake(scores, maximize):
    batch, d, _ = scores.shape
    objective = torch.empty(batch, dtype=torch.float64, device="cpu")
    return scores.new_empty((batch, d), dtype=torch.int64), objective, torch.empty_like(objective)


assign_op = define_op("_assign(Tensor scores, bool maximize) -> (Tensor, Tensor, Tensor)", _assign, _assign_fake)
