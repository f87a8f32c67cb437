"""Recover quality without training: refit the shared W_down of merged FFNs in closed form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import FFMergeError
from .._table import format_table
from ..models import FFNSublayer, is_conv1d
from ..ops import CorrelationState
from ..ops._activations import FORWARD
from .layers import format_layers
from .local import groups_to_recover, stream_weights
from .passes import evaluating, on_all_ranks, run, share_of_rank, to_device, world_size
from .streams import BlockPasses, Flow, is_pre_norm, wide

INPUTS = ("original", "merged")
WEIGHTS = ("stream", "output", "equal")
_SCALE_TOKENS = 1024  # that the variances behind the weights are taken over
_STEP = 0.5  # of a round towards its solution: each layer's new output changes the inputs of the later ones


@dataclass(frozen=True)
class RefitGroup:
    """What the first fit did for one group.

    Attributes:
        stack, layers: of the group.
        before, after: share of the FFN outputs' (weighted) variance on the calibration tokens that the shared FFN
            misses, before and after the fit; without b_down, of their second moment.
    """

    stack: str
    layers: tuple[int, ...]
    before: float
    after: float


@dataclass
class RefitReport:
    """What `refit_` did. Prints as a table.

    Attributes:
        groups: one entry per merged group.
        scores: of the model before the refit, after the first fit and after each round; empty if none was taken.
        best: which of `scores` the model now has.
    """

    groups: list[RefitGroup]
    scores: list[float] = field(default_factory=list)
    best: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [[g.stack, format_layers([(g.stack, g.layers)], [g.stack]), g.before, g.after] for g in self.groups]
        text = format_table(["stack", "layers", "output missed before", "after refit"], rows)
        if not self.scores:
            return text
        names = ["merged", "refit", *(f"round {i}" for i in range(1, len(self.scores) - 1))]
        names[self.best] += " (kept)"
        return f"{text}\n\n{format_table(['', 'score'], list(zip(names, self.scores, strict=True)))}"


def refit_(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    ridge: float = 1e-2,
    inputs: str = "original",
    rounds: int = 0,
    max_tokens: int = 10_000,
    weights: str = "stream",
    evaluate: Callable[[nn.Module], float] | None = None,
    higher_is_better: bool = False,
) -> RefitReport:
    """Set W_down and b_down of every merged group, in place, to what reproduces its layers' own outputs best.

    Ridge least squares over the group's layers i and the calibration tokens,

        min  Σ_i w_i ‖h_i W + b − y_i‖²  +  λ ‖W − W_merged‖²,     h_i = act(x_i W_up) or act(x_i W_gate) · x_i W_up,

    with the merged W_up, and the inputs x_i and outputs y_i of the *original* FFN of each layer; λ is `ridge` times the
    mean diagonal of Σ w hᵀh (centred if there is a b). One forward pass of the teacher, no gradients; all groups are
    fitted in it. Memory per group: sums of d_ff² + d_ff · d_model; two float64 matrices of d_ff² more to solve it.
    In a `torch.distributed` job each rank gives its own batches, counts its share of `max_tokens`, and all ranks get
    the same weights; an error on one makes all of them raise.

    Args:
        model: the merged model. All other weights, the tie, modes and dtypes stay.
        teacher: the original model, unmerged: a copy made before `merge_`, or loaded again.
        batches: calibration data, as for `collect`; padding does not count. Those that are used are held in memory.
        ridge: 0 is plain least squares; larger keeps W closer to the merged one.
        inputs: whose stream the first fit sees: "original" as above, or "merged", see `rounds`.
        rounds: fits after the first, on the merged model's own stream: x_i is what reaches the merged layer, y_i what
            leads from there to the original residual stream after the FFN; half a step each.
        max_tokens: stop after exactly this many tokens; encoder and decoder count separately.
        weights: w_i, from the first 1,024 tokens: "stream", 1 / the variance of the stream after block i, which an
            error of y_i is added to; "output", 1 / var(y_i); "equal". The first was never far behind the best of the
            three; the second fails where a layer writes much more than the others, as first layers do.
        evaluate: maps the model to a score on held-out data; the model gets the best weights of: as merged, first
            fit, each round. By default with `rounds`: the loss on every tenth batch, which is left out of the fits.
            That is a small sample: on 200 images, rounds whose losses differ by less than about 0.05 are chosen by
            chance, and a lower loss need not be a higher accuracy. Where rounds gain little (a small ViT), give
            `evaluate` on more data, or of the metric that counts. Without rounds nothing is scored by default.
        higher_is_better: of the score.

    Raises:
        FFMergeError: bad arguments; nothing is merged; the teacher is merged or of another layout; no data; features
            that are not finite; a singular system (names the group). The model is unchanged then, unless it was in a
            round (it has the best weights so far).
    """
    with on_all_ranks("refit"):
        _check_arguments(ridge, inputs, rounds, max_tokens, weights)
        groups = [_Group(model, ffns) for ffns in groups_to_recover(model, teacher, "refit")]
    data = _Replay(batches, hold_out=bool(rounds) and evaluate is None)
    if data.hold_out:
        evaluate, higher_is_better = data.loss, False
    fit = _Fit(groups, model, teacher, data, share_of_rank(max_tokens))
    best = _Best(model, groups, evaluate, higher_is_better)
    fit.set_weights(weights)
    first = solutions = fit.solve(inputs == "merged", ridge)
    best.note()
    try:
        fit.move_(solutions, 1.0)
        best.note()
        for _ in range(rounds):
            solutions = fit.solve(True, ridge)
            fit.move_(solutions, _STEP)
            best.note()
    finally:
        best.restore()
    missed = [RefitGroup(g.first.stack, g.layers, s.before, s.after) for g, s in zip(groups, first, strict=True)]
    return RefitReport(missed, best.scores, best.index)


# ------------------------------------------------------------------------------------------------- what is to be fitted


class _Group:
    """The shared FFN of some layers, and the moments that its fit needs."""

    def __init__(self, model: nn.Module, ffns: Sequence[FFNSublayer]):
        self.ffns, self.first = ffns, ffns[0]
        self.up, self.down = (model.get_submodule(path) for path in (self.first.up_path, self.first.down_path))
        self.gate = model.get_submodule(self.first.gate_path) if self.first.gate_path else None
        self.scales: dict[int, float] = {}  # {layer: sqrt(w)}

    @property
    def name(self) -> str:
        stack = self.first.stack
        return f"{stack} {format_layers([(stack, self.layers)], [stack])}"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(f.index for f in self.ffns)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in (self.down.weight, self.down.bias) if p is not None]

    @property
    def weight(self) -> Tensor:
        """W_down as [d_ff, d_model], a view."""
        weight = self.down.weight.detach()
        return weight if is_conv1d(self.down) else weight.T

    def hidden(self, x: Tensor) -> Tensor:
        """What the shared FFN hands to W_down for its input x."""
        x = x.to(self.up.weight)
        up, activation = self.up(x), FORWARD[self.first.activation]
        if self.first.fused:
            gate, up = up.chunk(2, dim=-1)
            return activation(gate) * up
        return activation(self.gate(x)) * up if self.gate is not None else activation(up)

    def clear(self) -> None:
        """New sums. The rows of all layers are pooled, scaled by sqrt(w); "1" is the column of the intercept."""
        widths = {"h": self.first.d_ff, "y": self.first.d_model}
        pairs = [("h", "h"), ("h", "y")]
        if self.down.bias is not None:
            widths["1"] = 1
            pairs += [("h", "1"), ("y", "1"), ("1", "1")]
        weight = self.down.weight
        compute = "fp64" if weight.dtype == torch.float64 else "auto"
        self.state = CorrelationState(widths, pairs, weight.device, compute)

    def add(self, ffn: FFNSublayer, h: Tensor, y: Tensor, mask: Tensor) -> None:
        """Add one layer's tokens: h [.., d_ff], y [.., d_model]."""
        scale, state = self.scales[ffn.index], self.state
        state.push("h", wide(h).to(state.device) * scale, mask)
        state.push("y", wide(y).to(state.device) * scale, mask)
        if "1" in state.widths:
            state.push("1", torch.full((len(mask), 1), scale, device=state.device), mask)
        try:
            state.end_batch()
        except FFMergeError as error:
            raise FFMergeError(f"refit: layer {ffn.key}: {error}") from error

    def solve(self, ridge: float) -> _Solution:
        """The step from the present W_down and b_down to the minimum, in float64."""
        gram, cross, total = self._moment("h", "h"), self._moment("h", "y"), self._square("y")
        weight = self.weight.double()
        intercept = None
        if "1" in self.state.widths:
            ones, h_sum, y_sum = (self._moment(key, "1")[:, 0] for key in ("1", "h", "y"))
            h_mean, y_mean = h_sum / ones, y_sum / ones
            gram -= h_mean[:, None] * h_sum
            cross -= h_mean[:, None] * y_sum
            total -= y_mean @ y_sum
            intercept = y_mean - h_mean @ weight - self.down.bias.detach().double()
        descent = cross - gram @ weight
        before = total - (weight * (cross + descent)).sum()
        shift = ridge * gram.diagonal().mean()
        step = torch.cholesky_solve(descent, self._factor(gram, shift))
        after = before - (step * (descent + shift * step)).sum()
        if intercept is not None:
            before += intercept.square().sum() * ones[0]
            intercept -= h_mean @ step
        return _Solution(step, intercept, *((x / total).item() for x in (before, after)))

    def _moment(self, a: str, b: str) -> Tensor:
        """Mean of the products of two columns over the pooled rows, float64 [d_a, d_b]."""
        return self.state.covariance(a, b).double().addr_(self.state.mean(a), self.state.mean(b))

    def _square(self, key: str) -> Tensor:
        return self.state.variance(key).sum() + self.state.mean(key).square().sum()

    def _factor(self, gram: Tensor, shift: Tensor) -> Tensor:
        """Cholesky factor of gram + shift · I; overwrites gram."""
        noise = torch.finfo(torch.float32).eps * gram.diagonal().mean()  # what the float32 sums cannot tell from 0
        gram.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed or not factor.diagonal().square().min() > noise:
            raise FFMergeError(
                f"refit: the normal equations of {self.name} are singular ({len(gram)} features, "
                f"{self.state.count('h')} rows): raise ridge= (1e-2 is usual) or give more calibration data"
            )
        return factor

    @torch.no_grad()
    def move_(self, solution: _Solution, size: float) -> None:
        """Go `size` of the way; rounded once."""
        self.weight.copy_(self.weight.double() + size * solution.step)
        if solution.intercept is not None:
            self.down.bias.copy_(self.down.bias.double() + size * solution.intercept)


@dataclass(frozen=True)
class _Solution:
    step: Tensor  # [d_ff, d_model]
    intercept: Tensor | None  # [d_model]
    before: float
    after: float


# ----------------------------------------------------------------------------------------------------- passes over data


class _Fit:
    """Passes over the calibration data that end in new weights for all groups."""

    def __init__(
        self, groups: Sequence[_Group], model: nn.Module, teacher: nn.Module, batches: _Replay, max_tokens: int
    ):
        self.groups, self.model, self.teacher = groups, model, teacher
        self.batches, self.max_tokens = batches, max_tokens
        self._ffns = [ffn for group in groups for ffn in group.ffns]
        self._group = {ffn.key: group for group in groups for ffn in group.ffns}
        self._pre_norm: dict[str, bool] = {}

    def set_weights(self, weights: str) -> None:
        """Set each layer's weight by the first tokens."""
        states = {
            id(group): CorrelationState(dict.fromkeys(group.layers, group.first.d_model), [], group.down.weight.device)
            for group in self.groups
        }

        def receive(ffn: FFNSublayer, flow: Flow, mask: Tensor) -> None:
            state = states[id(self._group[ffn.key])]
            state.push(ffn.index, (flow.y if weights == "output" else flow.out).to(state.device), mask)

        tokens = min(self.max_tokens, share_of_rank(_SCALE_TOKENS))
        with on_all_ranks("refit"), BlockPasses(self.teacher, self._ffns, tokens, receive) as passes:
            for _ in passes.over(self.batches, "refit"):
                for state in states.values():
                    state.end_batch()
        for group in self.groups:
            state = states[id(group)]
            group.scales = _scales(state.all_reduce_() if world_size() > 1 else state, weights)

    def solve(self, merged: bool, ridge: float) -> list[_Solution]:
        """The fit of each group, on the stream of the original or of the merged model; changes no weights."""
        with on_all_ranks("refit"):
            for group in self.groups:
                group.clear()
            self._see_merged() if merged else self._see_original()
        if world_size() > 1:
            for group in self.groups:
                group.state.all_reduce_()
        return [group.solve(ridge) for group in self.groups]

    def move_(self, solutions: Sequence[_Solution], size: float) -> None:
        """Go `size` of the way to the solutions."""
        for group, solution in zip(self.groups, solutions, strict=True):
            group.move_(solution, size)

    def _see_original(self) -> None:
        def receive(ffn: FFNSublayer, flow: Flow, mask: Tensor) -> None:
            group = self._group[ffn.key]
            group.add(ffn, group.hidden(flow.x), flow.y, mask)

        with BlockPasses(self.teacher, self._ffns, self.max_tokens, receive) as passes:
            for _ in passes.over(self.batches, "refit"):
                pass

    def _see_merged(self) -> None:
        for ffn in self._ffns:
            if self.batches.kept and ffn.stack not in self._pre_norm:
                self._pre_norm[ffn.stack] = is_pre_norm(self.teacher, ffn, self.batches.kept[0])
        goals: dict[str, Tensor] = {}  # of this batch: the original stream after each FFN

        def keep(ffn: FFNSublayer, flow: Flow, mask: Tensor) -> None:
            goals[ffn.key] = flow.stream(self._pre_norm[ffn.stack]) + wide(flow.y)

        def receive(ffn: FFNSublayer, flow: Flow, mask: Tensor) -> None:
            stream = flow.stream(self._pre_norm[ffn.stack])
            self._group[ffn.key].add(ffn, flow.h, goals.pop(ffn.key).to(stream.device) - stream, mask)

        original = BlockPasses(self.teacher, self._ffns, self.max_tokens, keep)
        own = BlockPasses(self.model, self._ffns, self.max_tokens, receive)
        with original, own:
            for number, batch in original.over(self.batches, "refit"):
                own.take(batch, number)


def _scales(state: CorrelationState, weights: str) -> dict[int, float]:
    """sqrt(w) of each layer."""
    if weights == "equal":
        return dict.fromkeys(state.widths, 1.0)
    variances = torch.stack([state.variance(layer).mean() for layer in state.widths])
    return dict(zip(state.widths, stream_weights(variances).sqrt().tolist(), strict=True))


# ------------------------------------------------------------------------------------------------------- the best round


class _Best:
    """Scores the model after each change, and can give it back the weights of the best score."""

    def __init__(self, model: nn.Module, groups: Sequence[_Group], evaluate, higher_is_better: bool):
        self._model, self._evaluate, self._higher = model, evaluate, higher_is_better
        self._parameters = [p for group in groups for p in group.parameters]
        self._kept: list[Tensor] = []
        self.scores: list[float] = []
        self.index = 0

    def note(self) -> None:
        """Score the model as it is."""
        if self._evaluate is None:
            return
        with on_all_ranks("refit"), evaluating(self._model), torch.no_grad():
            score = float(self._evaluate(self._model))
        score = self._agreed(score)
        self.scores.append(score)
        best = self.scores[self.index]
        if len(self.scores) == 1 or (score > best if self._higher else score < best) or best != best:
            self.index = len(self.scores) - 1
            self._kept = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, kept in zip(self._parameters, self._kept, strict=bool(self._kept)):
            parameter.copy_(kept)

    def _agreed(self, score: float) -> float:
        """The mean over all ranks, so that they keep the same round."""
        if world_size() == 1:
            return score
        scores = [0.0] * world_size()
        torch.distributed.all_gather_object(scores, score)
        return sum(scores) / len(scores)


class _Replay:
    """Batches that can be gone over again: those taken so far are kept, and no more are taken than are wanted.

    Args:
        batches: any iterable.
        hold_out: put every tenth batch (the second, the twelfth, ...) aside, for `loss`.
    """

    def __init__(self, batches: Iterable[Any], hold_out: bool):
        self._source, self._taken = iter(batches), 0
        self.hold_out = hold_out
        self.kept: list[Any] = []
        self._held: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for position in itertools.count():
            while position >= len(self.kept):
                try:
                    batch = next(self._source)
                except StopIteration:
                    return
                aside = self.hold_out and self._taken % 10 == 1
                (self._held if aside else self.kept).append(batch)
                self._taken += 1
            yield self.kept[position]

    def loss(self, model: nn.Module) -> float:
        """The model's label loss on the batches put aside."""
        if not self._held:
            raise FFMergeError(
                f"refit: rounds are judged on batches that are not fitted: got {self._taken} batches, wanted at least "
                "2 (use smaller ones), or evaluate="
            )
        return _label_loss(model, self._held)


def _label_loss(model: nn.Module, batches: Sequence[Any]) -> float:
    """Mean loss per label."""
    total, count = 0.0, 0
    for batch in batches:
        loss = getattr(run(model, to_device(batch, model)), "loss", None)
        if loss is None:
            raise FFMergeError(
                "refit: the held-out batches have no labels to judge rounds by; add them or give evaluate="
            )
        labels = int((batch["labels"] != -100).sum())
        total, count = total + loss.item() * labels, count + labels
    return total / max(1, count)


def _check_arguments(ridge: float, inputs: str, rounds: int, max_tokens: int, weights: str) -> None:
    if not ridge >= 0:
        raise FFMergeError(f"ridge: got {ridge}, wanted 0 or more (1e-2 is usual)")
    if inputs not in INPUTS:
        raise FFMergeError(f"inputs: got {inputs!r}, wanted 'original' or 'merged'")
    if weights not in WEIGHTS:
        raise FFMergeError(f"weights: got {weights!r}, wanted 'stream', 'output' or 'equal'")
    if rounds < 0:
        raise FFMergeError(f"rounds: got {rounds}, wanted 0 or more (3 is usual)")
    if max_tokens < 2:
        raise FFMergeError(f"max_tokens: got {max_tokens}, wanted at least 2 (about 10,000 is usual)")
