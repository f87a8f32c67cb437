"""How much each dimension of a model matters: of the residual stream, of every FFN and of every attention.

Activation scores follow Minitron (and the authors of paper B): sums of absolute values over calibration tokens.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.padding import token_masks
from ..models.forward import evaluating, run, to_device
from ..models.sublayers import base_model_type
from ..models.summary import fingerprint
from ..support.distributed import file_of_rank, is_distributed, sum_over_ranks
from ..support.errors import FFMergeError
from ..support.progress import progress
from .activations import sums_over_tokens
from .axes import ATTENTION, FFN, MODEL, ModelAxes, read_layout

METHODS = ("activation", "magnitude", "wanda", "random")
FEATURES = ("product", "up")
_FORMAT = 1


@dataclass
class Importance:
    """Scores of one model's dimensions; higher is kept.

    Attributes:
        method, features, seed: how they were made.
        model_type, fingerprint: of which model.
        scores: {"d_model": [d_model], "d_ff/<FFN key>": [d_ff], "attention/<path>": [heads · head_dim]}, float64 on
            the CPU; attention only where its width follows d_model.
        tokens: counted, 0 for scores that need no data.
    """

    method: str
    features: str
    seed: int
    model_type: str
    fingerprint: str
    scores: dict[str, Tensor] = field(repr=False)
    tokens: int = 0

    def check(self, model: nn.Module) -> None:
        """Raise FFMergeError unless the scores are of `model`."""
        found = fingerprint(model)
        if found != self.fingerprint:
            raise FFMergeError(
                f"importance: is of another model ({self.model_type} {self.fingerprint}; this one is "
                f"{base_model_type(model)} {found}); measure it again on this one"
            )

    def save(self, path: str | os.PathLike, **done: int) -> None:
        """Write one safetensors file with a JSON header; beside, then renamed."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {k: v for k, v in vars(self).items() if k != "scores"} | {"format": _FORMAT, "progress": done}
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(self.scores, beside, metadata={"ffmerge_importance": json.dumps(header)})
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Importance:
        """Read what `save` wrote.

        Raises:
            FFMergeError: no such file, damaged, or not a file of importances.
        """
        return cls._load(path)[0]

    @classmethod
    def _load(cls, path: str | os.PathLike) -> tuple[Importance, dict[str, int]]:
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FFMergeError(f"importance: {path} is not a file; make it with importance(...).save(path)")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("ffmerge_importance", "{}"))
                scores = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError) as error:
            raise FFMergeError(f"importance: {path} is damaged ({error}); measure it again") from error
        if header.pop("format", None) != _FORMAT:
            raise FFMergeError(f"importance: {path} is no file of importances of format {_FORMAT}; measure it again")
        done = header.pop("progress")
        return cls(scores=scores, **header), done


def importance(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    method: str = "activation",
    features: str = "product",
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    save_seconds: float = 60.0,
) -> Importance:
    """Score the dimensions of a model, for `project` and `hard_prune` to keep the best.

    Args:
        model: a transformers model (merged or not); its mode, device and dtype stay as they are.
        batches: calibration data as for `collect`, every token counted that is not padding; "magnitude" and "random"
            need none. In a torch.distributed job each rank gives its own, and all return the sum.
        method: "activation": sums of absolute values, of the outputs of all norms inside the layers for d_model, per
            layer of the FFN's features for d_ff and of the output projection's input for attention. "magnitude": L2
            norms of weights, the mean over all matrices for d_model. "wanda": L2 norms of those activations times the
            magnitudes. "random": uniform, from `seed`.
        features: of FFNs: "product", what W_down takes (act(gate) · up, or act(up)); "up", the output of W_up as in
            the authors' code.
        cache_dir: keep the running sums here, at most every `save_seconds`; a killed run goes on from there with the
            same `batches`.

    Raises:
        FFMergeError: unknown method or features, a model that cannot be projected, no data, activations that are not
            finite (names the batch), a cache of another run.
    """
    for name, value, known in (("method", method, METHODS), ("features", features, FEATURES)):
        if value not in known:
            raise FFMergeError(f"{name}: got {value!r}, wanted one of {', '.join(known)}")
    layout = read_layout(model)
    made = Importance(method, features, seed, base_model_type(model), fingerprint(model), _zeros(layout))
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        made.scores = {n: torch.rand(len(s), generator=generator, dtype=s.dtype) for n, s in made.scores.items()}
    elif method == "magnitude":
        made.scores = magnitudes(model, layout)
    else:
        if batches is None:
            raise FFMergeError(f"batches: got none, wanted calibration data for method {method!r}")
        _measure(made, model, layout, batches, _Cache(cache_dir, save_seconds))
        if method == "wanda":
            weights = magnitudes(model, layout)
            made.scores = {n: s.sqrt() * weights[n] for n, s in made.scores.items()}
    return made


def _zeros(layout: ModelAxes) -> dict[str, Tensor]:
    widths = {"d_model": layout.d_model}
    widths |= {f"d_ff/{key}": width for key, width in layout.d_ff.items()}
    widths |= {f"attention/{path}": a.heads * a.head_dim for path, a in layout.attention.items()}
    return {name: torch.zeros(width, dtype=torch.float64) for name, width in widths.items()}


@torch.no_grad()
def magnitudes(model: nn.Module, layout: ModelAxes) -> dict[str, Tensor]:
    """L2 norms of the weights along each dimension: the mean over matrices for d_model, the sum of an FFN's or an
    attention's projections for theirs."""
    scores, matrices = _zeros(layout), 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        for dim, axis in enumerate(layout.axes[name]):
            if axis is None:
                continue
            norms = parameter.detach().transpose(0, dim).flatten(1).double().norm(dim=1).cpu()
            key = {MODEL: "d_model", FFN: f"d_ff/{axis.key}", ATTENTION: f"attention/{axis.key}"}[axis.role]
            scores[key] += axis.split(norms, layout.head_dim).sum(0)
            matrices += axis.role == MODEL
    scores["d_model"] /= matrices
    return scores


# -------------------------------------------------------------------------------------------------------- activations


def _measure(made: Importance, model: nn.Module, layout: ModelAxes, batches: Iterable[Any], cache: _Cache) -> None:
    skip = cache.resume_(made)
    squared = made.method == "wanda"
    bar = progress(desc="importance", unit="batch")
    with bar, evaluating(model), torch.no_grad(), sums_over_tokens(model, layout, made.features, squared) as batch_sums:
        for number, batch in enumerate(batches):
            if number < skip:
                continue
            batch = to_device(batch, model)
            stacks = list(layout.stacks())
            batch_sums.start(token_masks(batch, model, stacks))
            run(model, batch)
            tokens, sums = batch_sums.finish(number)
            made.tokens += tokens
            for name, total in sums.items():
                made.scores[name] += total
            bar.update(1)
            cache.save_if_due(made, batches=number + 1)
    if is_distributed():
        _all_reduce_(made, next(model.parameters()).device)
    if not made.tokens:
        raise FFMergeError("importance: no calibration data: `batches` held no tokens")


def _all_reduce_(made: Importance, device: torch.device) -> None:
    packed = torch.cat([*made.scores.values(), torch.tensor([made.tokens], dtype=torch.float64)]).to(device)
    sum_over_ranks([packed])
    parts = packed.cpu().split([*map(len, made.scores.values()), 1])
    made.scores = {name: part.clone() for name, part in zip(made.scores, parts, strict=False)}
    made.tokens = int(parts[-1])


class _Cache:
    """The running sums on disk, so that a killed run goes on."""

    def __init__(self, folder: str | os.PathLike | None, save_seconds: float):
        self._path = Path(folder) / f"{file_of_rank('importance')}.safetensors" if folder else None
        self._save_seconds, self._saved = save_seconds, time.monotonic()

    def resume_(self, made: Importance) -> int:
        """Take over saved sums; returns how many batches they cover."""
        if self._path is None or not self._path.exists():
            return 0
        found, done = Importance._load(self._path)
        for name in ("fingerprint", "method", "features"):
            if getattr(found, name) != getattr(made, name):
                raise FFMergeError(f"cache_dir: {self._path} was begun with another {name}; use another folder")
        made.scores, made.tokens = found.scores, found.tokens
        return done["batches"]

    def save_if_due(self, made: Importance, **done: int) -> None:
        if self._path is not None and time.monotonic() - self._saved >= self._save_seconds:
            made.save(self._path, **done)
            self._saved = time.monotonic()
