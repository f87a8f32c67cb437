"""Rounds of a refit: the same batches again, and the weights of the best round."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models.forward import evaluating, run, to_device
from ...support.distributed import gather, on_all_ranks
from ...support.errors import FFMergeError
from ...support.tensors import is_usable
from .least_squares import LeastSquares


class Best:
    """Scores the model after each change, and can give it back the weights of the best score."""

    def __init__(self, model: nn.Module, groups: Sequence[LeastSquares], evaluate, higher_is_better: bool):
        self._model, self._evaluate, self._higher = model, evaluate, higher_is_better
        self._parameters = [p for group in groups for p in group.parameters]
        self._kept: list[Tensor] = []
        self.scores: list[float] = []
        self.index = 0

    def note(self) -> None:
        """Score the model as it is."""
        if self._evaluate is None:
            return
        with on_all_ranks("refit"), evaluating(self._model), torch.no_grad():
            score = float(self._evaluate(self._model))
        score = self._agreed(score)
        self.scores.append(score)
        best, usable = self.scores[self.index], is_usable(score, f"refit: the score after {len(self.scores) - 1} fits")
        better = (score > best if self._higher else score < best) or not math.isfinite(best)
        if len(self.scores) == 1 or (usable and better):
            self.index = len(self.scores) - 1
            self._kept = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, kept in zip(self._parameters, self._kept, strict=bool(self._kept)):
            parameter.copy_(kept)

    def _agreed(self, score: float) -> float:
        """The mean over all ranks, so that they keep the same round."""
        scores = gather(score)
        return sum(scores) / len(scores)


class Replay:
    """Batches that can be gone over again: those taken so far are kept, and no more are taken than are wanted.

    Args:
        batches: any iterable.
        hold_out: put every tenth batch (the second, the twelfth, ...) aside, for `loss`.
    """

    def __init__(self, batches: Iterable[Any], hold_out: bool):
        self._source, self._taken = iter(batches), 0
        self.hold_out = hold_out
        self.kept: list[Any] = []
        self._held: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for position in itertools.count():
            while position >= len(self.kept):
                try:
                    batch = next(self._source)
                except StopIteration:
                    return
                aside = self.hold_out and self._taken % 10 == 1
                (self._held if aside else self.kept).append(batch)
                self._taken += 1
            yield self.kept[position]

    @property
    def labelled(self) -> bool:
        """Whether batches were put aside, with labels to judge by."""
        return bool(self._held) and all(isinstance(b, Mapping) and b.get("labels") is not None for b in self._held)

    def loss(self, model: nn.Module) -> float:
        """The model's label loss on the batches put aside."""
        if not self._held:
            raise FFMergeError(
                f"refit, distill: the score is of batches that are not fitted: got {self._taken} batches, wanted at "
                "least 2 (use smaller ones), or evaluate= (distill: judge='error')"
            )
        return _label_loss(model, self._held)


def _label_loss(model: nn.Module, batches: Sequence[Any]) -> float:
    """Mean loss per label."""
    total, count = 0.0, 0
    for batch in batches:
        loss = getattr(run(model, to_device(batch, model)), "loss", None)
        if loss is None:
            raise FFMergeError(
                "refit, distill: the held-out batches have no labels to be scored by; add them, or give evaluate= "
                "(distill: judge='error')"
            )
        labels = int((batch["labels"] != -100).sum())
        total, count = total + loss.item() * labels, count + labels
    return total / max(1, count)
