"""When products are formed: in memory while the features stream by, or on demand from features spooled to disk."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Protocol

from torch import Tensor

from .packing import Packed, Pair, Product, RowPacking
from .spool import Spool
from .sums import LayerSums

Key = Hashable


class Accumulators(Protocol):
    """The products of all pairs of a state. `settle` comes before anything that writes: pivots, merging, loading."""

    tokens_per_product: int  # fewer tokens of a layer wait for the next batch

    def push(self, key: Key, x: Tensor, mask: Tensor | None, sums: LayerSums, seen: Iterable[Key]) -> None:
        """Add one layer's tokens; `seen` are the layers of this batch so far, this one included."""

    def discard_open_batch(self) -> None:
        """Forget features that wait: a batch was left incomplete, and partners no longer hold the same tokens."""

    def settle(self) -> None:
        """Form every product that is due."""

    def product(self, pair: Pair) -> Tensor:
        """The products of a pair, [d_a, d_b]; to be read only."""

    def replace_(self, pair: Pair, matrix: Tensor) -> None:
        """Set the products of a pair (after `settle`); `matrix` may be what `product` returned, changed in place."""

    def better_pivot(self, key: Key, sums: LayerSums) -> Tensor:
        """The pivot to go on with after a first batch of few tokens."""

    def held(self) -> int:
        """Number of layers whose packed features are in memory."""


class StreamingAccumulators:
    """Accumulators in memory. A pair is multiplied as soon as both sides came and enough tokens are gathered.

    A layer's features are released after its last partner: with the pairs of a window and large batches, only a band
    of layers is held; with small batches, at most `layout.tokens_per_product` tokens of every layer wait.
    """

    def __init__(self, layout: RowPacking):
        self.tokens_per_product = layout.tokens_per_product
        self._layout = layout
        self._partners = partners(layout)
        self._accumulators = {pair: layout.zeros(pair) for pair in layout.pairs}
        self._waiting: dict[Key, Packed] = {}

    def push(self, key: Key, x: Tensor, mask: Tensor | None, sums: LayerSums, seen: Iterable[Key]) -> None:
        packed = self._waiting.get(key, Packed())
        self._layout.pack_(key, x, mask, sums, packed)
        if not self._partners[key]:
            return self._layout.release(packed)
        self._waiting[key] = packed
        if packed.tokens < self._layout.tokens_per_product:
            return
        seen = set(seen)
        arrived = [partner for partner in self._partners[key] if partner in seen]
        self._multiply_(self._partners[key][partner] for partner in arrived)
        for held in {key, *arrived}:
            if self._partners[held].keys() <= seen:
                self._layout.release(self._waiting.pop(held))

    def discard_open_batch(self) -> None:
        self._waiting.clear()

    def settle(self) -> None:
        if any(packed.tokens for packed in self._waiting.values()):
            self._multiply_(pair for pair in self._layout.pairs if pair[0] in self._waiting)
        for packed in self._waiting.values():
            self._layout.release(packed)
        self._waiting.clear()

    def product(self, pair: Pair) -> Tensor:
        self.settle()
        return self._layout.matrix(pair, self._accumulators[pair])

    def replace_(self, pair: Pair, matrix: Tensor) -> None:
        self._layout.load_(pair, self._accumulators[pair], matrix)

    def better_pivot(self, key: Key, sums: LayerSums) -> Tensor:
        return self._layout.better_pivot(key, sums)

    def held(self) -> int:
        return sum(packed.tokens > 0 for packed in self._waiting.values())

    def _multiply_(self, pairs: Iterable[Pair]) -> None:
        waiting, accumulators = self._waiting, self._accumulators
        self._layout.multiply_([Product(p, accumulators[p], waiting[p[0]], waiting[p[1]]) for p in pairs])


class SpooledAccumulators:
    """Packed features on disk, products one pair at a time when they are read: bit for bit those of the other class.

    Less memory always, less disk than all products when tokens < features · pairs / layers. Products that are written
    (a merge, other pivots) become matrices on disk, and the features they were made of are dropped.
    """

    def __init__(self, layout: RowPacking):
        self.tokens_per_product = layout.tokens_per_product
        self._layout = layout
        self._partners = partners(layout)
        self._spool = Spool()
        self._sealed: dict[Key, list[Packed]] = {key: [] for key in layout.widths}
        self._waiting: dict[Key, Packed] = {}
        self._written: dict[Pair, Tensor] = {}

    def push(self, key: Key, x: Tensor, mask: Tensor | None, sums: LayerSums, seen: Iterable[Key]) -> None:
        packed = self._waiting.pop(key, Packed())
        self._layout.pack_(key, x, mask, sums, packed)
        if not self._partners[key]:
            return self._layout.release(packed)
        if packed.tokens < self._layout.tokens_per_product:
            self._waiting[key] = packed
        else:
            self._sealed[key].append(Packed(packed.tokens, [self._spool.store(block) for block in packed.blocks]))
            self._layout.release(packed)

    def discard_open_batch(self) -> None:
        self._waiting.clear()
        common = min(len(sealed) for key, sealed in self._sealed.items() if self._partners[key])
        self._sealed = {key: sealed[:common] for key, sealed in self._sealed.items()}

    def settle(self) -> None:
        if not any(self._sealed.values()) and not self._waiting:
            return
        for pair in self._layout.pairs:
            self._written[pair] = self._spool.store(self.product(pair))
        self._sealed = {key: [] for key in self._sealed}
        self._waiting.clear()

    def product(self, pair: Pair) -> Tensor:
        layout, (a, b) = self._layout, pair
        if pair in self._written and not self._sealed[a] and a not in self._waiting:
            return self._written[pair]
        accumulator = layout.zeros(pair)
        if pair in self._written:
            layout.load_(pair, accumulator, self._written[pair])
        for side_a, side_b in zip(self._sealed[a], self._sealed[b], strict=True):
            layout.multiply_([Product(pair, accumulator, side_a, side_b)])
        if a in self._waiting:
            layout.multiply_([Product(pair, accumulator, self._waiting[a], self._waiting[b])])
        return layout.matrix(pair, accumulator)

    def replace_(self, pair: Pair, matrix: Tensor) -> None:
        if pair not in self._written:
            self._written[pair] = self._spool.store(matrix)
        else:
            self._written[pair].copy_(matrix)

    def better_pivot(self, key: Key, sums: LayerSums) -> Tensor:
        return self._layout.better_pivot(key, sums)

    def held(self) -> int:
        return sum(packed.tokens > 0 for packed in self._waiting.values())


def partners(layout: RowPacking) -> dict[Key, dict[Key, Pair]]:
    """{layer: {partner: the pair they form}}, in the order of the layout's pairs."""
    found: dict[Key, dict[Key, Pair]] = {key: {} for key in layout.widths}
    for a, b in layout.pairs:
        found[a][b] = found[b][a] = (a, b)
    return found
