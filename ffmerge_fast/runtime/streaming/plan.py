"""Which weights of a streamed model stay on the device: blocks as steps, parcels of weights, a budget in bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...models.sublayers import find_ffns
from ...support.errors import FFMergeError
from ...support.sizes import format_bytes
from ...support.tensor_files import is_plain, memory


@dataclass(eq=False)
class Weight:
    """One piece of memory of a model, with all its names and all the parameters that are it."""

    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.parameters[0].nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters[0].dtype

    @property
    def shape(self) -> torch.Size:
        return self.parameters[0].shape

    @property
    def is_meta(self) -> bool:
        return self.parameters[0].is_meta


@dataclass(eq=False)
class BlockWeights:
    """Weights that are used by the same blocks: loaded before the first of these steps, let go of after the last."""

    steps: frozenset[int]
    weights: list[Weight]

    def __post_init__(self):
        self.nbytes = sum(weight.nbytes for weight in self.weights)
        self.first, self.last = min(self.steps), max(self.steps)

    def alive(self, step: int) -> bool:
        """Whether it is kept at this step: a tied FFN is also kept while other blocks run."""
        return self.first <= step <= self.last


def following_steps(lengths: Sequence[int]) -> dict[int, set[int]]:
    """{step: steps that may come after it} of stacks of blocks: after the last of a stack the first of any."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    ends = {start + length - 1 for start, length in zip(starts, lengths, strict=True)}
    return {step: set(starts) if step in ends else {step + 1} for step in range(sum(lengths))}


@dataclass(frozen=True)
class Steps:
    """A model's blocks in the order in which they run, and which weights each needs.

    Attributes:
        blocks: dotted paths; parcels: of their weights.
        rest: weights that are used outside of the blocks, too; fixed: bytes of these and of all buffers.
        following: see `following_steps`.
        often: the first block of the last stack, which runs for each token where an earlier one runs for each sequence.
    """

    blocks: list[str]
    parcels: list[BlockWeights]
    rest: list[Weight]
    fixed: int
    following: dict[int, set[int]]
    often: int

    @classmethod
    def of(cls, model: nn.Module) -> Steps:
        """Of a model whose weights may be anywhere; FFMergeError as `find_ffns`."""
        stacks = [[ffn.path for ffn in ffns] for ffns in find_ffns(model).by_stack().values()]
        blocks = [path for stack in stacks for path in stack]
        parcels, rest = parcels_of(model, blocks)
        fixed, following = nbytes_outside(rest, model.buffers()), following_steps([len(stack) for stack in stacks])
        return cls(blocks, parcels, rest, fixed, following, len(blocks) - len(stacks[-1]))

    def least(self, ahead: bool = True) -> int:
        """The smallest budget that streaming works with; `ahead`: that loads the next block while one runs."""
        return self.fixed + peak(self.parcels, self.following, ahead)


def total(parcels: Iterable[BlockWeights]) -> int:
    """Bytes of the parcels."""
    return sum(parcel.nbytes for parcel in parcels)


def parcels_of(model: nn.Module, blocks: Sequence[str]) -> tuple[list[BlockWeights], list[Weight]]:
    """The parcels of a model's blocks (dotted paths), and the weights that are used outside of them, too."""
    weights: dict[tuple, Weight] = {}
    steps: dict[tuple, set[int | None]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = memory(parameter)
        weight = weights.setdefault(key, Weight())
        weight.names.append(name)
        if not any(parameter is known for known in weight.parameters):
            weight.parameters.append(parameter)
        step = next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        steps.setdefault(key, set()).add(step if is_plain(parameter) else None)
    grouped: dict[frozenset[int], list[Weight]] = {}
    for key, used in steps.items():
        grouped.setdefault(frozenset(() if None in used else used), []).append(weights[key])
    rest = grouped.pop(frozenset(), [])
    return [BlockWeights(used, grouped[used]) for used in sorted(grouped, key=sorted)], rest


def peak(parcels: Collection[BlockWeights], following: dict[int, set[int]], ahead: bool = True) -> int:
    """Most bytes that are held at once while these are streamed.

    Args:
        following: {step: steps that may come after it}.
        ahead: while a step runs, the parcels of the next one are loaded.
    """
    alive = {step: {p for p in parcels if p.alive(step)} for step in following}
    needed = {step: {p for p in parcels if step in p.steps} for step in following}
    pairs = ((step, after) for step, afters in following.items() for after in afters)
    return max(total(alive[step] | needed[after] if ahead else alive[step]) for step, after in pairs)


def choose_resident(
    parcels: list[BlockWeights], following: dict[int, set[int]], room: int, often: int
) -> set[BlockWeights]:
    """The parcels that stay: those that save the most reading for their room, as long as the rest can be streamed.

    Steps from `often` on count first: a decoder runs for each token, an encoder for each sequence. A tied FFN costs
    less room than its bytes where it would be held at the peak anyway. Equal ones are spread over the model, so that
    the blocks that are read alternate with blocks that only compute.
    """
    whole = peak(parcels, following)

    def rank(parcel: BlockWeights) -> tuple:
        cost = parcel.nbytes + peak([p for p in parcels if p is not parcel], following) - whole
        return parcel.last < often, cost / parcel.nbytes, -parcel.nbytes, parcel.first * 0.618034 % 1

    streamed, resident = list(parcels), set()
    for parcel in sorted(parcels, key=rank):
        others = [p for p in streamed if p is not parcel]
        if total({*resident, parcel}) + peak(others, following) <= room:
            streamed, resident = others, {*resident, parcel}
    return resident


def check_budget(budget: int, fixed: int, parcels: Collection[BlockWeights], following: dict[int, set[int]]) -> None:
    """Raise FFMergeError, with the bytes needed, if not even one layer at a time fits beside what must stay."""
    need = fixed + peak(parcels, following, ahead=False)
    if budget < need:
        raise FFMergeError(
            f"budget: got {budget:,} bytes, wanted at least {need:,}: {format_bytes(fixed)} outside of the blocks and "
            f"{format_bytes(need - fixed)} for the largest layer with the tied FFNs held then; "
            f"{fixed + peak(parcels, following):,} to load the next layer meanwhile"
        )


def nbytes_outside(rest: Sequence[Weight], buffers: Iterable[Tensor]) -> int:
    """Bytes of what always lies on the device: weights outside of the blocks, and all buffers."""
    return sum(weight.nbytes for weight in rest) + sum(buffer.nbytes for buffer in buffers)
