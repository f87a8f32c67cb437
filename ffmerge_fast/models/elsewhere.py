"""Models with weights on "meta": where the values are, so that work that takes them one by one never loads a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..support.distributed import whole
from ..support.errors import FFMergeError
from ..support.tensor_files import WeightEntry
from .streamed import HANDLE, is_streamed, refuse_streamed

_PLACES = "_weights_elsewhere"  # attribute of such a model


@dataclass(frozen=True)
class InFile:
    """What gives the values of a weight: its entry in a file, in the dtype that the model has."""

    entry: WeightEntry
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        return self.entry.read().to(self.dtype)

    @property
    def as_it_is(self) -> bool:
        """Whether the file has the very bytes."""
        return self.entry.dtype == self.dtype


class Elsewhere:
    """{parameter on "meta": what gives its values, anew each time}. Copies of the model have copies of it.

    Attributes:
        folder: that the model is in.
        checksums: {parameter: what `summary.fingerprint` made of it}, so that it is read once.
    """

    def __init__(self, folder: str, values: dict[Tensor, Callable[[], Tensor]]):
        self.folder, self._values = folder, values
        self.checksums: dict[Tensor, bytes] = {}

    def attach_(self, model: nn.Module) -> None:
        """Make this the place where a model's values are."""
        setattr(model, _PLACES, self)

    def but(self, folder: str, values: Mapping[Tensor, Callable[[], Tensor]]) -> Elsewhere:
        """The same with other places of some weights."""
        return Elsewhere(folder, {**self._values, **values})

    def put(self, weight: Tensor, value: Callable[[], Tensor]) -> None:
        """Say what gives the values of a new parameter."""
        self._values[weight] = value

    def place(self, weight: Tensor) -> Callable[[], Tensor] | None:
        """What gives the values of a parameter; None for one that is not known here."""
        return self._values.get(weight)

    def read(self, weight: Tensor) -> Tensor:
        """The values of a parameter, which is itself where it is in memory."""
        if not weight.is_meta:
            return weight.detach()
        if weight not in self._values:
            raise FFMergeError(
                f"model: a weight of shape {list(weight.shape)} is on meta and in no file of {self.folder}"
            )
        return self._values[weight]()


def elsewhere(model: nn.Module) -> Elsewhere | None:
    """Where the values of a model's weights on "meta" are; None for an ordinary model."""
    return getattr(model, _PLACES, None)


def in_memory(model: nn.Module) -> bool:
    """Whether the values of all its parameters are in them."""
    return elsewhere(model) is None and not is_streamed(model)


def needs_weights(model: nn.Module, action: str) -> None:
    """Raise FFMergeError unless all weights of a model are in memory."""
    refuse_streamed(model, action)
    if (places := elsewhere(model)) is not None:
        raise FFMergeError(
            f"{action}: this model's weights are in the files of {places.folder}; load it (ffmerge_fast."
            "from_pretrained), or run it with ffmerge_fast.stream_"
        )


def reader_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that gives a parameter's values, wherever they are: in it, in files, in a stream's host memory, on all
    ranks of a job that FSDP2 has sharded it over, which must all call it then."""
    source: Any = getattr(model, HANDLE, None) or elsewhere(model)
    return _whole if source is None else source.read


def _whole(weight: Tensor) -> Tensor:
    return whole(weight.detach())


def values_elsewhere(model: nn.Module, modules: Iterable[nn.Module | None]) -> dict[int, Tensor]:
    """{id(parameter): its values, where the model runs} of those parameters of some modules that are elsewhere."""
    read, found = reader_of(model), {}
    for parameter in (p for module in modules if module is not None for p in module.parameters()):
        values = read(parameter)
        if parameter.is_meta or values.data_ptr() != parameter.data_ptr():
            found[id(parameter)] = values if parameter.is_meta else values.to(parameter.device)
    return found


def copied(model: nn.Module, module: nn.Module) -> nn.Module:
    """A module of a model again, with weights of its own; those that are elsewhere have the same places."""
    stream, places = getattr(model, HANDLE, None), elsewhere(model)
    new = copy.deepcopy(module, {id(stream): stream})  # which hooks of the module belong to
    for mine, theirs in zip(new.parameters(), module.parameters(), strict=True) if places else ():
        if (place := places.place(theirs)) is not None:
            places.put(mine, place)
    return new


@torch.no_grad()
def bring_(model: nn.Module, modules: Iterable[nn.Module], device: torch.device | str = "cpu") -> None:
    """Read the weights of some modules, which are parameters in memory from then on."""
    read = reader_of(model)
    for module in modules:
        for owner in module.modules():
            for name, weight in list(owner.named_parameters(recurse=False)):
                if weight.is_meta:
                    values = read(weight).to(device)
                    owner.register_parameter(name, nn.Parameter(values, weight.requires_grad))
