"""When products are formed: in memory while the features stream by, or on demand from features spooled to disk."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ...support.errors import FFMergeError
from ...support.machine import free_memory
from ...support.sizes import format_bytes
from .moments import Accumulators, Key, LayerSums, Pair
from .packing import Packed, Product, RowPacking
from .spool import Spool


def make_accumulators(packing: RowPacking, max_memory: int | None) -> Accumulators:
    """Accumulators in memory, or on disk where the products take more than `max_memory` bytes.

    Raises:
        FFMergeError: one pair's products take more than that, or all products more than is free.
    """
    sizes = [packing.accumulator_bytes(pair) for pair in packing.pairs]
    needed, largest = sum(sizes), max(sizes, default=0)
    if max_memory is not None and needed > max_memory:
        if largest > max_memory:
            raise FFMergeError(
                f"max_memory: {format_bytes(max_memory)}, but the products of one pair take "
                f"{format_bytes(largest)}: give at least that much"
            )
        return SpooledAccumulators(packing)
    free = free_memory(packing.device)
    budget = max(largest, (free or 0) // 2) // 2**20 + 1
    message = (
        f"the products of {len(sizes)} pairs need {format_bytes(needed)} ({needed} bytes) on {packing.device}, "
        f"{format_bytes(free or 0)} are free: give max_memory='{budget}MiB' (--max-memory {budget}MiB) to spool "
        "features (to the host, to disk), or fewer pairs (a smaller window)"
    )
    if free is not None and needed > free:
        raise FFMergeError(message)
    try:
        return StreamingAccumulators(packing)
    except (RuntimeError, MemoryError) as error:  # torch's CPU allocator raises RuntimeError, CUDA's a subclass
        if "memory" not in str(error).lower():
            raise
        raise FFMergeError(message) from error


class _Accumulators:
    """Features of layers that are packed and wait for their partners, or until enough are gathered."""

    def __init__(self, packing: RowPacking):
        self.packing = packing
        self._partners = partners(packing.widths, packing.pairs)
        self._waiting: dict[Key, Packed] = {}

    def better_pivot(self, key: Key, sums: LayerSums) -> Tensor:
        return self.packing.better_pivot(key, sums)

    def held(self) -> int:
        """Number of layers whose packed features are in memory."""
        return sum(packed.tokens > 0 for packed in self._waiting.values())


class StreamingAccumulators(_Accumulators):
    """Accumulators in memory. A pair is multiplied as soon as both sides came and enough tokens are gathered.

    A layer's features are released after its last partner: with the pairs of a window and large batches, only a band
    of layers is held; with small batches, at most `packing.tokens_per_product` tokens of every layer wait.
    """

    def __init__(self, packing: RowPacking):
        super().__init__(packing)
        self._accumulators = {pair: packing.zeros(pair) for pair in packing.pairs}

    def push(self, key: Key, x: Tensor, mask: Tensor | None, sums: LayerSums, seen: Iterable[Key]) -> None:
        packed = self._waiting.get(key, Packed())
        self.packing.pack_(key, x, mask, sums, packed)
        if not self._partners[key]:
            return self.packing.release(packed)
        self._waiting[key] = packed
        if packed.tokens < self.packing.tokens_per_product:
            return
        seen = set(seen)
        arrived = [partner for partner in self._partners[key] if partner in seen]
        self._multiply_(self._partners[key][partner] for partner in arrived)
        for held in {key, *arrived}:
            if self._partners[held].keys() <= seen:
                self.packing.release(self._waiting.pop(held))

    def discard_open_batch(self) -> None:
        self._waiting.clear()

    def settle(self) -> None:
        if any(packed.tokens for packed in self._waiting.values()):
            self._multiply_(pair for pair in self.packing.pairs if pair[0] in self._waiting)
        for packed in self._waiting.values():
            self.packing.release(packed)
        self._waiting.clear()

    def product(self, pair: Pair) -> Tensor:
        self.settle()
        return self.packing.matrix(pair, self._accumulators[pair])

    def kept(self, pair: Pair) -> Tensor:
        return self.product(pair)

    def replace_(self, pair: Pair, matrix: Tensor) -> None:
        self.packing.load_(pair, self._accumulators[pair], matrix)

    def _multiply_(self, pairs: Iterable[Pair]) -> None:
        waiting, accumulators = self._waiting, self._accumulators
        self.packing.multiply_([Product(p, accumulators[p], waiting[p[0]], waiting[p[1]]) for p in pairs])


class SpooledAccumulators(_Accumulators):
    """Packed features away from the device, products one pair at a time when they are read: bit for bit the other's.

    Less memory always, less disk than all products when tokens < features · pairs / layers. Products that are written
    (a merge, other pivots) become matrices on disk, and the features they were made of are dropped.
    """

    def __init__(self, packing: RowPacking):
        super().__init__(packing)
        self._spool = Spool(packing.device)
        self._sealed: dict[Key, list[Packed]] = {key: [] for key in packing.widths}
        self._written: dict[Pair, Tensor] = {}

    def push(self, key: Key, x: Tensor, mask: Tensor | None, sums: LayerSums, seen: Iterable[Key]) -> None:
        packed = self._waiting.pop(key, Packed())
        self.packing.pack_(key, x, mask, sums, packed)
        if not self._partners[key]:
            return self.packing.release(packed)
        if packed.tokens < self.packing.tokens_per_product:
            self._waiting[key] = packed
        else:
            self._sealed[key].append(Packed(packed.tokens, [self._spool.store(block) for block in packed.blocks]))
            self.packing.release(packed)

    def discard_open_batch(self) -> None:
        self._waiting.clear()
        common = min(len(sealed) for key, sealed in self._sealed.items() if self._partners[key])
        self._sealed = {key: sealed[:common] for key, sealed in self._sealed.items()}

    def settle(self) -> None:
        if not any(self._sealed.values()) and not self._waiting:
            return
        for pair in self.packing.pairs:
            self._written[pair] = self._spool.store(self.product(pair))
        self._sealed = {key: [] for key in self._sealed}
        self._waiting.clear()

    def product(self, pair: Pair) -> Tensor:
        packing, (a, b) = self.packing, pair
        if pair in self._written and not self._sealed[a] and a not in self._waiting:
            return self._spool.load(self._written[pair])
        accumulator = packing.zeros(pair)
        if pair in self._written:
            packing.load_(pair, accumulator, self._spool.load(self._written[pair]))
        for sides in zip(self._sealed[a], self._sealed[b], strict=True):
            packing.multiply_([Product(pair, accumulator, *map(self._loaded, sides))])
        if a in self._waiting:
            packing.multiply_([Product(pair, accumulator, self._waiting[a], self._waiting[b])])
        return packing.matrix(pair, accumulator)

    def kept(self, pair: Pair) -> Tensor:
        self.settle()
        return self._written[pair] if pair in self._written else self._spool.store(self.product(pair))

    def _loaded(self, packed: Packed) -> Packed:
        return Packed(packed.tokens, [self._spool.load(block) for block in packed.blocks])

    def replace_(self, pair: Pair, matrix: Tensor) -> None:
        if pair not in self._written:
            self._written[pair] = self._spool.store(matrix)
        else:
            self._written[pair].copy_(matrix)


def partners(keys: Iterable[Key], pairs: Iterable[Pair]) -> dict[Key, dict[Key, Pair]]:
    """{layer: {partner: the pair they form}}, in the order of the pairs."""
    found: dict[Key, dict[Key, Pair]] = {key: {} for key in keys}
    for a, b in pairs:
        found[a][b] = found[b][a] = (a, b)
    return found
