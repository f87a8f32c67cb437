"""How `accelerate_` computes an FFN by `ops.shared_ffn`, and when it may: by the FFN's module or inside a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ...models.ffn_weights import weights_of
from ...ops.shared_ffn.op import apply_ffn
from ...support.tensors import has_memory

LEAST, LEAST_FOR_ONE_TOKEN = 2**17, 2**21  # numbers of `up`, float32 on a CPU: below, torch's own calls take less time


@dataclass
class OpForm:
    """The projections of an FFN, by their paths in the module whose forward runs them.

    Args:
        up, gate, down: paths; `fused`: `up` holds gate and up, gate first.
        activation, recompute: as in `ops.shared_ffn`.
        parts: types of all modules that the op stands for; another type means that somebody replaced one.
        dropouts: module and attribute of each probability of dropout inside the FFN.
        only_eval: something else is random in training.
        least: numbers of `up` below which torch computes float32 on a CPU; None: `LEAST`, `LEAST_FOR_ONE_TOKEN`.
    """

    up: str
    gate: str | None
    down: str
    fused: bool
    activation: str
    recompute: str
    parts: dict[str, type] = field(default_factory=dict)
    dropouts: tuple[tuple[str, str], ...] = ()
    only_eval: bool = False
    least: int | None = None

    def __post_init__(self):
        self.projections = tuple(path for path in (self.up, self.gate, self.down) if path)

    def is_intact(self, module: nn.Module) -> bool:
        """Whether the parts are still those that were tried, and nobody changes or sees what passes between them."""
        if _has_any_global_hook() or _is_transformed():
            return False
        for path, kind in self.parts.items():
            part = at(module, path)
            if type(part) is not kind or (part is not None and is_watched(part)):
                return False
        if self._has_dropout(module):
            return False
        for path in self.projections:
            if type(at(module, path).weight) not in (nn.Parameter, Tensor):  # quantised, sharded
                return False
        return True

    def _has_dropout(self, module: nn.Module) -> bool:
        if module.training and self.only_eval:
            return True
        for path, probability in self.dropouts:
            owner = at(module, path)
            if owner is None or (owner.training and getattr(owner, probability) > 0):
                return True
        return False

    def takes(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the op computes in the dtype of the modules, and is worth its Python."""
        if not isinstance(x, Tensor) or not has_memory(x):
            return False
        if torch.is_autocast_enabled(x.device.type):
            return True
        for path in self.projections:
            if at(module, path).weight.dtype != x.dtype:
                return False
        if x.dtype != torch.float32 or x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return True
        least = self.least
        if least is None:
            least = LEAST_FOR_ONE_TOKEN if x.numel() == x.shape[-1] else LEAST
        return at(module, self.up).weight.numel() >= least

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model] by the op, without dropout."""
        gate = at(module, self.gate) if self.gate else None
        weights = weights_of(at(module, self.up), gate, at(module, self.down), self.fused)
        return apply_ffn(x, weights, self.activation, self.recompute)


@dataclass
class WholeFFN(OpForm):
    """A module that is an FFN and nothing else, but for dropout."""

    last_dropout: str | None = None  # applied to the output

    def forward(self, module: nn.Module, own: Callable, x: Tensor, *args, **kwargs) -> Tensor:
        """`own` is the forward that the module's class has."""
        if args or kwargs or not (self.is_intact(module) and self.takes(module, x)):
            return own(module, x, *args, **kwargs)
        y = self.run(module, x)
        return y if self.last_dropout is None else at(module, self.last_dropout)(y)


@dataclass
class FFNInside(OpForm):
    """An FFN that a layer computes in its own forward: `up`, a module `act`, perhaps dropout, then `down`.

    The layer's forward runs on a `Twin` of the layer, in which `up` and `act` pass on what they get and `down` is the
    whole FFN. The layer and its parts stay as they are, for whoever else reads or calls them.
    """

    act: str = ""

    def forward(self, module: nn.Module, own: Callable, *args, **kwargs):
        if not self.is_intact(module):
            return own(module, *args, **kwargs)
        return own(self.twin(module, partial(self.ffn, module)), *args, **kwargs)

    def ffn(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.takes(module, x):
            return self.run(module, x)
        return at(module, self.down)(at(module, self.act)(at(module, self.up)(x)))

    def twin(self, module: nn.Module, ffn: Callable) -> Twin:
        holders: dict[str, dict[str, Callable]] = {"": {}}
        for path, part in ((self.up, _pass_on), (self.act, _pass_on), (self.down, ffn)):
            holder, _, name = path.rpartition(".")
            holders.setdefault(holder, {})[name] = part
        parts = holders.pop("")
        return Twin(module, parts | {path: Twin(at(module, path), inner) for path, inner in holders.items()})


class Twin:
    """A module with other parts, as `self` for the forward of its class; all else is the module's."""

    def __init__(self, module: nn.Module, parts: dict[str, Callable]):
        if not torch.compiler.is_compiling():  # what forward will ask for, without a call of __getattr__ for each
            for found in (module.__dict__, module._parameters, module._buffers, module._modules, parts):
                self.__dict__.update(found)
        self.__dict__.update(_module=module, _parts=parts)

    def __getattr__(self, name: str):
        if name in self._parts:
            return self._parts[name]
        value = getattr(self._module, name)
        if isinstance(value, MethodType) and value.__self__ is self._module:
            return value.__func__.__get__(self)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._module, name, value)
        self.__dict__.pop(name, None)

    def forward(self, *args, **kwargs):
        return type(self._module).forward(self, *args, **kwargs)

    __call__ = forward


def at(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, "" for itself, or None."""
    if path and "." not in path:
        return module._modules.get(path)
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module


def is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks, or another forward (offloading)."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    forward = module.__dict__.get("forward")  # left there, and the class's own, by hooks that were removed
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def clear_hooks(module: nn.Module) -> None:
    """Of it and all modules within."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()


def _pass_on(x: Tensor) -> Tensor:
    return x


def _is_transformed() -> bool:
    """Whether somebody takes the operations apart (torch.func, forward gradients, jit.trace, torch.export)."""
    if torch.compiler.is_compiling():
        return getattr(torch.compiler, "is_exporting", bool)()
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )
