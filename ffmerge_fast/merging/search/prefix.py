"""Evaluate many windows without running the blocks before the first merged layer again: they compute what they did."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.passes import may_stop
from ...models.sublayers import FFNSublayer

_WIDE_OUTPUTS = ("output_hidden_states", "output_attentions")


@dataclass
class _Call:
    """One call of the model in every evaluation, and what one of its blocks gave."""

    inputs: Any
    layer: int = -1
    output: Any = None
    nbytes: int = 0


class PrefixOutputs:
    """Outputs of the blocks before a window, by the number of the model's call in its evaluation.

    A window's evaluation starts where an earlier one's left the unmerged model: its n-th call of the model, if its
    arguments equal those of the n-th call then, gets the kept output of the deepest block that no window had merged,
    bit for bit, and the blocks up to it do not run. Calls run whole where that could show: with other arguments, with
    gradients, in training mode, with a key-value cache, with hooks in the blocks, with hidden states or attentions
    asked for, under torch.compile, on offloaded or sharded models. Of encoder-decoder models only the encoder is
    branched off.

    Args:
        model: only calls of this module itself count.
        ffns: of the model.
        max_bytes: for the arguments and outputs that are kept; calls beyond it run whole.
    """

    def __init__(self, model: nn.Module, ffns: Sequence[FFNSublayer], max_bytes: int):
        self._model, self._left = model, max_bytes
        self.stack = ffns[0].stack
        self._blocks = {f.index: model.get_submodule(f.path) for f in ffns if f.stack == self.stack}
        self._possible = may_stop(model) and not any("forward" in vars(b) for b in self._blocks.values())
        self._calls: dict[int, _Call] = {}
        self._number = 0
        self._current: _Call | None = None  # the call that runs now, unless it has to run whole

    @contextlib.contextmanager
    def before(self, first: int) -> Iterator[None]:
        """Inside, the model's layers from `first` on are merged, and it is evaluated."""
        self._number, self._current = 0, None
        prefix = {i: block for i, block in self._blocks.items() if i < first and self._possible}
        with contextlib.ExitStack() as context:
            start = self._model.register_forward_pre_hook(self._start, with_kwargs=True)
            context.callback(start.remove)
            context.callback(self._model.register_forward_hook(self._end, always_call=True).remove)
            for i, block in prefix.items():
                block.forward = partial(self._forward, i, i == max(prefix), block.forward)
                context.callback(delattr, block, "forward")
            yield

    def _start(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        number, self._number = self._number, self._number + 1
        self._current = None
        if not self._may_branch(args, kwargs):
            return
        if number not in self._calls and self._take(_nbytes((args, kwargs))):
            self._calls[number] = _Call(_copied((args, kwargs)))
        if number in self._calls and _equal(self._calls[number].inputs, (args, kwargs)):
            self._current = self._calls[number]

    def _end(self, *_: Any) -> None:
        self._current = None

    def _may_branch(self, args: tuple, kwargs: dict) -> bool:
        config = getattr(self._model, "config", None)
        asked = any(kwargs.get(name) or getattr(config, name, False) for name in _WIDE_OUTPUTS)
        modules = [m for block in self._blocks.values() for m in block.modules()]
        seen = any(m.training or m._forward_hooks or m._forward_pre_hooks for m in modules)
        traced = torch.compiler.is_compiling()
        return not (torch.is_grad_enabled() or traced or asked or seen) and _is_plain((args, kwargs))

    def _forward(self, layer: int, last: bool, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """In place of an unmerged block's forward."""
        if not _is_plain((args, kwargs)):  # a key-value cache, which every block has to fill
            self._current = None
        call = self._current
        if call is not None and layer <= call.layer:
            return _copied(call.output)
        output = forward(*args, **kwargs)
        if last and call is not None and _is_plain(output):
            self._keep(call, layer, output)
        return output

    def _keep(self, call: _Call, layer: int, output: Any) -> None:
        nbytes = _nbytes(output)
        if self._take(nbytes - call.nbytes):
            call.layer, call.output, call.nbytes = layer, _copied(output), nbytes

    def _take(self, nbytes: int) -> bool:
        """Whether so many more bytes may be kept."""
        fits = nbytes <= self._left
        self._left -= nbytes * fits
        return fits


def _is_plain(value: Any) -> bool:
    """Whether a value is tensors, numbers and texts only, in tuples, lists and dicts."""
    if isinstance(value, dict):
        return type(value) is dict and all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return type(value) in (tuple, list) and all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def _copied(value: Any) -> Any:
    """A plain value with copies of its tensors, which nobody else can write to."""
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_copied, value))
    return value.clone() if isinstance(value, Tensor) else value


def _equal(a: Any, b: Any) -> bool:
    """Whether two plain values are the same, their tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return a == b


def _nbytes(value: Any) -> int:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return sum(map(_nbytes, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
