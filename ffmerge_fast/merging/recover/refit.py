"""Recover quality without training: refit the shared W_down of merged FFNs in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.blocks import BlockPasses, Flow, at_least_float32, is_pre_norm
from ...models.sublayers import FFNSublayer
from ...ops import CorrelationState
from ...support.distributed import on_all_ranks, share_of_rank, world_size
from ...support.errors import FFMergeError
from ...support.tensors import not_inference
from ..settings import INPUTS, WEIGHTS
from .attach import check_own
from .least_squares import LeastSquares, Solution
from .private import PrivateLeastSquares, attach_private_
from .recording import groups_to_recover, stream_weights
from .reports import RefitGroup, RefitReport
from .rounds import Best, Replay

_SCALE_TOKENS = 1024  # that the variances behind the weights are taken over
_STEP = 0.5  # of a round towards its solution: each layer's new output changes the inputs of the later ones


@not_inference
def refit_(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    ridge: float = 1e-2,
    inputs: str = "original",
    rounds: int = 0,
    max_tokens: int = 10_000,
    weights: str = "stream",
    private: int = 0,
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
        private: k: every layer also gets k neurons of its own beside the shared ones, those of its original ones that
            help it best, and a b_down of its own where there is one; see `PrivateLeastSquares`. They are parameters of
            the model, saved with it, and `expand_` turns them into neurons as the others.
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
        members = groups_to_recover(model, teacher, "refit")
        check_own(model, members, "private", private, "d_ff")
        groups = [
            PrivateLeastSquares(model, teacher, ffns, private) if private else LeastSquares(model, ffns)
            for ffns in members
        ]
    data = Replay(batches, hold_out=bool(rounds) and evaluate is None)
    if data.hold_out:
        evaluate, higher_is_better = data.loss, False
    fit = _Fit(groups, model, teacher, data, share_of_rank(max_tokens))
    fit.set_weights(weights)
    first = solutions = fit.solve(inputs == "merged", ridge)
    if private:
        fit.check(solutions)
        attach_private_(model, groups)
    best = Best(model, groups, evaluate, higher_is_better)
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
    missed = [
        RefitGroup(g.first.stack, g.layers, s.before, s.after, g.neurons, g.own_parameters)
        for g, s in zip(groups, first, strict=True)
    ]
    return RefitReport(missed, best.scores, best.index)


class _Fit:
    """Passes over the calibration data that end in new weights for all groups."""

    def __init__(
        self, groups: Sequence[LeastSquares], model: nn.Module, teacher: nn.Module, batches: Replay, max_tokens: int
    ):
        self.groups, self.model, self.teacher = groups, model, teacher
        self.batches, self.max_tokens = batches, max_tokens
        self._ffns = [ffn for group in groups for ffn in group.ffns]
        self._group = {ffn.key: group for group in groups for ffn in group.ffns}
        self._pre_norm: dict[str, bool] = {}

    def set_weights(self, weights: str) -> None:
        """Set each layer's weight by the first tokens."""
        states = {
            id(group): CorrelationState(dict.fromkeys(group.layers, group.first.d_model), [], group.weights.down.device)
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

    def solve(self, merged: bool, ridge: float) -> list[Solution]:
        """The fit of each group, on the stream of the original or of the merged model; changes no weights."""
        with on_all_ranks("refit"):
            for group in self.groups:
                group.clear()
            self._see_merged() if merged else self._see_original()
        if world_size() > 1:
            for group in self.groups:
                group.all_reduce_()
        return [group.solve(ridge) for group in self.groups]

    def check(self, solutions: Sequence[Solution]) -> None:
        """Raise FFMergeError if the weights cannot hold the solutions."""
        for group, solution in zip(self.groups, solutions, strict=True):
            group.moved(solution, 1.0)

    @torch.no_grad()
    def move_(self, solutions: Sequence[Solution], size: float) -> None:
        """Go `size` of the way to the solutions; all groups or none."""
        pairs = zip(self.groups, solutions, strict=True)
        for tensor, value in [moved for group, solution in pairs for moved in group.moved(solution, size)]:
            tensor.copy_(value)

    def _see_original(self) -> None:
        def receive(ffn: FFNSublayer, flow: Flow, mask: Tensor) -> None:
            group = self._group[ffn.key]
            group.add(ffn, flow.x, flow.y, mask)

        with BlockPasses(self.teacher, self._ffns, self.max_tokens, receive) as passes:
            for _ in passes.over(self.batches, "refit"):
                pass

    def _see_merged(self) -> None:
        for ffn in self._ffns:
            if self.batches.kept and ffn.stack not in self._pre_norm:
                self._pre_norm[ffn.stack] = is_pre_norm(self.teacher, ffn, self.batches.kept[0])
        goals: dict[str, Tensor] = {}  # of this batch: the original stream after each FFN

        def keep(ffn: FFNSublayer, flow: Flow, mask: Tensor) -> None:
            goals[ffn.key] = flow.stream(self._pre_norm[ffn.stack]) + at_least_float32(flow.y)

        def receive(ffn: FFNSublayer, flow: Flow, mask: Tensor) -> None:
            stream = flow.stream(self._pre_norm[ffn.stack])
            self._group[ffn.key].add(ffn, flow.x, goals.pop(ffn.key).to(stream.device) - stream, mask, flow.h)

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


def _check_arguments(ridge: float, inputs: str, rounds: int, max_tokens: int, weights: str) -> None:
    if not 0 <= ridge < math.inf:
        raise FFMergeError(f"ridge: got {ridge}, wanted 0 or more (1e-2 is usual)")
    if inputs not in INPUTS:
        raise FFMergeError(f"inputs: got {inputs!r}, wanted 'original' or 'merged'")
    if weights not in WEIGHTS:
        raise FFMergeError(f"weights: got {weights!r}, wanted 'stream', 'output' or 'equal'")
    if rounds < 0:
        raise FFMergeError(f"rounds: got {rounds}, wanted 0 or more (3 is usual)")
    if max_tokens < 2:
        raise FFMergeError(f"max_tokens: got {max_tokens}, wanted at least 2 (about 10,000 is usual)")
