"""A model walked block by block over the same batches: how it calls each block, and each block run alone.

A model's own code says how its blocks are called (masks, positions, the encoder's output). It is run once per stack and
batch with all blocks but the first standing still, and the calls are noted; from then on a block runs alone, with the
stream that is handed to it. So one block at a time is needed, its inputs may change between the blocks, and nothing
here knows a family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from ..models.forward import run, to_device, without_cache
from ..models.sublayers import FFNs
from ..support.errors import FFMergeError
from ..support.files import WriteError, hidden_folder, write_tensors
from ..support.tensors import same_values
from .padding import token_masks
from .passes import Passes

STREAM = "hidden_states"  # its name, where a block is not given it first


class Kept:
    """Tensors of each batch, by name: in host memory, or in files of a temporary folder.

    Args:
        folder: where to make that folder; None: in memory.
    """

    def __init__(self, folder: str | Path | None = None):
        self._context = contextlib.ExitStack()
        self._folder = None if folder is None else self._context.enter_context(_temporary(Path(folder)))
        self._tensors: dict[tuple[str, int], Tensor | Path] = {}

    def put(self, name: str, number: int, value: Tensor) -> None:
        """Keep a tensor of batch `number`, in place of the one of this name."""
        value = value.detach().to("cpu")
        if self._folder is None:
            self._tensors[name, number] = value
            return
        path = self._folder / f"{name}-{number}.safetensors"
        try:
            write_tensors(path, {"x": value.contiguous()})
        except WriteError as error:
            raise _unusable(path.parent.parent, error) from error
        self._tensors[name, number] = path

    def get(self, name: str, number: int) -> Tensor:
        """What was kept, on the host."""
        found = self._tensors[name, number]
        return found if isinstance(found, Tensor) else load_file(found)["x"]

    def has(self, name: str, number: int) -> bool:
        return (name, number) in self._tensors

    def drop(self, name: str) -> None:
        """Let go of a name's tensors."""
        for key in [key for key in self._tensors if key[0] == name]:
            found = self._tensors.pop(key)
            if isinstance(found, Path):
                found.unlink()

    def close(self) -> None:
        self._tensors.clear()
        self._context.close()


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A folder in `folder`, where those of killed processes are removed."""
    with contextlib.ExitStack() as context:
        try:
            made = context.enter_context(hidden_folder(folder / "walk"))
        except OSError as error:
            raise _unusable(folder, error) from error
        yield made


def _unusable(folder: str | Path, error: Exception) -> FFMergeError:
    reason = getattr(error, "strerror", None) or error.__cause__ or error
    return FFMergeError(f"spool_dir: {folder} cannot be written ({reason}); give a folder with room, or none")


@dataclass(frozen=True)
class _Call:
    """What a block is called with, beside the stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
        """(the stream, the rest without caches: a block runs more than once)"""
        args = tuple(map(_no_cache, args))
        kwargs = {name: _no_cache(value) for name, value in kwargs.items()}
        if args:
            return args[0], cls(args[1:], kwargs)
        return kwargs[STREAM], cls((), {name: value for name, value in kwargs.items() if name != STREAM})

    def run(self, block: nn.Module, stream: Tensor) -> Tensor:
        """The stream that the block leaves."""
        return stream_of(block(stream, *self.args, **self.kwargs))


class Walk(Passes):
    """One model, and how it calls its blocks for each of some batches. A context manager, as all `Passes`.

    Args:
        model: evaluated without gradients and without a cache of keys and values.
        ffns: its FFNs; their `path`s are the blocks.
        batches: on the host.
        kept: where the last stream of each stack is kept.
    """

    def __init__(self, model: nn.Module, ffns: FFNs, batches: Sequence[Any], kept: Kept):
        super().__init__(model, ffns.by_stack())
        self.blocks = {stack: [f.path for f in members] for stack, members in ffns.by_stack().items()}
        self.batches, self.kept = batches, kept
        self._calls: dict[tuple[str, int], list[_Call]] = {}
        self._rest: dict[tuple[str, int], tuple[Any, ...]] = {}  # what blocks return beside the stream
        self._masks: dict[tuple[str, int], Tensor | None] = {}

    def __enter__(self):
        super().__enter__()
        self._context.enter_context(without_cache(self.model))
        return self

    def open(self, stack: str, number: int) -> Tensor:
        """The stream that enters a stack's first block; stacks before it have been `left`.

        Raises:
            FFMergeError: something stands between two blocks, so that they cannot be run one by one.
        """
        known = self._rest.get((stack, number - 1))  # blocks that return the stream alone need not run to be known
        note = _Noting(self.blocks[stack], known == ())
        self._run(number, stack, note)
        self._calls[stack, number], self._rest[stack, number] = note.calls, note.rest
        return note.first

    def block(self, stack: str, position: int, number: int, stream: Tensor) -> Tensor | None:
        """The stream that leaves a block for the stream that enters it; None if a hook said that it is `enough`."""
        module = self.model.get_submodule(self.blocks[stack][position])
        call = self._calls[stack, number][position]
        with contextlib.suppress(_Enough):
            return call.run(module, stream.to(next(module.parameters()).device))
        return None

    def others(self, stack: str, position: int, number: int) -> list[Tensor]:
        """The tensors that a block is given beside the stream."""
        call = self._calls[stack, number][position]
        return [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]

    def left(self, stack: str, number: int, stream: Tensor) -> None:
        """Note what left a stack's last block; its calls are forgotten."""
        self.kept.put(f"{stack} end", number, stream)
        del self._calls[stack, number]

    def after(self, number: int) -> None:
        """Run what comes after the blocks, for hooks; every stack has been `left`."""
        self._run(number)

    def mask(self, stack: str, number: int, tokens: int) -> Tensor | None:
        """Which tokens of a batch are not padding, bool [tokens]; None: all, or what has as many rows is no stream."""
        mask = self._masks.get((stack, number))
        return None if mask is None or mask.numel() != tokens else mask.reshape(-1).bool()

    def mask_of_rows(self, number: int, rows: int) -> Tensor | None:
        """The mask of the stack, the last one first, that has this many tokens."""
        masks = (self.mask(stack, number, rows) for stack in reversed(self.blocks))
        return next((mask for mask in masks if mask is not None), None)

    def _run(self, number: int, stack: str | None = None, note: _Noting | None = None) -> None:
        """Run a batch with all blocks standing still, but those that `note` looks at."""
        batch = to_device(self.batches[number], self.model)
        self._masks |= {(of, number): m for of, m in token_masks(batch, self.model, self.blocks).items()}
        with contextlib.ExitStack() as context:
            for of, paths in self.blocks.items():
                for position, path in enumerate(paths):
                    block = self.model.get_submodule(path)
                    stand_in = partial(self._stand_in, of, number, position)
                    if of == stack:
                        stand_in = partial(note.call, block.forward, position)
                    context.enter_context(_replaced(block, stand_in))
            with contextlib.suppress(_Enough):
                run(self.model, batch)

    def _stand_in(self, stack: str, number: int, position: int, *args: Any, **kwargs: Any) -> Any:
        """What a block of a stack that is done, or of one that comes later, returns."""
        stream, _ = _Call.split(args, kwargs)
        rest = self._rest.get((stack, number), ())
        if position == len(self.blocks[stack]) - 1 and self.kept.has(f"{stack} end", number):
            stream = self.kept.get(f"{stack} end", number).to(stream)
        return (stream, *rest) if rest else stream


def _no_cache(value: Any) -> Any:
    return None if type(value).__name__.endswith("Cache") else value


class _Noting:
    """Notes how one stack's blocks are called: the first runs, the others stand still, and after the last it ends.

    Args:
        paths: of the stack's blocks.
        stream_alone: blocks are known to return the stream and nothing else: the first stands still, too.
    """

    def __init__(self, paths: Sequence[str], stream_alone: bool):
        self._paths, self._stream_alone = paths, stream_alone
        self._last: Tensor | None = None
        self.calls: list[_Call] = []
        self.rest: tuple[Any, ...] = ()
        self.first: Tensor | None = None

    def call(self, forward: Callable, position: int, *args: Any, **kwargs: Any) -> Any:
        stream, call = _Call.split(args, kwargs)
        if position != len(self.calls) or (position and not same_values(stream, self._last)):
            raise FFMergeError(
                f"reconstruct: something stands between {self._paths[position - 1]} and {self._paths[position]}, so "
                "the blocks cannot be run one by one; leave reconstruction out (--no-reconstruct)"
            )
        self.calls.append(call)
        if not position:
            self.first = stream.clone()
            output = stream if self._stream_alone else forward(*args, **kwargs)
            self.rest = tuple(output[1:]) if isinstance(output, (tuple, list)) else ()
        if len(self.calls) == len(self._paths):
            raise _Enough
        self._last = stream
        return (stream, *self.rest) if self.rest else stream


class _Enough(Exception):
    """Ends a pass once what it was for is known."""


def enough() -> None:
    """To be called by a hook on a module of a block: nothing more of this pass is wanted."""
    raise _Enough


def stream_of(output: Any) -> Tensor:
    """The stream in what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


@contextlib.contextmanager
def watching(
    model: nn.Module,
    inputs: Mapping[str, Callable[[Tensor], Any]] | None = None,
    outputs: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Iterator[None]:
    """Inside, `inputs[path](first argument)` is called before a module runs, `outputs[path](output)` after it."""
    handles = []
    for path, receive in (inputs or {}).items():
        hook = partial(_before, receive)
        handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
    for path, receive in (outputs or {}).items():
        handles.append(model.get_submodule(path).register_forward_hook(partial(_after, receive)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(receive: Callable, _: nn.Module, args: tuple, kwargs: dict) -> None:
    receive(args[0] if args else next(iter(kwargs.values())))


def _after(receive: Callable, _: nn.Module, args: tuple, output: Any) -> None:
    receive(output)


@contextlib.contextmanager
def _replaced(block: nn.Module, forward: Callable) -> Iterator[None]:
    before = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before
