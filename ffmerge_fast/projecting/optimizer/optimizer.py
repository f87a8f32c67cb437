"""The optimiser of projected compression: it owns P and R, and the student's weights follow.

`step()` takes the gradient of every W_C where the training loop left it (`parameter.grad`) and goes through the model
unit by unit: chain rule, AdamW on P and R, projection again in place. On a GPU, small matrices of equal shapes are done
several at a time, as far as their units are of one round (see `ownership`). There is no autograd graph through P, so
the model, the loop, gradient accumulation, mixed precision and data parallelism (which exchanges gradients of W_C,
4 to 8 times fewer than of P) are the plain small model's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...support.distributed import is_sharded, whole
from ...support.errors import FFMergeError
from ..matrices import ProjectedMatrix, Projection, Unit, alike, gradients, project_
from .adamw import AdamWOptions, adamw_
from .base_weights import BaseWeights
from .ownership import Round, Sending, finish
from .state import Entry, OwnedState, master_dtype

_AT_ONCE = {"cuda": 2**25}  # values of Δ of the matrices that are multiplied at once; elsewhere one at a time


class ProjectionOptimizer(OwnedState):
    """AdamW on the P and R behind a student's weights; made by `Projector.optimizer`.

    Its parameter groups hold the student's parameters, so schedulers, GradScaler and trainers treat it as any other
    optimiser. What it saves and who owns it: see `OwnedState`.

    Args:
        base: makes the `BaseWeights` of the units that this rank owns.
        starts: what trained tensors begin with, where that is not zero.
    """

    def __init__(
        self,
        units: list[Unit],
        base: Callable[[list[Unit]], BaseWeights],
        settings: dict[str, Any],
        residual: bool,
        options: AdamWOptions,
        distribute: bool | None = None,
        starts: Mapping[Entry, Tensor] | None = None,
    ):
        super().__init__(units, settings, residual, options, distribute, starts)
        self._trained = [(name, entry) for unit in units for name, entry, _ in unit.trained(residual)]
        self._inner: dict[str, tuple[Tensor, list[tuple[Tensor, int]]]] = {}  # name: product, of which deltas
        self._base = base(self._owners.mine)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every P, R and plain parameter that has a gradient, and of the student's weights.

        Raises:
            FFMergeError: a gradient is not finite, or a file of the base's weights was changed; nothing is changed
                then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._base.check()
        self._check_finite()
        self._whole_state = None
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        scale = self._clip_factor()
        sendings: list[Sending] = []
        for of_round, units in self._rounds(_has_gradient):
            of_weights, values = self._whole_gradients(of_round), self._values(of_round)
            for bunch in units:
                self._update_units_([unit.on(parameters=values) for unit in bunch], of_weights, scale, groups)
            sendings += self._owners.send(of_round, values)
        finish(sendings)
        return loss

    def _rounds(self, wanted: Callable[[Unit], bool]) -> Iterator[tuple[Round, Iterator[list[Unit]]]]:
        """Every round of the wanted units, and this rank's units of it, as many at a time as are done together, with
        their base weights at hand."""
        rounds = [of_round.only(wanted) for of_round in self._owners.rounds]
        stream = self._base.stream(bunch for of_round in rounds for bunch in _bunches(of_round.mine))
        for of_round in rounds:
            yield of_round, itertools.islice(stream, len(_bunches(of_round.mine)))

    def _whole_gradients(self, of_round: Round) -> dict[str, Tensor]:
        """{parameter name: gradient} of this rank's units; sharded ones are gathered by all ranks."""
        mine = {name for unit in of_round.mine for name in unit.parameters}
        found = {}
        for name, parameter in ((n, p) for unit in of_round.units for n, p in unit.parameters.items()):
            if parameter.grad is not None and (name in mine or self._sharded):
                gradient = whole(parameter.grad)
                if name in mine:
                    found[name] = gradient
        return found

    def _values(self, of_round: Round) -> dict[str, Tensor]:
        """{parameter name: what its owner changes and sends}: the parameter itself, or room for a sharded one."""
        values = {}
        for unit in of_round.units:
            for name, parameter in unit.parameters.items():
                if not is_sharded(parameter):
                    values[name] = parameter.detach()
                elif name in unit.plain:
                    values[name] = whole(parameter.detach())
                else:
                    values[name] = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        return values

    def _gradients(self, units: list[Unit], of_weights: Mapping[str, Tensor]) -> dict[Entry, Tensor]:
        """Gradients of everything trained in units, by the chain rule from those of their parameters."""
        deltas = self._deltas(units)
        found: dict[Entry, Tensor] = {}
        for group in _alike(m for unit in units for m in unit.matrices if m.name in of_weights):
            inner = self._inner_products(group, deltas)
            grads = [m.as_matrix(of_weights[m.name]) for m in group]
            for projection, of_delta in gradients(group, deltas, grads, inner):
                key = (projection.owner, projection.entry)
                found[key] = found[key].add_(of_delta) if key in found else of_delta
            for matrix in group if self._residual else ():
                residual = self._state(matrix.name)["residual"]
                found[matrix.name, "residual"] = of_weights[matrix.name].to(residual.dtype)
        for name, parameter in ((n, p) for unit in units for n, p in unit.plain.items()):
            if name in of_weights:
                found[name, "master"] = of_weights[name].to(master_dtype(parameter))
        return found

    def _update_units_(
        self,
        units: list[Unit],
        of_weights: Mapping[str, Tensor],
        scale: float | None,
        groups: dict[int, dict[str, Any]],
    ) -> None:
        """Chain rule, AdamW and projection of units."""
        parameters = {name: p for unit in units for name, p in unit.parameters.items()}
        found = self._gradients(units, of_weights)
        while found:  # each gradient is let go of once it is used
            (name, entry), gradient = found.popitem()
            gradient = gradient if scale is None else gradient * scale
            self._update_(name, entry, parameters[name], gradient, groups[id(self._named[name])])
            del gradient
        self._project_(units)

    def _update_(self, name: str, entry: str, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One AdamW step of a trained tensor."""
        state = self._state(name)
        value = state.get(entry, parameter)  # a plain float32 parameter is its own master
        moments = {k.removeprefix(f"{entry}_"): v for k, v in state.items() if k.startswith(f"{entry}_")}
        decay = group["weight_decay_on_projections" if entry.startswith("p_") else "weight_decay"]
        adamw_(value, gradient, moments, group["lr"], group["betas"], group["eps"], decay)
        if entry == "master" and value is not parameter:
            parameter.copy_(value)

    def _project_(self, units: list[Unit]) -> None:
        deltas = self._deltas(units)
        for group in _alike(m for unit in units for m in unit.matrices):
            for matrix in group:
                self._inner.pop(matrix.name, None)
            residuals = [m.as_matrix(self._state(m.name)["residual"]) for m in group if self._residual]
            inner = project_(group, deltas, residuals)
            if not self._base.offloaded:
                for matrix, product in zip(group, inner, strict=False):
                    made_of = [(deltas[p], deltas[p]._version) for p in matrix.projections]
                    self._inner[matrix.name] = product, made_of

    def _inner_products(self, group: list[ProjectedMatrix], deltas: dict[Projection, Tensor]) -> list[Tensor]:
        """The products that projecting left for the chain rule, if the deltas of all are still the same."""
        kept = [self._inner.get(m.name, (None, [])) for m in group]
        made_of = [(deltas[p], *of) for m, (_, parts) in zip(group, kept, strict=True)
                   for p, of in zip(m.projections, parts, strict=False)]  # fmt: skip
        same = all(delta is of and of._version == version for delta, of, version in made_of)
        return [inner for inner, _ in kept] if same and all(inner is not None for inner, _ in kept) else []

    def _deltas(self, units: list[Unit]) -> dict[Projection, Tensor]:
        return {p: self._state(p.owner)[p.entry] for unit in units for p in unit.projections}

    def _check_finite(self) -> None:
        names = [name for name, p in self._named.items() if p.grad is not None]
        norms = [whole(torch.linalg.vector_norm(p.grad, dtype=master_dtype(p))) for p in map(self._named.get, names)]
        total = torch.stack([n.to(norms[0].device) for n in norms]).sum() if norms else torch.zeros(())
        if self._owners.sum_(total.to(self._owners.device(), copy=True)).isfinite():
            return
        broken = next((n for n, norm in zip(names, norms, strict=True) if not norm.isfinite()), "another rank")
        raise FFMergeError(
            f"step: the gradient of {broken} is not finite; nothing was changed: go on from here with a lower lr, "
            "or clip the gradients"
        )

    def _clip_factor(self) -> float | None:
        """What all gradients are multiplied by, so that their norm is at most max_grad_norm."""
        if self._options.max_grad_norm is None:
            return None
        norms = {}
        for of_round, units in self._rounds(_has_gradient):
            of_weights = self._whole_gradients(of_round)
            for bunch in units:
                norms |= {key: g.norm() for key, g in self._gradients(bunch, of_weights).items()}
        device = next(iter(self._named.values())).device
        zero = torch.zeros((), device=device)
        found = torch.stack([norms.get(key, zero).float() for key in self._trained])  # one place each: no order of sums
        total = self._owners.sum_(found.to(self._owners.device())).norm()
        return min(1.0, self._options.max_grad_norm / (float(total) + 1e-6))

    @torch.no_grad()
    def take_residuals_(self) -> None:
        """Set every R to what the student's weights have beyond P W P, so that the student stays as it is."""
        for of_round, units in self._rounds(lambda unit: True):
            mine = {name for unit in of_round.mine for name in unit.parameters}
            values = {}
            for name, parameter in ((n, p) for unit in of_round.units for n, p in unit.parameters.items()):
                value = whole(parameter.detach())  # of a sharded one by all ranks
                if name in mine:
                    values[name] = value
            for matrix in (m for bunch in units for unit in bunch for m in unit.matrices):
                value = values[matrix.name]
                projected = torch.empty(value.shape, dtype=master_dtype(value), device=value.device)
                project_([replace(matrix, parameter=projected)], self._deltas([Unit([matrix])]))
                self._state(matrix.name)["residual"].copy_(value - projected)
        self._whole_state = None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, of any number of ranks, and set the student's weights to what it says.

        Raises:
            FFMergeError: it is of another projector (says what differs), or not of a projection optimiser.
        """
        super().load_state_dict(state_dict)
        sendings: list[Sending] = []
        for of_round, units in self._rounds(lambda unit: True):
            values = self._values(of_round)
            for bunch in units:
                self._project_([unit.on(parameters=values) for unit in bunch])
                for name in (name for unit in bunch for name in unit.plain):
                    if "master" in self._state(name):
                        values[name].copy_(self._state(name)["master"])
            sendings += self._owners.send(of_round, values)
        finish(sendings)


def _at_once(parameter: Tensor) -> int:
    return _AT_ONCE.get(parameter.device.type, 0)


def _bunches(units: list[Unit]) -> list[list[Unit]]:
    """Units that are done together: all of a round where matrices are multiplied several at a time."""
    several = any(_at_once(p) for unit in units for p in unit.parameters.values())
    return [units] if several else [[unit] for unit in units]


def _alike(matrices: Iterable[ProjectedMatrix]) -> Iterator[list[ProjectedMatrix]]:
    matrices = list(matrices)
    return alike(matrices, _at_once(matrices[0].parameter) if matrices else 0)


def _has_gradient(unit: Unit) -> bool:
    return any(p.grad is not None for p in unit.parameters.values())
