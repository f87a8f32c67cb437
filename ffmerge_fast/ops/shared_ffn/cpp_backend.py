"""The shared FFN on CPUs: own kernels for few tokens and for the activation, torch's GEMM for many tokens."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...support import env, machine
from ..common.cpu import ACTIVATIONS, DTYPES
from .pieces import backward_in_pieces, like, pieces, stacked
from .weights import FFNWeights, GradientSums

_NO_WEIGHT = (0, 0, 0, 0, 0, False)
_PIECE = 512  # tokens whose hidden features exist at a time, where none are kept


def can_run(tensor: Tensor | None = None) -> str | None:
    """Runs on CPU tensors of at most 32 bits wherever the extension is built."""
    if tensor is not None and tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}"
    if tensor is not None and tensor.dtype not in DTYPES:
        return f"the tensors are {tensor.dtype}"
    return machine.why_no_extension()


def forward(
    xs: list[Tensor], weights: FFNWeights, activation: str, recompute: str
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference."""
    if recompute == "full":
        ys = [_forward(x, weights, activation) for x in stacked(xs)]
        return like(xs, ys), []
    outputs, saved = [], []
    wide = weights.to(_gemm_dtype(weights.up.dtype))
    for x in xs:
        pre = wide.pre_activations(x.to(wide.up.dtype))
        hidden = _activate(pre, torch.empty_like(pre[0]), activation)
        outputs.append(F.linear(hidden, wide.down, wide.down_bias).to(x.dtype))
        saved += [kept.to(x.dtype) for kept in ([*pre, hidden] if recompute == "none" else pre)]
    return outputs, saved


def backward(
    grads: list[Tensor],
    xs: list[Tensor],
    saved: list[Tensor],
    weights: FFNWeights,
    activation: str,
    recompute: str,
    needs: list[bool],
    into: list[Tensor | None] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference. Only the hidden features of 512 tokens exist at a time, unless they were kept."""
    wide = weights.to(_gemm_dtype(weights.up.dtype))
    sums = GradientSums(wide, needs[1:], into, rounded=True)
    hidden_gradients = partial(_hidden_gradients, wide, activation, recompute)
    dxs = backward_in_pieces(hidden_gradients, wide, sums, xs, grads, saved, _PIECE, needs[0])
    return dxs, sums.needed()


def _hidden_gradients(weights: FFNWeights, activation: str, recompute: str, x: Tensor, dy: Tensor, *saved: Tensor):
    """What `GradientSums.add_` takes of one piece, in as little memory as the policy allows."""
    pre = saved[: weights.halves] or weights.pre_activations(x)
    hidden = saved[weights.halves] if recompute == "none" else None
    d_up = dy @ weights.down

    def room(i: int) -> Tensor:
        return pre[i] if recompute == "full" else torch.empty_like(d_up)  # what was kept must stay as it is

    d_gate = None if weights.gate is None else room(1)
    written = room(0) if hidden is None else None
    machine.extension().shared_ffn_activate_backward(
        *(ACTIVATIONS[activation], DTYPES[d_up.dtype], d_up.data_ptr()),
        *map(_address, (pre[0], None if d_gate is None else pre[1], d_up, d_gate, written)),
        *(d_up.numel(), machine.native_isa(), torch.get_num_threads()),
    )
    return d_up, d_gate, hidden if written is None else written


def _forward(x: Tensor, weights: FFNWeights, activation: str) -> Tensor:
    """[T, d] -> [T, d_out], keeping nothing."""
    if x.shape[0] <= most_decoded_tokens(x.dtype):
        return _decode(x, weights, activation)
    y = x.new_empty(len(x), len(weights.down))
    wide = weights.to(_gemm_dtype(x.dtype))
    for part in pieces(len(x), _PIECE):
        pre = wide.pre_activations(x[part].to(wide.up.dtype))
        hidden = _activate(pre, pre[0], activation)
        if wide.up.dtype != x.dtype:
            y[part] = F.linear(hidden, wide.down, wide.down_bias)
        elif wide.down_bias is None:
            torch.mm(hidden, wide.down.T, out=y[part])
        else:
            torch.addmm(wide.down_bias, hidden, wide.down.T, out=y[part])
    return y


def _decode(x: Tensor, weights: FFNWeights, activation: str) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    up, gate, down, up_bias, gate_bias, down_bias = map(_readable, weights)
    tokens, outputs = x.shape[0], down.shape[0]
    y = x.new_empty(tokens, outputs)
    machine.extension().shared_ffn_decode(
        _weight(up, up_bias),
        _NO_WEIGHT if gate is None else _weight(gate, gate_bias),
        _weight(down, down_bias),
        *(DTYPES[x.dtype], ACTIVATIONS[activation], x.data_ptr(), tokens, x.stride(0), y.data_ptr()),
        *(*_instructions(machine.cpu_isa()), torch.get_num_threads()),
    )
    return y


@cache
def _instructions(isa: str) -> tuple[str, int]:
    """What decoding takes for an instruction set: the one of its plain kernels, and its matrix unit."""
    return machine.native_isa(), {"amx": 1, env.AMX_EMULATED: 2}.get(isa, 0)


@cache
def most_decoded_tokens(dtype: torch.dtype) -> int:
    """Up to how many tokens our kernels are faster than torch's GEMM; README.md has the figures."""
    if dtype == torch.float32:
        return 32
    if _gemm_dtype(dtype) != dtype:
        return 64
    return 16 if dtype == torch.bfloat16 and machine.extension().cpu_isa() == "amx" else 8


@cache
def _gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 where torch multiplies `dtype` by plain loops: the CPU has no instructions for it."""
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype not in native or native[dtype]() else torch.float32


def _activate(pre: list[Tensor], hidden: Tensor, activation: str) -> Tensor:
    """act(up), or act(gate) · up, in one pass; `hidden` may be pre[0]."""
    machine.extension().shared_ffn_activate(
        *(ACTIVATIONS[activation], DTYPES[hidden.dtype], pre[0].data_ptr(), _address(pre[1]) if len(pre) > 1 else 0),
        *(hidden.data_ptr(), hidden.numel(), machine.native_isa(), torch.get_num_threads()),
    )
    return hidden


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _readable(weight: Tensor | None) -> Tensor | None:
    """A weight with one dimension contiguous: nn.Linear's, the transposed one of Conv1D, and most views are."""
    return weight if weight is None or weight.is_contiguous() or 1 in weight.stride() else weight.contiguous()


def _weight(weight: Tensor, bias: Tensor | None) -> tuple:
    """As csrc/bindings.cpp takes it. Of a matrix with both strides 1 the other one is the larger size."""
    outputs, inputs = weight.shape
    across, along = weight.stride()
    transposed = along != 1
    return weight.data_ptr(), _address(bias), outputs, inputs, along if transposed else across, transposed
