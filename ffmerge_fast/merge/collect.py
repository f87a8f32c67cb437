"""Collect FFN features of a model on calibration data, and correlate them while they stream by."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import FFMergeError
from .._progress import progress
from ..models import DECODER, ENCODER, FFNSublayer, by_stack, find_ffns
from .layers import anchor_of, parse_layers, windows
from .statistics import CorrelationStats, ModelSummary, Pair, layer_pairs


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
) -> CorrelationStats:
    """Correlate the FFN features of pairs of layers, in one pass over calibration data (paper A, eq. 1).

    Features are taken by hooks and added up layer by layer: memory is the accumulators and a band of one batch.
    The forward pass stops after the last FFN. In a `torch.distributed` job each rank gives its own batches, counts
    its share of `max_tokens`, and all ranks return the sum.

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

    Raises:
        FFMergeError: none or several of window, pairs, layers; unsupported or merged model; no data, fewer than two
            tokens; NaN or Inf features (names layer and batch); a mask that does not fit; a cache of another run.
    """
    ffns = find_ffns(model)
    if len({id(model.get_submodule(f.down_path)) for f in ffns}) < len(ffns):
        raise FFMergeError("collect: this model's FFNs are merged already; give the original model")
    if features not in ("pre", "post"):
        raise FFMergeError(f"features: got {features!r}, wanted 'pre' (before the activation) or 'post'")
    if max_tokens < 2:
        raise FFMergeError(f"max_tokens: got {max_tokens}, wanted at least 2 (about 10,000 is usual)")
    wanted = _wanted_pairs(ffns, window, pairs, layers, anchor)
    devices = {s: device or model.get_submodule(by_stack(ffns)[s][0].down_path).weight.device for s in wanted}
    stats = CorrelationStats.empty(ModelSummary.of(model), wanted, devices, features=features, max_tokens=max_tokens)
    cache = _Cache(cache_dir, save_seconds)
    stats, done = cache.resume(stats, devices)
    if not done.get("complete"):
        taker = _FeatureTaker(model, stats, _share_of_rank(max_tokens))
        _run(taker, batches, done.get("batches", 0), cache)
        cache.save(stats, complete=True)
    if _world_size() > 1:
        stats.all_reduce()
    _check_tokens(stats)
    return stats


def _run(taker: _FeatureTaker, batches: Iterable[Any], skip: int, cache: _Cache) -> None:
    bar = progress(total=taker.max_tokens, desc="collect", unit="tok")
    number = -1
    with bar, taker, torch.no_grad():
        for number, batch in enumerate(batches):
            if number < skip:
                continue
            before = taker.counted()
            taker.take(batch, number)
            bar.update(taker.counted() - before)
            if taker.finished():
                break
            cache.save_if_due(taker.stats, batches=number + 1)
    if number < 0 and _world_size() == 1:  # other ranks may have data, and wait for this one
        raise FFMergeError("collect: no calibration data: `batches` is empty")


class _FeatureTaker:
    """Hooks on the FFNs of a model that push features into the statistics while the forward pass runs."""

    def __init__(self, model: nn.Module, stats: CorrelationStats, max_tokens: int):
        self.model, self.stats, self.max_tokens = model, stats, max_tokens
        keys = {(stack, i) for stack, state in stats.states.items() for i in state.widths}
        self._ffns = [f for f in stats.model.ffns if (f.stack, f.index) in keys]
        self._counts = stats.tokens
        self._valid: dict[str, Tensor] = {}  # of this batch: tokens that are not padding, as far as it says
        self._masks: dict[str, Tensor] = {}  # of this batch: tokens to count
        self._seen: set[str] = set()
        self._may_stop = _may_stop(model)
        self._context = contextlib.ExitStack()

    def __enter__(self):
        self._context.enter_context(evaluating(self.model))
        self._context.enter_context(_without_fast_path())
        for ffn in self._ffns:
            if self.stats.settings["features"] == "post":
                module = self.model.get_submodule(ffn.down_path)
                handle = module.register_forward_pre_hook(lambda _, args, f=ffn: self._receive(f, args[0]))
            else:
                module = self.model.get_submodule(ffn.up_path)
                handle = module.register_forward_hook(lambda _, args, out, f=ffn: self._receive(f, out))
            self._context.callback(handle.remove)
        return self

    def __exit__(self, *exception):
        self._context.close()

    def counted(self) -> int:
        """Tokens counted in the stack that has the fewest."""
        return min(self._counts.values())

    def finished(self) -> bool:
        return self.counted() >= self.max_tokens

    def take(self, batch: Any, number: int) -> None:
        """Run one batch, up to the last FFN that is wanted."""
        self._masks, self._seen = {}, set()
        batch = to_device(batch, self.model)
        self._valid = token_masks(batch, self.model, list(self.stats.states))
        with contextlib.suppress(_AllSeen):
            run(self.model, batch)
        for stack, state in self.stats.states.items():
            if stack not in self._masks:
                raise FFMergeError(
                    f"batch {number}: the {stack} did not run; give inputs for it (labels, decoder_input_ids)"
                )
            try:
                state.end_batch()
            except FFMergeError as error:
                raise FFMergeError(f"batch {number}, {stack}: {error}") from error
        self._counts = self.stats.tokens

    def _receive(self, ffn: FFNSublayer, x: Tensor) -> None:
        x = x[..., -ffn.d_ff :]  # of a fused gate and up, the up half
        x = x.reshape(-1, ffn.d_ff)
        state = self.stats.states[ffn.stack]
        if ffn.stack not in self._masks:
            self._masks[ffn.stack] = self._mask(ffn.stack, len(x)).to(state.device)
        state.push(ffn.index, x.to(state.device), self._masks[ffn.stack])
        self._seen.add(ffn.key)
        if len(self._seen) == len(self._ffns) and self._may_stop:
            raise _AllSeen

    def _mask(self, stack: str, tokens: int) -> Tensor:
        """Which of this batch's tokens count: not padding, and not beyond max_tokens."""
        mask = self._valid.get(stack)
        if mask is None:
            mask = torch.ones(tokens, dtype=torch.bool)
        if mask.numel() != tokens:
            raise FFMergeError(
                f"the {stack}'s attention_mask has shape {list(mask.shape)}, but its FFNs saw {tokens} tokens: wanted "
                "one value per token, [batch, length]"
            )
        mask = mask.reshape(-1).bool()
        return mask & (mask.cumsum(0) <= self.max_tokens - self._counts[stack])


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """torch's own encoder layers call their Linears, instead of one kernel that shows no features."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _AllSeen(Exception):
    """Ends a forward pass once every wanted FFN has run."""


def _may_stop(model: nn.Module) -> bool:
    """Whether nothing needs the forward pass to end the ordinary way (offloading hooks, sharded modules do)."""
    wrappers = ("FSDP", "DistributedDataParallel", "FullySharded")
    return not any(hasattr(m, "_hf_hook") or type(m).__name__.startswith(wrappers) for m in model.modules())


class _Cache:
    """The running sums on disk, so that a killed run goes on."""

    def __init__(self, folder: str | os.PathLike | None, save_seconds: float):
        rank = f"-rank{torch.distributed.get_rank()}" if _world_size() > 1 else ""
        self._path = Path(folder) / f"statistics{rank}.safetensors" if folder else None
        self._save_seconds, self._saved = save_seconds, time.monotonic()

    def resume(self, stats: CorrelationStats, devices) -> tuple[CorrelationStats, dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return stats, {}
        found, done = CorrelationStats.load_with_progress(self._path)
        found.model.check_same(stats.model.model_type, stats.model.fingerprint, f"cache_dir: {self._path}")
        if found.settings != stats.settings:
            differ = sorted(k for k in stats.settings if found.settings.get(k) != stats.settings[k])
            raise FFMergeError(f"cache_dir: {self._path} was begun with other {', '.join(differ)}; use another folder")
        for stack, state in stats.states.items():
            state.load_state_dict_(found.states[stack].state_dict())
        return stats, done

    def save(self, stats: CorrelationStats, **done) -> None:
        if self._path is not None:
            stats.save(self._path, **done)
            self._saved = time.monotonic()

    def save_if_due(self, stats: CorrelationStats, **done) -> None:
        if time.monotonic() - self._saved >= self._save_seconds:
            self.save(stats, **done)


# ------------------------------------------------------------------------------------------------- pairs and tokens


def _wanted_pairs(ffns, window, pairs, layers, anchor) -> dict[str, list[Pair]]:
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
            for stack, members in by_stack(ffns).items()
        }
    if layers is not None:
        groups = parse_layers(layers, ffns)
        return layer_pairs(groups, [anchor_of(indices, anchor) for _, indices in groups])
    return _parse_pairs(pairs, ffns)


def _parse_pairs(pairs: Sequence[tuple], ffns: Sequence[FFNSublayer]) -> dict[str, list[Pair]]:
    stacks = by_stack(ffns)
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


def token_masks(batch: Any, model: nn.Module, stacks: Sequence[str]) -> dict[str, Tensor]:
    """Per stack, which tokens are not padding, as far as the batch says."""
    if not isinstance(batch, Mapping):
        return {}
    labels = batch.get("labels")
    of_tokens = labels is not None and labels.ndim == 2 and not labels.is_floating_point()
    from_labels = labels != -100 if of_tokens else None
    two_stacks = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    masks = {}
    if ENCODER in stacks and getattr(model, "main_input_name", "") != "input_features":  # audio is never masked
        mask = batch.get("attention_mask")
        masks[ENCODER] = mask if mask is not None else _torch_mask(batch, "src_key_padding_mask", model)
    if DECODER in stacks:
        mask = batch.get("decoder_attention_mask" if two_stacks else "attention_mask")
        mask = mask if mask is not None else _torch_mask(batch, "tgt_key_padding_mask", model)
        masks[DECODER] = mask if mask is not None else from_labels
    return {stack: mask for stack, mask in masks.items() if mask is not None}


def _torch_mask(batch: Mapping, name: str, model: nn.Module) -> Tensor | None:
    """The tokens that one of nn.Transformer's padding masks [batch, length] (True or -inf: padding) leaves."""
    padding = batch.get(name)
    if padding is None:
        return None
    batch_first = all(m.batch_first for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    return padding == 0 if batch_first else (padding == 0).T


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


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _share_of_rank(max_tokens: int) -> int:
    """This rank's part of `max_tokens`; the first ranks take the remainder."""
    world = _world_size()
    if world == 1:
        return max_tokens
    return max_tokens // world + (torch.distributed.get_rank() < max_tokens % world)


# ------------------------------------------------------------------------------------------------------ run a model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def to_device(batch: Any, model: nn.Module) -> Any:
    """The batch's tensors on the device of the model's first parameter."""
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(v.to(device) if isinstance(v, Tensor) else v for v in batch)
    raise FFMergeError(f"batches: got a {type(batch).__name__}, wanted dicts, tuples or tensors")


def run(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)`, `model(*batch)` or `model(batch)`, as the batch is a dict, a tuple or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
