"""All that this package asks of torch.distributed; one process is the plain case."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import FFMergeError

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------------ processes


def is_distributed() -> bool:
    """Whether a process group of more than one process is up."""
    return world_size() > 1


def world_size() -> int:
    """Processes of the `torch.distributed` job; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the job, from 0."""
    return dist.get_rank() if is_distributed() else 0


def device_to_send_from() -> torch.device:
    """Where tensors must lie for the backend to send them."""
    nccl = is_distributed() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def share_of_rank(total: int) -> int:
    """This rank's part of a number of tokens; the first ranks take the remainder."""
    return total // world_size() + (rank() < total % world_size())


def turns_of_rank(work: Sequence[T]) -> list[T | None]:
    """This rank's share of a list of work; every rank has as many turns, the last may be None."""
    turns: list[T | None] = list(work[rank() :: world_size()])
    return turns + [None] * (-(-len(work) // world_size()) - len(turns))


def file_of_rank(name: str) -> str:
    """ "statistics" -> "statistics-rank1", where several processes write into one folder."""
    return f"{name}-rank{rank()}" if is_distributed() else name


# --------------------------------------------------------------------------------------------------- tensors and values


def sum_over_ranks(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """Each tensor's sum over all processes, in place; as it is without a `torch.distributed` job.

    Args:
        group: a process group, all processes without one.
    """
    if group is not None or is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)
    return list(tensors)


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Rank 0's tensors on every rank, in place."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every rank's tensors as "rank<i>/<name>"."""
    return {f"rank{i}/{name}": tensor for i, part in enumerate(gather(tensors)) for name, tensor in part.items()}


def from_rank_zero(value: T) -> T:
    """Rank 0's `value` on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_any_rank(flag: bool) -> bool:
    """Whether any rank says so; every rank gets the same answer."""
    if not is_distributed():
        return flag
    return bool(sum_over_ranks([torch.tensor(int(flag), device=device_to_send_from())])[0])


# --------------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def on_all_ranks(name: str) -> Iterator[None]:
    """Work that every rank does before they meet: collective, all ranks enter it as often.

    An error of the block leaves it as it is, and makes all other ranks raise instead of waiting for this one.

    Args:
        name: of the work, for the other ranks' error.

    Raises:
        FFMergeError: the block failed on another rank (names the first one, and its error).
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if is_distributed():
        _raise_for_others(name, error)
    if error is not None:
        raise error


def _raise_for_others(name: str, error: Exception | None) -> None:
    """Tell every rank about this one's error; raise if this one has none, but another has."""
    kind = "" if isinstance(error, FFMergeError) else f"{type(error).__name__}: "
    messages = gather(None if error is None else kind + " ".join(str(error).split()))
    failed = [number for number, found in enumerate(messages) if found is not None]
    if failed and error is None:
        raise FFMergeError(f"{name}: rank {failed[0]} failed: {messages[failed[0]]}")


def on_rank_zero(action: Callable[[], Any]) -> None:
    """Run `action()` on rank 0; an FFMergeError there is raised on every rank."""
    error = None
    if rank() == 0:
        try:
            action()
        except FFMergeError as raised:
            error = raised
    message = from_rank_zero(str(error) if error else None)
    if message is not None:
        raise error or FFMergeError(message)


# ------------------------------------------------------------------------------------------------------ sharded tensors


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 makes them."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one; then every rank must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def fill_(tensor: Tensor, values: Tensor) -> None:
    """Copy whole values into a tensor, or this rank's part of them into a sharded one; nothing is sent."""
    if not is_sharded(tensor):
        tensor.copy_(values)
        return
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(values, tensor.device_mesh, [Replicate()] * tensor.device_mesh.ndim)
    tensor.to_local().copy_(everywhere.redistribute(placements=tensor.placements).to_local())


def sharded_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole value sharded as a tensor is, if it is; every rank must call this."""
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, tensor.device_mesh, tensor.placements)
