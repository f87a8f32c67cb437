"""The least-squares problem of one group's shared W_down: its moments and its solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...calibration.blocks import at_least_float32
from ...calibration.least_squares import ridge_factor
from ...models.ffn_weights import ffn_weights
from ...models.sublayers import FFNSublayer
from ...ops import CorrelationState
from ...support.errors import FFMergeError
from ..groups import format_indices


class LeastSquares:
    """The shared FFN of some layers, and the moments that its fit needs."""

    def __init__(self, model: nn.Module, ffns: Sequence[FFNSublayer]):
        self.ffns, self.first = ffns, ffns[0]
        with torch.no_grad():
            self.weights = ffn_weights(model, self.first)  # which `move_` changes, and with them the model
        self.scales: dict[int, float] = {}  # {layer: sqrt(w)}

    @property
    def name(self) -> str:
        return f"{self.first.stack} {format_indices(self.layers)}"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(f.index for f in self.ffns)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.weights.projection("down") if p is not None]

    @property
    def weight(self) -> Tensor:
        """W_down as [d_ff, d_model], a view."""
        return self.weights.down.detach().T

    @property
    def neurons(self) -> int:
        """How many each layer has of its own."""
        return 0

    @property
    def own_parameters(self) -> int:
        """Numbers in them."""
        return 0

    def hidden(self, x: Tensor) -> Tensor:
        """What the shared FFN hands to W_down for its input x."""
        return self.weights.hidden(x.to(self.weights.up), self.first.activation)

    def clear(self) -> None:
        """New sums. The rows of all layers are pooled, scaled by sqrt(w); "1" is the column of the intercept."""
        widths = {"h": self.first.d_ff, "y": self.first.d_model}
        pairs = [("h", "h"), ("h", "y")]
        if self.weights.down_bias is not None:
            widths["1"] = 1
            pairs += [("h", "1"), ("y", "1"), ("1", "1")]
        down = self.weights.down
        compute = "fp64" if down.dtype == torch.float64 else "auto"
        self.state = CorrelationState(widths, pairs, down.device, compute)

    def add(self, ffn: FFNSublayer, x: Tensor, y: Tensor, mask: Tensor, h: Tensor | None = None) -> None:
        """Add one layer's tokens.

        Args:
            x: [.., d_model], what goes into the FFN; y: [.., d_model], what should come out.
            h: [.., d_ff], `hidden(x)` where it is known.
        """
        scale, state, h = self.scales[ffn.index], self.state, self.hidden(x) if h is None else h
        state.push("h", at_least_float32(h).to(state.device) * scale, mask)
        state.push("y", at_least_float32(y).to(state.device) * scale, mask)
        if "1" in state.widths:
            state.push("1", torch.full((len(mask), 1), scale, device=state.device), mask)
        try:
            state.end_batch()
        except FFMergeError as error:
            raise FFMergeError(f"refit: layer {ffn.key}: {error}") from error

    def all_reduce_(self) -> None:
        self.state.all_reduce_()

    def solve(self, ridge: float) -> Solution:
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
            intercept = y_mean - h_mean @ weight - self.weights.down_bias.detach().double()
        descent = cross - gram @ weight
        before = total - (weight * (cross + descent)).sum()
        shift = ridge * gram.diagonal().mean()
        factor = ridge_factor(gram, shift, f"refit: {self.name}", self.state.count("h"))
        step = torch.cholesky_solve(descent, factor)
        after = before - (step * (descent + shift * step)).sum()
        if intercept is not None:
            before += intercept.square().sum() * ones[0]
            intercept -= h_mean @ step
        steps = [(self.weight, step), *([] if intercept is None else [(self.weights.down_bias, intercept)])]
        return Solution(steps, *((x / total).item() for x in (before, after)))

    def _moment(self, a: str, b: str) -> Tensor:
        """Mean of the products of two columns over the pooled rows, float64 [d_a, d_b]."""
        return self.state.covariance(a, b).double().addr_(self.state.mean(a), self.state.mean(b))

    def _square(self, key: str) -> Tensor:
        return self.state.variance(key).sum() + self.state.mean(key).square().sum()

    @torch.no_grad()
    def moved(self, solution: Solution, size: float) -> list[tuple[Tensor, Tensor]]:
        """(parameter, its value `size` of the way to the solution), rounded once.

        Raises:
            FFMergeError: a value is beyond the parameter's dtype.
        """
        found = [(tensor, (tensor.double() + size * step).to(tensor.dtype)) for tensor, step in solution.steps]
        for tensor, value in found:
            if not value.isfinite().all():
                raise FFMergeError(
                    f"refit: W_down or its bias of {self.name} goes beyond {tensor.dtype}; load the model in float32 "
                    "or bfloat16 (--dtype), or raise ridge="
                )
        return found


@dataclass(frozen=True)
class Solution:
    """(tensor of the model, or a view of it: float64 step to its best values), ...; and the shares missed."""

    steps: list[tuple[Tensor, Tensor]]
    before: float
    after: float
