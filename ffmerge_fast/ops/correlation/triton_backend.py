"""The `correlation` op on GPUs: one pass per layer to pack it, one persistent launch for the products of many pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import Tensor

from ...support import env
from ..common import tuning
from ..common.triton_launch import can_run, launch, multiprocessors, no_tf32
from . import reference
from .moments import Key, LayerSums, Pair
from .packing import Packed, Product, RowPacking

__all__ = ["accumulate_layer_", "accumulate_pair_", "accumulate_ring_", "can_run", "packing"]

_CHUNK, _COLUMNS = 256, 128  # tokens and features of one program of the layer kernel
_RING_CHUNK = 64  # tokens of one program of the ring kernel
_FAR = 1.0  # |mean| / std from which a bfloat16 feature gets a pivot; below, x itself is exact and needs no low half
_PIECE = 2048  # tokens that one call of cuBLAS sums: beyond, its error leaves float32's; rounded features allow more
_ROUNDED_PIECE = 8192


def accumulate_layer_(
    x: Tensor,
    mask: Tensor | None,
    count: Tensor,
    pivot: Tensor,
    sum_: Tensor,
    sumsq: Tensor,
    activation: str | None,
    compute: str,
    set_pivot: bool,
) -> Tensor:
    """As `reference.accumulate_layer_`: bfloat16 rows for "bf16", else float32 rows (float64 for "fp64")."""
    if pivot.dtype == torch.float64:
        return reference.accumulate_layer_(x, mask, count, pivot, sum_, sumsq, activation, compute, set_pivot)
    out = torch.empty(x.shape, dtype=torch.bfloat16 if compute == "bf16" else torch.float32, device=x.device)
    if set_pivot:
        _set_pivot_(x, mask, pivot, activation, keep_exact=compute == "bf16")
    _accumulate_layer_(x, mask, (count, pivot, sum_, sumsq), activation, out, len(x))
    return out


def accumulate_pair_(a: Tensor, b: Tensor, products: Tensor) -> None:
    """products [d_a, d_b] += aᵀ b, never in TF32; rows in bfloat16 are multiplied by tensor cores."""
    if a.dtype == b.dtype == torch.bfloat16 and products.dtype == torch.float32 and _addmm_adds_to_float32(products):
        _addmm_to_float32_(products, a.T, b)
        return
    with no_tf32():
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
    """As the reference, in one pass over x: a launch for each time round the ring."""
    (m, width), tokens, start = rows.shape, len(signs), 0
    pieces = []  # (tokens, row of the first one)
    while start < tokens:
        pieces.append((min(tokens - start, m - first), first))
        start, first = start + pieces[-1][0], 0
    most = sum(length // _RING_CHUNK + 2 for length, _ in pieces)
    partial = torch.empty(most, 2, width, dtype=torch.float64, device=x.device)
    blocks, start, done = -(-width // _COLUMNS), 0, 0
    for length, row in pieces:
        offset = start % _RING_CHUNK
        chunks = -(-(offset + length) // _RING_CHUNK)
        here = (x, at[start:]) if at is not None else (x[start:], None)
        launch(
            _kernels()._correlation_accumulate_ring_kernel,
            (blocks, chunks),
            x.device,
            *(*here, signs[start:], pivot, rows[row:], partial[done:], length, offset, _RING_CHUNK, width, *x.stride()),
            ACTIVATION=activation or "none",
            BLOCK_T=8 if x.device.type == "cuda" else 64,  # the interpreter takes a while for each block
            BLOCK_D=_COLUMNS,
            num_warps=4,
        )
        start, done = start + length, done + chunks
    counts, count = torch.zeros(done + 1, dtype=torch.int64, device=x.device).split([done, 1])  # counted by the caller
    _add_sums_(partial, counts, (count, sum_, sumsq), done)


def packing(
    widths: Mapping[Key, int], pairs: Iterable[Pair], device: torch.device, compute: str, activation: str | None
) -> RowPacking:
    """Tensor cores for "bf16", "bf16x3" and "auto"; "fp32" and "fp64" are plain rows, multiplied by cuBLAS."""
    kind = RowPacking if compute in ("fp32", "fp64") else TensorCorePacking
    return kind(widths, pairs, device, compute, activation)


class TensorCorePacking(RowPacking):
    """Features packed as bfloat16 rows, with a low half beside the high one unless compute is "bf16".

    A packed layer is one tensor [1 + tokens, pitch] (see triton_kernels). Of a self product the upper half is kept.
    """

    tokens_per_product = 2048

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._split = self.compute != "bf16"
        self._schedules: dict[tuple, _Schedule] = {}

    def pack_(self, key: Key, x: Tensor, mask: Tensor | None, sums: LayerSums, packed: Packed) -> None:
        if not len(x):
            return
        if not sums.tokens:
            _set_pivot_(x, mask, sums.pivot, self.activation, keep_exact=True)
        buffer = self._reserve(key, packed, len(x))
        first = 1 + packed.tokens
        rows = _padded(packed.tokens + len(x)) - packed.tokens
        flags = buffer if self._split else None
        _accumulate_layer_(x, mask, sums.tensors(), self.activation, buffer[first:], rows, flags)
        packed.tokens += len(x)

    def multiply_(self, products: Iterable[Product]) -> None:
        groups: dict[tuple[int, bool], list[Product]] = {}  # by tokens: separate stacks may have seen different numbers
        for product in products:
            if not product.a.tokens:
                continue
            by_cublas = self._by_cublas(product)
            if by_cublas:
                self._multiply_high_(product)
            if self._split or not by_cublas:
                groups.setdefault((product.a.tokens, not by_cublas), []).append(product)
        for (tokens, high), group in groups.items():
            for start in range(0, len(group), _kernels().PAIRS):
                self._launch(group[start : start + _kernels().PAIRS], tokens, high)

    def matrix(self, pair: Pair, accumulator: Tensor) -> Tensor:
        if pair[0] != pair[1]:
            return accumulator
        return accumulator.triu().add_(accumulator.triu(1).T)

    def _pitch(self, key: Key) -> int:
        return _padded(self.widths[key]) * (2 if self._split else 1)

    def _reserve(self, key: Key, packed: Packed, tokens: int) -> Tensor:
        """The layer's buffer with room for `tokens` more: at first for all that are gathered, later as many as come."""
        needed = packed.tokens + tokens
        old = packed.blocks[0] if packed.blocks else None
        if old is not None and len(old) > _padded(needed):
            return old
        gathered = old is None and tokens < self.tokens_per_product
        room = self.tokens_per_product + tokens if gathered else needed
        buffer = torch.empty(1 + _padded(room), self._pitch(key), dtype=torch.bfloat16, device=self.device)
        if old is None:
            buffer[0].zero_()
        else:
            buffer[: 1 + packed.tokens].copy_(old[: 1 + packed.tokens])
        packed.blocks = [buffer]
        return buffer

    def _by_cublas(self, product: Product) -> bool:
        """Whether cuBLAS multiplies the high halves: 1.3 to 2.3 times as fast as our kernel on an H100.

        Not of a self product, of which it would form both halves. Low halves are ours: only some tiles have any.
        """
        return product.pair[0] != product.pair[1] and _addmm_adds_to_float32(product.accumulator)

    def _multiply_high_(self, product: Product) -> None:
        sides = zip((product.a, product.b), product.pair, strict=True)
        a, b = (packed.blocks[0][1 : 1 + packed.tokens, : self.widths[key]] for packed, key in sides)
        piece = _PIECE if self._split else _ROUNDED_PIECE
        for rows_a, rows_b in zip(a.split(piece), b.split(piece), strict=True):
            _addmm_to_float32_(product.accumulator, rows_a.T, rows_b)

    def _launch(self, products: list[Product], tokens: int, high: bool) -> None:
        kernels = _kernels()
        shapes = tuple((self.widths[a], self.widths[b], a == b) for a, b in (p.pair for p in products))
        if shapes not in self._schedules:
            self._schedules[shapes] = _Schedule(shapes, self.device)
        schedule = self._schedules[shapes]
        unused = [products[0]] * (kernels.PAIRS - len(products))
        sides = ([p.a.blocks[0], p.b.blocks[0], p.accumulator] for p in (*products, *unused))
        a, b, c = (tuple(column) for column in zip(*sides, strict=True))
        launch(
            kernels._correlation_accumulate_pairs_kernel,
            (schedule.programs,),
            self.device,
            *(a, b, c, schedule.problems, schedule.tiles, len(products), tokens),
            describes=True,
            SPLIT=self._split,
            HIGH=int(high),
            VECTOR=schedule.vector,
            INTERPRETED=env.triton_interpreter(),
            **schedule.config,
        )


class _Schedule:
    """What a launch computes, by the widths of its pairs alone: made once per set of shapes, kept on the device."""

    def __init__(self, shapes: tuple[tuple[int, int, bool], ...], device: torch.device):
        processors = multiprocessors(device)
        for narrow in (False, True):  # the narrow tile where the wide one leaves processors idle
            self.config = product_config(device, narrow)
            block = self.config["BLOCK_M"], self.config["BLOCK_N"]
            tiles = [_tiles(*shape, *block) for shape in shapes]
            total = sum(map(len, tiles))
            if total >= processors:
                break
        self.programs = min(total, processors)
        self.vector = 4 if all(width_b % 4 == 0 for _, width_b, _ in shapes) else 1
        ends = torch.tensor([len(each) for each in tiles]).cumsum(0).tolist()
        problems = [
            [width_a, width_b // self.vector, end - len(each), end]
            for (width_a, width_b, _), each, end in zip(shapes, tiles, ends, strict=True)
        ]
        self.problems = torch.tensor(problems, dtype=torch.int32).to(device)
        self.tiles = torch.cat(tiles).to(device)


def product_config(device: torch.device, narrow: bool) -> tuning.Config:
    """Parameters of the kernel that multiplies, for its wide or its narrow tile."""
    key = "correlation_accumulate_pairs" + "_narrow" * narrow
    return tuning.config(key, device, closed_form if narrow else lambda shared: closed_form(shared, wide=True))


def closed_form(shared: int, wide: bool = False) -> tuning.Config:
    """The largest tile and pipeline that fit into `shared` bytes of one block."""
    stages = {block: min(4, (shared - 4096) // (2 * sum(block) * 64)) for block in ((128, 256), (128, 128), (64, 64))}
    if wide and stages[128, 256] == 4:
        (m, n), warps, parts = (128, 256), 8, 8
    elif stages[128, 128] >= 2:
        (m, n), warps, parts = (128, 128), 8, 4
    else:
        (m, n), warps, parts = (64, 64), 4, 2
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "STEPS": 16, "PARTS": parts}
    return tile | {"num_warps": warps, "num_stages": stages[m, n]}


@cache
def _tiles(width_a: int, width_b: int, upper: bool, block_m: int, block_n: int) -> Tensor:
    """Output tiles, row block << 16 | column block, in an order that reuses rows and columns in the cache."""
    rows, columns = -(-width_a // block_m), -(-width_b // block_n)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    order = (row // 8 * columns + column) * 8 + row % 8
    if upper:
        order = order.masked_fill((column + 1) * block_n <= row * block_m, rows * columns * 8)
    tiles = (row << 16 | column).flatten()[order.flatten().argsort()]
    return tiles[: int((order < rows * columns * 8).sum())].int()


def _set_pivot_(x: Tensor, mask: Tensor | None, pivot: Tensor, activation: str | None, keep_exact: bool) -> None:
    """The mean of the tokens, on the inputs' grid; `keep_exact`: 0 where a bfloat16 x is closer than `_FAR` to 0."""
    total, squares = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    _accumulate_layer_(x, mask, (count, None, total, squares), activation, None, len(x))
    mean = total / count.clamp(min=1)
    if activation is None:
        mean = mean.to(x.dtype).double()
        if keep_exact and x.dtype == torch.bfloat16:
            variance = squares / count.clamp(min=1) - mean.square()
            mean = torch.where(mean.square() > _FAR**2 * variance, mean, 0)
    pivot.copy_(mean)


def _accumulate_layer_(
    x: Tensor,  # [T, d]
    mask: Tensor | None,  # [T] bool
    sums: tuple[Tensor, Tensor | None, Tensor, Tensor],  # count, pivot, Σ, Σ²
    activation: str | None,
    out: Tensor | None,  # [rows or more, pitch]; None: sums only
    rows: int,  # to be written, zeros after the T tokens
    flags: Tensor | None = None,  # where `out` has two halves
) -> None:
    tokens, width = x.shape
    if not tokens:
        return
    count, pivot, total, squares = sums
    chunks, blocks = -(-rows // _CHUNK), -(-width // _COLUMNS)
    partial = torch.empty(chunks, 2, width, dtype=torch.float64, device=x.device)
    counts = torch.empty(chunks, dtype=torch.int64, device=x.device)
    mask = None if mask is None else mask.view(torch.uint8)
    pitch = 0 if out is None else out.stride(0)
    launch(
        _kernels()._correlation_accumulate_layer_kernel,
        (blocks, chunks),
        x.device,
        *(x, mask, pivot, out, flags, partial, counts, tokens, rows, _CHUNK, width, *x.stride(), pitch),
        ACTIVATION=activation or "none",
        SPLIT=flags is not None,
        BLOCK_T=8 if x.device.type == "cuda" else 64,  # the interpreter takes a while for each block
        BLOCK_D=_COLUMNS,
        INTERPRETED=env.triton_interpreter(),
        num_warps=4,
    )
    _add_sums_(partial, counts, (count, total, squares), chunks)


def _add_sums_(partial: Tensor, counts: Tensor, sums: tuple[Tensor, Tensor, Tensor], chunks: int) -> None:
    """Add the chunks' sums, in their order, to count, Σ and Σ²."""
    width = partial.shape[-1]
    launch(
        _kernels()._correlation_layer_sums_kernel,
        (-(-width // _COLUMNS),),
        partial.device,
        *(partial, counts, *sums, chunks, width),
        BLOCK_D=_COLUMNS,
        num_warps=4,
    )


def _kernels():
    from . import triton_kernels

    return triton_kernels


def _padded(n: int) -> int:
    """n rounded up to a multiple of `triton_kernels.ALIGNMENT`."""
    return -(-n // _kernels().ALIGNMENT) * _kernels().ALIGNMENT


def _addmm_adds_to_float32(accumulator: Tensor) -> bool:
    """Whether this torch multiplies bfloat16 and adds to float32 in place (on GPUs, since 2.8)."""
    return accumulator.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out")


def _addmm_to_float32_(products: Tensor, a: Tensor, b: Tensor) -> None:
    """products (float32) += a b of bfloat16 matrices, without a temporary."""
    with torch.autocast(products.device.type, enabled=False):
        torch.addmm(products, a, b, out_dtype=torch.float32, out=products)
