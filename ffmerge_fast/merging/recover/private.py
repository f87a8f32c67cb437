"""Neurons that each layer of a merged group has of its own, chosen and fitted in closed form beside W_down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...calibration.least_squares import Regression, eliminated, ridge_factor
from ...models.ffn_weights import ffn_weights
from ...models.projections import private_parameters
from ...models.sublayers import FFNSublayer
from ...ops.shared_ffn.weights import FFNWeights
from ...support.distributed import broadcast_
from .attach import Own, attach_
from .least_squares import LeastSquares, Solution


@dataclass(frozen=True)
class _Layer:
    """Moments of one layer's h [T, d_ff] of the shared neurons, p [T, k] of its own and y, and how much they weigh."""

    ffn: FFNSublayer
    weight: float
    gram: Tensor  # of [h, p], float64 [d_ff + k, d_ff + k]
    cross: Tensor  # of [h, p] and y
    means: tuple[Tensor, Tensor]  # of [h, p] and y
    square: Tensor  # E ‖y − mean‖², or E ‖y‖² without a b_down
    d_ff: int

    @property
    def h(self) -> tuple[Tensor, Tensor]:
        """Gram matrix of h, and its products with y."""
        return self.gram[: self.d_ff, : self.d_ff], self.cross[: self.d_ff]

    @property
    def p(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of p, and its products with h."""
        return self.gram[self.d_ff :, self.d_ff :], self.cross[self.d_ff :], self.gram[self.d_ff :, : self.d_ff]

    def restricted(self, own: Tensor) -> _Layer:
        """With some of the layer's own neurons only."""
        kept = torch.cat([torch.arange(self.d_ff, device=own.device), self.d_ff + own])
        means = (self.means[0][kept], self.means[1])
        return _Layer(self.ffn, self.weight, self.gram[kept][:, kept], self.cross[kept], means, self.square, self.d_ff)

    def error(self, both: Tensor, offset: Tensor | None) -> Tensor:
        """w E ‖[h, p] both + b − y‖² for W_down of both kinds of neurons; `offset`: what b leaves of the means."""
        error = self.square - (both * (2 * self.cross - self.gram @ both)).sum()
        return self.weight * (error if offset is None else error + offset.square().sum())


class PrivateLeastSquares(LeastSquares):
    """The shared FFN of some layers and neurons of their own beside it, and the moments that their fit needs.

        min  Σ_i w_i (‖h_i W + p_i D_i + b + c_i − y_i‖² + λ_i ‖D_i‖²)  +  λ ‖W − W_merged‖²

    p_i are some of layer i's original neurons. They are chosen once, by elimination of the others from a regression of
    what the best W alone misses; then W and all D_i are solved for together. Memory per layer: (2 d_ff)² sums until
    they are chosen, (d_ff + k)² afterwards.

    Args:
        teacher: has the original neurons.
        neurons: k, of each layer.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, ffns: Sequence[FFNSublayer], neurons: int):
        super().__init__(model, ffns)
        self._model, self._neurons, self._attached = model, neurons, False
        with torch.no_grad():
            self._originals = {f.key: ffn_weights(teacher, f) for f in ffns}

    @property
    def neurons(self) -> int:
        return self._neurons

    @property
    def own_parameters(self) -> int:
        return sum(
            p.numel()
            for f in self.ffns
            for path in f.projections.values()
            for p in self._of(path).values()
            if p is not None
        )

    @property
    def parameters(self) -> list[Tensor]:
        return [*super().parameters, *(p for f in self.ffns for p in self._own(f) if p is not None)]

    def own_values(self) -> dict[str, Own]:
        """What `attach_` takes: the chosen neurons, which give nothing yet."""
        found = {}
        for ffn in self.ffns:
            rows = self._originals[ffn.key]
            pairs = {"up": rows.projection("up"), "gate": rows.projection("gate")}
            if ffn.fused:
                up, gate = pairs.pop("up"), pairs.pop("gate")
                pairs["up"] = tuple(None if u is None else torch.cat([g, u]) for u, g in zip(up, gate, strict=True))
            down = torch.zeros(ffn.d_model, self._neurons, device=rows.up.device)
            bias = None if self.weights.down_bias is None else down[:, 0]
            found[ffn.key] = {name: pairs[name] for name in ffn.projections if name != "down"} | {"down": (down, bias)}
        return found

    def attached(self) -> None:
        """From now on the model's layers have the chosen neurons."""
        self._attached = True

    def clear(self) -> None:
        like = self.weights.down
        widths = {f.key: self.first.d_ff + len(self._originals[f.key].up) for f in self.ffns}
        self._moments = {f.key: Regression(widths[f.key], self.first.d_model, like) for f in self.ffns}

    def add(self, ffn: FFNSublayer, x: Tensor, y: Tensor, mask: Tensor, h: Tensor | None = None) -> None:
        h = self.hidden(x) if h is None else h[..., : self.first.d_ff]
        own = self._originals[ffn.key]
        p = own.hidden(x.to(own.up), ffn.activation).to(h)
        y = y.to(h.device)
        self._moments[ffn.key].push(torch.cat([h, p], -1), y, mask, f"refit: layer {ffn.key}")

    def all_reduce_(self) -> None:
        for moments in self._moments.values():
            moments.all_reduce_()

    @torch.no_grad()
    def solve(self, ridge: float) -> Solution:
        layers = [self._layer(ffn) for ffn in self.ffns]
        if len(self._originals[self.first.key].up) > self._neurons:
            layers = self._choose(layers, ridge)
        weight, shift = self.weight.double(), self._shift(layers, ridge)
        solved = [self._without_own(layer, ridge) for layer in layers]
        gram = sum(layer.weight * g for layer, (g, _, _, _) in zip(layers, solved, strict=True))
        cross = sum(layer.weight * c for layer, (_, c, _, _) in zip(layers, solved, strict=True))
        descent = cross - gram @ weight
        step = torch.cholesky_solve(descent, self._factor(gram, shift))
        steps, before, after = [(self.weight, step)], 0.0, 0.0
        for layer, (_, _, of_h, of_y) in zip(layers, solved, strict=True):
            down, bias = self._own(layer.ffn)
            present = torch.zeros_like(of_y) if down is None else down.detach().T.double()
            best = of_y - of_h @ (weight + step)
            old, new = torch.cat([weight, present]), torch.cat([weight + step, best])
            steps.append((None if down is None else down.detach().T, best - present))
            offset = None
            if self.weights.down_bias is not None:
                x, y = layer.means
                offset = y - x @ old - self.weights.down_bias.detach().double()
                offset = offset if bias is None else offset - bias.detach().double()
                now = offset if bias is None else offset + bias.detach().double()
                best_bias = now + x @ (old - new)
                steps.append((bias, best_bias if bias is None else best_bias - bias.detach().double()))
            before, after = before + layer.error(old, offset), after + layer.error(new, None)
        total = self._total(layers)
        return Solution(steps, (before / total).item(), (after / total).item())

    def moved(self, solution: Solution, size: float) -> list[tuple[Tensor, Tensor]]:
        """Before the neurons are attached: what becomes of the shared weights; the others are checked with them."""
        if self._attached:
            own = [t for f in self.ffns for t in self._own(f)]
            own = [t.detach().T if t.dim() == 2 else t for t in own if t is not None]
            tensors = [self.weight, *own]
        else:
            like = self.weight
            tensors = [like, *(torch.zeros_like(step, dtype=like.dtype) for _, step in solution.steps[1:])]
        steps = [(tensor, step) for tensor, (_, step) in zip(tensors, solution.steps, strict=True)]
        return super().moved(Solution(steps, solution.before, solution.after), size)

    def _layer(self, ffn: FFNSublayer) -> _Layer:
        moments, centred = self._moments[ffn.key], self.weights.down_bias is not None
        return _Layer(
            ffn,
            self.scales[ffn.index] ** 2 * moments.tokens,
            moments.gram(centred),
            moments.cross(centred),
            (moments.mean("x"), moments.mean("t")),
            moments.square("t", centred),
            self.first.d_ff,
        )

    def _choose(self, layers: Sequence[_Layer], ridge: float) -> list[_Layer]:
        """Keep the neurons that help each layer best beside the best shared W_down alone."""
        gram, cross = (sum(layer.weight * layer.h[i] for layer in layers) for i in (0, 1))
        weight = self.weight.double()
        step = torch.cholesky_solve(cross - gram @ weight, self._factor(gram, self._shift(layers, ridge)))
        kept = []
        for layer in layers:
            own, of_y, of_h = layer.p
            missed, rows = of_y - of_h @ (weight + step), self._moments[layer.ffn.key].tokens
            chosen = eliminated(own, missed, self._neurons, max(ridge, 1e-6), f"refit: {self.name}", rows)
            broadcast_([chosen])  # eigenvalues may be rounded differently elsewhere
            self._originals[layer.ffn.key] = _rows(self._originals[layer.ffn.key], chosen)
            kept.append(layer.restricted(chosen))
        return kept

    def _without_own(self, layer: _Layer, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layer's normal equations for W with D_i solved for; and D_i = of_y − of_h W."""
        own, own_y, own_h = layer.p
        shift = ridge * own.diagonal().mean()
        factor = ridge_factor(own.clone(), shift, f"refit: the neurons of {layer.ffn.key}", self._rows(layer))
        of_h, of_y = torch.cholesky_solve(own_h, factor), torch.cholesky_solve(own_y, factor)
        gram, cross = layer.h
        return gram - own_h.T @ of_h, cross - own_h.T @ of_y, of_h, of_y

    def _shift(self, layers: Sequence[_Layer], ridge: float) -> Tensor:
        return ridge * sum(layer.weight * layer.h[0].diagonal().mean() for layer in layers)

    def _factor(self, gram: Tensor, shift: Tensor) -> Tensor:
        rows = sum(moments.tokens for moments in self._moments.values())
        return ridge_factor(gram.clone(), shift, f"refit: {self.name}", rows)

    def _rows(self, layer: _Layer) -> int:
        return self._moments[layer.ffn.key].tokens

    def _own(self, ffn: FFNSublayer) -> tuple[Tensor | None, Tensor | None]:
        """D_iᵀ [d_model, k] and c_i of a layer that has them."""
        own = self._of(ffn.down_path)
        return own.get("weight"), own.get("bias")

    def _of(self, path: str) -> dict[str, nn.Parameter]:
        return private_parameters(self._model.get_submodule(path)) if self._attached else {}

    def _total(self, layers: Sequence[_Layer]) -> Tensor:
        """Σ w ‖y‖², about the mean over all layers where there is a b_down."""
        total = sum(layer.weight * layer.square for layer in layers)
        if self.weights.down_bias is None:
            return total
        weights = torch.tensor([layer.weight for layer in layers], dtype=torch.float64, device=total.device)
        means = torch.stack([layer.means[1] for layer in layers])
        centre = (weights[:, None] * means).sum(0) / weights.sum()
        return total + (weights[:, None] * (means - centre).square()).sum()


def attach_private_(model: nn.Module, groups: Sequence[PrivateLeastSquares]) -> None:
    """Give the model's layers the neurons that were chosen; it computes what it did."""
    values = {key: own for group in groups for key, own in group.own_values().items()}
    attach_(model, [group.ffns for group in groups], {"private_neurons": groups[0].neurons}, values)
    for group in groups:
        group.attached()


def _rows(weights: FFNWeights, kept: Tensor) -> FFNWeights:
    """Some of an FFN's neurons."""
    rows = {n: v[kept] for n in ("up", "gate", "up_bias", "gate_bias") if (v := getattr(weights, n)) is not None}
    return weights._replace(**rows, down=weights.down[:, kept])
