"""A task: data of one kind made into batches for one model, with the metric that goes with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...support.digests import content_hash
from ...support.errors import FFMergeError

SPLITS = ("train", "validation", "test")


class Task:
    """Batches and metrics of one kind of data; made by `load_task`.

    Attributes:
        kind: "lm", "masked", "images", "classification" or "translation".
        metric: key of `evaluate`'s result that `score` returns.
        higher_is_better: whether a larger `score` is better.
        splits: names of the splits there are.
    """

    kind: str
    metrics: tuple[str, ...]  # the first is the default
    batch_size: int  # of evaluation, unless told

    def __init__(self, data: Mapping[str, Any], metric: str | None = None):
        self._data = dict(data)
        self.metric = metric or self.metrics[0]
        if self.metric not in self.metrics:
            raise FFMergeError(f"metric: got {metric!r}, wanted {' or '.join(self.metrics)} for {self.kind} data")
        self.higher_is_better = self.metric in ("accuracy", "bleu")

    def signature(self) -> dict[str, Any]:
        """What decides its batches and metrics, as JSON values: "data" (a hash of the examples), lengths, metric.

        The examples are token ids, sentence pairs with the ids of the first 64, or images in memory by their bytes, in
        files by name, size and first 4 KiB, with the processor's settings.
        """
        return {"data": content_hash(self._examples()), "metric": self.metric, **self._lengths()}

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(name for name in SPLITS if name in self._data)

    def size(self, split: str = "train") -> int:
        """Number of examples: blocks of text, images or sentence pairs."""
        return len(self._split(split))

    def batches(
        self,
        split: str = "train",
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epochs: int | None = 1,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        limit: int | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Dicts for `model(**batch)`, on the CPU, labels included; padding has attention_mask 0 and label -100.

        The order depends on `seed` and the epoch only; a text of more than 4 million characters is not shuffled as one
        but a part after the other, so that no more is tokenised than is used. Starting late costs nothing more, and of
        `world` ranks each takes every `world`-th batch.

        Args:
            shuffle: a new order every epoch; a last batch that is not full is left out then.
            epochs: passes over the data; None: without end.
            start: batches of this rank to pass over.
            limit: only the first so many examples.
        """
        batch_size = batch_size or self.batch_size
        if batch_size < 1:
            raise FFMergeError(f"batch_size: got {batch_size}, wanted at least 1")
        index, before = start * world + rank, 0  # of this rank's next batch; batches before the part
        for epoch in itertools.count() if epochs is None else range(epochs):
            for part in self._parts(split, batch_size, limit):
                count = len(part) // batch_size if shuffle else -(-len(part) // batch_size)
                count = max(count, part.start == 0)
                if index < before + count:
                    order = torch.arange(part.start, part.stop)
                    order = order[_permutation(len(part), seed, epoch, part.start)] if shuffle else order
                while index < before + count:
                    position = index - before
                    yield self._batch(split, order[position * batch_size : (position + 1) * batch_size])
                    index += world
                before += count

    def evaluate(
        self, model: nn.Module, split: str = "validation", batch_size: int | None = None, limit: int | None = None
    ) -> dict[str, float]:
        """Metrics on one split: always `self.metric`, the loss where it costs nothing more, and what was counted."""
        raise NotImplementedError

    def described(self) -> str:
        """What the data turned out to be, where that is not plain from its place; else empty."""
        return ""

    def score(self, model: nn.Module, split: str = "validation", limit: int | None = None) -> float:
        """`evaluate(...)[self.metric]`: what `search` and `finetune` compare."""
        return self.evaluate(model, split, limit=limit)[self.metric]

    def _parts(self, split: str, batch_size: int, limit: int | None) -> Iterator[range]:
        """The examples, at most `limit`, in ranges of which each is shuffled on its own."""
        yield range(min(self.size(split), limit or self.size(split)))

    def _examples(self) -> Any:
        """What `content_hash` takes of the examples."""
        raise NotImplementedError

    def _lengths(self) -> dict[str, Any]:
        """Settings that decide batches and metrics, by the command line's names."""
        return {}

    def _batch(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _split(self, name: str) -> Any:
        if name not in self._data:
            raise FFMergeError(
                f"split: this task has no {name} data, only {', '.join(self.splits) or 'none'}; give {name}="
            )
        return self._data[name]


def _permutation(n: int, seed: int, epoch: int, part: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + part * 1_000_000_007) % 2**63)
    return torch.randperm(n, generator=generator)
