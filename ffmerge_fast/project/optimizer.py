"""The optimiser of projected compression: it owns P and R, and the student's weights follow.

`step()` takes the gradient of every W_C where the training loop left it (`parameter.grad`) and goes through the model
matrix by matrix: chain rule, AdamW on P and R, projection again in place. There is no autograd graph through P, so
the model, the loop, gradient accumulation, mixed precision and data parallelism (which exchanges gradients of W_C,
4 to 8 times fewer than of P) are the plain small model's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._errors import FFMergeError
from .adamw import AdamWOptions, adamw_
from .base_weights import BaseWeights
from .matrix import ProjectedMatrix, Projection
from .owned_state import OwnedState, master_dtype
from .ownership import Round, Sending, finish
from .units import Unit, is_sharded, whole

_Entry = tuple[str, str]  # (parameter name, name of a trained tensor in its state)


class ProjectionOptimizer(OwnedState):
    """AdamW on the P and R behind a student's weights; made by `Projector.optimizer`.

    Its parameter groups hold the student's parameters, so schedulers, GradScaler and trainers treat it as any other
    optimiser. What it saves and who owns it: see `OwnedState`.

    Args:
        base: makes the `BaseWeights` of the units that this rank owns.
    """

    def __init__(
        self,
        units: list[Unit],
        base: Callable[[list[Unit]], BaseWeights],
        settings: dict[str, Any],
        residual: bool,
        options: AdamWOptions,
        distribute: bool | None = None,
    ):
        super().__init__(units, settings, residual, options, distribute)
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
            gradients, values = self._whole_gradients(of_round), self._values(of_round)
            for unit in units:
                self._update_unit_(unit.on(parameters=values), gradients, scale, groups)
            sendings += self._owners.send(of_round, values)
        finish(sendings)
        return loss

    def _rounds(self, wanted: Callable[[Unit], bool]) -> Iterator[tuple[Round, Iterator[Unit]]]:
        """Every round of the wanted units, and this rank's units of it with their base weights at hand."""
        stream = self._base.stream(unit for unit in self._owners.mine if wanted(unit))
        for of_round in self._owners.rounds:
            of_round = of_round.only(wanted)
            yield of_round, itertools.islice(stream, len(of_round.mine))

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

    def _unit_gradients(self, unit: Unit, gradients: Mapping[str, Tensor]) -> dict[_Entry, Tensor]:
        """Gradients of everything trained in a unit, by the chain rule from those of its parameters."""
        deltas = self._deltas(unit)
        found: dict[_Entry, Tensor] = {}
        for matrix in unit.matrices:
            gradient = gradients.get(matrix.name)
            if gradient is None:
                continue
            inner = self._inner_product(matrix, deltas)
            for projection, of_delta in matrix.gradients(deltas, matrix.as_matrix(gradient), inner):
                key = (projection.owner, projection.entry)
                found[key] = found[key] + of_delta if key in found else of_delta
            if self._residual:
                found[matrix.name, "residual"] = gradient.to(self._state(matrix.name)["residual"].dtype)
        for name, parameter in unit.plain.items():
            if name in gradients:
                found[name, "master"] = gradients[name].to(master_dtype(parameter))
        return found

    def _update_unit_(
        self, unit: Unit, gradients: Mapping[str, Tensor], scale: float | None, groups: dict[int, dict[str, Any]]
    ) -> None:
        """Chain rule, AdamW and projection of one unit."""
        parameters, found = unit.parameters, self._unit_gradients(unit, gradients)
        while found:  # each is let go of once it is used
            (name, entry), gradient = found.popitem()
            gradient = gradient if scale is None else gradient * scale
            self._update_(name, entry, parameters[name], gradient, groups[id(self._named[name])])
        del gradient
        self._project_(unit)

    def _update_(self, name: str, entry: str, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One AdamW step of a trained tensor."""
        state = self._state(name)
        value = state.get(entry, parameter)  # a plain float32 parameter is its own master
        moments = {k.removeprefix(f"{entry}_"): v for k, v in state.items() if k.startswith(f"{entry}_")}
        decay = group["weight_decay_on_projections" if entry.startswith("p_") else "weight_decay"]
        adamw_(value, gradient, moments, group["lr"], group["betas"], group["eps"], decay)
        if entry == "master" and value is not parameter:
            parameter.copy_(value)

    def _project_(self, unit: Unit) -> None:
        deltas = self._deltas(unit)
        for matrix in unit.matrices:
            self._inner.pop(matrix.name, None)
            residual = self._state(matrix.name).get("residual")
            inner = matrix.project_(deltas, None if residual is None else matrix.as_matrix(residual))
            if inner is not None and not self._base.offloaded:
                self._inner[matrix.name] = inner, [(deltas[p], deltas[p]._version) for p in matrix.projections]

    def _inner_product(self, matrix: ProjectedMatrix, deltas: dict[Projection, Tensor]) -> Tensor | None:
        """The product that projecting left for the chain rule, if its deltas are still the same."""
        inner, made_of = self._inner.get(matrix.name, (None, []))
        same = all(deltas[p] is d and d._version == v for p, (d, v) in zip(matrix.projections, made_of, strict=False))
        return inner if same else None

    def _deltas(self, unit: Unit) -> dict[Projection, Tensor]:
        return {p: self._state(p.owner)[p.entry] for p in unit.projections}

    def _check_finite(self) -> None:
        names = [name for name, p in self._named.items() if p.grad is not None]
        norms = [whole(torch.linalg.vector_norm(self._named[name].grad, dtype=torch.float32)) for name in names]
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
            gradients = self._whole_gradients(of_round)
            norms |= {k: g.norm() for unit in units for k, g in self._unit_gradients(unit, gradients).items()}
        device = next(iter(self._named.values())).device
        zero = torch.zeros((), device=device)
        found = torch.stack([norms.get(key, zero).float() for key in self._trained])  # one place each: no order of sums
        total = self._owners.sum_(found.to(self._owners.device())).norm()
        return min(1.0, self._options.max_grad_norm / (float(total) + 1e-6))

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
            for unit in units:
                self._project_(unit.on(parameters=values))
                for name in unit.plain:
                    if "master" in self._state(name):
                        values[name].copy_(self._state(name)["master"])
            sendings += self._owners.send(of_round, values)
        finish(sendings)


def _has_gradient(unit: Unit) -> bool:
    return any(p.grad is not None for p in unit.parameters.values())
