"""Who updates what in a torch.distributed job: every unit has one rank that owns it, as in ZeRO stage 1.

The owner alone holds the unit's P, R and moments, and does its chain rule, AdamW and projection; then it sends the
student's weights to the others. Units are dealt out so that ranks train equally many values, and done in rounds: while
one round's weights are under way, the next is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...support.distributed import (
    device_to_send_from,
    fill_,
    is_distributed,
    is_sharded,
    rank,
    sum_over_ranks,
    world_size,
)
from ..matrices import Unit

_BUCKET_BYTES = 2**23  # of weights that are sent in one go


@dataclass(frozen=True)
class Round:
    """One bucket of units per rank; `mine` is this rank's."""

    buckets: list[list[Unit]]
    mine: list[Unit]

    @property
    def units(self) -> Iterator[Unit]:
        """Of all ranks."""
        return (unit for bucket in self.buckets for unit in bucket)

    def only(self, wanted: Callable[[Unit], bool]) -> Round:
        """The round without other units."""
        return Round([list(filter(wanted, bucket)) for bucket in self.buckets], list(filter(wanted, self.mine)))


class Ownership:
    """Units dealt out to the ranks of the default group, or all of them to this process.

    Args:
        sizes: {unit: how many values it trains}, in the same order on every rank.
        distribute: None: if torch.distributed is up with several ranks.
    """

    def __init__(self, sizes: Mapping[Unit, int], distribute: bool | None = None):
        self.several = is_distributed() and distribute is not False
        self.rank, self.world = (rank(), world_size()) if self.several else (0, 1)
        self.owner = _dealt(sizes, self.world)
        dealt = [[unit for unit in sizes if self.owner[unit] == owner] for owner in range(self.world)]
        self.mine = dealt[self.rank]
        buckets = [list(_bucketed(units)) for units in dealt]
        count = max(map(len, buckets))
        padded = [of + [[]] * (count - len(of)) for of in buckets]
        self.rounds = [Round([of[i] for of in padded], padded[self.rank][i]) for i in range(count)]

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place; they must be on the device that the backend communicates from."""
        return sum_over_ranks([values])[0] if self.several else values

    def device(self) -> torch.device:
        """What the backend sends from."""
        return device_to_send_from() if self.several else torch.device("cpu")

    def send(self, of_round: Round, values: Mapping[str, Tensor]) -> list[Sending]:
        """Start to give every rank the values that their owners have computed: {parameter name: whole tensor}."""
        if not self.several:
            return []
        started = []
        for owner, bucket in enumerate(of_round.buckets):
            by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
            for name, parameter in ((n, p) for unit in bucket for n, p in unit.parameters.items()):
                by_dtype.setdefault(parameter.dtype, []).append((parameter, values[name]))
            started += [Sending(pairs, owner, owner == self.rank) for pairs in by_dtype.values()]
        return started

    def gathered(self, unit: Unit, tensors: Mapping[str, Tensor], to: int) -> dict[str, Tensor]:
        """The owner's tensors on the CPU of rank `to`, {} on others; every rank must call this.

        Args:
            tensors: the owner's; elsewhere tensors on "meta" of the same names, shapes and dtypes.
        """
        owner, device, found = self.owner[unit], self.device(), {}
        for name, tensor in tensors.items():
            if owner == self.rank == to:
                found[name] = tensor.detach().cpu().clone()
            elif owner == self.rank:
                dist.send(tensor.detach().to(device).contiguous(), to)
            elif to == self.rank:
                received = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                dist.recv(received, owner)
                found[name] = received.cpu()
        return found


class Sending:
    """A broadcast under way.

    Args:
        pairs: (parameter, its whole value), the two in one memory unless the parameter is sharded.
        mine: whether this rank is the owner.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], owner: int, mine: bool):
        self._pairs = pairs
        values = [value for _, value in pairs]
        if len(values) == 1 and values[0].is_contiguous():
            self._flat = values[0].view(-1)
        elif mine:
            self._flat = torch.cat([value.reshape(-1) for value in values])
        else:
            self._flat = values[0].new_empty(sum(value.numel() for value in values))
        self._done = mine or self._flat.data_ptr() == values[0].data_ptr()
        self._work = dist.broadcast(self._flat, owner, async_op=True)

    def wait(self) -> None:
        """Until the values are in the parameters."""
        self._work.wait()
        parts = self._flat.split([value.numel() for _, value in self._pairs])
        for (parameter, value), part in zip(self._pairs, parts, strict=True):
            if is_sharded(parameter) or not self._done:
                fill_(parameter, part.view(value.shape))


def _dealt(sizes: Mapping[Unit, int], world: int) -> dict[Unit, int]:
    """The largest first, each to the rank that has least so far."""
    load, owner = [0] * world, {}
    for unit in sorted(sizes, key=sizes.__getitem__, reverse=True):
        rank = load.index(min(load))
        owner[unit] = rank
        load[rank] += sizes[unit]
    return owner


def _bucketed(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    bucket: list[Unit] = []
    size = 0
    for unit in units:
        nbytes = sum(p.numel() * p.element_size() for p in unit.parameters.values())
        if bucket and size + nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(unit)
        size += nbytes
    if bucket:
        yield bucket


def finish(sendings: Sequence[Sending]) -> None:
    """Wait for all of them."""
    for sending in sendings:
        sending.wait()
