"""`project`: a smaller student of a frozen model, whose matrices are projections of the model's own (paper B)."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.elsewhere import needs_weights
from ..models.summary import ModelSummary
from ..models.ties import CONFIG_VERSION
from ..support.digests import weights_hash
from ..support.distributed import from_rank_zero
from ..support.errors import FFMergeError
from ..support.resume import RunningSums
from ..support.settings import check
from ..support.tensors import not_inference
from .axes import ModelAxes
from .bases import start_from_basis_, stream_basis
from .clone import CloneLoss
from .importance import Importance, by_magnitude
from .matrices import Projection, Unit, grouped
from .optimizer.adamw import AdamWOptions
from .optimizer.base_weights import BaseWeights
from .optimizer.optimizer import ProjectionOptimizer
from .parameters import sorted_parameters
from .reconstruct import ReconstructReport
from .reconstruction import reconstruct_
from .selection import Selection, Sizes, resolve_sizes, select
from .settings import INITS, OFFLOADS, SHARES, Reconstructing, Widths
from .student import build_student, fold


@dataclass(frozen=True)
class Origin:
    """What a projector was made from: the base, which it does not keep alive, and what of it is kept.

    Attributes:
        basis: Q [d_model', d_model], float64.
    """

    model: weakref.ref[nn.Module]
    layout: ModelAxes
    selection: Selection
    basis: Tensor


@dataclass
class Projector:
    """A student and what its weights are made of; made by `project`.

    Attributes:
        student: a plain, smaller model of the base's class. Train it with any loop, but with `optimizer(...)`; move it
            to another device or dtype before that. The base's weights stay where they are, on the CPU for example, and
            are read from there in every step; they must not change.
        settings: everything a resumed run must have in common with this one, as JSON values.
        units: matrices that share projections; the optimiser goes through them one by one.
        plain: {name: parameter} of the student that are trained as they are: norms, vectors, and what keeps its shape.
        residual: whether every matrix has an R.
        starts: {projection: Δ it begins with}, where that is not zero (init="svd").
        reconstructed: whether R begins with what the student's weights have beyond P W P.
    """

    student: nn.Module
    settings: dict[str, Any]
    units: list[Unit] = field(repr=False)
    plain: dict[str, nn.Parameter] = field(repr=False)
    residual: bool
    starts: dict[Projection, Tensor] = field(repr=False)
    _config: dict[str, Any] = field(repr=False)
    _base_folder: str | None = field(default=None, repr=False)
    _made_from: Origin | None = field(default=None, repr=False)
    reconstructed: bool = False

    def reconstruct_(
        self,
        batches: Iterable[Any],
        ridge: float = 1e-2,
        local_steps: int | None = None,
        local_lr: float | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike | None = None,
        save_seconds: float = 60.0,
        spool_dir: str | os.PathLike | None = None,
        fresh: bool = False,
        tell: Callable[[str], Any] | None = None,
    ) -> ReconstructReport:
        """Give the student, in place, a far better start: every matrix the least-squares fit to the base on its own
        inputs, block by block (see `projecting.reconstruct`). To be called before `optimizer`.

        P stays the start's (use init="svd" where the stream gets narrower: directions fit better than coordinates); R
        becomes what the fitted weights have beyond P W P, so training goes on as from any start.

        Time: two passes of the base's blocks, about two of the student's, and a Cholesky factor of each width.
        Memory: 2 · tokens · (d + d') numbers for the streams, and one block's moments, beside the models.
        In a `torch.distributed` job each rank gives its own batches, and all get the same weights.

        Args:
            batches: calibration data, as for `collect`; labels are not needed. All are held in memory.
            ridge: pulls to the start's weights; relative to the mean square of a matrix' inputs.
            local_steps: AdamW steps on each block alone, after its matrices, towards the base's stream behind it. The
                default is 400 where norms stand in the stream (post-norm: BERT, Marian), which no matrix can follow,
                and none elsewhere; there it costs as much as so many steps of training, for a little.
            local_lr: of those; by default 0.03 / sqrt(d_model) of the student.
            seed: of their order of the batches.
            cache_dir: keep the fitted weights here after each block, at most every `save_seconds`; a killed run goes on
                with the next block, to the same result.
            spool_dir: keep the streams in files of a temporary folder there, instead of in host memory.
            fresh: begin anew, whatever `cache_dir` holds.
            tell: told in a line, before the walk, what it will take.

        Raises:
            FFMergeError: no residual; bad numbers; no data; the base was let go of or is streamed; a block of no known
                form, or tensors that are not finite (names them). The student may be changed in part then.
        """
        how = Reconstructing(ridge, local_steps, local_lr, seed)
        check(how)
        if not self.residual:
            raise FFMergeError("reconstruct: without R the weights cannot be set; project with residual=True")
        self.check_student()
        with RunningSums(
            cache_dir, "reconstruction", save_seconds, self._decides(how) if cache_dir else {}, fresh
        ) as cache:
            report = reconstruct_(self._origin("reconstruct_"), self.student, how, batches, cache, spool_dir, tell)
        self.reconstructed = True
        self.settings["reconstructed"] = {**vars(how), "data": from_rank_zero(cache.data)}
        return report

    def clone_loss(self) -> CloneLoss:
        """What keeps the student's matrices close to the base's while it is trained, for `finetune(clone=)`.

        Raises:
            FFMergeError: the base was let go of, or is streamed.
        """
        base, layout, selection, basis = self._origin("clone_loss")
        return CloneLoss(self.student, base, layout, selection, basis)

    def _origin(self, action: str) -> tuple[nn.Module, ModelAxes, Selection, Tensor]:
        """(base, its axes, what is kept, Q), in memory."""
        made = self._made_from
        base = made and made.model()
        if base is None or any(p.is_meta for p in base.parameters()):
            raise FFMergeError(f"{action}: the base model was let go of; keep it until {action} has run")
        needs_weights(base, action)
        return base, made.layout, made.selection, made.basis

    def _decides(self, how: Reconstructing) -> dict[str, Any]:
        """What decides a reconstruction, beside the data."""
        base = self._origin("reconstruct_")[0]
        return {**vars(how), "settings": self.settings, "weights": weights_hash(base)}

    def optimizer(
        self,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight_decay_on_projections: float = 0.0,
        max_grad_norm: float | None = None,
        state: str = "fp32",
        offload_base: str | None = None,
        offload_dir: str | os.PathLike | None = None,
        distribute: bool | None = None,
    ) -> ProjectionOptimizer:
        """AdamW on P and R (and on the plain parameters), driven by the gradients of the student's weights.

        To be made after FSDP2 has sharded the student (`finetune` takes a function for that), before or after DDP.

        Args:
            weight_decay: on residuals and on plain matrices; not on norms and biases.
            weight_decay_on_projections: on Δ of P = S + Δ, which pulls P to the selection it began with.
            max_grad_norm: clip by the norm of all gradients of P, R and plain parameters, which takes the chain rule
                twice. (Trainers that clip the student's gradients clip those of W_C; that costs nothing.)
            state: "fp32" moments, or "8bit": block-wise dynamic ones, a quarter of the memory; vectors and matrices
                of fewer than 4,096 values keep float32.
            offload_base: where the base's weights wait for their unit's turn. None: where the base has them. "cpu": in
                host memory, pinned if the student is on CUDA. "disk": in safetensors files, those the base was loaded
                from where they hold the same values. Memory is free when the base model is let go of too: drop every
                reference to it (`del model`), unless it is the teacher. The student is trained bit for bit the same.
            offload_dir: where to write weights that no file of the base's own holds; what is there is used again. By
                default a temporary folder, removed with the optimiser.
            distribute: deal the units out to the ranks of torch.distributed, each of which keeps and updates its own
                and sends the student's weights to the others. The default is to do so if there are several ranks. False
                for loops that call `state_dict` on one rank only, as transformers.Trainer does.

        Raises:
            FFMergeError: a bad value; the student's config was edited or its modules wrapped; the base was offloaded to
                disk by an earlier optimizer of this projector.
        """
        self.check_student()
        options = AdamWOptions(lr, betas, eps, weight_decay, weight_decay_on_projections, max_grad_norm, state)
        units = self._bound_units()
        if offload_base is not None and offload_base not in OFFLOADS:
            raise FFMergeError(f"offload_base: got {offload_base!r}, wanted None, 'cpu' or 'disk'")
        place = OFFLOADS.get(offload_base)

        def base_weights(mine: list[Unit]) -> BaseWeights:
            base = BaseWeights(mine, place, (self._base_folder, offload_dir))
            if base.offloaded:
                for unit in (*units, *self.units):
                    unit.keep_weights_(base.held())
            return base

        starts = {(p.owner, p.entry): delta for p, delta in self.starts.items()}
        made = ProjectionOptimizer(units, base_weights, self.settings, self.residual, options, distribute, starts)
        if self.reconstructed:
            made.take_residuals_()
        return made

    def _bound_units(self) -> list[Unit]:
        """Units of the parameters that the student has now (FSDP2 makes them anew), plain ones included."""
        named = dict(self.student.named_parameters())
        wanted = [*self.plain, *(m.name for unit in self.units for m in unit.matrices)]
        if missing := [name for name in wanted if name not in named]:
            raise FFMergeError(
                f"student: it no longer has {missing[0]}; make the optimizer before wrapping its modules"
            )
        return [
            *(unit.on(parameters=named) for unit in self.units),
            *(Unit([], {name: named[name]}) for name in self.plain),
        ]

    def fold(self) -> nn.Module:
        """The student as it is, on its own: a plain transformers model in evaluation mode, without gradients.

        Every rank must call this for a student that FSDP2 has sharded.
        """
        self.check_student()
        return fold(self.student)

    def check_student(self) -> None:
        """Raise FFMergeError if the student's config no longer is the one it was built with."""
        now = _shape_settings(self.student.config)
        if now != self._config:
            names = sorted(k for k in now.keys() | self._config.keys() if now.get(k) != self._config.get(k))
            raise FFMergeError(
                f"student: its config was edited ({', '.join(names)}); its weights still have the old widths: undo that"
            )

    def parameters(self) -> dict[str, int]:
        """Numbers of trained values: {"projections", "residuals", "plain"}, and "student", what remains in the end."""
        matrices = [m for unit in self.units for m in unit.matrices]
        return {
            "projections": sum(p.numel for unit in self.units for p in unit.projections),
            "residuals": sum(m.parameter.numel() for m in matrices) if self.residual else 0,
            "plain": sum(p.numel() for p in self.plain.values()),
            "student": sum(p.numel() for p in self.student.parameters()),
        }


@not_inference
def project(
    model: nn.Module,
    keep: float | None = None,
    d_model: int | None = None,
    d_ff: int | Mapping[str, int] | None = None,
    importance: Importance | None = None,
    attention: str = "heads",
    residual: bool = True,
    share: str | None = None,
    untie_embeddings: bool | None = None,
    init: str = "selection",
) -> Projector:
    """Make a smaller student of `model` whose matrices are W_C = P_out · W · P_in + R (paper B).

    It starts as the hard-pruned model: P selects the most important dimensions and R is zero (see `init` for another
    start). Its optimiser trains P and R; afterwards the student is all that is kept. A merged model's shared FFNs stay
    shared in the student, and are projected once.

    Args:
        model: a transformers model, left as it is; it must stay unchanged while the student is trained.
        keep: share of the base's parameters to keep, d_model and d_ff shrinking alike; or
        d_model, d_ff: the widths. One that is not given stays. d_ff may differ by stack: {"encoder": …, "decoder": …}.
        importance: which dimensions to start from; by default the magnitude of the weights.
        attention: where heads · head_dim is d_model by the config (GPT-2, OPT, BERT, ViT, Marian), what gets fewer:
            whole "heads", or "head_dim", the channels of each. Elsewhere attention keeps its width, as in the paper.
        residual: train R. Biases: b_C = P_out · b + r, r likewise.
        share: projections in common: None, every matrix has its own (paper); "qkv", query, key and value share P_in;
            "residual_stream", every matrix shares one P of d_model.
        untie_embeddings: give embedding and head projections of their own, as in the paper; False keeps them tied.
            Default: untied where just those two are tied.
        init: what P of the residual stream begins with: "selection", the most important coordinates (paper); "svd",
            the leading directions of all weights along it (see `basis`), whose start is no pruned model but nearer to
            the base (weight decay on projections still pulls to the selection). Neurons and heads are selected in both.

    Raises:
        FFMergeError: widths beyond the base's or that the architecture cannot have; an importance of another model; a
            family that is not known; a merged model of another version.
    """
    needs_weights(model, "project")
    if share not in SHARES:
        raise FFMergeError(f"share: got {share!r}, wanted None, 'qkv' or 'residual_stream'")
    if init not in INITS:
        raise FFMergeError(f"init: got {init!r}, wanted 'selection' or 'svd'")
    layout, sizes = resolve(model, Widths(keep, d_model, d_ff, attention, untie_embeddings))
    base = ModelSummary.of(model, layout.ffns)
    selection = chosen(model, base, layout, sizes, importance)
    student = build_student(model, layout, sizes, selection)
    found = sorted_parameters(model, student, layout, selection, share)
    matrices, plain = list(found.matrices.values()), found.plain
    if not matrices:
        raise FFMergeError("project: nothing gets smaller; give widths below the base model's")
    starts, basis = {}, torch.eye(layout.d_model, dtype=torch.float64)[selection.d_model]
    if init == "svd":
        if sizes.d_model == layout.d_model:
            raise FFMergeError("init: 'svd' is of the residual stream, whose width stays; give keep= or a d_model=")
        basis = stream_basis(model, layout, selection.d_model, student)
        starts = start_from_basis_(basis, model, layout, matrices, plain, found.stream, selection.d_model)
    settings = {
        "base": f"{base.model_type} {base.fingerprint}",
        "d_model": sizes.d_model,
        "d_ff": sizes.d_ff,
        "attention": sizes.attention if layout.attention else None,
        "residual": residual,
        "share": share,
        "init": init,
        "untied": sizes.untie,
        "selection": hashlib.sha256(json.dumps(selection.state()).encode()).hexdigest()[:16],
    }
    folder = getattr(model, "name_or_path", None) or None
    shape = _shape_settings(student.config)
    origin = Origin(weakref.ref(model), layout, selection, basis)
    return Projector(student, settings, grouped(matrices), plain, residual, starts, shape, folder, origin)


def resolve(model: nn.Module, widths: Widths) -> tuple[ModelAxes, Sizes]:
    """Axes of the model and the student's sizes: all of `project` that can go wrong without data."""
    version = (getattr(getattr(model, "config", None), "ffmerge", None) or {}).get("version", CONFIG_VERSION)
    if version != CONFIG_VERSION:
        raise FFMergeError(
            f"project: the model was merged by another version ({version}, this one writes {CONFIG_VERSION}); merge "
            "the original again"
        )
    layout = ModelAxes.of(model)
    return layout, resolve_sizes(model, layout, widths)


def chosen(
    model: nn.Module, base: ModelSummary, layout: ModelAxes, sizes: Sizes, scores: Importance | None
) -> Selection:
    """The dimensions to keep, by default those of the largest weights; raises FFMergeError for another model's.

    Args:
        base: of the model.
    """
    scores = by_magnitude(model, layout, base) if scores is None else scores
    scores.check_summary(base)
    return select(model, layout, sizes, scores)


def _shape_settings(config: Any) -> dict[str, Any]:
    """The config's numbers and flags that widths depend on."""
    values = json.loads(config.to_json_string(use_diff=False))
    names = ("hidden_size", "n_embd", "d_model", "d_ff", "n_inner", "intermediate_size", "ffn_dim", "head_dim", "d_kv",
             "tie_word_embeddings", "word_embed_proj_dim", "vocab_size")  # fmt: skip
    return {k: v for k, v in values.items() if k in names or k.endswith(("_ffn_dim", "head", "heads"))}
