"""Run the FFNs of a model on the `shared_ffn` op, in place; and undo it."""

from __future__ import annotations

import warnings
from functools import cache

from torch import nn

from ...models.elsewhere import needs_weights
from ...models.sublayers import find_ffns
from ...ops.shared_ffn.op import check_recompute
from ...support.errors import FFMergeError
from .trial import form_of, host_path


def accelerate_(model: nn.Module, recompute: str = "activation", *, least: int | None = None) -> nn.Module:
    """Let every FFN of `model` compute by `ops.shared_ffn`, merged or not; `restore_` undoes it.

    Only the class of a module changes, to a subclass of the same name with another `forward`: that of the FFN's module,
    or of the layer where the FFN has none (BERT, OPT, Marian, Whisper). Parameters, state dict, hooks and sharing
    between layers stay. The model's own code runs whenever the op cannot stand for it: while a part has hooks or was
    replaced (an adapter, a quantised Linear), in training with dropout inside the FFN, under torch.func, jit.trace and
    torch.export; and for so little work that the op would not be faster (`least`). Like the op it is differentiable
    once.

    Args:
        model: any model that `find_ffns` knows. FFNs whose forward does something else stay as they are, and so do
            layers with low-rank deltas; a warning names them and says why.
        recompute: what backward computes again, see `ops.shared_ffn`.
        least: on CPUs in float32 without gradients, FFNs of fewer numbers in W_up run their own code; None: 2^17, and
            2^21 for a single token.

    Returns:
        `model`.

    Raises:
        FFMergeError: unknown policy, unknown family, a streamed model (stream it afterwards), or there is no FFN that
            could be accelerated.
    """
    check_recompute(recompute)
    needs_weights(model, "accelerate_")
    reasons: dict[str, str] = {}
    ready: dict[nn.Module, object] = {}
    for ffn in find_ffns(model, quantised=True):
        module = model.get_submodule(host_path(ffn))
        if module in ready:
            continue
        if isinstance(module, AcceleratedFFN):
            module._ffmerge.recompute = recompute
            ready[module] = module._ffmerge
            continue
        form = form_of(module, ffn, recompute)
        if isinstance(form, str):
            reasons[ffn.key] = form
        else:
            ready[module] = form
    if not ready:
        key, reason = next(iter(reasons.items()))
        raise FFMergeError(
            f"accelerate_: no FFN of this {type(model).__name__} can run on shared_ffn ({key}: {reason})"
        )
    if reasons:
        kept = "; ".join(f"{key}: {reason}" for key, reason in reasons.items())
        warnings.warn(f"accelerate_: FFNs that stay as they are: {kept}", stacklevel=2)
    for module, form in ready.items():
        form.least = least
        if not isinstance(module, AcceleratedFFN):
            module._ffmerge = form
            module.__class__ = _accelerated(type(module))
    return model


def restore_(model: nn.Module) -> nn.Module:
    """Undo `accelerate_`: the modules have their own classes again. Other modules are left alone."""
    for module in model.modules():
        if isinstance(module, AcceleratedFFN):
            if type(module) is not _accelerated(module._own_class):
                raise FFMergeError(
                    f"restore_: a {type(module).__name__} was wrapped after accelerate_; unwrap it, or restore_ before"
                )
            module.__class__ = module._own_class
            del module._ffmerge
    return model


class AcceleratedFFN(nn.Module):
    """A module of some library, an FFN or a layer with one, whose FFN is `ops.shared_ffn` on the weights it has."""

    _own_class: type[nn.Module]

    def forward(self, *args, **kwargs):
        return self._ffmerge.forward(self, self._own_class.forward, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        return _rebuild, (self._own_class,), self.__dict__


@cache
def _accelerated(cls: type[nn.Module]) -> type[nn.Module]:
    """Of the same name, which device maps and FSDP policies look for."""
    return type(cls.__name__, (AcceleratedFFN, cls), {"__module__": cls.__module__, "_own_class": cls})


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    """An empty accelerated module of a class, for pickle and copy."""
    accelerated = _accelerated(cls)
    return accelerated.__new__(accelerated)
