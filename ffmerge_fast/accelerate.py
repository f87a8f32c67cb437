"""Run the FFNs of a model on the `shared_ffn` op, in place; and undo it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ._errors import FFMergeError
from .models import FFNSublayer, delta_parameters, find_ffns, is_conv1d
from .ops import shared_ffn
from .ops._activations import FORWARD
from .ops.shared_ffn.op import check_recompute

_TOLERANCE = 1e-4  # of the largest output, between two float32 computations of the same


def accelerate_(model: nn.Module, recompute: str = "activation") -> nn.Module:
    """Let every FFN module of `model` compute by `ops.shared_ffn`, merged or not; `restore_` undoes it.

    Only the class of a module changes, to a subclass with another `forward`: parameters, state dict, hooks on it and
    sharing between layers stay. A module computes as before whenever the op cannot stand for it: while one of its
    parts has hooks or was replaced (an adapter, a quantised Linear), or in training with dropout inside the FFN.

    Args:
        model: any model that `find_ffns` knows. FFNs without a module of their own (BERT, OPT, Marian) stay as they
            are, and so do those whose forward does something else, and layers with low-rank deltas; a warning names
            them.
        recompute: what backward computes again, see `ops.shared_ffn`.

    Returns:
        `model`.

    Raises:
        FFMergeError: unknown policy, unknown family, or there is no FFN that could be accelerated.
    """
    check_recompute(recompute)
    reasons: dict[str, str] = {}
    ready = {}
    for ffn in find_ffns(model):
        module = model.get_submodule(ffn.shared[0])
        if isinstance(module, AcceleratedFFN):
            module._ffmerge.recompute = recompute
            ready[id(module)] = (module, module._ffmerge)
        elif id(module) not in ready:
            layout = _Layout.of(module, ffn, recompute)
            reason = _why_not(module, ffn, layout)
            if reason:
                reasons[ffn.key] = reason
            else:
                ready[id(module)] = (module, layout)
    if not ready:
        key, reason = next(iter(reasons.items()))
        raise FFMergeError(
            f"accelerate_: no FFN of this {type(model).__name__} can run on shared_ffn ({key}: {reason})"
        )
    if reasons:
        kept = "; ".join(f"{key}: {reason}" for key, reason in reasons.items())
        warnings.warn(f"accelerate_: FFNs that stay as they are: {kept}", stacklevel=2)
    for module, layout in ready.values():
        if not isinstance(module, AcceleratedFFN):
            module._ffmerge = layout
            module.__class__ = _accelerated(type(module))
    return model


def restore_(model: nn.Module) -> nn.Module:
    """Undo `accelerate_`: the modules have their own classes again. Other modules are left alone."""
    for module in model.modules():
        if isinstance(module, AcceleratedFFN):
            if type(module).__bases__[0] is not AcceleratedFFN:
                raise FFMergeError(
                    f"restore_: a {type(module).__name__} was wrapped after accelerate_; unwrap it, or restore_ before"
                )
            module.__class__ = type(module).__bases__[1]
            del module._ffmerge
    return model


class AcceleratedFFN(nn.Module):
    """An FFN module of some library whose forward is `ops.shared_ffn` on the weights of its own Linear modules."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """[..., d_model] -> [..., d_model]; by the module's own code where the op cannot stand for it."""
        layout = self._ffmerge
        if args or kwargs or not layout.fits(self, x):
            return super().forward(x, *args, **kwargs)
        y = layout.run(self, x)
        return y if layout.last_dropout is None else getattr(self, layout.last_dropout)(y)

    def __reduce_ex__(self, protocol):
        return _rebuild, (type(self).__bases__[1],), self.__dict__


@cache
def _accelerated(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Accelerated{cls.__name__}", (AcceleratedFFN, cls), {"__module__": __name__})


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    """An empty accelerated module of a class, for pickle and copy."""
    accelerated = _accelerated(cls)
    return accelerated.__new__(accelerated)


@dataclass
class _Layout:
    """Which children of an FFN module are its projections, and what it does besides."""

    up: str
    gate: str | None
    down: str
    fused: bool  # `up` holds gate and up, gate first
    activation: str
    recompute: str
    types: dict[str, type]  # of the projections: another type means that somebody replaced one
    last_dropout: str | None = None  # applied to the output
    inner_dropout: bool = False

    @staticmethod
    def of(module: nn.Module, ffn: FFNSublayer, recompute: str) -> _Layout:
        prefix = f"{ffn.shared[0]}."
        up, gate, down = (p and p.removeprefix(prefix) for p in (ffn.up_path, ffn.gate_path, ffn.down_path))
        types = {name: type(module.get_submodule(name)) for name in (up, gate, down) if name and "." not in name}
        return _Layout(up, gate, down, ffn.fused, ffn.activation, recompute, types)

    def fits(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the op computes now what the module's own forward would."""
        if not isinstance(x, Tensor) or (self.inner_dropout and module.training) or _has_any_global_hook():
            return False
        children = module._modules
        if any(type(children.get(name)) is not kind for name, kind in self.types.items()):
            return False
        if any(child is not None and _is_watched(child) for child in children.values()):
            return False
        weights = [children[name].weight for name in self.types]
        if any(type(weight) not in (nn.Parameter, Tensor) for weight in weights):  # quantised, sharded
            return False
        return all(weight.dtype == x.dtype for weight in weights) or torch.is_autocast_enabled(x.device.type)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """The op on the module's weights, without dropout."""
        (up, up_bias), (down, down_bias) = (_projection(getattr(module, name)) for name in (self.up, self.down))
        gate = gate_bias = None
        if self.fused:
            gate, up = up.chunk(2)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
        elif self.gate:
            gate, gate_bias = _projection(getattr(module, self.gate))
        biases = (up_bias, gate_bias, down_bias)
        return shared_ffn(x, up, down, gate, *biases, activation=self.activation, recompute=self.recompute)


def _projection(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias."""
    return linear.weight.T if is_conv1d(linear) else linear.weight, linear.bias


def _is_watched(child: nn.Module) -> bool:
    return bool(child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks)


def _why_not(module: nn.Module, ffn: FFNSublayer, layout: _Layout) -> str | None:
    """None if the op can stand for the module: tried on random inputs, on a float32 copy. Fills in the dropouts."""
    if len(ffn.shared) > 1:
        return "its projections have no module of their own"
    if ffn.activation not in FORWARD:
        return f"activation {ffn.activation!r}"
    if len(layout.types) < 2 + (layout.gate is not None):
        return "its projections are not its direct children"
    for child in (module.get_submodule(name) for name in layout.types):
        if delta_parameters(child):
            return "its layer has low-rank deltas"
        if not (type(child) is nn.Linear or is_conv1d(child)):
            return f"a projection is a {type(child).__name__}"
        if child.weight.is_meta:
            return "its weights are on the meta device: load them first"
    with torch.autocast("cpu", enabled=False):
        return _differs(_plain_copy(module), layout)


def _plain_copy(module: nn.Module) -> nn.Module:
    """On the CPU in float32, without hooks."""
    clone = copy.deepcopy(module).to("cpu", torch.float32)
    for part in clone.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return clone


@torch.no_grad()
def _differs(clone: nn.Module, layout: _Layout) -> str | None:
    weight, _ = _projection(getattr(clone, layout.up))
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    try:
        expected = clone.eval()(x)
    except Exception as error:  # whatever the forward of another library raises for a lone input
        return f"its forward does not take x alone ({type(error).__name__})"
    if not _equal(layout.run(clone, x), expected):
        return "its forward does more than an FFN"
    clone.train()
    dropouts = [n for n, m in clone._modules.items() if isinstance(m, nn.Dropout) and m.p > 0]
    layout.inner_dropout = bool(dropouts)
    with torch.random.fork_rng(devices=[]):
        for name in dropouts:
            torch.manual_seed(0)
            expected = clone(x)
            torch.manual_seed(0)
            if _equal(getattr(clone, name)(layout.run(clone, x)), expected):
                layout.last_dropout, layout.inner_dropout = name, False
                break
    return None


def _equal(ours: Tensor, expected: object) -> bool:
    if not isinstance(expected, Tensor) or ours.shape != expected.shape:
        return False
    return bool((ours - expected).abs().max() <= _TOLERANCE * expected.abs().max())
