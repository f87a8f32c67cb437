"""Choose the layers to merge: try every window on validation data, in memory (paper A, section 3.4, algorithm 1)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from ...models.elsewhere import reader_of
from ...models.forward import evaluating
from ...models.summary import ModelSummary
from ...support.digests import weights_hash
from ...support.distributed import gather, is_distributed, on_all_ranks, rank, turns_of_rank
from ...support.errors import FFMergeError
from ...support.progress import progress
from ...support.resume import Signature, in_use
from ...support.sealed import DamagedError, read_sealed_json, write_sealed_json
from ...support.sizes import parse_bytes
from ...support.tensors import is_usable, not_inference
from ..apply import merged, summary_of_unmerged
from ..groups import Group, format_layers, windows
from ..plan import MergePlan, check_given, note_sketch, plan, plan_groups, rank_windows
from ..statistics import CorrelationStats
from .prefix import PrefixOutputs
from .proxy import proxy_scores


@not_inference
def search(
    model: nn.Module,
    stats: CorrelationStats,
    window: int,
    evaluate: Callable[[nn.Module], float] | str,
    higher_is_better: bool = False,
    anchor: str = "first",
    method: str = "permute",
    seed: int = 0,
    resume: str | os.PathLike | None = None,
    batches: Iterable[Any] | None = None,
    max_tokens: int = 2048,
    prefix_memory: int | str = "1GiB",
    signature: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> MergePlan:
    """Merge each of the N - window + 1 windows, evaluate without tuning, undo, and keep the best.

    The model is never reloaded and has exactly its own weights and modes afterwards. Encoder and decoder move in step.
    In a `torch.distributed` job the windows are shared out over the ranks, and every rank returns the same plan; the
    ranks meet after each window, so that an error on one makes all of them raise.

    Blocks before the first merged one do not run again for every window: where `evaluate` calls the model with the same
    arguments each time, their outputs are kept, and the scores are the same bit for bit. That needs calls without
    gradients (torch.no_grad) and without a key-value cache (use_cache=False); others run whole.

    Args:
        model: the model the statistics are of.
        stats: from `collect(window=at least this window)`.
        window: number of layers that become one FFN.
        evaluate: maps the merged model, in evaluation mode, to a score (loss, perplexity, accuracy, ...); or "proxy":
            the model is not evaluated, the score is the sum over the merged layers of the mean squared error of the
            shared FFN's output on the layer's own input, relative to the variance of the stream after the block.
        higher_is_better: of the score.
        anchor, method, seed: as in `plan`.
        resume: a JSON file that keeps the scores; a killed search goes on from it.
        batches: data for "proxy", as for `collect`: one forward pass of the model; no labels are needed.
        max_tokens: of "proxy": how many tokens' FFN inputs and outputs are kept in memory, in all layers.
        prefix_memory: bytes, or text such as "8GiB", for the kept outputs: d_model numbers per token that `evaluate`
            gives to the model, and its arguments. Calls beyond it run whole; 0 runs all so.
        signature: what decides the scores that `evaluate` gives, by name (its data, its metric), as JSON values; kept
            in `resume` and compared.
        fresh: begin anew, whatever `resume` holds.

    Returns:
        The plan of the best window (the first one among equals), with all scores in `.search`.

    Raises:
        FFMergeError: window too large, statistics of another model, every score NaN or Inf, `resume` of another search
            (model, statistics, settings, signature), damaged or in use.
    """
    with on_all_ranks("search"):
        _check_arguments(evaluate, higher_is_better, resume, batches, max_tokens)
        check_given(stats, model, method)
        found = _checked(model, stats)
        keep = parse_bytes(prefix_memory, "prefix_memory") if prefix_memory else 0
        wanted = {format_layers(g, stats.model.stacks): g for g in windows(stats.model.ffns, window)}
        decide = {"model": stats.model.fingerprint, "window": window, "anchor": anchor, "method": method, "seed": seed}
        if resume is not None:
            decide |= {"weights": weights_hash(model, reader_of(model)), "statistics": stats.signature()}
            decide |= signature or {}

    def planned(groups: Sequence[Group]) -> MergePlan:
        return plan_groups(stats, stats.model, groups, anchor, method, model, seed)

    def merged_at(groups: Sequence[Group]) -> AbstractContextManager:
        return merged(model, planned(groups), found)

    if evaluate == "proxy":
        values = proxy_scores(model, found.ffns, wanted, merged_at, batches, max_tokens)
    else:
        with contextlib.ExitStack() as context:
            with on_all_ranks("search"):
                scores = context.enter_context(_Scores(resume, decide, fresh))
            values = _evaluated(model, wanted, merged_at, evaluate, scores, PrefixOutputs(model, found.ffns, keep))
    with on_all_ranks("search"):
        _checked(model, stats)  # after the last window: `evaluate` left the model as it was
    ranked = [(name, values[name]) for name in wanted]
    usable = [(name, value) for name, value in ranked if is_usable(value, f"search: the score of layers {name}")]
    if not usable:
        raise FFMergeError("search: every window's score is NaN or Inf; check `evaluate` on the unmerged model")
    best = (max if higher_is_better else min)(usable, key=lambda entry: entry[1])[0]
    chosen = planned(wanted[best])
    chosen.search = ranked
    return note_sketch(chosen, stats)


def _checked(model: nn.Module, stats: CorrelationStats) -> ModelSummary:
    found = summary_of_unmerged(model)
    stats.model.check(found, "stats")
    return found


def _evaluated(
    model: nn.Module,
    wanted: Mapping[str, Sequence[Group]],
    merged_at: Callable[[Sequence[Group]], AbstractContextManager],
    evaluate: Callable[[nn.Module], float],
    scores: _Scores,
    prefix: PrefixOutputs,
) -> dict[str, float]:
    """The score of every window, each evaluated by one rank."""
    turns = turns_of_rank(list(wanted))
    for name in progress(turns, total=len(turns), desc="search", unit="window"):
        with on_all_ranks("search"):
            if name is not None and name not in scores.values:
                first = next(layers[0] for stack, layers in wanted[name] if stack == prefix.stack)
                with evaluating(model), merged_at(wanted[name]), prefix.before(first):
                    scores.add(name, float(evaluate(model)))
    return {name: score for part in gather(scores.values) for name, score in part.items()}


def _check_arguments(evaluate, higher_is_better: bool, resume, batches, max_tokens: int) -> None:
    if evaluate != "proxy":
        if not callable(evaluate):
            raise FFMergeError(
                f"evaluate: got {evaluate!r}, wanted a function of the model that returns a number, or 'proxy'"
            )
        if batches is not None:
            raise FFMergeError("batches: only evaluate='proxy' takes them; an `evaluate` function has its own data")
        return
    if batches is None:
        raise FFMergeError("batches: missing, wanted data for evaluate='proxy'")
    if higher_is_better:
        raise FFMergeError("higher_is_better: the score of evaluate='proxy' is an error, lower is better; leave it out")
    if resume is not None:
        raise FFMergeError("resume: evaluate='proxy' scores all windows in one pass and keeps no file; leave it out")
    if max_tokens < 2:
        raise FFMergeError(f"max_tokens: got {max_tokens}, wanted at least 2 (about 2,000 is usual)")


def sweep(stats: CorrelationStats, sizes: Iterable[int], anchor: str = "first") -> list[dict]:
    """For each window size, every window's mean matched correlation and what merging it leaves.

    Returns:
        Rows with window, layers, mean_correlation, parameters, nbytes; nothing is evaluated.
    """
    rows = []
    for size in sizes:
        for groups, correlation in rank_windows(stats, size, anchor):
            layers = format_layers(groups, stats.model.stacks)
            made = plan(stats, layers=layers, anchor=anchor)
            row = {"window": size, "layers": layers, "mean_correlation": correlation}
            rows.append(row | {"parameters": made.parameters_after, "nbytes": made.nbytes_after})
    return rows


def _number(score: float | None) -> float:
    return math.nan if score is None else float(score)  # JSON has no NaN


class _Scores:
    """Scores by window, mirrored in a JSON file after each one. A context manager, as `in_use`."""

    def __init__(self, path: str | os.PathLike | None, signature: Mapping[str, Any], fresh: bool):
        self._path = Path(f"{path}.rank{rank()}" if is_distributed() else path) if path else None
        self._signature, self._fresh = Signature(signature), fresh
        self.values: dict[str, float] = {}

    def __enter__(self) -> _Scores:
        with contextlib.ExitStack() as context:
            if self._path is not None:
                context.enter_context(in_use(self._path, "resume"))
                if self._path.exists() and not self._fresh:
                    self._read()
            self._context = context.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.close()

    def _read(self) -> None:
        try:
            content = read_sealed_json(self._path)
            kept = dict(content["settings"])
            self.values = {name: _number(score) for name, score in content["scores"].items()}
        except DamagedError as error:
            raise FFMergeError(
                f"resume: {self._path} is not a file of search scores ({error}); delete it or give another"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FFMergeError(
                f"resume: {self._path} is not a file of search scores; delete it or give another"
            ) from error
        self._signature.check(kept, f"resume: {self._path}")

    def add(self, name: str, score: float) -> None:
        self.values[name] = score
        if self._path is not None:
            scores = {n: None if math.isnan(value) else value for n, value in self.values.items()}  # JSON has no NaN
            write_sealed_json(self._path, {"settings": self._signature, "scores": scores})
