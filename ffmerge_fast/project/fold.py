"""Folding: what remains of a projected model is its student, a plain transformers model."""

from __future__ import annotations

import copy

from torch import nn


def fold(student: nn.Module) -> nn.Module:
    """A copy of the student in evaluation mode and without gradients; W, P and R are not part of it."""
    gradients = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad(set_to_none=True)  # so that they are not copied
    try:
        folded = copy.deepcopy(student)
    finally:
        for name, parameter in student.named_parameters():
            parameter.grad = gradients[name]
    return folded.eval()
