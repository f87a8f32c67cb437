"""Tasks: data of one kind made into batches for one model, with the metric that goes with it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.folder import load_processor
from ...support.errors import FFMergeError
from .. import evaluate
from .hub import load_hub
from .images import ImageData, PixelReader, image_splits, load_images
from .text import PairEncoder, load_parallel, load_text, pack, text_blocks, token_ids

__all__ = ["ImageData", "KINDS", "SPLITS", "Task", "load_images", "load_parallel", "load_task", "load_text",
           "task_kind", "text_blocks"]  # fmt: skip

KINDS = ("lm", "images", "translation")
SPLITS = ("train", "validation", "test")
_DEFAULT_BLOCK = 1024  # the papers' language models


class Task:
    """Batches and metrics of one kind of data; made by `load_task`.

    Attributes:
        kind: "lm", "images" or "translation".
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

        The order depends on `seed` and the epoch only. Starting late costs nothing, and of `world` ranks each takes
        every `world`-th batch.

        Args:
            shuffle: a new order every epoch; a last batch that is not full is left out then.
            epochs: passes over the data; None: without end.
            start: batches of this rank to pass over.
            limit: only the first so many examples.
        """
        examples = min(self.size(split), limit or self.size(split))
        batch_size = batch_size or self.batch_size
        if batch_size < 1:
            raise FFMergeError(f"batch_size: got {batch_size}, wanted at least 1")
        count = max(1, examples // batch_size) if shuffle else -(-examples // batch_size)
        order, ordered = torch.arange(examples), None
        for index in itertools.count(start * world + rank, world):
            epoch, position = divmod(index, count)
            if epochs is not None and epoch >= epochs:
                return
            if shuffle and epoch != ordered:
                order, ordered = _permutation(examples, seed, epoch), epoch
            yield self._batch(split, order[position * batch_size : (position + 1) * batch_size])

    def evaluate(
        self, model: nn.Module, split: str = "validation", batch_size: int | None = None, limit: int | None = None
    ) -> dict[str, float]:
        """Metrics on one split: always `self.metric`, the loss where it costs nothing more, and what was counted."""
        raise NotImplementedError

    def score(self, model: nn.Module, split: str = "validation", limit: int | None = None) -> float:
        """`evaluate(...)[self.metric]`: what `search` and `finetune` compare."""
        return self.evaluate(model, split, limit=limit)[self.metric]

    def _batch(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _split(self, name: str) -> Any:
        if name not in self._data:
            raise FFMergeError(
                f"split: this task has no {name} data, only {', '.join(self.splits) or 'none'}; give {name}="
            )
        return self._data[name]


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


def load_task(
    model: nn.Module,
    processor: Any,
    train: Any = None,
    *,
    validation: Any = None,
    test: Any = None,
    kind: str | None = None,
    block: int | None = None,
    stride: int | None = None,
    max_length: int = 128,
    prefix: str = "",
    num_beams: int = 1,
    holdout: float = 0.1,
    metric: str | None = None,
) -> Task:
    """Bring data into the form one model needs.

    Args:
        model: decides the kind of task, unless `kind` ("lm", "images", "translation") does.
        processor: its tokenizer or image processor, or the folder that holds it.
        train, validation, test: data of each split; at least one. Language models: a text file, a folder of text
            files, or a list of texts. Images: a folder with one sub-folder per class, an .npz file, or an `ImageData`.
            Translation: (source file, target file) or a list of sentence pairs. All: a data set name of the Hugging
            Face hub if FFMERGE_ONLINE=1.
        block: tokens per block of a language model; default its context, at most 1024.
        stride: of the sliding window of `evaluate`; default `block` (no overlap, fastest). The paper reports block / 2.
        max_length: tokens per sentence of a translation; longer ones are cut.
        prefix: put before every source sentence.
        num_beams: of the translations that BLEU scores.
        holdout: share of `train` taken as validation data where only `train` is given: the last blocks of text, every
            n-th image or sentence pair. 0: none.
        metric: what `score` returns: "perplexity" or "loss"; "accuracy" or "loss"; "bleu" or "loss".

    Raises:
        FFMergeError: no data or not enough of it, unreadable or unequal files, a block beyond the model's context, a
            model whose kind of task cannot be told, or no tokenizer or image processor.
    """
    sources = {"train": train, "validation": validation, "test": test}
    sources = {split: source for split, source in sources.items() if source is not None}
    if not sources:
        raise FFMergeError("data: got none, wanted at least one of train=, validation=, test=")
    if not 0 <= holdout < 1:
        raise FFMergeError(f"holdout: got {holdout}, wanted a share of 0 or more and less than 1")
    kind = kind or task_kind(model)
    if kind not in KINDS:
        raise FFMergeError(f"kind: got {kind!r}, wanted one of {', '.join(KINDS)}")
    processor = _processor(processor, kind)
    if kind == "lm":
        block = block or min(evaluate.context_length(model) or _DEFAULT_BLOCK, _DEFAULT_BLOCK)
        evaluate.check_context(model, block, "block")
        data = {split: token_ids(_read(load_text, source, split, kind), processor) for split, source in sources.items()}
        return TextTask(_hold_out(data, lambda ids: _cut_text(ids, holdout, block)), block, stride, metric)
    if kind == "images":
        data = {split: _images(source, split, sources) for split, source in sources.items()}
        _check_labels(model, data)
        return ImageTask(_hold_out(data, lambda images: _every_nth(images, holdout)), processor, metric)
    evaluate.check_context(model, max_length, "max_length")
    data = {split: _pairs(source, split) for split, source in sources.items()}
    encoder = PairEncoder(processor, max_length, prefix)
    return TranslationTask(_hold_out(data, lambda pairs: _every_nth(pairs, holdout)), encoder, num_beams, metric)


def task_kind(model: nn.Module) -> str:
    """ "lm", "images" or "translation", by the model's class and configuration."""
    if getattr(model, "main_input_name", "") == "pixel_values" and "Classification" in type(model).__name__:
        return "images"
    can_generate = getattr(model, "can_generate", None)
    if getattr(model, "main_input_name", "input_ids") == "input_ids" and can_generate and can_generate():
        return "translation" if model.config.is_encoder_decoder else "lm"
    raise FFMergeError(
        f"kind: cannot tell the task of {type(model).__name__}; wanted a causal language model, an image classifier or "
        f"an encoder-decoder of texts; pass kind= ({', '.join(KINDS)})"
    )


def _processor(processor: Any, kind: str) -> Any:
    if not isinstance(processor, (str, os.PathLike)):
        return processor
    folder = processor
    processor = load_processor(folder)
    if kind == "images" and not hasattr(processor, "image_mean"):
        raise FFMergeError(f"{folder}: no image processor there; add its preprocessor_config.json, or pass a processor")
    if kind != "images" and not hasattr(processor, "eos_token_id"):
        raise FFMergeError(f"{folder}: no tokenizer there; add its tokenizer.json, or pass a tokenizer")
    return processor


def _read(loader: Callable[[Any], Any], source: Any, split: str, kind: str) -> Any:
    """`loader(source)`, or the hub where `source` is a string that names nothing here."""
    if isinstance(source, str) and not Path(source).expanduser().exists():
        return load_hub(source, split, kind)
    return loader(source)


def _images(source: Any, split: str, sources: Mapping[str, Any]) -> ImageData:
    if isinstance(source, ImageData):
        return source
    return _read(lambda path: load_images(path, _split_of(path, split)), source, split, "images")


def _split_of(path: str | os.PathLike, split: str) -> str:
    """The part of a file or folder of images that serves as `split`; validation and test stand in for one another."""
    there = image_splits(path)
    other = {"validation": "test", "test": "validation"}.get(split, split)
    return next((name for name in (split, other) if name in there), split if not there else "train")


def _pairs(source: Any, split: str) -> list[tuple[str, str]]:
    paths = (str, os.PathLike)
    if isinstance(source, (tuple, list)) and len(source) == 2 and all(isinstance(path, paths) for path in source):
        return load_parallel(*source)
    if isinstance(source, paths):
        if isinstance(source, os.PathLike) or Path(source).expanduser().exists():
            raise FFMergeError(f"parallel data: got one path, {source}; wanted two, source and target")
        return load_hub(source, split, "translation")
    pairs = [tuple(pair) for pair in source]
    if not pairs or any(len(pair) != 2 or not all(isinstance(text, str) for text in pair) for pair in pairs):
        raise FFMergeError("parallel data: wanted (source file, target file) or a list of (source, target) sentences")
    return pairs


def _check_labels(model: nn.Module, data: Mapping[str, ImageData]) -> None:
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    for split, images in data.items():
        highest = int(images.labels.max())
        if classes is not None and highest >= classes:
            raise FFMergeError(
                f"image data: the {split} labels go up to {highest}, but the model has {classes} classes (0 to "
                f"{classes - 1}); give the data the model was trained for"
            )


def _hold_out(data: dict[str, Any], cut: Callable[[Any], tuple[Any, Any]]) -> dict[str, Any]:
    if set(data) != {"train"}:
        return data
    kept, held = cut(data["train"])
    return {"train": kept} if held is None else {"train": kept, "validation": held}


def _cut_text(ids: Tensor, holdout: float, block: int) -> tuple[Tensor, Tensor | None]:
    blocks = len(ids) // block
    held = round(blocks * holdout)
    if not held or held == blocks:
        return ids, None
    return ids[: (blocks - held) * block], ids[(blocks - held) * block :]


def _every_nth(examples: Any, holdout: float) -> tuple[Any, Any]:
    held = range(0, len(examples), round(1 / holdout)) if holdout else range(0)
    if not held or len(held) == len(examples):
        return examples, None
    chosen = set(held)
    kept = [i for i in range(len(examples)) if i not in chosen]
    return _select(examples, kept), _select(examples, held)


def _select(examples: Any, indices: Sequence[int]) -> Any:
    return examples.select(indices) if isinstance(examples, ImageData) else [examples[i] for i in indices]


def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator)
