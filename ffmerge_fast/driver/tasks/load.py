"""Tasks from files, folders, lists and hub names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...checkpoint.trusted import load_processor
from ...support.errors import FFMergeError
from .. import evaluate
from .hub import load_hub
from .images import ImageData, image_splits, load_images
from .kinds import KINDS, ImageTask, TextTask, TranslationTask
from .task import Task
from .text import PairEncoder, load_parallel, load_text, token_ids

_DEFAULT_BLOCK = 1024  # the papers' language models


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
