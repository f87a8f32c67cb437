"""`CorrelationStats`: what `collect` measured on a model, saved as safetensors with a JSON header."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.summary import ModelSummary
from ..support.digests import content_hash
from ..support.distributed import gather, is_distributed, on_all_ranks, rank, world_size
from ..support.errors import FFMergeError
from ..support.progress import progress
from ..support.sealed import DamagedError, read_sealed_tensors, write_sealed_tensors
from .sketching import described

EXACT, SKETCHED = FORMATS = 1, 2  # earlier versions read the first only
Pair = tuple[int, int]


@dataclass(frozen=True)
class Alignment:
    """How one layer's neurons match the anchor's.

    Attributes:
        permutation: int64 [d_ff]; the anchor's neuron j corresponds to this layer's neuron `permutation[j]`.
        matched: mean correlation of matched neurons; `unmatched`: the same before alignment (the diagonal's mean).
    """

    permutation: Tensor
    matched: float
    unmatched: float


@dataclass
class CorrelationStats:
    """Second moments of the FFN features of a model, one `CorrelationState` per stack.

    Attributes:
        model: the model they were measured on.
        settings: how (pairs, features, max_tokens, and sketch where there is one).
        states: {stack: CorrelationState whose keys are layer indices}.
        data: hash of the batches that were counted; None where that is not known.
    """

    model: ModelSummary
    settings: dict[str, Any]
    states: dict[str, ops.CorrelationState]
    data: str | None = None
    _alignments: dict[tuple[str, int, int], Alignment] = field(default_factory=dict, repr=False)

    @classmethod
    def empty(
        cls, model: ModelSummary, pairs: Mapping[str, Iterable[Pair]], devices, max_memory=None, sketch=None, **settings
    ) -> CorrelationStats:
        """Sums for `pairs` ({stack: [(i, j)]}) on `devices` ({stack: device}), with nothing counted yet."""
        states = {}
        for stack, wanted in pairs.items():
            layers = sorted({i for pair in wanted for i in pair})
            sizes = {ffn.index: ffn.d_ff for ffn in model.ffns.of(stack, layers)}
            states[stack] = ops.CorrelationState(sizes, wanted, devices[stack], max_memory=max_memory, sketch=sketch)
        settings["pairs"] = {stack: [list(p) for p in state.pairs] for stack, state in states.items()}
        if sketch is not None:
            settings["sketch"] = sketch
        return cls(model, settings, states)

    @property
    def sketch(self) -> int | None:
        """Rows of each layer's sketch; None where correlations are exact."""
        return self.settings.get("sketch")

    @property
    def sketch_error(self) -> float:
        """Standard deviation of an estimated correlation; 0 where they are exact."""
        return next(iter(self.states.values())).sketch_error

    def described(self) -> str:
        """What is kept, exact products or sketches, and what the other way would take."""
        return described(self.sketch, self.settings["pairs"], self.model.ffns, self.settings["max_tokens"])

    def holds(self, stack: str, i: int, j: int) -> bool:
        """Whether `correlation(i, j)` can be had: of a sketch, of any two of its layers."""
        state = self.states.get(stack)
        if state is None or self.sketch is None:
            return state is not None and ((i, j) in state.pairs or (j, i) in state.pairs)
        return {i, j} <= state.widths.keys()

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens counted in each stack."""
        return {stack: state.count(next(iter(state.widths))) for stack, state in self.states.items()}

    def signature(self) -> str:
        """Hash of what they were made from and how: model, settings, data and tokens."""
        return content_hash(self.model.fingerprint, self.settings, self.data, self.tokens)

    def correlation(self, i: int, j: int, stack: str | None = None) -> Tensor:
        """Pearson correlation of the FFN features of layers `i` and `j`, float32 [d_ff, d_ff]; rows are layer `i`'s.

        Raises:
            FFMergeError: the pair was not collected; no `stack` given for an encoder-decoder model.

        From a sketch: an estimate, with a standard deviation of `sketch_error`.
        """
        return self._state(stack).correlation(i, j)

    def alignment(self, anchor: int, layer: int, stack: str | None = None) -> Alignment:
        """The best match of `layer`'s neurons to `anchor`'s (paper A, eq. 2); computed once, then remembered."""
        stack = stack or self._only_stack()
        key = (stack, anchor, layer)
        if key not in self._alignments:
            scores = self.correlation(anchor, layer, stack)
            found = ops.assign(scores)
            unmatched = scores.diagonal().double().mean().item()
            self._alignments[key] = Alignment(found.permutation.cpu(), found.objective / len(scores), unmatched)
        return self._alignments[key]

    def expected_loss(self, anchor: int, layer: int, stack: str | None = None) -> float:
        """Which share of the matched correlation `alignment` loses by matching on a sketch, without the exact one.

        Half of the sketch is matched alone, and both matches are scored on it. By how much the whole sketch's match
        is worse there is, to second order in the errors, what it loses against the exact one: an error e of variance
        s² in each half moves the optimum to e/2 + e'/2, which costs s²/4 of the truth, and s²/2 - s²/4 on this half.

        Returns:
            The share, 0 or more; 0 for exact statistics, 1 where nothing matched.

        Raises:
            FFMergeError: as `correlation`.
        """
        stack = stack or self._only_stack()
        if self.sketch is None:
            return 0.0
        whole, half = self.alignment(anchor, layer, stack), self._state(stack).half_correlation(anchor, layer)
        columns = whole.permutation.to(half.device)[:, None]
        worse = ops.assign(half).objective - half.gather(1, columns).double().sum().item()
        return max(0.0, worse / (whole.matched * len(half))) if whole.matched > 0 else 1.0

    def align(self, wanted: Iterable[tuple[str, int, int]], over_ranks: bool = False) -> None:
        """Compute the alignments of many (stack, anchor, layer), several at a time: one per torch thread.

        On a GPU at least two, so that one pair's correlations are copied while another pair is solved.

        Args:
            over_ranks: every process of a torch.distributed job computes its share, and all get all; all must call.
        """
        missing = [key for key in dict.fromkeys(wanted) if key not in self._alignments]
        if over_ranks and is_distributed():
            share = missing[rank() :: world_size()]
            with on_all_ranks("align"):
                self.align(share)
            for found in gather({key: self._alignments[key] for key in share}):
                self._alignments |= found
            return
        on_cpu = all(state.device.type == "cpu" for state in self.states.values())
        workers = max(torch.get_num_threads(), 1 if on_cpu else 2)
        with ThreadPoolExecutor(workers) as pool:
            bar = progress(total=len(missing), desc="align", unit="pair")
            for _ in pool.map(lambda key: self.alignment(key[1], key[2], key[0]), missing):
                bar.update(1)
            bar.close()

    def merge(self, other: CorrelationStats) -> CorrelationStats:
        """Add the tokens of `other` (same model, pairs and features) in place.

        Exact however they were split; sketches add up to one of all tokens, with the error of one.

        Raises:
            FFMergeError: they are of other models, pairs, features or sketches.
        """
        if other.model.fingerprint != self.model.fingerprint:
            raise FFMergeError("merge: the statistics are of different models; collect both from the same one")
        for name in ("pairs", "features", "sketch"):
            if self.settings.get(name) != other.settings.get(name):
                raise FFMergeError(f"merge: the statistics differ in {name}; collect both with the same settings")
        for stack, state in self.states.items():
            state.merge_(other.states[stack])
        self.data = content_hash(self.data, other.data)
        self._alignments.clear()
        return self

    def settle(self) -> None:
        """Add what waits: nothing is added after this."""
        for state in self.states.values():
            state.settle()

    def all_reduce(self, group=None) -> CorrelationStats:
        """Add up the tokens of all processes of a `torch.distributed` group, in place, on every one of them."""
        for state in self.states.values():
            state.all_reduce_(group)
        self._alignments.clear()
        return self

    def save(self, path: str | os.PathLike, **progress) -> None:
        """Write one safetensors file (header: model, settings); complete or absent."""
        tensors = {
            f"{stack}/{name}": tensor.contiguous()
            for stack, state in self.states.items()
            for name, tensor in state.state_dict().items()
        }
        kind = EXACT if self.sketch is None else SKETCHED
        header = {"format": kind, "model": self.model.to_dict(), "settings": self.settings, "data": self.data}
        write_sealed_tensors(path, tensors, header | {"progress": progress})

    @classmethod
    def load(
        cls, path: str | os.PathLike, device: torch.device | str = "cpu", max_memory: int | str | None = None
    ) -> CorrelationStats:
        """Read what `save` wrote.

        Args:
            device, max_memory: where the sums are kept, and what they may take, as in `collect`.

        Raises:
            FFMergeError: no such file, damaged, not a file of statistics, or more than fits into memory.
        """
        return cls.load_with_progress(path, device, max_memory)[0]

    @classmethod
    def load_with_progress(
        cls, path: str | os.PathLike, device="cpu", max_memory=None
    ) -> tuple[CorrelationStats, dict[str, Any]]:
        """(statistics, what `save` was told of the progress of collecting them)."""
        if not Path(path).is_file():
            raise FFMergeError(f"statistics: {path} is not a file; make it with `ffmerge collect`")
        try:
            tensors, header = read_sealed_tensors(path)
        except DamagedError as error:
            raise FFMergeError(f"statistics: {path} is damaged ({error}); collect again") from error
        if header is None:
            raise FFMergeError(f"statistics: {path} is a safetensors file, but not one of statistics")
        if header["format"] not in FORMATS:
            raise FFMergeError(
                f"statistics: {path} has format {header['format']}, this version reads {EXACT} and {SKETCHED}"
            )
        settings = header["settings"]
        pairs = {stack: [tuple(p) for p in wanted] for stack, wanted in settings.pop("pairs").items()}
        devices = dict.fromkeys(pairs, device)
        stats = cls.empty(ModelSummary.from_dict(header["model"]), pairs, devices, max_memory, **settings)
        for stack, state in stats.states.items():
            prefix = f"{stack}/"
            state.load_state_dict_({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        stats.data = header.get("data")
        return stats, header["progress"]

    def _state(self, stack: str | None) -> ops.CorrelationState:
        stack = stack or self._only_stack()
        if stack not in self.states:
            raise FFMergeError(f"stack: got {stack!r}, these statistics have {', '.join(self.states)}")
        return self.states[stack]

    def _only_stack(self) -> str:
        if len(self.states) > 1:
            raise FFMergeError(f"stack: say which of {', '.join(self.states)}, this model has both")
        return next(iter(self.states))


def layer_pairs(groups: Sequence[tuple[str, Sequence[int]]], anchors: Sequence[int]) -> dict[str, list[Pair]]:
    """{stack: [(anchor, other layer), ...]} of the groups: what aligning them needs."""
    pairs: dict[str, list[Pair]] = {}
    for (stack, indices), anchor in zip(groups, anchors, strict=True):
        pairs.setdefault(stack, []).extend((anchor, i) for i in indices if i != anchor)
    return pairs
