"""The kinds of tasks: language modelling, image classification, translation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import evaluate
from .images import ImageData, PixelReader
from .task import Task
from .text import PairEncoder, pack

KINDS = ("lm", "images", "translation")
_ENCODED = 64  # sentence pairs by whose ids a tokenizer is recognised


class TextTask(Task):
    """Language modelling on packed blocks. Metrics: perplexity, loss."""

    kind = "lm"
    metrics = ("perplexity", "loss")
    batch_size = 16

    def __init__(self, data: Mapping[str, Tensor], block: int, stride: int | None, metric: str | None = None):
        super().__init__({split: pack(ids, block) for split, ids in data.items()}, metric)
        self._ids = dict(data)
        self.block = block
        self.stride = stride

    def evaluate(
        self,
        model: nn.Module,
        split: str = "validation",
        batch_size: int | None = None,
        limit: int | None = None,
        stride: int | None = None,
    ) -> dict[str, float]:
        """Loss and perplexity by windows of one block moved by `stride` (default: the task's, else one block)."""
        self._split(split)
        ids = self._ids[split][: limit * self.block] if limit else self._ids[split]
        stride = stride or self.stride or self.block
        loss, tokens = evaluate.nll(model, ids, self.block, stride, batch_size or self.batch_size)
        return {"loss": loss, "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()), "tokens": tokens}

    def _batch(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        ids = self._data[split][indices]
        return {"input_ids": ids, "labels": ids.clone()}

    def _examples(self) -> Any:
        return self._ids

    def _lengths(self) -> dict[str, Any]:
        return {"max_length": self.block, "stride": self.stride}


class ImageTask(Task):
    """Image classification. Metrics: accuracy (0 to 1), loss."""

    kind = "images"
    metrics = ("accuracy", "loss")
    batch_size = 128

    def __init__(self, data: Mapping[str, ImageData], processor: Any, metric: str | None = None):
        super().__init__(data, metric)
        self._readers = {split: PixelReader(images, processor) for split, images in data.items()}

    def evaluate(
        self, model: nn.Module, split: str = "validation", batch_size: int | None = None, limit: int | None = None
    ) -> dict[str, float]:
        """Accuracy, or the mean loss if that is the task's metric."""
        batches = self.batches(split, batch_size, limit=limit)
        measure = evaluate.accuracy if self.metric == "accuracy" else evaluate.loss
        return {self.metric: measure(model, batches), "images": min(self.size(split), limit or self.size(split))}

    def _batch(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": self._readers[split](indices), "labels": self._data[split].labels[indices]}

    def _examples(self) -> Any:
        return {split: [images.identity(), self._readers[split].identity()] for split, images in self._data.items()}


class TranslationTask(Task):
    """Sentence pairs for an encoder-decoder model. Metrics: bleu (0 to 100), loss (per target token)."""

    kind = "translation"
    metrics = ("bleu", "loss")
    batch_size = 64

    def __init__(self, data: Mapping[str, list], encoder: PairEncoder, num_beams: int = 1, metric: str | None = None):
        super().__init__(data, metric)
        self.encoder, self.num_beams = encoder, num_beams

    def evaluate(
        self, model: nn.Module, split: str = "validation", batch_size: int | None = None, limit: int | None = None
    ) -> dict[str, float]:
        """Loss per target token, and BLEU unless the loss is the task's metric."""
        pairs = self._split(split)[:limit]
        result: dict[str, float] = {}
        if self.metric == "bleu":
            result["bleu"] = evaluate.bleu(
                model, self.encoder, pairs, num_beams=self.num_beams, batch_size=batch_size or self.batch_size
            )
        result["loss"] = evaluate.loss(model, self.batches(split, batch_size, limit=limit))
        return result | {"pairs": len(pairs)}

    def _batch(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        sources, targets = zip(*(self._data[split][i] for i in indices.tolist()), strict=True)
        return self.encoder(sources, targets)

    def _examples(self) -> Any:
        return {
            split: [pairs, self.encoder(*zip(*pairs[:_ENCODED], strict=True))] for split, pairs in self._data.items()
        }

    def _lengths(self) -> dict[str, Any]:
        encoder = self.encoder
        return {"max_length": encoder.max_length, "prefix": encoder.prefix, "num_beams": self.num_beams}
