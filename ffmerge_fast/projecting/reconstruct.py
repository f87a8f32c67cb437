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

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.blocks import at_least_float32
from ..calibration.least_squares import Regression, ridge_factor
from ..calibration.walk import Kept, Walk, enough, watching
from ..models.projections import is_conv1d
from ..support.distributed import broadcast_
from ..support.errors import FFMergeError
from ..support.progress import progress
from .axes import MODEL, Axis, ModelAxes
from .norms import Gain
from .selection import Selection
from .stages import Event, Linears, Norming, Reading, Stage, Writing, block_stages, norms_of, readings, trace

_ROWS = 8192  # of a matrix that are solved at a time
_FEW = 20  # tokens per unknown, below which a warning is given


@dataclass
class ReconstructReport:
    """What a reconstruction did.

    Attributes:
        tokens: counted, of all ranks.
        missed: {path of a matrix that writes the stream: (share of its target's square that the start missed, and the
            solution misses)}, in the order of the walk.
    """

    tokens: int = 0
    missed: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{path}: {before:.3f} -> {after:.3f}" for path, (before, after) in self.missed.items()]
        return "\n".join([f"share of the stream's targets missed ({self.tokens:,} tokens)", *lines])


class Reconstruction:
    """One run of the walk.

    Args:
        teacher, student: of the same class and depth.
        layout, selection: the teacher's axes, and what the student keeps of them.
        basis: Q [d', d], float64.
        batches: calibration data of this rank.
        ridge: μ, see above.
        kept: where streams are kept.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        layout: ModelAxes,
        selection: Selection,
        basis: Tensor,
        batches: Sequence[Any],
        ridge: float,
        kept: Kept,
    ):
        self._models = teacher, student
        self._layout, self._selection, self._ridge = layout, selection, ridge
        self._linears = Linears(teacher, layout)
        like = next(student.parameters())
        self._like = at_least_float32(like.detach())
        self._basis, self._basis64 = basis.to(self._like), basis.to(like.device)
        self._narrower = basis.shape[0] < basis.shape[1]
        self._batches, self._kept = batches, kept
        self.teacher = Walk(teacher, layout.ffns, batches, Kept())
        self.student = Walk(student, layout.ffns, batches, Kept())
        self._last_norm: str | None = None  # of the stream, in the last block (post-norm)
        self.report = ReconstructReport()

    def run(self) -> ReconstructReport:
        """Fit the whole student, in place."""
        with self.teacher, self.student, contextlib.closing(self._kept):
            blocks = sum(map(len, self.teacher.blocks.values()))
            with progress(total=blocks + 1, desc="reconstruct", unit="block") as bar:
                for stack in self.teacher.blocks:
                    for _ in self._walk(stack):
                        bar.update()
                self._after()
                bar.update()
        return self.report

    # ------------------------------------------------------------------------------------------------------- blocks

    def _walk(self, stack: str) -> Iterable[None]:
        numbers = range(len(self._batches))
        for number in numbers:
            self._kept.put("teacher", number, self.teacher.open(stack, number))
            self._kept.put("student", number, self.student.open(stack, number))
        for position in range(len(self.teacher.blocks[stack])):
            self._block(stack, position)
            yield
        for number in numbers:
            self.teacher.left(stack, number, self._kept.get("teacher", number))
            self.student.left(stack, number, self._kept.get("student", number))

    def _block(self, stack: str, position: int) -> None:
        stages = self._stages(stack, position)
        path = self.teacher.blocks[stack][position]
        self._last_norm = next((s.path for s in reversed(stages) if isinstance(s, Norming)), None)
        for index, stage in enumerate(stages):
            if isinstance(stage, Reading):
                self._absorb_gain(stage)
            moments = self._regression(stage)
            for number in range(len(self._batches)):
                if index == 0:
                    self._pass_teacher(stack, position, number, stages)
                z, target = self._pass_student(stack, position, number, stages, index)
                tokens = z.shape[:-1].numel()
                foreign = isinstance(stage, Reading) and stage.foreign
                mask = self.student.mask_of_rows(number, tokens) if foreign else self.student.mask(stack, number, tokens)
                moments.push(z, target, mask, f"reconstruct: {path}")
            self._kept.drop(f"stage {index}")
            moments.all_reduce_()
            self._fit(stage, moments)
        for number in range(len(self._batches)):
            stream = self.student.block(stack, position, number, self._kept.get("student", number))
            self._kept.put("student", number, stream)

    def _stages(self, stack: str, position: int) -> list[Stage]:
        """Those of a block of the teacher, by a pass over its first batch."""
        path, x = self.teacher.blocks[stack][position], self._kept.get("teacher", 0)
        teacher, found = self._models[0], []
        paths = [*self._linears.inside(path), *norms_of(teacher, path)]
        events = trace(teacher, paths, lambda: found.append(self.teacher.block(stack, position, 0, x)))
        foreign = [t for t in self.teacher.others(stack, position, 0) if t.shape[-1:] == x.shape[-1:]]
        streams = {"in": x.to(found[0].device), "out": found[0], "foreign": foreign}
        return block_stages(path, type(teacher.get_submodule(path)).__name__, events, self._linears, streams)

    def _pass_teacher(self, stack: str, position: int, number: int, stages: Sequence[Stage]) -> None:
        """One batch through a block of the teacher: its stream, and every stage's target, are kept."""
        stream = x = self._kept.get("teacher", number)
        inputs, outputs = {}, {}

        def wrote(index: int, y: Tensor) -> None:
            nonlocal stream
            stream = stream.to(y.device) + y.reshape(x.shape)
            self._kept.put(f"stage {index}", number, self._to_student(stream))

        def normed(index: int, y: Tensor) -> None:
            nonlocal stream
            stream = y.reshape(x.shape)
            self._kept.put(f"stage {index}", number, self._to_student(stream))

        for index, stage in enumerate(stages):
            if isinstance(stage, Reading):
                inputs[stage.paths[0]] = lambda z, index=index: self._kept.put(f"stage {index}", number, z)
            elif isinstance(stage, Writing):
                outputs[stage.path] = lambda y, index=index: wrote(index, y)
            else:
                outputs[stage.path] = lambda y, index=index: normed(index, y)
        with watching(self._models[0], inputs, outputs):
            self._kept.put("teacher", number, self.teacher.block(stack, position, number, x))

    def _pass_student(
        self, stack: str, position: int, number: int, stages: Sequence[Stage], index: int
    ) -> tuple[Tensor, Tensor]:
        """(the student's own input of a stage, its target) for one batch; the block runs as far as the stage."""
        stream = x = self._kept.get("student", number).to(self._like.device)
        stage, outputs, found = stages[index], {}, []

        def wrote(y: Tensor) -> None:
            nonlocal stream
            stream = at_least_float32(stream) + y.reshape(x.shape)

        def normed(y: Tensor) -> None:
            nonlocal stream
            stream = y.reshape(x.shape)

        def reached(z: Tensor) -> None:
            found.append(z)
            enough()

        for before in stages[:index]:
            if not isinstance(before, Reading):
                outputs[before.path] = wrote if isinstance(before, Writing) else normed
        at = {} if isinstance(stage, Norming) else {stage.paths[0] if isinstance(stage, Reading) else stage.path: reached}
        if isinstance(stage, Norming):
            outputs[stage.path] = reached
        with watching(self._models[1], at, outputs):
            self.student.block(stack, position, number, x)
        target = self._kept.get(f"stage {index}", number).to(self._like.device)
        return found[0], target - at_least_float32(stream) if isinstance(stage, Writing) else target

    # ------------------------------------------------------------------------------------------------- after the blocks

    def _after(self) -> None:
        """Fit what comes after the blocks: heads, poolers, classifiers."""
        events = self._events_after()
        table = self._models[1].get_input_embeddings() if self._batches else None
        for stage in readings(events, self._linears):
            tied = [p for p in stage.paths if self._models[1].get_submodule(p).weight is getattr(table, "weight", None)]
            own = Reading(tuple(p for p in stage.paths if p not in tied), None if tied else stage.norm)
            if own.paths:
                self._absorb_gain(own)
                self._fit(own, self._moments_after(own.paths[0]))
            for path in tied:
                self._fit_gain(path, self._norm_before(path, events))

    def _events_after(self) -> list[Event]:
        """What runs after the last block of the teacher, outside of all blocks, with its first batch."""
        teacher = self._models[0]
        blocks = [path for paths in self.teacher.blocks.values() for path in paths]
        outside = [p for p in (*self._linears.axes, *norms_of(teacher)) if not any(_inside(p, b) for b in blocks)]
        events = trace(teacher, [*outside, blocks[-1]], lambda: self.teacher.after(0))
        last = max(i for i, event in enumerate(events) if event.path == blocks[-1])
        return events[last + 1 :]

    def _moments_after(self, path: str) -> Regression:
        """Of the inputs of a module after the blocks: the student's, and the teacher's."""
        moments = self._regression(Reading((path,)))
        for number in range(len(self._batches)):
            z, target = (self._input_after(walk, model, path, number)
                         for walk, model in zip((self.student, self.teacher), reversed(self._models), strict=True))  # fmt: skip
            tokens = z.shape[:-1].numel()
            moments.push(z, target, self.student.mask_of_rows(number, tokens), f"reconstruct: {path}")
        moments.all_reduce_()
        return moments

    def _input_after(self, walk: Walk, model: nn.Module, path: str, number: int) -> Tensor:
        found: list[Tensor] = []

        def reached(z: Tensor) -> None:
            found.append(z)
            enough()

        with watching(model, {path: reached}):
            walk.after(number)
        return found[0]

    def _norm_before(self, path: str, events: Sequence[Event]) -> str | None:
        """The norm that a tied head is given the output of, up to a factor (T5)."""
        z = next(event.x for event in events if event.path == path).float()
        for event in events:
            if event.path not in self._linears.axes and event.y.shape == z.shape:
                y = event.y.float()
                factor = (y * z).sum() / y.square().sum()
                if (factor * y - z).norm() <= 1e-2 * z.norm():
                    return event.path
        return self._last_norm

    # ---------------------------------------------------------------------------------------------------------- fitting

    def _absorb_gain(self, stage: Reading) -> None:
        """Let the student's norm before matrices that are fitted have gain one and no bias; they take both over."""
        if not self._narrower or stage.norm is None:
            return
        student = self._models[1]
        gain = Gain(student.get_submodule(stage.norm))
        if not gain.known:
            return
        for module in map(student.get_submodule, stage.paths):
            weight = _matrix(module)
            if gain.bias is not None and module.bias is not None:
                module.bias.add_((weight.double() @ gain.bias).to(module.bias))
            weight.copy_(weight * gain.value.to(weight))
        gain.set_(torch.ones_like(gain.value), None if gain.bias is None else torch.zeros_like(gain.bias))

    def _regression(self, stage: Stage) -> Regression:
        """Empty moments for a stage."""
        teacher, student = self._models
        if isinstance(stage, Reading):
            widths = [_matrix(m.get_submodule(stage.paths[0])).shape[1] for m in (student, teacher)]
        elif isinstance(stage, Writing):
            widths = _matrix(student.get_submodule(stage.path)).T.shape
        else:
            widths = [len(self._basis)] * 2
        return Regression(*widths, self._like)

    def _fit(self, stage: Stage, moments: Regression) -> None:
        self.report.tokens = max(self.report.tokens, moments.tokens)
        if isinstance(stage, Norming):
            self._fit_norm(stage.path, moments)
        elif isinstance(stage, Writing):
            self._fit_writer(stage.path, moments)
        else:
            self._fit_readers(stage.paths, moments)

    def _fit_readers(self, paths: Sequence[str], moments: Regression) -> None:
        teacher, student = self._models
        solvers: dict[bool, _Solver] = {}
        for path in paths:
            module, original = student.get_submodule(path), teacher.get_submodule(path)
            centred = module.bias is not None
            if centred not in solvers:
                solvers[centred] = _Solver(moments, centred, self._ridge, f"reconstruct: {path}")
            solver, weight, whole = solvers[centred], _matrix(module), self._rows(path, _matrix(original))
            for rows, targets in zip(weight.split(_ROWS), whole.split(_ROWS), strict=True):
                targets = targets.to(self._like.device, torch.float64)
                rows.copy_(solver.solve(rows.double(), solver.cross @ targets.T))
            if centred:
                wanted = whole.double().to(self._like.device) @ moments.mean("t")
                wanted += self._rows(path, original.bias.detach()).double().to(wanted)
                module.bias.copy_(wanted - weight.double() @ moments.mean("x"))
            _same_on_all_ranks(module)

    def _fit_writer(self, path: str, moments: Regression) -> None:
        module = self._models[1].get_submodule(path)
        centred, weight = module.bias is not None, _matrix(module)
        solver = _Solver(moments, centred, self._ridge, f"reconstruct: {path}")
        before = solver.missed(weight.double())
        weight.copy_(solver.solve(weight.double(), solver.cross))
        after = solver.missed(weight.double())
        if centred:
            off = moments.mean("t") - weight.double() @ moments.mean("x")
            module.bias.copy_(off)
        self.report.missed[path] = before, after
        _same_on_all_ranks(module)

    def _fit_norm(self, path: str, moments: Regression) -> None:
        """Gain and bias of a norm of the stream, each feature for itself."""
        gain = Gain(self._models[1].get_submodule(path))
        if not self._narrower or not gain.known:
            return
        centred = gain.bias is not None
        squares, products = moments.gram(centred).diagonal(), moments.cross(centred).diagonal()
        shift = self._ridge * squares.mean()
        factor = (products + shift) / (squares + shift)
        bias = None
        if centred:
            bias = moments.mean("t") - factor * (moments.mean("x") - gain.bias)
        gain.set_(gain.value * factor, bias)
        _same_on_all_ranks(gain.norm)

    def _fit_gain(self, path: str, norm: str | None) -> None:
        """The gain before a head that is tied to the embedding E: min E‖E' diag(r) z' − E z‖² over r [d']."""
        gain = Gain(self._models[1].get_submodule(norm)) if norm else None
        if gain is None or not gain.known or not self._narrower:
            return
        moments = self._moments_after(path)
        theirs, own = (m.get_submodule(path).weight.detach() for m in self._models)
        products = [sum((a.double().T @ b.double() for a, b in zip(own.split(_ROWS), of.split(_ROWS), strict=True)))
                    for of in (own, theirs)]  # fmt: skip
        gram = products[0] * moments.gram(False)
        wanted = (products[1] * moments.cross(False)).sum(1)
        shift = self._ridge * gram.diagonal().mean()
        start = torch.ones_like(wanted)
        step = torch.cholesky_solve(
            (wanted - gram @ start)[:, None], ridge_factor(gram, shift, f"reconstruct: {norm}", moments.tokens)
        )[:, 0]
        factor = start + step
        gain.set_(gain.value * factor, None if gain.bias is None else gain.bias * factor)
        _same_on_all_ranks(gain.norm)

    # ------------------------------------------------------------------------------------------------------------- sizes

    def _to_student(self, stream: Tensor) -> Tensor:
        """Q x for the teacher's stream x [.., d]."""
        return at_least_float32(stream).to(self._basis) @ self._basis.T

    def _rows(self, path: str, x: Tensor) -> Tensor:
        """What the student keeps of the rows of a teacher's matrix or bias."""
        axis: Axis | None = self._linears.axes[path][0]
        if axis is None:
            return x
        if axis.role == MODEL:
            return self._basis64.to(x.device) @ x.double()
        return x.index_select(0, self._selection.choice(axis).index.to(x.device))


class _Solver:
    """The ridge problem of the matrices that have the same input.

    Attributes:
        cross: E z' tᵀ, [n, m].
    """

    def __init__(self, moments: Regression, centred: bool, ridge: float, what: str):
        self._gram, self.cross = moments.gram(centred), moments.cross(centred)
        self._total = moments.square("t", centred)
        self._shift = ridge * self._gram.diagonal().mean()
        self._factor = ridge_factor(self._gram.clone(), self._shift, what, moments.tokens)

    def solve(self, start: Tensor, cross: Tensor) -> Tensor:
        """W [out, n] for the start W₀ [out, n] and E z' Tᵀ [n, out]."""
        descent = cross - self._gram @ start.T
        return start + torch.cholesky_solve(descent, self._factor).T

    def missed(self, weight: Tensor) -> float:
        """Share of the targets' square that W [m, n] misses, where t is the target itself."""
        left = self._total - (weight * (2 * self.cross.T - weight @ self._gram)).sum()
        return (left / self._total.clamp(min=torch.finfo(torch.float64).tiny)).item()


def _matrix(module: nn.Module) -> Tensor:
    """A module's weight as [out, in], a view."""
    weight = module.weight.detach()
    return weight.T if is_conv1d(module) else weight


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _same_on_all_ranks(module: nn.Module) -> None:
    """Rank 0's values: solutions may be rounded differently elsewhere."""
    broadcast_([p.detach() for p in (module.weight, getattr(module, "bias", None)) if p is not None])
