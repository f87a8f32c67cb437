"""The optimiser of projected compression: it owns P and R, and the student's weights follow.

`step()` takes the gradient of every W_C where the training loop left it (`parameter.grad`) and goes through the model
matrix by matrix: chain rule, AdamW on P and R, projection again in place. There is no autograd graph through P, so
the model, the loop, gradient accumulation, mixed precision and data parallelism (which exchanges gradients of W_C,
4 to 8 times fewer than of P) are the plain small model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .._errors import FFMergeError
from .matrix import ProjectedMatrix, Projection

_SETTINGS = "projector"
_Entry = tuple[str, str]  # (parameter name, name of a trained tensor in its state)


@dataclass(frozen=True, eq=False)
class Unit:
    """Matrices that share projections and so are updated together: usually a weight and its bias."""

    matrices: list[ProjectedMatrix]

    @property
    def projections(self) -> list[Projection]:
        """Each once."""
        return list(dict.fromkeys(p for m in self.matrices for p in m.projections))


class ProjectionOptimizer(torch.optim.Optimizer):
    """AdamW on the P and R behind a student's weights; made by `Projector.optimizer`.

    Its parameter groups hold the student's parameters, so schedulers, GradScaler and trainers treat it as any other
    optimiser. `state[parameter]` holds, in float32 or better: p_out, p_in (Δ), residual (R), master (plain parameters
    in half precision), and for each trained tensor its exp_avg, exp_avg_sq and step.

    Attributes:
        settings: what a resumed run must have in common with this one, as JSON values.
    """

    def __init__(
        self,
        units: list[Unit],
        plain: dict[str, nn.Parameter],
        settings: dict[str, Any],
        residual: bool,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        weight_decay_on_projections: float,
        max_grad_norm: float | None,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay),
                            ("weight_decay_on_projections", weight_decay_on_projections)):  # fmt: skip
            if not value >= 0:
                raise FFMergeError(f"{name}: got {value}, wanted 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise FFMergeError(f"betas: got {betas}, wanted two numbers from 0 to below 1")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise FFMergeError(f"max_grad_norm: got {max_grad_norm}, wanted a number above 0, or None")
        self._units, self._plain, self._residual = units, plain, residual
        self._max_grad_norm = max_grad_norm
        self._inner: dict[str, tuple[Tensor, list[tuple[Tensor, int]]]] = {}  # name: product, of which deltas
        self.settings = {f"{_SETTINGS}.{name}": value for name, value in settings.items()}
        self._named = plain | {m.name: m.parameter for u in units for m in u.matrices}
        for name, parameter in self._named.items():
            if hasattr(parameter, "placements"):
                raise FFMergeError(f"optimizer: {name} is sharded (DTensor); projections work with DDP, not with FSDP2")
        matrices = {n: p for n, p in self._named.items() if p.ndim >= 2}
        vectors = {n: p for n, p in self._named.items() if p.ndim < 2}
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps}
        groups = [
            {"params": list(of.values()), "weight_decay": decay, "weight_decay_on_projections": on_projections}
            for of, decay, on_projections in (
                (matrices, weight_decay, weight_decay_on_projections),
                (vectors, 0.0, weight_decay_on_projections),
            )
            if of
        ]
        super().__init__(groups, defaults)
        self._init_state()

    # ------------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every P, R and plain parameter that has a gradient, and of the student's weights.

        Raises:
            FFMergeError: a gradient is not finite; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_finite()
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        scale = self._clip_factor()
        for unit in self._units:
            self._step_unit(unit, scale, groups)
        for name, gradient in self._plain_gradients():
            self._update(name, "master", gradient * scale if scale is not None else gradient, groups)
        return loss

    def _step_unit(self, unit: Unit, scale: float | None, groups: dict[int, dict]) -> None:
        gradients = self._unit_gradients(unit)
        if not gradients:
            return
        while gradients:  # each is let go of once it is used
            (name, entry), gradient = gradients.popitem()
            self._update(name, entry, gradient * scale if scale is not None else gradient, groups)
        del gradient
        self._project_(unit)

    def _unit_gradients(self, unit: Unit) -> dict[_Entry, Tensor]:
        """Gradients of everything trained in a unit, by the chain rule from those of its matrices."""
        deltas = self._deltas(unit)
        found: dict[_Entry, Tensor] = {}
        for matrix in unit.matrices:
            if matrix.parameter.grad is None:
                continue
            grad = matrix.as_matrix(matrix.parameter.grad)
            for projection, gradient in matrix.gradients(deltas, grad, self._inner_product(matrix, deltas)):
                key = (projection.owner, projection.entry)
                found[key] = found[key] + gradient if key in found else gradient
            if self._residual:
                found[matrix.name, "residual"] = matrix.parameter.grad.to(
                    self.state[matrix.parameter]["residual"].dtype
                )
        return found

    def _plain_gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._plain.items():
            if parameter.grad is not None:
                yield name, parameter.grad.to(_master_dtype(parameter))

    def _update(self, name: str, entry: str, gradient: Tensor, groups: dict[int, dict]) -> None:
        """One AdamW step of a trained tensor."""
        parameter = self._named[name]
        state, group = self.state[parameter], groups[id(parameter)]
        value = state.get(entry, parameter)  # a plain float32 parameter is its own master
        moments = [state[f"{entry}_{moment}"] for moment in ("exp_avg", "exp_avg_sq", "step")]
        decay = "weight_decay_on_projections" if entry.startswith("p_") else "weight_decay"
        first, second = group["betas"]
        average, square, step = ([m] for m in moments)
        adamw(
            [value], [gradient.contiguous()], average, square, [], step, foreach=False, fused=value.is_cpu,
            amsgrad=False, beta1=first, beta2=second, lr=group["lr"], weight_decay=group[decay], eps=group["eps"],
            maximize=False,
        )  # fmt: skip
        if entry == "master" and value is not parameter:
            parameter.copy_(value)

    def _project_(self, unit: Unit) -> None:
        deltas = self._deltas(unit)
        for matrix in unit.matrices:
            self._inner.pop(matrix.name, None)
            residual = self.state[matrix.parameter].get("residual")
            inner = matrix.project_(deltas, None if residual is None else matrix.as_matrix(residual))
            if inner is not None:
                self._inner[matrix.name] = inner, [(deltas[p], deltas[p]._version) for p in matrix.projections]

    def _inner_product(self, matrix: ProjectedMatrix, deltas: dict[Projection, Tensor]) -> Tensor | None:
        """The product that projecting left for the chain rule, if its deltas are still the same."""
        inner, made_of = self._inner.get(matrix.name, (None, []))
        same = all(deltas[p] is d and d._version == v for p, (d, v) in zip(matrix.projections, made_of, strict=False))
        return inner if same else None

    def _deltas(self, unit: Unit) -> dict[Projection, Tensor]:
        return {p: self.state[self._named[p.owner]][p.entry] for p in unit.projections}

    def _check_finite(self) -> None:
        names = [name for name, p in self._named.items() if p.grad is not None]
        norms = [self._named[name].grad.norm(dtype=torch.float32) for name in names]
        if norms and not torch.stack([n.to(norms[0].device) for n in norms]).sum().isfinite():
            broken = next((n for n, norm in zip(names, norms, strict=True) if not norm.isfinite()), names[0])
            raise FFMergeError(
                f"step: the gradient of {broken} is not finite; nothing was changed: go on from here with a lower lr, "
                "or clip the gradients"
            )

    def _clip_factor(self) -> float | None:
        """What all gradients are multiplied by, so that their norm is at most max_grad_norm."""
        if self._max_grad_norm is None:
            return None
        norms = [g.norm() for unit in self._units for g in self._unit_gradients(unit).values()]
        norms += [gradient.norm() for _, gradient in self._plain_gradients()]
        if not norms:
            return None
        total = torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
        return min(1.0, self._max_grad_norm / (float(total) + 1e-6))

    # ------------------------------------------------------------------------------------------------------ state

    def _init_state(self) -> None:
        for name, entry, shape in self._trained():
            parameter = self._named[name]
            like = {"device": parameter.device, "dtype": _master_dtype(parameter)}
            state = self.state[parameter]
            if entry != "master":
                state[entry] = torch.zeros(shape, **like)
            elif parameter.dtype != like["dtype"]:
                state[entry] = parameter.detach().to(like["dtype"])
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{entry}_{moment}"] = torch.zeros(shape, **like)
            state[f"{entry}_step"] = torch.zeros((), dtype=torch.float32)

    def _trained(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(parameter name, entry, shape) of everything that is trained."""
        for unit in self._units:
            yield from ((p.owner, p.entry, p.shape) for p in unit.projections)
            if self._residual:
                yield from ((m.name, "residual", tuple(m.parameter.shape)) for m in unit.matrices)
        yield from ((name, "master", tuple(p.shape)) for name, p in self._plain.items())

    def state_dict(self) -> dict[str, Any]:
        """As of any optimiser, and the projector's settings under "projector"."""
        return super().state_dict() | {_SETTINGS: dict(self.settings)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, and set the student's weights to what it says.

        Raises:
            FFMergeError: it is of another projector (says what differs), or not of a projection optimiser.
        """
        saved = state_dict.get(_SETTINGS)
        if saved is None:
            raise FFMergeError("load_state_dict: this is no state of a projection optimizer (it has no 'projector')")
        for name, value in self.settings.items():
            if saved.get(name) != value:
                raise FFMergeError(
                    f"load_state_dict: {name} was {saved.get(name)!r} and is {value!r} now; project with the same "
                    "settings"
                )
        order = [p for group in self.param_groups for p in group["params"]]
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in loaded.items() if k != "params"})
        for index, parameter in enumerate(order):
            now, loaded = self.state[parameter], state_dict["state"].get(index, {})
            if {k: v.shape for k, v in now.items()} != {k: v.shape for k, v in loaded.items()}:
                raise FFMergeError(f"load_state_dict: the state of parameter {index} has other tensors or shapes")
            for key, value in loaded.items():  # moved along if the student was
                device = parameter.device if value.ndim else "cpu"
                now[key] = value.detach().to(device, now[key].dtype, copy=True)
        with torch.no_grad():
            for unit in self._units:
                self._project_(unit)
            for name, parameter in self._plain.items():
                if "master" in self.state[self._named[name]]:
                    parameter.copy_(self.state[parameter]["master"])


def _master_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
