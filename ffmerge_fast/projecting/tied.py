"""FFNs that layers of a merged model share: fitted once, to what all their layers need, before the walk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ..calibration.least_squares import Regression
from ..calibration.walk import watching
from ..models.ffn_weights import ffn_parameters, ffn_weights
from ..models.projections import matrix
from ..models.sublayers import FFNSublayer
from ..support.distributed import on_all_ranks
from ..support.tensors import same_values
from .axes import ModelAxes
from .fits import Fits
from .side_by_side import SideBySide
from .stages import Norming, Reading, Stage, norms_of


class TiedFFNs:
    """The shared FFNs of a student, which are left alone while their layers are walked.

    Their layers come one after the other, and what a later one is given depends on the FFN itself. So they are fitted
    on pooled moments of all their layers, on the inputs that these would have if the stream were the teacher's: Q x.
    """

    def __init__(self, pair: SideBySide, fits: Fits, layout: ModelAxes):
        self._pair, self._fits = pair, fits
        self._teacher, self._student = pair.teacher.model, pair.student.model
        by_weight: dict[int, list[FFNSublayer]] = {}
        for ffn in layout.ffns:
            by_weight.setdefault(id(self._student.get_submodule(ffn.down_path).weight), []).append(ffn)
        self._groups = [members for members in by_weight.values() if len(members) > 1]
        self._paths = {path for members in self._groups for f in members for path in f.projections.values()}

    @property
    def parameters(self) -> set[int]:
        """Ids of the student's."""
        return {id(p) for members in self._groups for p in ffn_parameters(self._student, members[0])}

    def free(self, stage: Stage) -> bool:
        """Whether a stage's matrices are of one layer only."""
        return isinstance(stage, Norming) or not self._paths.intersection(
            stage.paths if isinstance(stage, Reading) else [stage.path]
        )

    def fit_(self, stack: str) -> None:
        """Fit the shared FFNs of a stack, at whose first block the teacher's streams are kept."""
        groups = [members for members in self._groups if members[0].stack == stack]
        for down in (False, True) if groups else ():
            moments = {id(members): self._regression(members[0], down) for members in groups}
            of = {ffn.key: (members, moments[id(members)]) for members in groups for ffn in members}
            with on_all_ranks("reconstruct"):
                self._see(stack, of, down)
            for members in groups:
                found = moments[id(members)]
                found.all_reduce_()
                if down:
                    self._fits.writer(members[0].down_path, found)
                else:
                    paths = [p for name, p in members[0].projections.items() if name != "down"]
                    self._fits.readers(paths, found)

    def _regression(self, first: FFNSublayer, down: bool) -> Regression:
        if down:
            return Regression(*matrix(self._student.get_submodule(first.down_path)).T.shape, self._pair.like)
        widths = (matrix(m.get_submodule(first.up_path)).shape[1] for m in (self._student, self._teacher))
        return Regression(*widths, self._pair.like)

    def _see(self, stack: str, of: dict[str, tuple[Sequence[FFNSublayer], Regression]], down: bool) -> None:
        """Walk the teacher through a stack and add what the shared FFNs see."""
        pair, walk = self._pair, self._pair.teacher
        layers = {ffn.path: (ffn, moments) for members, moments in of.values() for ffn in members}
        for number in pair.numbers:
            x = pair.kept.get("teacher", number)
            for position, path in enumerate(walk.blocks[stack]):
                if path not in layers:
                    x = walk.block(stack, position, number, x)
                    continue
                ffn, moments = layers[path]
                seen: dict[str, Tensor] = {}
                norms = norms_of(self._teacher, path)
                inputs = {ffn.up_path: partial(seen.__setitem__, "z")}
                inputs |= {norm: partial(seen.__setitem__, f"in {norm}") for norm in norms}
                outputs = {norm: partial(seen.__setitem__, f"out {norm}") for norm in norms}
                outputs[ffn.down_path] = partial(seen.__setitem__, "y")
                with watching(self._teacher, inputs, outputs):
                    x = walk.block(stack, position, number, x)
                own = self._own_input(norms, seen)
                mask = walk.mask(stack, number, own.shape[:-1].numel())
                if down:
                    hidden = ffn_weights(self._student, ffn).hidden(own, ffn.activation)
                    moments.push(hidden, pair.to_student(seen["y"]), mask, f"reconstruct: {ffn.down_path}")
                else:
                    moments.push(own, seen["z"], mask, f"reconstruct: {ffn.up_path}")

    def _own_input(self, norms: Sequence[str], seen: dict[str, Tensor]) -> Tensor:
        """What the student's FFN would be given if its stream were the teacher's."""
        weight = next(self._student.parameters())
        for norm in norms:  # the one that gives the FFN its input
            given = seen.get(f"out {norm}")
            if given is not None and same_values(given, seen["z"]):
                stream = self._pair.to_student(seen[f"in {norm}"]).to(weight)
                return self._student.get_submodule(norm)(stream)
        return self._pair.to_student(seen["z"]).to(weight)
