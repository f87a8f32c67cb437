"""The state of projected compression's optimiser: what there is, who owns it, how it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...support.distributed import is_sharded, whole
from ...support.errors import FFMergeError
from ..matrices import Unit
from .adamw import AdamWOptions, new_moments
from .ownership import Ownership

_SETTINGS = "projector"
Entry = tuple[str, str]  # (parameter name, name of a trained tensor in its state)


class OwnedState(torch.optim.Optimizer):
    """P, R, masters and moments of the units that this rank owns, keyed by the student's parameters.

    `state[parameter]` holds, in float32 or better: p_out, p_in (Δ), residual (R), master (plain parameters in half
    precision), and for each trained tensor its moments (see `adamw.new_moments`). With several owners it is only a
    part of the whole; `named_state` and `consolidate_state_dict` collect that.

    Attributes:
        settings: what a resumed run must have in common with this one, as JSON values.
    """

    def __init__(
        self,
        units: list[Unit],
        settings: dict[str, Any],
        residual: bool,
        options: AdamWOptions,
        distribute: bool | None = None,
        starts: Mapping[Entry, Tensor] | None = None,
    ):
        self._options, self._residual, self._starts = options, residual, starts or {}
        self._owners = Ownership({unit: unit.numel(residual) for unit in units}, distribute)
        self._named = {name: p for unit in units for name, p in unit.parameters.items()}
        self._sharded = any(map(is_sharded, self._named.values()))
        if self._sharded and not self._owners.several:
            raise FFMergeError(
                "distribute: got False, or no process group, for sharded parameters (DTensor), which need owners"
            )
        self._whole_state: dict[str, Tensor] | None = None
        self._projector = {f"{_SETTINGS}.{name}": value for name, value in settings.items()}
        self.settings = self._projector | {f"optimizer.{n}": value for n, value in options.settings.items()}
        super().__init__(self._groups(), {"lr": options.lr, "betas": tuple(options.betas), "eps": options.eps})
        for unit in self._owners.mine:
            for name, entries in self._new_state(unit).items():
                self.state[self._named[name]].update(entries)

    def _groups(self) -> list[dict[str, Any]]:
        matrices = [p for p in self._named.values() if p.ndim >= 2]
        vectors = [p for p in self._named.values() if p.ndim < 2]
        on_projections = self._options.weight_decay_on_projections
        return [
            {"params": of, "weight_decay": decay, "weight_decay_on_projections": on_projections}
            for of, decay in ((matrices, self._options.weight_decay), (vectors, 0.0))
            if of
        ]

    def _new_state(self, unit: Unit, device: str | None = None) -> dict[str, dict[str, Tensor]]:
        """{parameter name: its state before the first step}, on `device` or the parameter's own."""
        state: dict[str, dict[str, Tensor]] = {name: {} for name in unit.parameters}
        for name, entry, shape in unit.trained(self._residual):
            parameter = self._named[name]
            dtype, where = master_dtype(parameter), torch.device(device or parameter.device)
            if entry != "master":
                state[name][entry] = torch.zeros(shape, dtype=dtype, device=where)
                if (name, entry) in self._starts:
                    state[name][entry].copy_(self._starts[name, entry])
            elif parameter.dtype != dtype:
                state[name][entry] = whole(parameter.detach()).to(where, dtype)
            moments = new_moments(shape, dtype, where, self._options.state)
            state[name] |= {f"{entry}_{moment}": value for moment, value in moments.items()}
        return state

    def named_state(self, to: int = 0) -> dict[str, Tensor]:
        """The state as {"<entry>/<parameter name>": tensor}; of all owners on rank `to`, {} on the others.

        With several owners every rank must call this; the tensors are then copies on the CPU.
        """
        found: dict[str, Tensor] = {}
        for unit in self._owners.owner:
            own = self._owners.owner[unit] == self._owners.rank
            state = {n: self._state(n) for n in unit.parameters} if own else self._new_state(unit, "meta")
            named = {f"{entry}/{name}": value for name, entries in state.items() for entry, value in entries.items()}
            found |= self._owners.gathered(unit, dict(sorted(named.items())), to) if self._owners.several else named
        return found

    def load_named_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `named_state` gave, whatever the number of ranks was; the student's weights stay.

        Raises:
            FFMergeError: tensors are missing or have other shapes.
        """
        by_name: dict[str, dict[str, Tensor]] = {name: {} for name in self._named}
        for key, value in saved.items():
            entry, _, name = key.partition("/")
            by_name.setdefault(name, {})[entry] = value
        mine = [name for unit in self._owners.mine for name in unit.parameters]
        for name in mine:
            now, loaded = self._state(name), by_name[name]
            if {k: v.shape for k, v in now.items()} != {k: v.shape for k, v in loaded.items()}:
                raise FFMergeError(f"load_state_dict: the saved state of {name} has other tensors or shapes")
        for name in mine:
            now = self._state(name)
            for entry, value in by_name[name].items():  # moved along if the student was
                device = self._named[name].device if value.ndim else "cpu"
                now[entry] = value.detach().to(device, now[entry].dtype, copy=True)
        self._whole_state = None

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collect the state of all owners for `state_dict()` on rank `to`; every rank must call this."""
        if self._owners.several:
            self._whole_state = self.named_state(to) or None

    def state_dict(self) -> dict[str, Any]:
        """As of any optimiser, and the projector's settings under "projector".

        Raises:
            FFMergeError: several ranks own it and it was not collected here since the last step.
        """
        if self._owners.several and self._whole_state is None:
            raise FFMergeError(
                f"state_dict: {self._owners.world} ranks own the state; call consolidate_state_dict() on every rank "
                "first, or make the optimizer with distribute=False"
            )
        named = self._whole_state if self._owners.several else self.named_state()
        names = {parameter: name for name, parameter in self._named.items()}
        order = [names[p] for group in self.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(order))}
        index = {name: i for i, name in enumerate(order)}
        for key, value in named.items():
            entry, _, name = key.partition("/")
            state[index[name]][entry] = value
        return super().state_dict() | {"state": state, _SETTINGS: dict(self.settings)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, of any number of ranks.

        Raises:
            FFMergeError: it is of another projector (says what differs), or not of a projection optimiser.
        """
        saved = state_dict.get(_SETTINGS)
        if saved is None:
            raise FFMergeError("load_state_dict: this is no state of a projection optimizer (it has no 'projector')")
        for name in (*self._projector, "optimizer.state"):
            if saved.get(name) != self.settings[name]:
                raise FFMergeError(
                    f"load_state_dict: {name} was {saved.get(name)!r} and is {self.settings[name]!r} now; project with "
                    "the same settings"
                )
        names = {parameter: name for name, parameter in self._named.items()}
        order = [names[p] for group in self.param_groups for p in group["params"]]
        loaded = state_dict["state"]
        self.load_named_state({f"{e}/{n}": v for i, n in enumerate(order) for e, v in loaded.get(i, {}).items()})
        for group, now in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in now.items() if k != "params"})

    def _state(self, name: str) -> dict[str, Tensor]:
        return self.state[self._named[name]]


def master_dtype(parameter: Tensor) -> torch.dtype:
    """Of what is trained behind a parameter."""
    return torch.promote_types(parameter.dtype, torch.float32)
