"""The small model itself: a stock transformers class with a smaller config, filled with the kept weights."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn

from ..models.ties import groups_among
from ..support.distributed import is_sharded, whole
from ..support.errors import FFMergeError
from ..support.tensors import not_inference
from .axes import Axis, ModelAxes
from .selection import Selection, Sizes


def build_student(model: nn.Module, layout: ModelAxes, sizes: Sizes, selection: Selection) -> nn.Module:
    """A smaller model of the same class whose every weight is a slice of the base's (hard pruning).

    Constants that the class makes and never saves (sinusoids) are those of the smaller size.

    Raises:
        FFMergeError: the class builds other shapes than the layout says.
    """
    student = fresh_student(model, layout, sizes)
    base = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if not parameter.requires_grad:  # a constant
                continue
            if name not in base:
                raise FFMergeError(f"project: the smaller {type(model).__name__} has {name}, which the base lacks")
            kept = sliced(base[name], layout.axes[name], selection)
            if kept.shape != parameter.shape:
                raise FFMergeError(
                    f"project: {name} is {list(parameter.shape)} in the smaller {type(model).__name__}, expected "
                    f"{list(kept.shape)}; this architecture cannot have these widths"
                )
            parameter.copy_(kept)
        _copy_buffers_(model, student)
    return student


def fresh_student(model: nn.Module, layout: ModelAxes, sizes: Sizes, seed: int = 0) -> nn.Module:
    """A smaller model of the same class, initialised as the class does it; everything but its constants is trained.

    Raises:
        FFMergeError: FFNs are shared in a way that the config does not say.
    """
    config = sizes.config(model, layout)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        student = type(model)(config)
    if groups_among(layout.ffns, student) != groups_among(layout.ffns, model):
        raise FFMergeError(
            f"project: layers of this {type(model).__name__} share FFNs, which its config does not say; tie them with "
            "merge_, or call expand_ first"
        )
    constants = constant_names(student)
    student.to(device=next(model.parameters()).device, dtype=model.dtype)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name not in constants)
    if getattr(model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.train(model.training)


def sliced(tensor: Tensor, axes: tuple[Axis | None, ...], selection: Selection) -> Tensor:
    """The kept entries of a parameter."""
    for dim, axis in enumerate(axes):
        if axis is not None:
            tensor = tensor.index_select(dim, selection.choice(axis).index.to(tensor.device))
    return tensor


def constant_names(fresh: nn.Module) -> set[str]:
    """Parameters of a freshly built model that its class neither trains nor saves."""
    unsaved = [re.compile(pattern) for pattern in getattr(fresh, "_keys_to_ignore_on_save", None) or ()]
    return {
        name for name, p in fresh.named_parameters() if not p.requires_grad and any(u.search(name) for u in unsaved)
    }


def _copy_buffers_(model: nn.Module, student: nn.Module) -> None:
    saved = student.state_dict(keep_vars=True)
    own = dict(model.named_buffers())
    for name, buffer in student.named_buffers():
        if name in saved and name in own:
            if own[name].shape != buffer.shape:
                raise FFMergeError(f"project: the buffer {name} depends on the width, which is not supported")
            buffer.copy_(own[name])


@not_inference
def fold(student: nn.Module) -> nn.Module:
    """A copy of the student in evaluation mode and without gradients; W, P and R are not part of it.

    A student that FSDP2 has sharded becomes a whole model of its own class; every rank must call this then.
    """
    if any(map(is_sharded, student.parameters())):
        return _gathered(student).eval()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad(set_to_none=True)  # so that they are not copied
    try:
        folded = copy.deepcopy(student)
    finally:
        for name, parameter in student.named_parameters():
            parameter.grad = gradients[name]
    return folded.eval()


@torch.no_grad()
def _gathered(student: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FSDPModule

    plain = next(cls for cls in type(student).__mro__ if not issubclass(cls, FSDPModule))
    with torch.random.fork_rng(devices=[]):
        gathered = plain(copy.deepcopy(student.config))
    first = next(student.parameters())
    gathered.to(device=first.device, dtype=first.dtype)
    gathered.generation_config = copy.deepcopy(getattr(student, "generation_config", None))
    for of in ("named_parameters", "named_buffers"):
        targets = dict(getattr(gathered, of)())
        for name, tensor in getattr(student, of)():
            targets[name].copy_(whole(tensor))
            targets[name].requires_grad_(tensor.requires_grad)
    return gathered
