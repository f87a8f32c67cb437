"""How the neurons of a layer are matched with those of its group's anchor: one function for each method of `plan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..models.ffn_weights import ffn_weights
from ..models.sublayers import FFNSublayer
from .statistics import CorrelationStats


class Sources(NamedTuple):
    """What methods may look at."""

    stats: CorrelationStats | None
    model: nn.Module | None
    generator: torch.Generator


class Match(NamedTuple):
    """A layer's neurons in the anchor's order."""

    permutation: Tensor  # int64 [d_ff]
    scores: tuple[float, float] | None = None  # mean correlation of matched neurons, and as they were


def _by_correlation(sources: Sources, anchor: FFNSublayer, layer: FFNSublayer) -> Match:
    found = sources.stats.alignment(anchor.index, layer.index, anchor.stack)
    return Match(found.permutation, (found.matched, found.unmatched))


def _as_they_are(sources: Sources, anchor: FFNSublayer, layer: FFNSublayer) -> Match:
    return Match(torch.arange(layer.d_ff))


def _at_random(sources: Sources, anchor: FFNSublayer, layer: FFNSublayer) -> Match:
    return Match(torch.randperm(layer.d_ff, generator=sources.generator))


def _by_weights(sources: Sources, anchor: FFNSublayer, layer: FFNSublayer) -> Match:
    """By the cosine of all weights of a neuron (in, gate, biases, out)."""
    a, b = (nn.functional.normalize(_neurons(sources.model, ffn), dim=1) for ffn in (anchor, layer))
    return Match(ops.assign(a @ b.T).permutation.cpu())


def _neurons(model: nn.Module, ffn: FFNSublayer) -> Tensor:
    """All weights of each hidden neuron, float32 [d_ff, (2 or 3) * d_model + biases]."""
    weights = ffn_weights(model, ffn)
    of_gate, of_up = (weights.gate, weights.gate_bias), (weights.up, weights.up_bias)
    columns = [w if w.ndim == 2 else w[:, None] for w in (*of_gate, *of_up, weights.down.T) if w is not None]
    return torch.cat([column.detach().float() for column in columns], dim=1)


MATCHES: dict[str, Callable[[Sources, FFNSublayer, FFNSublayer], Match]] = {
    "permute": _by_correlation,
    "average": _as_they_are,
    "random": _at_random,
    "weights": _by_weights,
}
