"""Where the gradient of a weight may be added at once, instead of being returned and added by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

_FLAG = "grad_added_to_main_grad"  # what Megatron's and other optimizers ask for beside `main_grad`


def gradient_buffer(weight: Tensor | None) -> Tensor | None:
    """The float32 buffer of the parameter behind `weight` (itself, or it is a transposed view of it), or None.

    The buffer is `main_grad`, if the parameter has one, else `.grad`, which is made if it is None. To be called in
    backward. None, so that autograd does its own work: where `.grad` is not what this backward fills (autograd.grad),
    the parameter is no float32 leaf, or hooks wait for its gradient.
    """
    leaf, transposed = _leaf(weight)
    if leaf is None or not leaf.requires_grad:
        return None
    node = torch.autograd.graph.get_gradient_edge(leaf).node
    parameter = node.variable  # not `leaf`, which is a stand-in where hooks unpacked it (checkpointing)
    if _has_hooks(parameter) or not _will_run(node):
        return None
    buffer = getattr(parameter, "main_grad", None)
    if buffer is not None:
        setattr(parameter, _FLAG, True)
    elif parameter.dtype == torch.float32:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        buffer = parameter.grad
    usable = buffer is not None and type(buffer) is Tensor and buffer.dtype == torch.float32 and not buffer.is_sparse
    if not usable or buffer.shape != parameter.shape or buffer.device != parameter.device:
        return None
    return buffer.T if transposed else buffer


def _leaf(weight: Tensor | None) -> tuple[Tensor | None, bool]:
    if weight is None or weight.is_leaf:
        return weight, False
    base = weight._base
    if base is None or not base.is_leaf or base.ndim != 2 or weight.shape != base.shape[::-1]:
        return None, False
    same_memory = weight.stride() == base.stride()[::-1] and weight.data_ptr() == base.data_ptr()
    return (base, True) if same_memory else (None, False)


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def _will_run(node) -> bool:
    """Whether the backward that runs now ends at this node, which fills a parameter's `.grad`."""
    try:
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # a torch without it; autograd.grad, which refuses to answer for leaves
        return False
