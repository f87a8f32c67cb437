"""The shared FFN on GPUs: activations in the GEMM's epilogue, one launch for a few tokens, one pass for derivatives."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...support import env
from ..common import tuning
from ..common.triton_launch import can_run, launch, multiprocessors, no_tf32
from . import reference
from .counters import counters
from .pieces import backward_in_pieces, like, stacked
from .weights import FFNWeights, GradientSums

__all__ = ["backward", "can_run", "forward"]

_HALF = (torch.bfloat16, torch.float16)
_DECODED = 16  # tokens of the kernel for few: the least rows that tensor cores multiply
_DECODED_BYTES = 128 * 2**20  # of weights, which take 34 µs to read; beyond, two launches saved are less than 15 %
_WIDEST = 3072  # d up to which the traffic that the epilogue saves is worth a GEMM at 90 % of cuBLAS; README.md
_PIECE = 8192  # tokens whose hidden features exist at a time in backward, where none are kept
_ROWS, _COLUMNS = 64, 128  # of hidden features that one program activates
_PREFETCHED_BYTES = 16 * 2**20  # of down: what the L2 cache can hold beside the rest


def forward(
    xs: list[Tensor], weights: FFNWeights, activation: str, recompute: str
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference."""
    if weights.up.dtype == torch.float64:
        return reference.forward(xs, weights, activation, recompute)
    with _exact(weights.up.dtype):
        if recompute == "full":
            ys = [_forward(x, weights, activation) for x in stacked(xs)]
            return like(xs, ys), []
        outputs, saved = [], []
        for x in xs:
            *pre, hidden = _hidden(x, weights, activation, keep=True)
            outputs.append(F.linear(hidden, weights.down, weights.down_bias))
            saved += [*pre, hidden] if recompute == "none" else pre
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
    """As the reference. Only the hidden features of 8192 tokens exist at a time, unless they were kept."""
    if weights.up.dtype == torch.float64:
        return reference.backward(grads, xs, saved, weights, activation, recompute, needs, into)
    sums = GradientSums(weights, needs[1:], into)
    hidden_gradients = partial(_hidden_gradients, weights, activation, recompute, needs[4:6])
    with _exact(weights.up.dtype):
        dxs = backward_in_pieces(hidden_gradients, weights, sums, xs, grads, saved, _PIECE, needs[0])
    return dxs, sums.needed()


def closed_form(shared: int, halves: int) -> tuning.Config:
    """Tiles of the kernel that computes hidden features: the largest that fit into `shared` bytes of one block.

    halves: 2 with a gate, whose products share a tile with those of up.
    """
    for rows, columns, least in ((128, 256, 4), (128, 128, 2), (64, 64, 1)):
        stages = min(4, (shared - 4096) // (2 * 64 * (rows + columns)))
        if stages >= least:
            break
    tile = {"BLOCK_M": rows, "BLOCK_N": columns // halves, "BLOCK_K": 64, "PARTS": max(1, columns // halves // 64)}
    return tile | {"num_warps": rows // 16, "num_stages": stages}


def narrow(config: tuning.Config, halves: int) -> tuning.Config:
    """The same with smaller tiles, where too few would keep a GPU busy."""
    return config | {"BLOCK_M": 64, "BLOCK_N": 64 // halves, "PARTS": 1, "num_warps": 4}


def decode_closed_form(shared: int, halves: int) -> tuning.Config:
    """Slices for a few tokens: small ones, so that all multiprocessors read weights."""
    stages = min(4, 1 + (shared - 2048) // (2 * 512 * (16 + 16)))  # one stage less is in memory
    tile = {"BLOCK_F": 32, "BLOCK_D": 256 // halves, "BLOCK_N": 16, "BLOCK_K": 512}
    return tile | {"num_warps": 4, "num_stages": stages}


def _exact(dtype: torch.dtype):
    """torch multiplies float32, and never as TF32; our kernels are for tensor cores."""
    return no_tf32() if dtype == torch.float32 else nullcontext()


def _forward(x: Tensor, weights: FFNWeights, activation: str) -> Tensor:
    """[T, d] -> [T, d_out], keeping nothing."""
    if x.is_cuda and weights.gate is None:  # on an H100 torch's three launches take 0.92-1.02 of our one or two
        return reference.forward([x], weights, activation, "full")[0][0]
    if _decodes(x, weights):
        return _decode(x, weights, activation)
    *_, hidden = _hidden(x, weights, activation, keep=False)
    return F.linear(hidden, weights.down, weights.down_bias)


def _hidden(x: Tensor, weights: FFNWeights, activation: str, keep: bool) -> list[Tensor]:
    """[T, d] -> the hidden features [T, f], after the pre-activations of up (and gate) if they are to be kept."""
    if x.dtype not in _HALF or x.shape[1] > _WIDEST // (2 if keep else 1):
        pre = weights.pre_activations(x)
        hidden = torch.empty_like(pre[0]) if keep else pre[0]
        _activate(pre, activation, hidden=hidden)
        return [*pre, hidden] if keep else [hidden]
    tensors = [x.new_empty(len(x), len(weights.up)) for _ in range(1 + weights.halves * keep)]
    _fused_hidden(x, weights, activation, tensors)
    return tensors


def _fused_hidden(x: Tensor, weights: FFNWeights, activation: str, outs: list[Tensor]) -> None:
    from . import triton_kernels as kernels

    up, gate, halves = weights.up, weights.gate, weights.halves
    (m, depth), n, device = x.shape, len(up), x.device
    key = "shared_ffn_hidden" + "_gated" * (halves - 1)
    config = tuning.config(key, device, partial(closed_form, halves=halves))
    tiles, tma = _tiles(m, n, config), _tma(x, up, gate)
    if tiles < multiprocessors(device):  # to describe matrices to TMA would take as long as a small tile
        config, tma = narrow(config, halves), ""
        tiles = _tiles(m, n, config)
    if not tiles:
        return
    *kept, hidden = outs
    kept += [None] * (2 - len(kept))
    launch(
        kernels._shared_ffn_hidden_kernel,
        (min(tiles, multiprocessors(device)) if tma else tiles,),
        device,
        *(x, up, gate, *map(_vector, (weights.up_bias, weights.gate_bias)), hidden, *kept),
        *(m, n, depth, *x.stride(), *up.stride(), *_strides(gate)),
        describes=bool(tma),
        ACTIVATION=activation,
        TMA=tma,
        INTERPRETED=env.triton_interpreter(),
        **config,
    )


def _tiles(m: int, n: int, config: tuning.Config) -> int:
    return -(-m // config["BLOCK_M"]) * -(-n // config["BLOCK_N"])


def _tma(x: Tensor, up: Tensor, gate: Tensor | None) -> str:
    """How the weights are stored, "rows" or "columns", where the tensor memory accelerator can read all; else ""."""
    if not _has_tma(x.device) or not _aligned(x) or 0 in x.shape:
        return ""
    both = [up] if gate is None else [up, gate]
    if all(map(_aligned, both)):
        return "rows"
    return "columns" if all(_aligned(w.T) for w in both) else ""


def _aligned(matrix: Tensor) -> bool:
    """Contiguous rows that start at multiples of 16 bytes and do not overlap."""
    pitch, unit = matrix.stride()
    size = matrix.element_size()
    return unit == 1 and pitch >= matrix.shape[1] and pitch * size % 16 == 0 and matrix.data_ptr() % 16 == 0


@cache
def _has_tma(device: torch.device) -> bool:
    if device.type != "cuda":
        return True  # the interpreter has
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _decodes(x: Tensor, weights: FFNWeights) -> bool:
    """Whether one launch does it all. Its programs wait for others, which AMD's scheduler does not promise to start."""
    count = sum(w.numel() for w in (weights.up, weights.gate, weights.down) if w is not None)
    few = 0 < len(x) <= _DECODED and len(weights.down) > 0 and count * x.element_size() <= _DECODED_BYTES
    return few and x.dtype in _HALF and not (x.is_cuda and torch.version.hip)


def _decode(x: Tensor, weights: FFNWeights, activation: str) -> Tensor:
    from .triton_decode_kernel import _shared_ffn_decode_kernel

    up, gate, down = weights.up, weights.gate, weights.down
    (m, d), f, n, device = x.shape, len(up), len(down), x.device
    key = "shared_ffn_decode" + "_gated" * (weights.halves - 1)
    config = tuning.config(key, device, partial(decode_closed_form, halves=weights.halves))
    writers = -(-f // config["BLOCK_F"])
    readers = max(1, min(-(-n // config["BLOCK_N"]), multiprocessors(device) - 1))  # not all: somebody must write
    hidden, y = x.new_empty(m, f), x.new_empty(m, n)
    launch(
        _shared_ffn_decode_kernel,
        (writers + readers,),
        device,
        *(x, up, gate, down, *map(_vector, weights[3:]), hidden, y, counters(device)),
        *(m, d, f, n, *x.stride(), *up.stride(), *_strides(gate), *down.stride()),
        ACTIVATION=activation,
        PREFETCH=_prefetch(down),
        WARPS=config["num_warps"],
        INTERPRETED=env.triton_interpreter(),
        **config,
    )
    return y


def _prefetch(down: Tensor) -> str:
    """How `down` is stored, where its prefetch pays; the interpreter has no such instruction."""
    if not down.is_cuda or down.numel() * down.element_size() > _PREFETCHED_BYTES:
        return ""
    return "rows" if down.stride(1) == 1 else "columns"


def _hidden_gradients(
    weights: FFNWeights, activation: str, recompute: str, needs_bias: list[bool], x: Tensor, dy: Tensor, *saved: Tensor
) -> tuple[Tensor | None, ...]:
    """What `GradientSums.add_` takes of one piece; the products' memory is used again where nobody keeps it."""
    pre = list(saved[: weights.halves]) or weights.pre_activations(x)
    hidden = saved[weights.halves] if recompute == "none" else None
    d_up = dy @ weights.down
    full = recompute == "full"
    d_gate = None if weights.gate is None else pre[1] if full else torch.empty_like(d_up)
    written = None if hidden is not None else pre[0] if full else torch.empty_like(d_up)
    parts = [
        torch.empty(-(-len(x) // _ROWS), d_up.shape[1], dtype=torch.float32, device=x.device) if need else None
        for need in needs_bias
    ]
    _activate(pre, activation, d_up, written, d_up, d_gate, *parts)
    return d_up, d_gate, hidden if written is None else written, *parts


def _activate(
    pre: list[Tensor],  # [T, f] of up, and of gate
    activation: str,
    d_hidden: Tensor | None = None,
    hidden: Tensor | None = None,
    d_up: Tensor | None = None,
    d_gate: Tensor | None = None,
    up_parts: Tensor | None = None,
    gate_parts: Tensor | None = None,
) -> None:
    """What is given is written, see the kernel; outputs may be inputs."""
    from . import triton_kernels as kernels

    tokens, width = pre[0].shape
    if not pre[0].numel():
        return
    pre = [p.contiguous() for p in pre]
    launch(
        kernels._shared_ffn_activate_kernel,
        (-(-width // _COLUMNS), -(-tokens // _ROWS)),
        pre[0].device,
        *(pre[0], pre[1] if len(pre) > 1 else None, d_hidden, hidden, d_up, d_gate, up_parts, gate_parts),
        *(tokens, width),
        ACTIVATION=activation,
        CHUNK=_ROWS,
        BLOCK_M=8 if pre[0].is_cuda else _ROWS,  # the interpreter takes a while for each block
        BLOCK_N=_COLUMNS,
        INTERPRETED=env.triton_interpreter(),
        num_warps=4,
    )


def _vector(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else matrix.stride()
