"""How much each dimension of a model matters: of the residual stream, of every FFN and of every attention.

Activation scores follow Minitron (and the authors of paper B): sums of absolute values over calibration tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.passes import check_batches
from ..models.elsewhere import reader_of
from ..models.summary import ModelSummary
from ..support.digests import weights_hash
from ..support.distributed import is_distributed, sum_over_ranks
from ..support.errors import FFMergeError
from ..support.resume import RunningSums
from ..support.sealed import DamagedError, read_sealed_tensors, write_sealed_tensors
from ..support.tensors import check_finite, not_inference
from .activations import ActivationPasses
from .axes import ATTENTION, FFN, MODEL, ModelAxes
from .settings import FEATURES

_FORMAT, _HEADER = 1, "ffmerge_importance"


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
        """Raise FFMergeError unless the scores are of `model`, and finite."""
        self.check_summary(ModelSummary.of(model))

    def check_summary(self, given: ModelSummary) -> None:
        """The same for a model that was read already."""
        if given.fingerprint != self.fingerprint:
            raise FFMergeError(
                f"importance: is of another model ({self.model_type} {self.fingerprint}; this one is "
                f"{given.model_type} {given.fingerprint}); measure it again on this one"
            )
        check_finite("importance", self.scores.items(), "measure it again")

    def save(self, path: str | os.PathLike, **done: Any) -> None:
        """Write one safetensors file with a JSON header; complete or absent."""
        header = {k: v for k, v in vars(self).items() if k != "scores"} | {"format": _FORMAT, "progress": done}
        write_sealed_tensors(path, self.scores, header, _HEADER)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Importance:
        """Read what `save` wrote.

        Raises:
            FFMergeError: no such file, damaged, or not a file of importances.
        """
        return cls.load_with_progress(path)[0]

    @classmethod
    def load_with_progress(cls, path: str | os.PathLike) -> tuple[Importance, dict[str, Any]]:
        """(importances, what `save` was told beside them)."""
        if not Path(path).is_file():
            raise FFMergeError(f"importance: {path} is not a file; make it with importance(...).save(path)")
        try:
            scores, header = read_sealed_tensors(path, _HEADER)
        except DamagedError as error:
            raise FFMergeError(f"importance: {path} is damaged ({error}); measure it again") from error
        if header is None or header.pop("format", None) != _FORMAT:
            raise FFMergeError(f"importance: {path} is no file of importances of format {_FORMAT}; measure it again")
        done = header.pop("progress")
        return cls(scores=scores, **header), done


@not_inference
def importance(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    method: str = "activation",
    features: str = "product",
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    save_seconds: float = 60.0,
    fresh: bool = False,
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
        fresh: begin anew, whatever `cache_dir` holds.

    Raises:
        FFMergeError: unknown method or features, a model that cannot be projected, no data, activations that are not
            finite (names the batch), a cache of another run (model, data, method, features), or in use.
    """
    for name, value, known in (("method", method, METHODS), ("features", features, FEATURES)):
        if value not in known:
            raise FFMergeError(f"{name}: got {value!r}, wanted one of {', '.join(known)}")
    layout = ModelAxes.of(model)
    base = ModelSummary.of(model, layout.ffns)
    made = Importance(method, features, seed, base.model_type, base.fingerprint, _zeros(layout))
    signature = _signature(made) | ({"weights": weights_hash(model, reader_of(model))} if cache_dir else {})
    with RunningSums(cache_dir, "importance", save_seconds, signature, fresh) as cache:
        METHODS[method](made, model, layout, batches, cache)
    return made


def _signature(made: Importance) -> dict[str, Any]:
    return {"model": made.fingerprint, "method": made.method, "features": made.features}


def by_magnitude(model: nn.Module, layout: ModelAxes, base: ModelSummary) -> Importance:
    """`importance(model, method="magnitude")` of a model that was read already."""
    return Importance("magnitude", "product", 0, base.model_type, base.fingerprint, magnitudes(model, layout))


def _zeros(layout: ModelAxes) -> dict[str, Tensor]:
    widths = {"d_model": layout.d_model}
    widths |= {f"d_ff/{key}": width for key, width in layout.d_ff.items()}
    widths |= {f"attention/{path}": a.heads * a.head_dim for path, a in layout.attention.items()}
    return {name: torch.zeros(width, dtype=torch.float64) for name, width in widths.items()}


@torch.no_grad()
def magnitudes(model: nn.Module, layout: ModelAxes) -> dict[str, Tensor]:
    """L2 norms of the weights along each dimension: the mean over matrices for d_model, the sum of an FFN's or an
    attention's projections for theirs."""
    scores, matrices, read = _zeros(layout), 0, reader_of(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        values = read(parameter)
        for dim, axis in enumerate(layout.axes[name]):
            if axis is None:
                continue
            norms = values.transpose(0, dim).flatten(1).double().norm(dim=1).cpu()
            key = {MODEL: "d_model", FFN: f"d_ff/{axis.key}", ATTENTION: f"attention/{axis.key}"}[axis.role]
            scores[key] += axis.split(norms, layout.head_dim).sum(0)
            matrices += axis.role == MODEL
    scores["d_model"] /= matrices
    return scores


# ------------------------------------------------------------------------------------------------------------ methods


def _random_(made: Importance, *_: Any) -> None:
    generator = torch.Generator().manual_seed(made.seed)
    made.scores = {n: torch.rand(len(s), generator=generator, dtype=s.dtype) for n, s in made.scores.items()}


def _magnitude_(made: Importance, model: nn.Module, layout: ModelAxes, *_: Any) -> None:
    made.scores = magnitudes(model, layout)


def _wanda_(made: Importance, model: nn.Module, layout: ModelAxes, *data: Any) -> None:
    _activation_(made, model, layout, *data)
    weights = magnitudes(model, layout)
    made.scores = {n: s.sqrt() * weights[n] for n, s in made.scores.items()}


def _activation_(
    made: Importance, model: nn.Module, layout: ModelAxes, batches: Iterable[Any] | None, cache: RunningSums
) -> None:
    """Sums of absolute values; for "wanda" of squares."""
    if batches is None:
        raise FFMergeError(f"batches: got none, wanted calibration data for method {made.method!r}")

    kept, done = cache.resume(Importance.load_with_progress, _signature)
    if kept is not None:
        made.scores, made.tokens = kept.scores, kept.tokens
    with ActivationPasses(model, layout, made.features, squared=made.method == "wanda") as passes:
        check_batches(batches)
        for number, _ in passes.over(cache.watched(batches), "importance", skip=done.get("batches", 0)):
            tokens, sums = passes.sums(number)
            made.tokens += tokens
            for name, total in sums.items():
                made.scores[name] += total
            cache.save_if_due(made)
    if is_distributed():
        _all_reduce_(made, next(model.parameters()).device)
    if not made.tokens:
        raise FFMergeError("importance: no calibration data: `batches` held no tokens")


METHODS: dict[str, Callable[..., None]] = {  # each fills in the scores
    "activation": _activation_,
    "magnitude": _magnitude_,
    "wanda": _wanda_,
    "random": _random_,
}


def _all_reduce_(made: Importance, device: torch.device) -> None:
    packed = torch.cat([*made.scores.values(), torch.tensor([made.tokens], dtype=torch.float64)]).to(device)
    sum_over_ranks([packed])
    parts = packed.cpu().split([*map(len, made.scores.values()), 1])
    made.scores = {name: part.clone() for name, part in zip(made.scores, parts, strict=False)}
    made.tokens = int(parts[-1])
