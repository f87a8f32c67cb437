"""Tasks from files, folders, lists and hub names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ...checkpoint.trusted import load_processor
from ...support.errors import FFMergeError
from .. import evaluate
from .documents import Document
from .hub import load_hub
from .images import ImageData, load_images
from .kinds import KINDS, ClassificationTask, ImageTask, MaskedTask, TextTask, TranslationTask
from .labelled import LabelledTexts, load_labelled
from .task import Task
from .text import PairEncoder, load_parallel, load_text
from .tokens import TokenStream, special_tokens

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
    text_column: str | None = None,
    label_column: str | None = None,
    languages: tuple[str | None, str | None] = (None, None),
    bos: bool = True,
) -> Task:
    """Bring data into the form one model needs.

    Args:
        model: decides the kind of task, unless `kind` ("lm", "masked", "images", "classification", "translation") does.
        processor: its tokenizer or image processor, or the folder that holds it.
        train, validation, test: data of each split; at least one. Language models: a file or folder of texts or of
            records (JSON lines, JSON, CSV, Parquet, a saved data set), a list of such `pathlib.Path`s, or a list of
            texts. Images: a folder with one sub-folder per class, an .npz file, or an `ImageData`, whose classes are
            matched by name with the model's. Classification of texts: records, or a list of (text, label) pairs, whose
            labels are matched likewise. Translation: (source file, target file) or a list of sentence pairs. All:
            a data set name of the Hugging Face hub if FFMERGE_ONLINE=1.
        block: tokens per block of a language model; default its context, at most 1024.
        stride: of the sliding window of `evaluate`; default `block` (no overlap, fastest). The paper reports block / 2.
        max_length: tokens per sentence of a translation, or per classified text; longer ones are cut.
        prefix: put before every source sentence.
        num_beams: of the translations that BLEU scores.
        holdout: share of `train` taken as validation data where only `train` is given: the last blocks of text, every
            n-th image or sentence pair. 0: none.
        metric: what `score` returns: "perplexity" or "loss"; "accuracy" or "loss"; "bleu" or "loss".
        text_column: of records, that holds the texts; default the only one with strings.
        label_column: of records, that holds the labels; default "label" or "labels".
        languages: codes of source and target, for translation by a tokenizer of many languages.
        bos: a beginning-of-text token that the tokenizer adds begins every block and window, as the model saw it in
            training; else only each text, as the tokenizer gives it.

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
    kind = _checked_kind(model, kind) if kind else task_kind(model)
    _check_options(kind, text_column, label_column, languages, bos)
    processor = _processor(processor, kind)
    if kind in ("lm", "masked"):
        block = block or min(evaluate.context_length(model) or _DEFAULT_BLOCK, _DEFAULT_BLOCK)
        evaluate.check_context(model, block, "block")
        texts = {split: _texts(source, split, kind, text_column) for split, source in sources.items()}
        make = _masked_task if kind == "masked" else partial(_text_task, stride=stride, bos=bos)
        return make(texts, processor, block=block, holdout=holdout, metric=metric)
    if kind == "images":
        data = {split: _images(source, split).for_model(model, split) for split, source in sources.items()}
        return ImageTask(_hold_out(data, lambda images: _every_nth(images, holdout)), processor, metric)
    evaluate.check_context(model, max_length, "max_length")
    if kind == "classification":
        texts = {
            n: load_labelled(data, n, text_column, label_column).for_model(model, n) for n, data in sources.items()
        }
        return ClassificationTask(_hold_out(texts, lambda t: _every_nth(t, holdout)), processor, max_length, metric)
    data = {split: _pairs(source, split) for split, source in sources.items()}
    encoder = PairEncoder(processor, max_length, prefix, languages)
    return TranslationTask(_hold_out(data, lambda pairs: _every_nth(pairs, holdout)), encoder, num_beams, metric)


def task_kind(model: nn.Module) -> str:
    """ "lm", "masked", "images", "classification" or "translation", by the model's class and configuration."""
    kind = _kind_of(model)
    if kind is None:
        raise FFMergeError(
            f"task: cannot tell that of {type(model).__name__}; wanted a causal or masked language model, a classifier "
            "of images or texts, or an encoder-decoder of texts"
        )
    return kind


def _kind_of(model: nn.Module) -> str | None:
    name, inputs = type(model).__name__, getattr(model, "main_input_name", "input_ids")
    can_generate = getattr(model, "can_generate", None)
    if inputs == "pixel_values" and "Classification" in name:
        return "images"
    if inputs == "input_ids" and can_generate and can_generate():
        return "translation" if model.config.is_encoder_decoder else "lm"
    if inputs == "input_ids" and "ForSequenceClassification" in name:
        return "classification" if model.config.num_labels > 1 else None  # one number is no class
    return "masked" if inputs == "input_ids" and "ForMaskedLM" in name else None


def _checked_kind(model: nn.Module, kind: str) -> str:
    """`kind`, which has to be that of a model of transformers: none is scored as what it is not."""
    if kind not in KINDS:
        raise FFMergeError(f"kind: got {kind!r}, wanted one of {', '.join(KINDS)}")
    found = _kind_of(model)
    if kind != found and hasattr(model, "can_generate"):
        remedy = f"give --task {found} (kind={found!r})" if found else "there is no task for it"
        raise FFMergeError(f"task: got {kind!r}, but {type(model).__name__} is no model for that; {remedy}")
    return kind


def _check_options(
    kind: str, column: str | None, label: str | None, languages: tuple[str | None, str | None], bos: bool
) -> None:
    text, labelled = kind in ("lm", "masked", "classification"), kind == "classification"
    for given, ok, name, what in (
        (column is not None, text, "--text-column (text_column=)", "language models and classification"),
        (label is not None, labelled, "--label-column (label_column=)", "classification of texts"),
        (any(languages), kind == "translation", "--source-lang, --target-lang (languages=)", "translation"),
        (not bos, kind == "lm", "--no-bos (bos=)", "causal language models"),
    ):
        if given and not ok:
            raise FFMergeError(f"{name}: is for {what}, and this task is {kind}; leave it out")


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


def _read(loader: Callable[[Any], Any], source: Any, split: str, kind: str, column: str | None = None) -> Any:
    """`loader(source)`, or the hub where `source` is a string that names nothing here."""
    if isinstance(source, str) and not Path(source).expanduser().exists():
        source = load_hub(source, split, kind, column)
        return source if kind == "images" else load_text(source)
    return loader(source)


def _images(source: Any, split: str) -> ImageData:
    if isinstance(source, ImageData):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise FFMergeError(f"image data: got {type(source).__name__} for {split}, wanted one folder or .npz file")
    return _read(lambda path: load_images(path, split), source, split, "images")


def _texts(source: Any, split: str, kind: str, column: str | None) -> list[Document]:
    return _read(lambda given: load_text(given, split, column), source, split, kind, column)


def _text_task(
    texts: Mapping[str, list[Document]],
    tokenizer: Any,
    block: int,
    stride: int | None,
    holdout: float,
    metric: str | None,
    bos: bool,
) -> TextTask:
    adds_bos = bos and special_tokens(tokenizer)[0] == [tokenizer.bos_token_id]
    streams = _streams(texts, tokenizer, "front" if adds_bos else None, holdout, block - adds_bos)
    return TextTask(streams, block, stride, metric, tokenizer.bos_token_id if adds_bos else None)


def _masked_task(
    texts: Mapping[str, list[Document]], tokenizer: Any, block: int, holdout: float, metric: str | None
) -> MaskedTask:
    before, after = special_tokens(tokenizer)
    streams = _streams(texts, tokenizer, "all", holdout, block - len(before) - len(after))
    return MaskedTask(streams, block, tokenizer, metric, before, after)


def _streams(
    documents: Mapping[str, Any], tokenizer: Any, bare: str | None, holdout: float, block: int
) -> dict[str, TokenStream]:
    streams = {split: TokenStream(texts, tokenizer, bare) for split, texts in documents.items()}
    return _hold_out(streams, lambda stream: stream.hold_out(holdout, max(1, block)))


def _pairs(source: Any, split: str) -> list[tuple[str, str]]:
    paths = (str, os.PathLike)
    if isinstance(source, (tuple, list)) and len(source) == 2 and all(isinstance(path, paths) for path in source):
        return load_parallel(*source)
    if isinstance(source, paths):
        if isinstance(source, os.PathLike) or Path(source).expanduser().exists():
            raise FFMergeError(f"parallel data: got one path, {source}; wanted two, source and target")
        return load_hub(source, split, "translation")
    pairs = [pair if isinstance(pair, paths) else tuple(pair) for pair in source]
    if not pairs or any(
        isinstance(pair, paths) or len(pair) != 2 or not all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise FFMergeError("parallel data: wanted (source file, target file) or a list of (source, target) sentences")
    return pairs


def _hold_out(data: dict[str, Any], cut: Callable[[Any], tuple[Any, Any]]) -> dict[str, Any]:
    if set(data) != {"train"}:
        return data
    kept, held = cut(data["train"])
    return {"train": kept} if held is None else {"train": kept, "validation": held}


def _every_nth(examples: Any, holdout: float) -> tuple[Any, Any]:
    held = range(0, len(examples), round(1 / holdout)) if holdout else range(0)
    if not held or len(held) == len(examples):
        return examples, None
    chosen = set(held)
    kept = [i for i in range(len(examples)) if i not in chosen]
    return _select(examples, kept), _select(examples, held)


def _select(examples: Any, indices: Sequence[int]) -> Any:
    return (
        examples.select(indices) if isinstance(examples, (ImageData, LabelledTexts)) else [examples[i] for i in indices]
    )
