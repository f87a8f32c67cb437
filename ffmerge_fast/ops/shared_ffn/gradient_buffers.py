"""One float32 sum for the gradient of a weight over all its uses in a backward, however many layers share it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

_FLAG = "grad_added_to_main_grad"  # what Megatron's and other optimizers ask for beside `main_grad`
_SUMS = "ffmerge"  # key in the metadata of an AccumulateGrad node: {id of a backward: its _Sum}


class GradientBuffer(NamedTuple):
    """Where backward adds the gradient of a weight, and what it returns to autograd instead of that gradient."""

    sum: Tensor  # float32, of the shape of the weight
    returned: Tensor | None


def gradient_buffer(weight: Tensor | None) -> GradientBuffer | None:
    """The buffer for the parameter behind `weight` (itself, or it is a transposed view of it), or None.

    To be called in backward. It is `main_grad`, if the parameter has one; else a sum that becomes the gradient, rounded
    once, when autograd comes to the parameter after its last use: hooks, the reductions of DDP and FSDP and optimizers
    in backward then see one gradient, as they would see autograd's own sum. None, so that autograd does all of it:
    where this backward does not fill `.grad` (autograd.grad), the parameter is no leaf of at most 32 bits, or tensor
    hooks wait for it.
    """
    leaf, transposed = _leaf(weight)
    if leaf is None or not leaf.requires_grad:
        return None
    node = torch.autograd.graph.get_gradient_edge(leaf).node
    parameter = node.variable  # not `leaf`, which is a stand-in where hooks unpacked it (checkpointing)
    plain = type(parameter) in (nn.Parameter, Tensor) and parameter.dtype.itemsize <= 4
    if not plain or parameter._backward_hooks or not _will_run(node):
        return None
    if _has_main_grad(parameter):
        setattr(parameter, _FLAG, True)
        buffer = GradientBuffer(parameter.main_grad, None)
    else:
        buffer = _sum_of_this_backward(node, parameter)
    return GradientBuffer(*(tensor if tensor is None else tensor.T for tensor in buffer)) if transposed else buffer


class _Sum:
    """A float32 sum that takes the place of a zero gradient when autograd comes to the parameter."""

    def __init__(self, parameter: Tensor, task: int, sums: dict[int, _Sum]):
        self.task, self.sums = task, sums
        self.stream: torch.cuda.Stream | None = None
        self.buffer = torch.zeros_like(parameter, dtype=torch.float32)
        self.placeholder = parameter.new_zeros(()).expand(parameter.shape)

    def wait(self) -> None:
        """Order this stream behind that of the last use: autograd does so only for gradients that it is given."""
        if not self.buffer.is_cuda:
            return
        stream = torch.cuda.current_stream(self.buffer.device)
        if self.stream is not None and stream != self.stream:
            stream.wait_stream(self.stream)
            self.buffer.record_stream(stream)
        self.stream = stream

    def deliver(self, gradients: tuple[Tensor]) -> tuple[Tensor] | None:
        """The pre-hook of the parameter's AccumulateGrad node."""
        if torch._C._current_graph_task_id() != self.task:  # one within it (checkpointing), or after it failed
            return None
        self.wait()
        self.handle.remove()
        del self.sums[self.task]
        (others,) = gradients  # of uses outside the op, or the placeholder alone
        total, self.buffer = self.buffer, None  # without other owners it becomes `.grad` itself
        if others.data_ptr() != self.placeholder.data_ptr():
            total += others
        return (total.to(others.dtype),)


def _sum_of_this_backward(node, parameter: Tensor) -> GradientBuffer:
    """The sum, and the zero gradient for the first use to return."""
    task = torch._C._current_graph_task_id()
    sums = node.metadata.setdefault(_SUMS, {})
    first = task not in sums
    if first:
        sums[task] = _Sum(parameter, task, sums)
        sums[task].handle = node.register_prehook(sums[task].deliver)
    sums[task].wait()
    return GradientBuffer(sums[task].buffer, sums[task].placeholder if first else None)


def _leaf(weight: Tensor | None) -> tuple[Tensor | None, bool]:
    if weight is None or weight.is_leaf:
        return weight, False
    base = weight._base
    if base is None or not base.is_leaf or base.ndim != 2 or weight.shape != base.shape[::-1]:
        return None, False
    same_memory = weight.stride() == base.stride()[::-1] and weight.data_ptr() == base.data_ptr()
    return (base, True) if same_memory else (None, False)


def _has_main_grad(parameter: Tensor) -> bool:
    """Whether its gradient belongs there at once, and nobody waits for it to arrive in `.grad`."""
    buffer = getattr(parameter, "main_grad", None)
    if type(buffer) is not Tensor or buffer.dtype != torch.float32 or buffer.layout != torch.strided:
        return False
    waits = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return buffer.shape == parameter.shape and buffer.device == parameter.device and not waits


def _will_run(node) -> bool:
    """Whether the backward that runs now ends at this node, which fills a parameter's `.grad`."""
    try:
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # a torch without it; autograd.grad, which refuses to answer for leaves
        return False
