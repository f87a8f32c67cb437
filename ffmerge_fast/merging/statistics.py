"""`CorrelationStats`: what `collect` measured on a model, saved as safetensors with a JSON header."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.summary import ModelSummary
from ..support.errors import FFMergeError
from ..support.files import write_tensors
from ..support.progress import progress

FORMAT = 1
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
        settings: how (pairs, features, max_tokens).
        states: {stack: CorrelationState whose keys are layer indices}.
    """

    model: ModelSummary
    settings: dict[str, Any]
    states: dict[str, ops.CorrelationState]
    _alignments: dict[tuple[str, int, int], Alignment] = field(default_factory=dict, repr=False)

    @classmethod
    def empty(
        cls, model: ModelSummary, pairs: Mapping[str, Iterable[Pair]], devices, max_memory=None, **settings
    ) -> CorrelationStats:
        """Accumulators for `pairs` ({stack: [(i, j)]}) on `devices` ({stack: device}), with nothing counted yet."""
        states = {}
        for stack, wanted in pairs.items():
            layers = sorted({i for pair in wanted for i in pair})
            sizes = {ffn.index: ffn.d_ff for ffn in model.ffns.of(stack, layers)}
            states[stack] = ops.CorrelationState(sizes, wanted, devices[stack], max_memory=max_memory)
        settings["pairs"] = {stack: [list(p) for p in state.pairs] for stack, state in states.items()}
        return cls(model, settings, states)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens counted in each stack."""
        return {stack: state.count(next(iter(state.widths))) for stack, state in self.states.items()}

    def correlation(self, i: int, j: int, stack: str | None = None) -> Tensor:
        """Pearson correlation of the FFN features of layers `i` and `j`, float32 [d_ff, d_ff]; rows are layer `i`'s.

        Raises:
            FFMergeError: the pair was not collected; no `stack` given for an encoder-decoder model.
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

    def align(self, wanted: Iterable[tuple[str, int, int]]) -> None:
        """Compute the alignments of many (stack, anchor, layer), several at a time: one per torch thread.

        On a GPU at least two, so that one pair's correlations are copied while another pair is solved.
        """
        missing = [key for key in dict.fromkeys(wanted) if key not in self._alignments]
        on_cpu = all(state.device.type == "cpu" for state in self.states.values())
        workers = max(torch.get_num_threads(), 1 if on_cpu else 2)
        with ThreadPoolExecutor(workers) as pool:
            bar = progress(total=len(missing), desc="align", unit="pair")
            for _ in pool.map(lambda key: self.alignment(key[1], key[2], key[0]), missing):
                bar.update(1)
            bar.close()

    def merge(self, other: CorrelationStats) -> CorrelationStats:
        """Add the tokens of `other` (same model, pairs and features) in place; exact however they were split."""
        if other.model.fingerprint != self.model.fingerprint:
            raise FFMergeError("merge: the statistics are of different models; collect both from the same one")
        for name in ("pairs", "features"):
            if self.settings[name] != other.settings[name]:
                raise FFMergeError(f"merge: the statistics differ in {name}; collect both with the same settings")
        for stack, state in self.states.items():
            state.merge_(other.states[stack])
        self._alignments.clear()
        return self

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
        header = {"format": FORMAT, "model": self.model.to_dict(), "settings": self.settings, "progress": progress}
        content = json.dumps(header | {"crc32": {name: _crc32(tensor) for name, tensor in tensors.items()}})
        write_tensors(path, tensors, {"ffmerge": content, "crc32": str(zlib.crc32(content.encode()))})

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
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FFMergeError(f"statistics: {path} is not a file; make it with `ffmerge collect`")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise FFMergeError(f"statistics: {path} is damaged ({error}); collect again") from error
        if "ffmerge" not in metadata:
            raise FFMergeError(f"statistics: {path} is a safetensors file, but not one of statistics")
        if metadata.get("crc32") != str(zlib.crc32(metadata["ffmerge"].encode())):
            raise FFMergeError(f"statistics: {path} is damaged (its header has changed); collect again")
        header = json.loads(metadata["ffmerge"])
        if header["format"] != FORMAT:
            raise FFMergeError(f"statistics: {path} has format {header['format']}, this version reads {FORMAT}")
        damaged = [name for name, crc in header["crc32"].items() if name not in tensors or _crc32(tensors[name]) != crc]
        if damaged:
            raise FFMergeError(f"statistics: {path} is damaged ({damaged[0]} has changed); collect again")
        settings = header["settings"]
        pairs = {stack: [tuple(p) for p in wanted] for stack, wanted in settings.pop("pairs").items()}
        devices = dict.fromkeys(pairs, device)
        stats = cls.empty(ModelSummary.from_dict(header["model"]), pairs, devices, max_memory, **settings)
        for stack, state in stats.states.items():
            prefix = f"{stack}/"
            state.load_state_dict_({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
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


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def layer_pairs(groups: Sequence[tuple[str, Sequence[int]]], anchors: Sequence[int]) -> dict[str, list[Pair]]:
    """{stack: [(anchor, other layer), ...]} of the groups: what aligning them needs."""
    pairs: dict[str, list[Pair]] = {}
    for (stack, indices), anchor in zip(groups, anchors, strict=True):
        pairs.setdefault(stack, []).extend((anchor, i) for i in indices if i != anchor)
    return pairs
