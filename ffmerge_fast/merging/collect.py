"""Collect FFN features of a model on calibration data, and correlate them while they stream by."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.passes import FFNPasses, check_batches
from ..models.elsewhere import reader_of
from ..models.sublayers import FFNs, FFNSublayer, find_ffns
from ..models.summary import ModelSummary
from ..models.ties import groups_among
from ..support.digests import content_hash, weights_hash
from ..support.distributed import gather, on_all_ranks, share_of_rank, world_size
from ..support.errors import FFMergeError
from ..support.resume import RunningSums
from ..support.sizes import parse_bytes
from ..support.tensors import not_inference
from .groups import anchor_of, parse_layers, windows
from .sketching import chosen_rows
from .statistics import CorrelationStats, Pair, layer_pairs


@not_inference
def collect(
    model: nn.Module,
    batches: Iterable[Any],
    window: int | None = None,
    pairs: Sequence[tuple] | None = None,
    layers: str | Sequence | None = None,
    anchor: str = "first",
    features: str = "pre",
    max_tokens: int = 10_000,
    device: torch.device | str | None = None,
    cache_dir: str | os.PathLike | None = None,
    save_seconds: float = 60.0,
    max_memory: int | str | None = None,
    fresh: bool = False,
    sketch: int | str | None = None,
) -> CorrelationStats:
    """Correlate the FFN features of pairs of layers, in one pass over calibration data (paper A, eq. 1).

    Features are taken by hooks and added up layer by layer: memory is the accumulators and a band of one batch.
    The forward pass stops after the last FFN. In a `torch.distributed` job each rank gives its own batches, counts
    its share of `max_tokens`, and all ranks return the sum; an error on one makes all of them raise.

    Args:
        model: any supported model; its mode, device and dtype stay as they are.
        batches: dicts (`model(**batch)`), tuples (`model(*batch)`) or tensors. Positions whose attention_mask is 0 are
            not counted, nor those in nn.Transformer's src_key_padding_mask and tgt_key_padding_mask; without any mask,
            decoders leave out positions labelled -100.
        window: correlate all layers at a distance below `window`: what any window search or plan of that size needs.
        pairs: or these pairs of layers, (i, j), or ("encoder.0", "encoder.1") in encoder-decoder models.
        layers: or each group's `anchor` with its other layers; syntax as in `plan`.
        anchor: "first", "middle" or "last" layer of a group.
        features: "pre": the output of W_up, before the activation (paper A); "post": the input of W_down.
        max_tokens: stop after exactly this many tokens; encoder and decoder count separately.
        device: where the sums are kept; by default where each stack's first FFN is.
        cache_dir: keep the running sums here, at most every `save_seconds`; a killed run goes on from there with the
            same `batches`.
        max_memory: bytes, or text such as "8GiB", for the sums of each stack; beyond it features go to disk (TMPDIR),
            those of a GPU to host memory first, and are multiplied pair by pair when a correlation is read.
        fresh: begin anew, whatever `cache_dir` holds.
        sketch: instead of the products of each pair (paper A, exact: None) keep so many rows per layer, from which any
            pair of its layers is estimated (`CorrelationStats.sketch_error`): little memory, and additions instead of
            products while collecting. "auto": 1024 rows (more for d_ff above 3584), or exact where that costs less or
            few tokens come.

    Raises:
        FFMergeError: none or several of window, pairs, layers; unsupported or merged model; no data, fewer than two
            tokens; NaN or Inf features (names layer and batch); a mask that does not fit; a cache that is of
            another run (model, data, settings), damaged or in use; a sketch below 16 rows or above `max_tokens`.
    """
    with on_all_ranks("collect"):
        _check_arguments(features, max_tokens)
        ffns = _unmerged_ffns(model)
        wanted = wanted_pairs(ffns, window, pairs, layers, anchor)
        devices = {s: device or model.get_submodule(ffns.by_stack()[s][0].down_path).weight.device for s in wanted}
        settings = {"features": features, "max_tokens": max_tokens}
        limit = None if max_memory is None else parse_bytes(max_memory, "max_memory")
        rows = chosen_rows(sketch, wanted, ffns, max_tokens, limit)
        stats = CorrelationStats.empty(ModelSummary.of(model, ffns), wanted, devices, max_memory, rows, **settings)
        signature = _signature(stats) | ({"weights": weights_hash(model, reader_of(model))} if cache_dir else {})
        with RunningSums(cache_dir, "statistics", save_seconds, signature, fresh) as cache:
            _collect_here(model, stats, batches, cache, max_memory)
    if world_size() > 1:
        stats.all_reduce()
        stats.data = content_hash(gather(stats.data))
    _check_tokens(stats)
    return stats


def _check_arguments(features: str, max_tokens: int) -> None:
    if features not in ("pre", "post"):
        raise FFMergeError(f"features: got {features!r}, wanted 'pre' (before the activation) or 'post'")
    if max_tokens < 2:
        raise FFMergeError(f"max_tokens: got {max_tokens}, wanted at least 2 (about 10,000 is usual)")


def _unmerged_ffns(model: nn.Module) -> FFNs:
    ffns = find_ffns(model)
    if groups_among(ffns, model):
        raise FFMergeError("collect: this model's FFNs are merged already; give the original model")
    return ffns


def _collect_here(
    model: nn.Module, stats: CorrelationStats, batches: Iterable[Any], cache: RunningSums, max_memory: int | str | None
) -> None:
    """Count this process's tokens, from where the cache left off."""
    check_batches(batches)
    done = _resume_(stats, cache, max_memory)
    if done.get("complete") and "data" not in done:  # kept by an earlier version
        return
    taker = _FeatureTaker(model, stats, share_of_rank(stats.settings["max_tokens"]))
    if done and taker.passes.finished():
        cache.check(batches)
    else:
        with taker.passes:
            taker.hook()
            for number, _ in taker.passes.over(cache.watched(batches), "collect", done.get("batches", 0)):
                taker.end_batch(number)
                if taker.settled():  # so that neither a save nor going on from one changes what is rounded
                    cache.save_if_due(stats)
        stats.settle()
        cache.save(stats)
    stats.data = cache.data


class _FeatureTaker:
    """Pushes the FFN features of forward passes into the statistics."""

    def __init__(self, model: nn.Module, stats: CorrelationStats, max_tokens: int):
        self.stats = stats
        keys = {(stack, i) for stack, state in stats.states.items() for i in state.widths}
        self._ffns = [f for f in stats.model.ffns if (f.stack, f.index) in keys]
        self.passes = FFNPasses(model, self._ffns, max_tokens, stats.tokens)

    def hook(self) -> None:
        """Have every wanted FFN hand over its features; to be called inside `passes`."""
        for ffn in self._ffns:
            if self.stats.settings["features"] == "post":
                self.passes.on_input(ffn.down_path, partial(self._receive, ffn))
            else:
                self.passes.on_output(ffn.up_path, partial(self._receive, ffn))

    def end_batch(self, number: int) -> None:
        """Close a batch in every stack's state."""
        for stack, state in self.stats.states.items():
            try:
                state.end_batch()
            except FFMergeError as error:
                raise FFMergeError(f"batch {number}, {stack}: {error}") from error

    def settled(self) -> bool:
        """Whether no features wait to be multiplied; one stack's are with another's, so that this comes to pass."""
        waiting = {stack for stack, state in self.stats.states.items() if state.waits()}
        running = {stack for stack, tokens in self.passes.counts.items() if tokens < self.passes.max_tokens}
        if running <= waiting:
            return not waiting
        for stack in waiting:
            self.stats.states[stack].settle()
        return True

    def _receive(self, ffn: FFNSublayer, x: Tensor) -> None:
        x = x[..., -ffn.d_ff :]  # of a fused gate and up, the up half
        x = x.reshape(-1, ffn.d_ff)
        state = self.stats.states[ffn.stack]
        state.push(ffn.index, x.to(state.device), self.passes.mask(ffn.stack, len(x), state.device))
        self.passes.saw(ffn)


def _resume_(stats: CorrelationStats, cache: RunningSums, max_memory: int | str | None) -> dict[str, Any]:
    """Fill `stats` with what was kept; returns its progress."""
    kept, done = cache.resume(partial(CorrelationStats.load_with_progress, max_memory=max_memory), _signature)
    for stack, state in stats.states.items() if kept else ():
        state.load_state_dict_(kept.states[stack].state_dict())
    return done


def _signature(stats: CorrelationStats) -> dict[str, Any]:
    return {"model": stats.model.fingerprint, **stats.settings, "sketch": stats.sketch}


# ------------------------------------------------------------------------------------------------- pairs and tokens


def wanted_pairs(
    ffns: FFNs,
    window: int | None = None,
    pairs: Sequence[tuple] | None = None,
    layers: str | Sequence | None = None,
    anchor: str = "first",
) -> dict[str, list[Pair]]:
    """{stack: pairs of layers} that `collect` correlates, of the same arguments."""
    if sum(x is not None for x in (window, pairs, layers)) != 1:
        raise FFMergeError("collect: give exactly one of window=, pairs= or layers=")
    if window is not None:
        windows(ffns, window)  # checks
        return {
            stack: [
                (a.index, b.index)
                for a in members
                for b in members
                if 0 < b.index - a.index < window and a.signature == b.signature
            ]
            for stack, members in ffns.by_stack().items()
        }
    if layers is not None:
        groups = parse_layers(layers, ffns)
        return layer_pairs(groups, [anchor_of(indices, anchor) for _, indices in groups])
    return _parse_pairs(pairs, ffns)


def _parse_pairs(pairs: Sequence[tuple], ffns: FFNs) -> dict[str, list[Pair]]:
    stacks = ffns.by_stack()
    wanted: dict[str, list[Pair]] = {}
    for pair in pairs:
        keys = [f"{next(iter(stacks))}.{k}" if isinstance(k, int) and len(stacks) == 1 else str(k) for k in pair]
        known = [f for key in keys for f in ffns if f.key == key]
        if len(keys) != 2 or len(known) != 2 or known[0].stack != known[1].stack:
            raise FFMergeError(
                f"pairs: got {pair!r}, wanted two layers of one stack: (0, 1), or ('encoder.0', 'encoder.1') where the "
                f"model has two; this one has {ffns[0].key} to {ffns[-1].key}"
            )
        wanted.setdefault(known[0].stack, []).append((known[0].index, known[1].index))
    if not wanted:
        raise FFMergeError("pairs: empty, wanted at least one pair of layers")
    return wanted


def _check_tokens(stats: CorrelationStats) -> None:
    widest = {stack: max(state.widths.values()) for stack, state in stats.states.items()}
    for stack, tokens in stats.tokens.items():
        if tokens < 2:
            raise FFMergeError(
                f"collect: the {stack} saw {tokens} tokens, wanted at least 2; give more calibration data"
            )
        if tokens < widest[stack]:
            warnings.warn(
                f"the {stack} saw {tokens} tokens for {widest[stack]} features: correlations are noisy below one token "
                "per feature; give more calibration data",
                stacklevel=3,
            )
