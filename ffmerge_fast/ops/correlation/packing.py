"""How a backend keeps packed features and the products of pairs: the interface, and the plain form of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import registered
from .moments import Key, LayerSums, Pair


@dataclass
class Packed:
    """Features of one layer as a packing keeps them: some tokens, in blocks that only the packing understands."""

    tokens: int = 0
    blocks: list[Tensor] = field(default_factory=list)


@dataclass
class Product:
    """One product to add up: accumulator += aᵀ b. Both sides hold the same tokens."""

    pair: Pair
    accumulator: Tensor
    a: Packed
    b: Packed


class RowPacking:
    """Features as rows [T, d], products as matrices [d_a, d_b]; runs everywhere.

    A backend with a form of its own overrides every public method. Nothing here knows when a product is formed.

    Attributes:
        tokens_per_product: products of fewer tokens waste time; so many are gathered first.
    """

    tokens_per_product = 1

    def __init__(
        self,
        widths: Mapping[Key, int],
        pairs: Iterable[Pair],
        device: torch.device,
        compute: str,
        activation: str | None,
    ):
        self.widths, self.pairs, self.device = widths, list(pairs), device
        self.compute, self.activation = compute, activation
        self.dtype = torch.float64 if compute == "fp64" else torch.float32

    def pack_(self, key: Key, x: Tensor, mask: Tensor | None, sums: LayerSums, packed: Packed) -> None:
        """Add the tokens of one layer to its sums and to `packed`."""
        x = registered.accumulate_layer_(x, mask, *sums.tensors(), self.activation, self.compute, not sums.tokens)
        packed.blocks.append(x)
        packed.tokens += len(x)

    def release(self, packed: Packed) -> None:
        """`packed` was multiplied and will not be used again: its memory may serve the next tokens."""

    def better_pivot(self, key: Key, sums: LayerSums) -> Tensor:
        """The pivot [d] to go on with after a first batch of few tokens."""
        return sums.mean()

    def zeros(self, pair: Pair) -> Tensor:
        """A new accumulator for a pair."""
        return torch.zeros(self.widths[pair[0]], self.widths[pair[1]], dtype=self.dtype, device=self.device)

    def multiply_(self, products: Iterable[Product]) -> None:
        """Add up the products."""
        for product in products:
            registered.accumulate_pair_(_rows(product.a), _rows(product.b), product.accumulator)

    def matrix(self, pair: Pair, accumulator: Tensor) -> Tensor:
        """The products as a matrix [d_a, d_b]: the accumulator itself or a new one."""
        return accumulator

    def load_(self, pair: Pair, accumulator: Tensor, matrix: Tensor) -> None:
        """Set an accumulator to the products in `matrix` (which `matrix()` may have returned)."""
        if matrix is not accumulator:
            accumulator.copy_(matrix)

    def accumulator_bytes(self, pair: Pair) -> int:
        """Memory of one accumulator."""
        return self.widths[pair[0]] * self.widths[pair[1]] * self.dtype.itemsize


def _rows(packed: Packed) -> Tensor:
    """All tokens as one tensor; joined once, however many partners the layer has."""
    if len(packed.blocks) > 1:
        packed.blocks = [torch.cat(packed.blocks)]
    return packed.blocks[0]
