"""The kinds of tasks: language modelling, also masked, classification of images and of texts, translation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...support.errors import FFMergeError
from .. import evaluate
from .images import ImageData, PixelReader
from .labelled import LabelledTexts
from .task import Task
from .text import IGNORED, PairEncoder
from .tokens import TokenStream

KINDS = ("lm", "masked", "images", "classification", "translation")
_PART = 1 << 19  # tokens of a long text that are shuffled together
_ENCODED = 64  # texts by whose ids a tokenizer is recognised


class _Blocks(Task):
    """Text in blocks of equal length; the tokens after the last whole block are left out.

    Args:
        data: tokens of each split: a TokenStream, or [tokens].
        block: tokens of a block.
        before, after: tokens that begin and end each block.
    """

    batch_size = 16

    def __init__(
        self,
        data: Mapping[str, Tensor | TokenStream],
        block: int,
        metric: str | None = None,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
    ):
        streams = {name: ids if isinstance(ids, TokenStream) else TokenStream.of(ids) for name, ids in data.items()}
        super().__init__(streams, metric)
        self.block, self._before, self._after = block, torch.tensor(before).long(), torch.tensor(after).long()
        self.room = block - len(before) - len(after)
        if block < 2 or self.room < 1:
            raise FFMergeError(f"block: got {block}, wanted at least {max(2, block - self.room + 1)} tokens")
        for stream in streams.values():
            if len(stream.first(self.room)) < self.room:
                raise FFMergeError(
                    f"text data: {len(stream.first())} tokens do not fill one block of {block}; give more text"
                )

    def size(self, split: str = "train") -> int:
        return len(self._split(split).first()) // self.room

    def _parts(self, split: str, batch_size: int, limit: int | None) -> Iterator[range]:
        stream = self._split(split)
        if not stream.long:
            yield from super()._parts(split, batch_size, limit)
            return
        step = max(1, _PART // self.room // batch_size) * batch_size
        for start in itertools.count(0, step):
            wanted = min(start + step, limit or start + step)
            stop = min(wanted, len(stream.first(wanted * self.room)) // self.room)
            if stop > start:
                yield range(start, stop)
            if stop < start + step:
                return

    def _blocks(self, split: str, indices: Tensor) -> Tensor:
        """[n, block]"""
        ids = self._split(split).first((int(indices.max()) + 1) * self.room).view(-1, self.room)[indices].long()
        edges = (edge.expand(len(ids), -1) for edge in (self._before, self._after))
        return torch.cat([next(edges), ids, next(edges)], dim=1)

    def _examples(self) -> Any:
        return [self._before, self._after, {split: stream.identity() for split, stream in self._data.items()}]

    def _lengths(self) -> dict[str, Any]:
        return {"max_length": self.block}


class TextTask(_Blocks):
    """Language modelling on packed blocks. Metrics: perplexity, loss.

    Args:
        data: tokens of each split.
        block: tokens of a block, and of a window of `evaluate`.
        stride: of `evaluate`'s window.
        bos: token that begins every block and window.
    """

    kind = "lm"
    metrics = ("perplexity", "loss")

    def __init__(
        self,
        data: Mapping[str, Tensor | TokenStream],
        block: int,
        stride: int | None,
        metric: str | None = None,
        bos: int | None = None,
    ):
        super().__init__(data, block, metric, before=() if bos is None else (bos,))
        self.stride, self.bos = stride, bos

    def evaluate(
        self,
        model: nn.Module,
        split: str = "validation",
        batch_size: int | None = None,
        limit: int | None = None,
        stride: int | None = None,
    ) -> dict[str, float]:
        """Loss and perplexity by windows of one block moved by `stride` (default: the task's, else no overlap)."""
        ids = self._split(split).first(limit * self.room if limit else None)
        stride = stride or self.stride or self.room
        loss, tokens = evaluate.nll(model, ids, self.block, stride, batch_size or self.batch_size, self.bos)
        return {"loss": loss, "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()), "tokens": tokens}

    def _batch(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        ids = self._blocks(split, indices)
        return {"input_ids": ids, "labels": ids.clone()}

    def _lengths(self) -> dict[str, Any]:
        return super()._lengths() | {"stride": self.stride}


class MaskedTask(_Blocks):
    """Masked language modelling (BERT's): of each block the same 15 % of the tokens are to be found every time.

    Of these 80 % are replaced by the mask token, 10 % by some other, 10 % are left. Metrics: perplexity (exp of the
    loss over the tokens to be found), loss.

    Args:
        data: tokens of each split.
        block: tokens of a block.
        tokenizer: whose mask and special tokens are taken.
    """

    kind = "masked"
    metrics = ("perplexity", "loss")

    def __init__(
        self,
        data: Mapping[str, Tensor | TokenStream],
        block: int,
        tokenizer: Any,
        metric: str | None = None,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
    ):
        super().__init__(data, block, metric, before, after)
        self.mask, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self._special = torch.tensor(tokenizer.all_special_ids)
        if self.mask is None:
            raise FFMergeError("tokenizer: it has no mask token, wanted one for masked language modelling; add it")

    def evaluate(
        self, model: nn.Module, split: str = "validation", batch_size: int | None = None, limit: int | None = None
    ) -> dict[str, float]:
        """Loss over the masked tokens and its exponential."""
        loss = evaluate.loss(model, self.batches(split, batch_size, limit=limit))
        blocks = min(self.size(split), limit or self.size(split))
        return {"loss": loss, "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()), "blocks": blocks}

    def _batch(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        ids = self._blocks(split, indices)
        chance, other = torch.empty(ids.shape), torch.empty_like(ids)
        for i, index in enumerate(indices.tolist()):
            generator = torch.Generator().manual_seed(index)
            chance[i].uniform_(generator=generator)
            other[i].random_(self.vocabulary, generator=generator)
        chance[torch.isin(ids, self._special)] = 1.0
        labels = torch.where(chance < 0.15, ids, IGNORED)
        inputs = torch.where(chance < 0.12, self.mask, torch.where(chance < 0.135, other, ids))
        return {"input_ids": inputs, "labels": labels}


class ImageTask(Task):
    """Image classification. Metrics: accuracy (0 to 1), loss."""

    kind = "images"
    metrics = ("accuracy", "loss")
    batch_size = 128

    def __init__(self, data: Mapping[str, ImageData], processor: Any, metric: str | None = None):
        super().__init__(data, metric)
        self._readers = {split: PixelReader(images, processor) for split, images in data.items()}

    def described(self) -> str:
        return "; ".join(f"{split}: {images.counts()}" for split, images in self._data.items())

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


class ClassificationTask(Task):
    """Classification of texts. Metrics: accuracy (0 to 1), loss.

    Args:
        data: texts of each split, with the model's labels.
        max_length: tokens of a text, special ones included; longer ones are cut.
    """

    kind = "classification"
    metrics = ("accuracy", "loss")
    batch_size = 32

    def __init__(self, data: Mapping[str, LabelledTexts], tokenizer: Any, max_length: int, metric: str | None = None):
        super().__init__(data, metric)
        self._tokenizer, self.max_length = tokenizer, max_length
        if tokenizer.pad_token_id is None:
            raise FFMergeError("tokenizer: it has no padding token, wanted one for texts of different lengths; set it")

    def described(self) -> str:
        return "; ".join(f"{split}: {texts.counts()}" for split, texts in self._data.items())

    def evaluate(
        self, model: nn.Module, split: str = "validation", batch_size: int | None = None, limit: int | None = None
    ) -> dict[str, float]:
        """Accuracy, or the mean loss if that is the task's metric."""
        batches = self.batches(split, batch_size, limit=limit)
        measure = evaluate.accuracy if self.metric == "accuracy" else evaluate.loss
        return {self.metric: measure(model, batches), "texts": min(self.size(split), limit or self.size(split))}

    def _batch(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        texts = [self._data[split].texts[i] for i in indices.tolist()]
        found = self._tokenizer(texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt")
        return {**found, "labels": self._data[split].labels[indices]}

    def _examples(self) -> Any:
        first = {
            split: self._batch(split, torch.arange(min(_ENCODED, len(texts)))) for split, texts in self._data.items()
        }
        return {split: [texts.texts, texts.labels, first[split]["input_ids"]] for split, texts in self._data.items()}

    def _lengths(self) -> dict[str, Any]:
        return {"max_length": self.max_length}


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
