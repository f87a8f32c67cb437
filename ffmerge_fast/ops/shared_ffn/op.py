"""The `shared_ffn` op: checks, registration and autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...support.errors import FFMergeError
from ...support.tensors import check_memory
from ..common.activations import check_activation
from .gradient_buffers import GradientBuffer, gradient_buffer
from .registered import backward, backward_op, forward, forward_op
from .weights import FFNWeights

_POLICIES = ("none", "activation", "full")


class SharedFFNFunction(torch.autograd.Function):
    """Autograd around the op: weights keep their dtype, the op runs in `dtype` (that of autocast, or the inputs')."""

    @staticmethod
    def forward(ctx, activation, recompute, dtype, up, gate, down, up_bias, gate_bias, down_bias, *xs):
        weights = FFNWeights(up, gate, down, up_bias, gate_bias, down_bias)
        inputs = [x.to(dtype) for x in xs]
        outputs, saved = forward_op(inputs, *weights.to(dtype), activation, recompute)
        ctx.save_for_backward(*weights, *inputs, *saved)
        ctx.options = (activation, recompute)
        ctx.dtypes = (dtype, [x.dtype for x in xs])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        eager = not (torch.compiler.is_compiling() or torch.is_grad_enabled())  # enabled by create_graph
        tensors = ctx.saved_tensors  # once: checkpointing computes them when asked, and only one time
        needs = ctx.needs_input_grad[3:9]
        buffers = [gradient_buffer(w) if eager and need else None for w, need in zip(tensors[:6], needs, strict=True)]
        return _gradients(ctx, tensors, buffers, *grads)


@once_differentiable
def _gradients(ctx, tensors: tuple, buffers: list[GradientBuffer | None], *grads: Tensor):
    """The gradients of `SharedFFNFunction`'s inputs; what their buffers say for those that were added to these."""
    dtype, x_dtypes = ctx.dtypes
    n = len(x_dtypes)
    weights, xs, saved = FFNWeights(*tensors[:6]), list(tensors[6 : 6 + n]), list(tensors[6 + n :])
    needs_weight, needs_x = ctx.needs_input_grad[3:9], ctx.needs_input_grad[9:]
    given, cast = ([g.to(dtype) for g in grads], xs, saved), weights.to(dtype)
    needs = [any(needs_x), *needs_weight]
    if any(buffer is not None for buffer in buffers):
        dxs, sums = backward(*given, cast, *ctx.options, needs, [buffer and buffer.sum for buffer in buffers])
    else:
        dxs, sums = backward_op(*given, *cast, *ctx.options, needs)
    sums = iter(sums)
    totals = [next(sums) if need else None for need in needs_weight]
    d_weights = [
        b.returned if b else d if d is None else d.to(w.dtype) for w, d, b in zip(weights, totals, buffers, strict=True)
    ]
    d_xs = [dxs[i].to(x_dtypes[i]) if needs_x[i] else None for i in range(n)]
    return None, None, None, *d_weights, *d_xs


def shared_ffn(
    x: Tensor | Sequence[Tensor],
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "gelu",
    recompute: str = "activation",
) -> Tensor | list[Tensor]:
    """Apply one FFN to the inputs of many layers or micro-batches: down(act(up x)), or down(act(gate x) · up x).

    The weight gradients of all inputs of one call are summed in one float32 buffer and rounded once. Under autocast
    the op runs in autocast's dtype, and gradients have the dtype of the weights. Differentiable once.

    Args:
        x: [..., d], for instance [G, T, d], or a list of [T_i, d] (nothing is stacked); float32, bfloat16, float16 or
            float64.
        up: [d_ff, d] (the layout of nn.Linear), like `gate`.
        down: [d_out, d_ff].
        gate: makes the FFN a gated one.
        up_bias, gate_bias: [d_ff]. down_bias: [d_out].
        activation: relu, gelu, gelu_tanh, silu, relu2 or quick_gelu.
        recompute: what backward computes again: "none", the "activation" (kept are the pre-activations), or "full"
            (kept is x only: least memory, one more GEMM or two).

    Returns:
        [..., d_out], or a list of [T_i, d_out] for a list.

    Raises:
        FFMergeError: unknown activation or policy; a shape, dtype or device does not fit.
    """
    return apply_ffn(x, FFNWeights(up, gate, down, up_bias, gate_bias, down_bias), activation, recompute)


def apply_ffn(
    x: Tensor | Sequence[Tensor], weights: FFNWeights, activation: str, recompute: str = "activation"
) -> Tensor | list[Tensor]:
    """`shared_ffn` with its weights in one."""
    check_activation(activation)
    check_recompute(recompute)
    xs = [x] if isinstance(x, Tensor) else list(x)
    check_memory("x", *xs)
    check_memory("weights", *weights)
    _check_weights(weights)
    width = weights.up.shape[1]
    dtype = _compute_dtype(xs, weights)
    for i, one in enumerate(xs):
        if one.ndim == 0 or one.shape[-1] != width:
            name = "x" if isinstance(x, Tensor) else f"x[{i}]"
            raise FFMergeError(f"{name}: got shape {list(one.shape)}, want [..., {width}], the input width of up")
    if not xs:
        return []
    flat = [one if one.ndim == 2 else one.reshape(-1, width) for one in xs]
    if torch.is_grad_enabled():
        outputs = SharedFFNFunction.apply(activation, recompute, dtype, *weights, *flat)
    else:  # nothing will be needed again
        inputs, cast = [one.to(dtype) for one in flat], weights.to(dtype)
        if _is_eager():  # the dispatcher takes 13 µs, a small FFN in cache 100
            outputs, _ = forward(inputs, cast, activation, "full")
        else:
            outputs, _ = forward_op(inputs, *cast, activation, "full")
    outputs = [_in_shape_of(one, y) for y, one in zip(outputs, xs, strict=True)]
    return outputs[0] if isinstance(x, Tensor) else outputs


def _in_shape_of(x: Tensor, y: Tensor) -> Tensor:
    """[T, d_out] -> [..., d_out]; no view where gradients are needed, FSDP2 warns of these."""
    if x.ndim == 2:
        return y
    shape = [*x.shape[:-1], y.shape[1]]
    return torch.ops.aten._unsafe_view.default(y, shape) if y.requires_grad else y.view(shape)


def check_recompute(policy: str) -> None:
    """Raise FFMergeError unless `policy` is a known one."""
    if policy not in _POLICIES:
        raise FFMergeError(f"recompute: got {policy!r}, want one of {', '.join(_POLICIES)}")


def _check_weights(weights: FFNWeights) -> None:
    up, gate, down, up_bias, gate_bias, down_bias = weights
    if up.ndim != 2 or down.ndim != 2:
        raise FFMergeError(f"up, down: got shapes {list(up.shape)}, {list(down.shape)}, want [d_ff, d] and [d, d_ff]")
    d_ff, d = up.shape
    _check_shape("gate", gate, (d_ff, d), up)
    _check_shape("down", down, (down.shape[0], d_ff), up)
    _check_shape("up_bias", up_bias, (d_ff,), up)
    _check_shape("gate_bias", gate_bias, (d_ff,), up)
    _check_shape("down_bias", down_bias, (down.shape[0],), up)
    if gate is None and gate_bias is not None:
        raise FFMergeError("gate_bias: given without gate; give gate too or leave it out")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], up: Tensor) -> None:
    if tensor is not None and tensor.shape != shape:
        raise FFMergeError(f"{name}: got shape {list(tensor.shape)}, want {list(shape)} beside up {list(up.shape)}")


def _compute_dtype(xs: Sequence[Tensor], weights: FFNWeights) -> torch.dtype:
    """The dtype to run in: autocast's, or the one that all tensors share."""
    device, dtype, other = weights.up.device, weights.up.dtype, None
    for tensor in (*xs, *weights):
        if tensor is None:
            continue
        if tensor.device != device:
            raise FFMergeError(f"x and weights: on {tensor.device} and {device}; move them to one device")
        if tensor.dtype != dtype:
            other = tensor.dtype
    if torch.is_autocast_enabled(device.type):
        if all(t is None or t.dtype != torch.float64 for t in (*xs, *weights)):
            return torch.get_autocast_dtype(device.type)
    if other is not None or not dtype.is_floating_point:
        raise FFMergeError(f"x and weights: got {dtype} and {other or dtype}, want one floating-point dtype")
    return dtype


def _is_eager() -> bool:
    """Whether nobody traces, compiles or intercepts ops."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or torch._C._functorch.peek_interpreter_stack()
    )
