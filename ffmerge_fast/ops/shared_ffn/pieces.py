"""Small neighbours are run as one, large inputs piece by piece: what the backends with kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .weights import FFNWeights, GradientSums

_STACKED = 512  # tokens that are stacked at most


def pieces(tokens: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` tokens."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def stacked(tensors: list[Tensor]) -> list[Tensor]:
    """Neighbours of together at most 512 tokens as one tensor, large ones as they are."""
    if len(tensors) == 1:
        return tensors
    groups = [tensors[group] for group in _groups([len(t) for t in tensors])]
    return [group[0] if len(group) == 1 else torch.cat(group) for group in groups]


def like(xs: list[Tensor], results: list[Tensor]) -> list[Tensor]:
    """The inverse of `stacked`, on results for `xs`. Copies: outputs of an op are no views of each other."""
    if len(xs) == 1:
        return results
    split = []
    for group, result in zip(_groups([len(x) for x in xs]), results, strict=True):
        sizes = [len(x) for x in xs[group]]
        split += [result] if len(sizes) == 1 else [part.clone() for part in result.split(sizes)]
    return split


def backward_in_pieces(
    hidden_gradients: Callable[..., tuple[Tensor, ...]],
    weights: FFNWeights,
    sums: GradientSums,
    xs: list[Tensor],
    grads: list[Tensor],
    saved: list[Tensor],
    size: int,
    needs_x: bool,
) -> list[Tensor]:
    """Gradients of the inputs (no entries unless `needs_x`), and those of the weights added to `sums`.

    Args:
        hidden_gradients: (x, dy, and what was saved) of a piece -> what `GradientSums.add_` takes besides x and dy.
        weights: in the dtype to compute in.
        xs, grads, saved: as `reference.backward` takes them.
        size: tokens of a piece.
    """
    kept = len(saved) // max(len(xs), 1)
    columns = [xs, grads, *(saved[i::kept] for i in range(kept))]
    dxs = []
    for x, *rest in zip(*map(stacked, columns), strict=True):
        whole = 0 < len(x) <= size
        dx = None if whole or not needs_x else torch.empty_like(x, memory_format=torch.contiguous_format)
        for part in pieces(len(x), size):
            x_part, dy, *mine = (tensor[part].to(weights.up.dtype) for tensor in (x, *rest))
            d_up, d_gate, *others = hidden_gradients(x_part, dy, *mine)
            sums.add_(x_part, dy, d_up, d_gate, *others)
            if needs_x:
                gradient = weights.input_gradient(d_up, d_gate)
                if whole:
                    dx = gradient.to(x.dtype)
                else:
                    dx[part] = gradient
        dxs.append(dx)
    return like(xs, dxs) if needs_x else []


def _groups(tokens: list[int]) -> Iterator[slice]:
    first, total = 0, 0
    for i, count in enumerate(tokens):
        if i > first and total + count > _STACKED:
            yield slice(first, i)
            first, total = i, 0
        total += count
    if tokens:
        yield slice(first, len(tokens))
