"""Quality of a model: loss, perplexity, accuracy, BLEU. Nothing is trained, and every module keeps its mode."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.forward import evaluating, to_device_and_dtype, without_cache
from ..support.env import require
from ..support.errors import FFMergeError
from ..support.progress import progress
from .tasks.text import PairEncoder
from .training.losses import LossFunction, label_count, loss_of


def loss(model: nn.Module, batches: Iterable[Any], loss_fn: LossFunction | None = None) -> float:
    """Mean loss per label over all batches: each batch counts by its number of labels.

    Args:
        model: returns an object with `.loss` for a batch, unless `loss_fn(model, batch)` is given.
        batches: dicts for `model(**batch)`; with `loss_fn`, anything that it takes.

    Raises:
        FFMergeError: no batch, no label, or no loss.
    """
    total, count = 0.0, 0
    with _scoring(model):
        for batch in batches:
            batch = to_device_and_dtype(batch, model)
            output = loss_fn(model, batch) if loss_fn else model(**batch)
            labels = label_count(model, batch)
            if labels:
                total += float(loss_of(output)) * labels
                count += labels
    if not count:
        raise FFMergeError("loss: the batches hold no labels; give at least one labelled example")
    return total / count


def perplexity(model: nn.Module, ids: Tensor, window: int, stride: int | None = None, batch_size: int = 8) -> float:
    """exp of the mean negative log-likelihood per token, by a sliding window (the paper: window 1024, stride 512).

    The window moves by `stride` tokens; each token is scored once, in the first window that holds it, with what
    precedes it there as context. A window's first token has no context: of the whole text only the first token stays
    unscored if `stride < window`, the first of every window if `stride == window`.

    Args:
        model: a causal language model.
        ids: int64 [tokens].
        window: tokens the model sees at once.
        stride: 1 to `window`; default half the window.
        batch_size: windows per forward pass.

    Raises:
        FFMergeError: fewer than two tokens, a stride outside 1..window, or a window beyond the model's context.
    """
    return math.exp(min(nll(model, ids, window, stride, batch_size)[0], 700.0))


def nll(
    model: nn.Module,
    ids: Tensor,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    bos: int | None = None,
) -> tuple[float, int]:
    """Mean negative log-likelihood (nats) per scored token, and how many were scored; see `perplexity`.

    With `bos` every window begins with that token, of which each other one is then scored.
    """
    stride = stride or max(1, window // 2)
    _check_window(model, ids, window, stride)
    opening = torch.tensor([] if bos is None else [bos], dtype=ids.dtype)
    window -= len(opening)
    stride = min(stride, window)
    total, count = torch.zeros((), dtype=torch.float64), 0
    with _scoring(model):
        groups = list(_window_groups(len(ids), window, stride, batch_size, unscored=1 - len(opening)))
        for starts, length, fresh in progress(groups, desc="perplexity", unit="batch"):
            windows = torch.stack([torch.cat([opening, ids[start : start + length]]) for start in starts]).long()
            batch = to_device_and_dtype(windows, model)
            scores = model(input_ids=batch).logits[:, -fresh - 1 : -1].float()  # [windows, fresh, vocabulary]
            targets = batch[:, -fresh:]
            total += F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum").double().cpu()
            count += targets.numel()
    return float(total) / count, count


def accuracy(model: nn.Module, batches: Iterable[dict[str, Any]]) -> float:
    """Share (0 to 1) of examples whose highest logit is at their label; NaN if a logit is NaN.

    Raises:
        FFMergeError: there is no example.
    """
    right = count = 0
    with _scoring(model):
        for batch in batches:
            batch = to_device_and_dtype(batch, model)
            labels = batch["labels"]
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**inputs).logits
            right += int((logits.argmax(-1) == labels).sum()) if not logits.isnan().any() else math.nan
            count += len(labels)
    if not count:
        raise FFMergeError("accuracy: no examples; give at least one labelled example")
    return right / count


def bleu(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    batch_size: int = 64,
) -> float:
    """Corpus BLEU (0 to 100) by sacrebleu's defaults of translations of the pairs' first sentences.

    Args:
        tokenizer: of transformers, or a `PairEncoder`.
        pairs: (source, reference).
        max_new_tokens: longest translation; default half as long again as the longest source sentence. Never more than
            the decoder's positions allow.
        num_beams: 1 is greedy search.
    """
    sacrebleu = require("sacrebleu", extra="driver")
    if not pairs:
        raise FFMergeError("bleu: no sentence pairs; give at least one")
    sources, references = (list(side) for side in zip(*pairs, strict=True))
    hypotheses = translate(model, tokenizer, sources, max_new_tokens, num_beams, batch_size)
    return float(sacrebleu.corpus_bleu(hypotheses, [references]).score)


def translate(
    model: nn.Module,
    tokenizer: Any,
    sources: Sequence[str],
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    batch_size: int = 64,
) -> list[str]:
    """Translations of `sources`, in their order (computed longest first, so that batches hold little padding).

    Arguments as for `bleu`.
    """
    encoder = tokenizer if isinstance(tokenizer, PairEncoder) else PairEncoder(tokenizer)
    if not sources:
        return []
    ids = encoder.source_ids(sources)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    length = _translation_length(model, max_new_tokens, longest=len(ids[order[0]]) - 1)
    result = [""] * len(ids)
    with torch.no_grad(), evaluating(model):
        for start in progress(range(0, len(order), batch_size), desc="translate", unit="batch"):
            chosen = order[start : start + batch_size]
            batch = to_device_and_dtype(encoder.pad_sources([ids[i] for i in chosen]), model)
            options = {"max_new_tokens": length, "num_beams": num_beams, "do_sample": False} | encoder.generation
            output = model.generate(**batch, **options)
            texts = encoder.tokenizer.batch_decode(output, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                result[i] = text
    return result


@contextlib.contextmanager
def _scoring(model: nn.Module) -> Iterator[None]:
    with torch.no_grad(), evaluating(model), without_cache(model):
        yield


def _translation_length(model: nn.Module, max_new_tokens: int | None, longest: int) -> int:
    wanted = max_new_tokens or max(16, longest * 3 // 2)
    positions = context_length(model)
    return min(wanted, positions - 1) if positions else wanted


def _window_groups(
    tokens: int, window: int, stride: int, batch_size: int, unscored: int
) -> Iterator[tuple[list[int], int, int]]:
    """(starts, length, fresh): windows of equal length to run together, of which the last `fresh` tokens are scored.

    The first `unscored` tokens of a window have no context.
    """
    waiting: list[int] = []
    done = 0
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        fresh = end - max(done, start + unscored)
        if start and fresh == min(stride, window - unscored) and end - start == window:
            waiting.append(start)
            if len(waiting) == batch_size:
                yield waiting, window, fresh
                waiting = []
        elif fresh > 0:
            yield [start], end - start, fresh
        done = end
        if end == tokens:
            break
    if waiting:
        yield waiting, window, min(stride, window - unscored)


def _check_window(model: nn.Module, ids: Tensor, window: int, stride: int) -> None:
    if ids.ndim != 1 or len(ids) < 2:
        raise FFMergeError(f"perplexity: ids has shape {list(ids.shape)}, wanted [tokens] with at least 2 tokens")
    if window < 2 or not 1 <= stride <= window:
        raise FFMergeError(
            f"perplexity: got window {window} and stride {stride}, wanted window >= 2 and 1 <= stride <= window"
        )
    check_context(model, window, "window")


def check_context(model: nn.Module, length: int, name: str) -> None:
    """Raise FFMergeError if `length` (the argument `name`) exceeds the model's positions."""
    context = context_length(model)
    if context and length > context:
        raise FFMergeError(f"{name}: got {length} tokens, but the model's context is {context}; give at most {context}")


def context_length(model: nn.Module) -> int | None:
    """Positions the model has, where its configuration says so."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None
