"""Correlation in C++: packing with statistics on every CPU, products on AMX; without AMX torch's GEMM multiplies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ...support import env, machine
from ..common.activations import FORWARD
from ..common.cpu import ACTIVATIONS, DTYPES
from . import reference
from .moments import LayerSums, Pair
from .packing import Packed, Product, RowPacking

_PIVOT_ROWS = 64  # of the first batch: a pivot need only be near the mean
_LEAF = 128  # width at which a self product is not split further


def can_run(tensor: Tensor | None = None) -> str | None:
    """Runs on CPU tensors wherever the extension is built."""
    if tensor is not None and tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}"
    return machine.why_no_extension()


def packing(widths, pairs, device, compute, activation) -> RowPacking:
    """Tiles where the CPU multiplies bfloat16 tiles and `compute` allows it, else rows."""
    amx = machine.cpu_isa() in ("amx", env.AMX_EMULATED)
    tiled = amx and compute in ("auto", "bf16", "bf16x3")
    return (_TilePacking if tiled else _RowPacking)(widths, pairs, device, compute, activation)


def accumulate_layer_(
    x: Tensor,  # [T, d]
    mask: Tensor | None,  # [T] bool
    count: Tensor,  # [] int64
    pivot: Tensor,  # [d] float32 (float64 when compute is "fp64")
    sum_: Tensor,  # [d] float64
    sumsq: Tensor,  # [d] float64
    activation: str | None,
    compute: str,
    set_pivot: bool,
) -> Tensor:
    """As the reference, in one pass over x."""
    if compute == "fp64":
        return reference.accumulate_layer_(x, mask, count, pivot, sum_, sumsq, activation, compute, set_pivot)
    if mask is not None:
        out = x.new_zeros(x.shape, dtype=torch.bfloat16 if compute == "bf16" else torch.float32)
        out[mask] = accumulate_layer_(x[mask], None, count, pivot, sum_, sumsq, activation, compute, set_pivot)
        return out
    x = _readable(x)
    if set_pivot and len(x):
        pivot.copy_(_mean(x, activation))
    out = torch.empty(x.shape)
    count += len(x)
    _pack_rows(x, activation, pivot, sum_, sumsq, compute == "bf16", out)
    return out.bfloat16() if compute == "bf16" else out


def accumulate_pair_(a: Tensor, b: Tensor, products: Tensor) -> None:
    """The reference's addmm_: MKL's fp32 GEMM is near the peak of CPUs without AMX, and ours was not faster."""
    reference.accumulate_pair_(a, b, products)


def accumulate_ring_(
    x: Tensor,
    at: Tensor | None,
    signs: Tensor,
    pivot: Tensor,
    rows: Tensor,
    first: int,
    sum_: Tensor,
    sumsq: Tensor,
    activation: str | None,
) -> None:
    """As the reference, in one pass over x."""
    x = _readable(x)
    pointer, dtype, _, width, *rest = _arguments(x, activation, pivot, sum_, sumsq)
    at = at if at is None else at.contiguous()
    ring = rows.data_ptr(), len(rows), first, signs.data_ptr(), 0 if at is None else at.data_ptr()
    machine.extension().correlation_accumulate_ring(
        pointer, dtype, len(signs), width, *rest, *ring, machine.native_isa(), _threads()
    )


class _RowPacking(RowPacking):
    """Rows for torch's GEMM, of the tokens that count only; of a self product the upper half.

    Packed features are one block: a buffer [rows, d] of which the first `tokens` are used.
    """

    tokens_per_product = 1024

    def __init__(self, widths, pairs, device, compute, activation):
        super().__init__(widths, pairs, device, compute, activation)
        self._pool = _Pool()

    def pack_(self, key, x: Tensor, mask: Tensor | None, sums: LayerSums, packed: Packed) -> None:
        x = _counted(x, mask)
        if self.dtype == torch.float64:
            return super().pack_(key, x, None, sums, packed)
        x = _readable(x)
        if not sums.tokens and len(x):
            sums.pivot.copy_(_mean(x, self.activation))
        start, packed.tokens = packed.tokens, packed.tokens + len(x)
        if not packed.blocks or len(packed.blocks[0]) < packed.tokens:
            self._grow(packed, start, self.widths[key])
        sums.count += len(x)
        out = packed.blocks[0][start : packed.tokens]
        _pack_rows(x, self.activation, sums.pivot, sums.sum, sums.sumsq, self.compute == "bf16", out)

    def multiply_(self, products: Iterable[Product]) -> None:
        for product in products:
            if product.pair[0] == product.pair[1]:
                _accumulate_self_(_rows(product.a), product.accumulator)
            else:
                accumulate_pair_(_rows(product.a), _rows(product.b), product.accumulator)

    def release(self, packed: Packed) -> None:
        ring = 2 * self.tokens_per_product
        self._pool.give([b for b in packed.blocks if len(b) == ring and b.dtype == torch.float32])

    def matrix(self, pair: Pair, accumulator: Tensor) -> Tensor:
        if pair[0] == pair[1]:
            for rows, columns in _upper_blocks(0, len(accumulator)):
                if rows is not columns:
                    accumulator[columns, rows] = accumulator[rows, columns].T
        return accumulator

    def _grow(self, packed: Packed, used: int, width: int) -> None:
        """Room for packed.tokens. Batches below `tokens_per_product` never fill twice as many rows."""
        old = packed.blocks
        rows = max(packed.tokens, 2 * self.tokens_per_product)
        packed.blocks = [self._pool.take((rows, width), torch.float32)]
        if used:
            packed.blocks[0][:used] = old[0][:used]


class _TilePacking(RowPacking):
    """Chunks of 256 tokens as operands of AMX, accumulators in tiles (csrc/correlation/tiles.h).

    A value is high + low, two bfloat16, unless compute is "bf16". Where all of a step's low parts are 0, as they are
    for bfloat16 features that need no pivot, they cost nothing: "auto" and "bf16x3" are then as fast as "bf16".
    """

    tokens_per_product = 1024
    _CHUNK = 256

    def __init__(self, widths, pairs, device, compute, activation):
        super().__init__(widths, pairs, device, compute, activation)
        left, right = {a for a, _ in self.pairs}, {b for _, b in self.pairs}
        split = compute != "bf16"
        self._forms = {key: (width, key in left, key in right, split) for key, width in widths.items()}
        self._emulated = machine.cpu_isa() == env.AMX_EMULATED
        self._extension = machine.extension()
        self._pool = _Pool()
        self._exact: set = set()  # layers whose features are bfloat16: exact unless a pivot is subtracted

    def pack_(self, key, x: Tensor, mask: Tensor | None, sums: LayerSums, packed: Packed) -> None:
        x = _readable(_counted(x, mask))
        if not sums.tokens and len(x):
            if x.dtype == torch.bfloat16 and self.activation is None:
                self._exact.add(key)
            sums.pivot.copy_(_mean(x, self.activation, keep_exact=key in self._exact))
        sums.count += len(x)
        form, filled = self._forms[key], packed.tokens
        packed.tokens += len(x)
        while len(packed.blocks) * self._CHUNK < packed.tokens:
            packed.blocks.append(self._pool.take((self._extension.correlation_chunk_bytes(form),), torch.uint8))
        self._extension.correlation_pack_tiles(
            *_arguments(x, self.activation, sums.pivot, sums.sum, sums.sumsq),
            form,
            filled,
            [block.data_ptr() for block in packed.blocks],
            machine.native_isa(),
            _threads(),
        )

    def release(self, packed: Packed) -> None:
        self._pool.give(packed.blocks)

    def better_pivot(self, key, sums: LayerSums) -> Tensor:
        mean = sums.mean()
        return _unless_small(mean, sums.variance()).bfloat16() if key in self._exact else mean

    def zeros(self, pair: Pair) -> Tensor:
        return torch.zeros(self.accumulator_bytes(pair) // 4)

    def multiply_(self, products: Iterable[Product]) -> None:
        layers, indices, jobs = [], {}, []
        for product in products:
            for key, packed in zip(product.pair, (product.a, product.b), strict=True):
                if key not in indices:
                    indices[key] = len(layers)
                    layers.append((self._forms[key], packed.tokens, [block.data_ptr() for block in packed.blocks]))
            jobs.append((product.accumulator.data_ptr(), *(indices[key] for key in product.pair)))
        self._extension.correlation_multiply_tiles(layers, jobs, self._emulated, _threads())

    def matrix(self, pair: Pair, accumulator: Tensor) -> Tensor:
        a, b = pair
        matrix = torch.empty(self.widths[a], self.widths[b])
        self._extension.correlation_untile(accumulator.data_ptr(), *matrix.shape, a == b, matrix.data_ptr(), _threads())
        return matrix

    def load_(self, pair: Pair, accumulator: Tensor, matrix: Tensor) -> None:
        matrix = matrix.contiguous()
        self._extension.correlation_tile(matrix.data_ptr(), *matrix.shape, accumulator.data_ptr(), _threads())

    def accumulator_bytes(self, pair: Pair) -> int:
        return self._extension.correlation_accumulator_bytes(*(self.widths[key] for key in pair))


class _Pool:
    """Buffers that are used again: fresh memory costs a page fault for every 4 KiB."""

    def __init__(self):
        self._free: dict[tuple, list[Tensor]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        free = self._free.get(shape)
        return free.pop() if free else torch.empty(shape, dtype=dtype)

    def give(self, buffers: list[Tensor]) -> None:
        for buffer in buffers:
            self._free.setdefault(tuple(buffer.shape), []).append(buffer)


def _rows(packed: Packed) -> Tensor:
    """The tokens [T, d] of a buffer; in float64 nothing is gathered, and there is a block for each batch."""
    return packed.blocks[0][: packed.tokens] if len(packed.blocks) == 1 else torch.cat(packed.blocks)


def _pack_rows(
    x: Tensor, activation: str | None, pivot: Tensor, sum_: Tensor, sumsq: Tensor, rounded: bool, out: Tensor
):
    arguments = _arguments(x, activation, pivot, sum_, sumsq)
    machine.extension().correlation_pack_rows(*arguments, rounded, out.data_ptr(), machine.native_isa(), _threads())


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Only the tokens that count: they need not be multiplied."""
    return x if mask is None or bool(mask.all()) else x[mask]


def _readable(x: Tensor) -> Tensor:
    """x in a dtype that C++ reads, features contiguous; rows may be far apart."""
    if x.dtype == torch.float64:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _mean(x: Tensor, activation: str | None, keep_exact: bool = False) -> Tensor:
    """A pivot [d] from the first rows: the mean, on the inputs' grid so that differences are exact."""
    head = x[:_PIVOT_ROWS]
    if activation is not None:
        head = FORWARD[activation](head.float())
    mean = head.mean(0, dtype=torch.float64)
    if keep_exact:
        mean = _unless_small(mean, (head - mean).square().mean(0))
    return mean if activation else mean.to(x.dtype)


def _unless_small(mean: Tensor, variance: Tensor) -> Tensor:
    """0 where |mean| <= 4 std: there features are exact as they are, and their differences to a pivot are not."""
    return torch.where(mean.abs() > 4 * variance.sqrt(), mean, 0)


def _arguments(x: Tensor, activation: str | None, pivot: Tensor, sum_: Tensor, sumsq: Tensor) -> tuple[int, ...]:
    """A layer's features, as the packing functions of the extension take them."""
    sums = (tensor.data_ptr() for tensor in (pivot, sum_, sumsq))
    return x.data_ptr(), DTYPES[x.dtype], *x.shape, x.stride(0), ACTIVATIONS[activation], *sums


def _accumulate_self_(x: Tensor, products: Tensor) -> None:
    """products[i, j] += Σ x_i x_j for the blocks on and above the diagonal."""
    with torch.autocast("cpu", enabled=False):
        for rows, columns in _upper_blocks(0, x.shape[1]):
            products[rows, columns].addmm_(x[:, rows].T, x[:, columns])


def _upper_blocks(start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of a symmetric matrix, halved again and again: large ones off the diagonal, where a GEMM is fastest."""
    if stop - start <= _LEAF:
        diagonal = slice(start, stop)
        yield diagonal, diagonal
        return
    middle = start + -(-(stop - start) // 2 // 32) * 32
    yield from _upper_blocks(start, middle)
    yield from _upper_blocks(middle, stop)
    yield slice(start, middle), slice(middle, stop)


def _threads() -> int:
    return torch.get_num_threads()
