"""A start in closed form: every matrix of a student fitted, block by block, to its teacher on the student's own inputs.

Teacher and student have the same blocks; they are walked side by side over the same calibration tokens. Q [d', d] is
the basis of the student's stream. In the order of execution every matrix gets the ridge least-squares solution

    min  E‖W z' + b − T‖² + μ ‖W − W₀‖²,       μ = ridge · mean diagonal of E z'z'ᵀ,   W₀ the start's,

with the student's own inputs z', all matrices before it fitted already. One that reads the stream is to give what the
teacher's gives (of the rows that are kept): T = W_t z + b_t with the teacher's inputs z, so E z' zᵀ is all that is
needed. One that writes it is to lead to the teacher's stream: T = Q · (teacher's stream after it) − (student's stream
before it), so that drift is corrected too. Moments are pairs of the correlation op.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..calibration.blocks import at_least_float32
from ..calibration.least_squares import Regression
from ..calibration.walk import enough, watching
from ..models.projections import matrix
from ..support.distributed import gather, on_all_ranks
from ..support.errors import FFMergeError
from ..support.progress import progress
from .after_blocks import fit_after_blocks
from .axes import ModelAxes
from .fits import Fits
from .local_training import train_block_
from .selection import Selection
from .settings import Reconstructing
from .side_by_side import SideBySide
from .stages import (
    Linears,
    Norming,
    Reading,
    Stage,
    Writing,
    block_stages,
    close,
    moved,
    no_target,
    norms_of,
    trace,
)
from .tied import TiedFFNs

_NAME = "reconstruct"
_FEW = 20  # tokens per unknown, below which a warning is given
_RATE = 0.03  # of local training, times 1 / sqrt(d')
POST_NORM_STEPS = 400  # of local training, by default, where norms stand in the stream


@dataclass
class ReconstructReport:
    """What a reconstruction did.

    Attributes:
        tokens: of the stack that has most, of all ranks, without padding.
        missed: {path of a matrix that writes the stream: (share of its target's square that the start misses, and the
            solution)}, in the order of the walk.
        trained: {path of a block: (share of its output's variance that is missed before local training, and after)}, by
            batches that were not trained on.
    """

    tokens: int = 0
    missed: dict[str, tuple[float, float]] = field(default_factory=dict)
    trained: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"share of the targets missed, start -> least squares ({self.tokens:,} tokens)"]
        lines += [f"  {path}: {before:.3f} -> {after:.3f}" for path, (before, after) in self.missed.items()]
        lines += ["share of the blocks' outputs missed, before -> after local training"] if self.trained else []
        lines += [f"  {path}: {before:.3f} -> {after:.3f}" for path, (before, after) in self.trained.items()]
        return "\n".join(lines)


class Reconstruction:
    """One run of the walk, which fits a student in place.

    Args:
        teacher, student: of the same class and depth.
        layout, selection: the teacher's axes, and what the student keeps of them.
        basis: Q [d', d], float64.
        batches: calibration data of this rank.
        how: ridge and local training.
        spool_dir: folder for the streams; None: in host memory.
        done: blocks that are fitted already.
        fitted: called after each block with how many are fitted.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        layout: ModelAxes,
        selection: Selection,
        basis: Tensor,
        batches: Sequence[Any],
        how: Reconstructing,
        spool_dir: str | Path | None = None,
        done: int = 0,
        fitted: Callable[[int], Any] = lambda blocks: None,
    ):
        self._pair = SideBySide(teacher, student, layout.ffns, basis, batches, spool_dir)
        self._linears = Linears(teacher, layout)
        self._fits = Fits(teacher, student, self._linears, selection, basis.to(self._pair.like.device), how.ridge)
        self._tied = TiedFFNs(self._pair, self._fits, layout)
        self._how, self._done, self._fitted = how, done, fitted
        self._forms: dict[tuple[str, ...], tuple[str, list[Stage]]] = {}  # a block of each form, and its stages
        self.report = ReconstructReport(missed=self._fits.missed)

    def run(self) -> ReconstructReport:
        """Fit the whole student."""
        blocks = sum(map(len, self._pair.teacher.blocks.values()))
        with self._pair.walking(), progress(total=blocks + 1, desc="reconstruct", unit="block") as bar:
            count, last_norm = 0, None
            for stack in self._pair.teacher.blocks:
                for norm in self._stack(stack, count):
                    bar.update()
                    count, last_norm = count + 1, norm
                    if count > self._done:
                        self._fitted(count)
            fit_after_blocks(self._pair, self._fits, self._linears, last_norm)
            bar.update()
        return self.report

    def _stack(self, stack: str, before: int) -> Iterator[str | None]:
        """Fit a stack's blocks; yields after each the norm of the stream that it ends with, if it does."""
        with on_all_ranks(_NAME):
            for number in self._pair.numbers:
                self._pair.kept.put("teacher", number, self._pair.teacher.open(stack, number))
        self._count_tokens(stack)
        if self._done <= before:
            self._tied.fit_(stack)
        with on_all_ranks(_NAME):
            for number in self._pair.numbers:
                self._pair.kept.put("student", number, self._pair.student.open(stack, number))
        for position in range(len(self._pair.teacher.blocks[stack])):
            with on_all_ranks(_NAME):
                stages = self._stages(stack, position)
            stages = next(filter(None, gather(stages)))  # of a rank with data
            if before + position < self._done:
                with on_all_ranks(_NAME):
                    for number in self._pair.numbers:
                        self._pass_teacher(stack, position, number, [])
            else:
                self._fit_block(stack, position, stages)
            with on_all_ranks(_NAME):
                for number in self._pair.numbers:
                    stream = self._pair.student.block(stack, position, number, self._pair.kept.get("student", number))
                    self._pair.kept.put("student", number, stream)
            yield next((s.path for s in reversed(stages) if isinstance(s, Norming)), None)
        for number in self._pair.numbers:
            self._pair.teacher.left(stack, number, self._pair.kept.get("teacher", number))
            self._pair.student.left(stack, number, self._pair.kept.get("student", number))

    def _count_tokens(self, stack: str) -> None:
        """Count a stack's tokens on all ranks; warn of few."""
        counts = [self._pair.kept.get("teacher", number).shape[:-1].numel() for number in self._pair.numbers]
        masks = [self._pair.teacher.mask(stack, number, count) for number, count in enumerate(counts)]
        tokens = sum(gather(sum(c if m is None else int(m.sum()) for c, m in zip(counts, masks, strict=True))))
        if not tokens:
            raise FFMergeError("reconstruct: no calibration data: `batches` held no tokens")
        self.report.tokens = max(self.report.tokens, tokens)
        widths = {p: matrix(self._pair.student.model.get_submodule(p)).shape[1]
                  for block in self._pair.teacher.blocks[stack] for p in self._linears.inside(block)}  # fmt: skip
        path = max(widths, key=widths.__getitem__)
        if tokens < _FEW * widths[path]:
            warnings.warn(
                f"reconstruct: {tokens:,} tokens of the {stack} for the {widths[path]:,} unknowns of a row of {path}: "
                f"the ridge carries what they leave open; {_FEW * widths[path]:,} or more are usual",
                stacklevel=2,
            )

    def _fit_block(self, stack: str, position: int, stages: Sequence[Stage]) -> None:
        """Fit a block's stages in their order, then train it alone where that is wanted."""
        for index, stage in enumerate(stages):
            free = self._tied.free(stage)
            if free and isinstance(stage, Reading):
                self._fits.absorb_gain(stage.paths, stage.norm)
            moments = self._regression(stage) if free else None
            with on_all_ranks(_NAME):
                for number in self._pair.numbers:
                    if index == 0:
                        self._pass_teacher(stack, position, number, stages)
                    if free:
                        z, target = self._pass_student(stack, position, number, stages, index)
                        moments.push(z, target, self._mask(stack, number, stage, z), f"reconstruct: {_first(stage)}")
            self._pair.kept.drop(f"stage {index}")
            if free:
                moments.all_reduce_()
                self._fit(stage, moments)
        steps = self._how.local_steps
        if steps is None:
            steps = POST_NORM_STEPS if any(isinstance(s, Norming) for s in stages) and self._fits.narrower else 0
        if steps:
            path, lr = self._pair.teacher.blocks[stack][position], self._how.local_lr
            lr = _RATE / len(self._pair.basis) ** 0.5 if lr is None else lr
            self.report.trained[path] = train_block_(
                self._pair, stack, position, steps, lr, self._how.seed, self._tied.parameters
            )

    def _fit(self, stage: Stage, moments: Regression) -> None:
        if isinstance(stage, Reading):
            self._fits.readers(stage.paths, moments)
        elif isinstance(stage, Writing):
            self._fits.writer(stage.path, moments)
        else:
            self._fits.norm(stage.path, moments)

    def _stages(self, stack: str, position: int) -> list[Stage]:
        """Those of a block of the teacher, by a pass of its first batch, or by those of a block like it."""
        if not self._pair.numbers:  # a rank without data
            return []
        teacher, path = self._pair.teacher.model, self._pair.teacher.blocks[stack][position]
        paths = [*self._linears.inside(path), *norms_of(teacher, path)]
        form = (stack, self._kind(path), *(p.removeprefix(path) for p in paths))
        if form not in self._forms:
            x, out = self._pair.kept.get("teacher", 0), []
            events = trace(teacher, paths, lambda: out.append(self._pair.teacher.block(stack, position, 0, x)))
            foreign = [t for t in self._pair.teacher.others(stack, position, 0) if t.shape[-1:] == x.shape[-1:]]
            streams = {"in": x.to(out[0].device), "out": out[0], "foreign": foreign}
            self._forms[form] = path, block_stages(path, self._kind(path), events, self._linears, streams)
        first, stages = self._forms[form]
        return [moved(stage, first, path) for stage in stages]

    def _kind(self, path: str) -> str:
        return type(self._pair.teacher.model.get_submodule(path)).__name__

    def _pass_teacher(self, stack: str, position: int, number: int, stages: Sequence[Stage]) -> None:
        """One batch through a block of the teacher: its stream, and every stage's target, are kept."""
        stream = _Stream(self._pair.kept.get("teacher", number), lambda index, x: self._keep_target(index, number, x))
        inputs = {s.paths[0]: partial(self._pair.kept.put, f"stage {i}", number)
                  for i, s in enumerate(stages) if isinstance(s, Reading)}  # fmt: skip
        with watching(self._pair.teacher.model, inputs, stream.hooks(stages)):
            out = self._pair.teacher.block(stack, position, number, stream.x)
        if stages and not number and not close(stream.now.to(out), out, out):
            path = self._pair.teacher.blocks[stack][position]
            raise no_target(path, self._kind(path))
        self._pair.kept.put("teacher", number, out)

    def _keep_target(self, index: int, number: int, stream: Tensor) -> None:
        self._pair.kept.put(f"stage {index}", number, self._pair.to_student(stream))

    def _pass_student(
        self, stack: str, position: int, number: int, stages: Sequence[Stage], index: int
    ) -> tuple[Tensor, Tensor]:
        """(the student's own input of a stage, its target) for one batch; the block runs as far as the stage."""
        stage, found = stages[index], []

        def reached(z: Tensor) -> None:
            found.append(z)
            enough()

        stream = _Stream(self._pair.kept.get("student", number).to(self._pair.like.device))
        inputs, outputs = {}, stream.hooks(stages[:index])
        (outputs if isinstance(stage, Norming) else inputs)[_first(stage)] = reached
        with watching(self._pair.student.model, inputs, outputs):
            self._pair.student.block(stack, position, number, stream.x)
        target = self._pair.kept.get(f"stage {index}", number).to(self._pair.like.device)
        return found[0], target - stream.now if isinstance(stage, Writing) else target

    def _regression(self, stage: Stage) -> Regression:
        """Empty moments for a stage."""
        teacher, student = self._pair.teacher.model, self._pair.student.model
        if isinstance(stage, Reading):
            widths = [matrix(m.get_submodule(stage.paths[0])).shape[1] for m in (student, teacher)]
        elif isinstance(stage, Writing):
            widths = matrix(student.get_submodule(stage.path)).T.shape
        else:
            widths = [len(self._pair.basis)] * 2
        return Regression(*widths, self._pair.like)

    def _mask(self, stack: str, number: int, stage: Stage, z: Tensor) -> Tensor | None:
        tokens = z.shape[:-1].numel()
        if isinstance(stage, Reading) and stage.foreign:
            return self._pair.student.mask_of_rows(number, tokens)
        return self._pair.student.mask(stack, number, tokens)


class _Stream:
    """The residual stream inside a block, by hooks on what writes and norms it.

    Args:
        x: into the block.
        changed: called with a stage's number and the stream after it.
    """

    def __init__(self, x: Tensor, changed: Callable[[int, Tensor], None] = lambda index, x: None):
        self.x, self.now, self._changed = x, at_least_float32(x), changed

    def hooks(self, stages: Sequence[Stage]) -> dict[str, Callable[[Tensor], None]]:
        """Of the modules' outputs, by path."""
        of = {Writing: self._wrote, Norming: self._normed}
        return {s.path: partial(of[type(s)], i) for i, s in enumerate(stages) if not isinstance(s, Reading)}

    def _wrote(self, index: int, y: Tensor) -> None:
        self.now = self.now.to(y.device) + y.reshape(self.x.shape)
        self._changed(index, self.now)

    def _normed(self, index: int, y: Tensor) -> None:
        self.now = at_least_float32(y).reshape(self.x.shape)
        self._changed(index, self.now)


def _first(stage: Stage) -> str:
    return stage.paths[0] if isinstance(stage, Reading) else stage.path
