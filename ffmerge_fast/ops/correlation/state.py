"""`CorrelationState`: streaming second moments of FFN features, per layer and per pair of layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...support.errors import FFMergeError
from ...support.sizes import format_bytes, parse_bytes
from ...support.tensors import not_inference
from ..common import backends
from ..common.activations import check_activation
from .batch import Batch, flat_features
from .moments import Key, LayerSums, Moments, Pair
from .products import make_accumulators, partners
from .sketch import SMALLEST, SketchedMoments

_COMPUTE = ("auto", "bf16", "bf16x3", "fp32", "fp64")


class CorrelationState:
    """Streaming second moments of FFN features, per layer and per pair of layers (paper A, eq. 1).

    Kept are Σ(x - pivot) and Σ(x - pivot)² per layer in float64, and Σ(x_a - pivot_a)ᵀ(x_b - pivot_b) per pair in
    float32. The pivot is the mean of the first batch (of the first batches, until 64 tokens are in), so large means
    cost no accuracy. The backend, and with it the form in which products are kept, is chosen when the state is made.

    Args:
        widths: {layer key: number of features}; a key is any hashable, such as 3 or "encoder.3".
        pairs: pairs of keys to correlate; (b, a) is the transposed view of (a, b). A pair (a, a) is legal.
        device: where the sums live and the features come from.
        compute: "fp32"; "fp64"; "bf16" rounds the pivoted features once (correlations good to about 1e-4); "bf16x3"
            float32-grade accuracy on bfloat16 hardware; "auto" lets the backend choose, never worse than "bf16x3".
        activation: applied to the features first (relu, gelu, gelu_tanh, silu, relu2, quick_gelu), or None.
        max_memory: bytes, or text such as "8GiB", that the products of all pairs may take. Beyond it, features are
            spooled to disk (TMPDIR), those of a GPU to host memory first, and each pair is multiplied when it is read;
            results are the same.
        sketch: instead of products, keep so many rows per layer (16 or more, float32 [sketch, d]) from which the
            covariance of any two layers of equal tokens is estimated, without bias (`sketch_error`). Means and
            variances are exact. Collecting costs T·d additions per layer, reading a pair sketch·d_a·d_b products.

    Raises:
        FFMergeError: unknown key in `pairs`, width below 1, unknown `compute` or `activation`, `max_memory` that is no
            number of bytes or below one pair's products, too little memory (with the bytes needed); `sketch` below 16,
            or with another `compute` than "auto" and "fp32", or that takes more than `max_memory`.
    """

    @not_inference
    def __init__(
        self,
        widths: Mapping[Key, int],
        pairs: Iterable[Pair],
        device: torch.device | str = "cpu",
        compute: str = "auto",
        activation: str | None = None,
        max_memory: int | str | None = None,
        sketch: int | None = None,
    ):
        self.widths, self.compute, self.activation, self.sketch = dict(widths), compute, activation, sketch
        self.device = torch.empty(0, device=device).device  # "cuda" -> "cuda:0"
        self.max_memory = None if max_memory is None else parse_bytes(max_memory, "max_memory")
        self._check_arguments()
        self.pairs = self._distinct(pairs)
        self._partners = partners(self.widths, self.pairs)
        self.dtype = torch.float64 if compute == "fp64" else torch.float32
        self._moments = self._exact_moments() if sketch is None else self._sketched_moments()
        self._batch = Batch()

    def __repr__(self) -> str:
        kind = self.compute if self.sketch is None else f"sketch of {self.sketch} rows"
        return f"CorrelationState({len(self.widths)} layers, {len(self.pairs)} pairs, {kind}, {self.device})"

    # Accumulate

    @not_inference
    def push(self, key: Key, x: Tensor, mask: Tensor | None = None) -> None:
        """Add one layer of the current batch.

        The products of a pair are formed once both its sides were pushed, in this batch or, where batches are small, in
        a later one; then the features are released: with the pairs of a window, only a band of layers is held.

        Args:
            key: the layer.
            x: its features [T, d] or [..., d]; not kept.
            mask: tokens to count (bool or 0/1, T elements in any shape); masked features may hold anything.

        Raises:
            FFMergeError: unknown key, layer pushed twice in a batch, or width, dtype, device, number of tokens or mask
                that does not fit. Nothing was added then.
        """
        batch = self._batch
        self._layer(key)
        x = flat_features(key, x, self.widths[key], self.device)
        if key in batch.tokens:
            raise FFMergeError(f"layer {key!r} was pushed twice in one batch: call end_batch() between batches")
        flat = batch.flat_mask(mask, len(x), self.device)
        batch.check_partners(key, len(x), mask, (p for p in self._partners[key] if p in batch.tokens))
        batch.add(key, len(x), mask)
        with torch.no_grad():
            self._moments.push(key, x, flat, batch.tokens)

    @not_inference
    def end_batch(self) -> None:
        """Close the batch: every layer must have been pushed, and all sums must be finite (one device sync).

        Raises:
            FFMergeError: layers are missing, or sums are not finite (NaN, Inf or beyond float32), naming the layers.
        """
        seen, self._batch = self._batch.tokens, Batch()
        missing = [key for key in self.widths if key not in seen]
        if missing:
            self._moments.discard_open_batch()
            raise FFMergeError(f"end_batch: layers {missing} were not pushed in this batch; push every layer once")
        self._moments.end_batch()

    def waits(self) -> bool:
        """Whether features wait for more tokens before they are multiplied."""
        return self._moments.waits()

    def settle(self) -> None:
        """Multiply what waits; the sums that follow are rounded otherwise than without."""
        self._no_open_batch()
        self._moments.settle()

    def check_batch(self, features: Mapping[Key, Tensor], mask: Tensor | None = None) -> None:
        """Raise FFMergeError unless `features` are one whole batch of this state; changes nothing."""
        if self._batch.tokens:
            raise FFMergeError(f"layers {list(self._batch.tokens)} were pushed already: call end_batch() first")
        missing = [key for key in self.widths if key not in features]
        if missing:
            raise FFMergeError(f"features: layers {missing} are missing; give every layer of the state")
        tokens = {}
        for key, x in features.items():
            self._layer(key)
            tokens[key] = len(flat_features(key, x, self.widths[key], self.device))
        if len(set(tokens.values())) > 1:
            raise FFMergeError(f"features: layers have different token counts {tokens}; use push for separate stacks")
        self._batch.flat_mask(mask, next(iter(tokens.values())), self.device)

    # Read

    def count(self, key: Key) -> int:
        """Number of tokens counted for a layer, as of the last `end_batch`."""
        return self._layer(key).tokens

    def mean(self, key: Key) -> Tensor:
        """Mean of each feature, float64 [d]."""
        return self._closed(key).mean()

    def variance(self, key: Key) -> Tensor:
        """Variance of each feature (1/n), float64 [d]; exactly 0 where it is only rounding noise of a constant."""
        return self._closed(key).variance()

    def covariance(self, a: Key, b: Key) -> Tensor:
        """Covariance (1/n) of the features of two layers, float32 [d_a, d_b]; rows are those of `a`."""
        pair = self._stored(a, b)
        matrix = self._moments.comoments(pair).div_(self.count(pair[0])).float()
        return matrix if pair == (a, b) else matrix.T

    def correlation(self, a: Key, b: Key) -> Tensor:
        """Pearson correlation of the features of two layers, float32 [d_a, d_b] in [-1, 1]; rows are those of `a`.

        A feature without variance (a dead neuron) has correlation 0 with everything. Of a sketch: the estimate.
        """
        pair = self._stored(a, b)
        matrix = self._moments.correlation(pair).clamp_(-1, 1).float()
        return matrix if pair == (a, b) else matrix.T

    @property
    def sketch_error(self) -> float:
        """Standard deviation of an estimated correlation near 0 (about √2 times as much near 1); 0 without a sketch."""
        return 0.0 if self.sketch is None else self.sketch**-0.5

    def half_correlation(self, a: Key, b: Key) -> Tensor:
        """An estimate of `correlation(a, b)` by the first half of a sketch's rows alone, not clamped to [-1, 1].

        Raises:
            FFMergeError: this is no sketch; as `correlation`.
        """
        if self.sketch is None:
            raise FFMergeError("half_correlation: want a state with sketch=; this one is exact")
        pair = self._stored(a, b)
        matrix = self._moments.correlation(pair, slice(self.sketch // 2))
        return matrix if pair == (a, b) else matrix.T

    # Merge, save, load

    @not_inference
    def merge_(self, other: CorrelationState) -> CorrelationState:
        """Add the tokens of another state of the same layers and pairs (Chan et al. 1979: exact for any split).

        Raises:
            FFMergeError: the states differ in layers, widths, pairs, activation or sketch, or a batch is open.
        """
        for name in ("widths", "pairs", "activation", "sketch"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise FFMergeError(f"merge_: the states differ in {name}: {mine} and {theirs}")
        for each in (self, other):
            each._no_open_batch()
        self._moments.merge_(other._moments)
        return self

    @not_inference
    def all_reduce_(self, group=None) -> CorrelationState:
        """Make every process hold the moments of all processes' tokens; ranks without tokens are legal.

        Collective: all ranks of the `torch.distributed` group call it once, with the same layers and pairs.
        One process without a group is its only rank.
        """
        self._no_open_batch()
        self._moments.all_reduce_(group)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """All sums: "layer/<key>/count|pivot|sum|sumsq" and "pair/<a>|<b>", of a sketch "ring/<key>/rows|ones|waiting".

        To be read only, valid until the next push.

        The products are the state's own where the backend keeps plain matrices, else copies.
        """
        self._no_open_batch()
        return self._moments.state_dict()

    @not_inference
    def load_state_dict_(self, tensors: Mapping[str, Tensor]) -> CorrelationState:
        """Replace the sums by those of `state_dict()` of a state with the same layers and pairs.

        Raises:
            FFMergeError: a tensor is missing, unknown or of another shape or dtype. Nothing was changed then.
        """
        self._no_open_batch()
        self._moments.load_state_dict_(tensors)
        return self

    # Private

    def _exact_moments(self) -> Moments:
        backend = backends.select("correlation", torch.empty(0, device=self.device))
        packing = backend.packing(self.widths, self.pairs, self.device, self.compute, self.activation)
        layers = {key: LayerSums.empty(width, self.dtype, self.device) for key, width in self.widths.items()}
        return Moments(layers, self.pairs, make_accumulators(packing, self.max_memory))

    def _sketched_moments(self) -> SketchedMoments:
        m = self.sketch
        if type(m) is not int or m < SMALLEST:
            raise FFMergeError(f"sketch: got {m!r}, want a number of rows, {SMALLEST} or more (1024 is usual), or None")
        if self.compute not in ("auto", "fp32"):
            raise FFMergeError(f"compute: got {self.compute!r}, a sketch is kept in float32: leave it out")
        needed = 4 * m * sum(self.widths.values())
        if self.max_memory is not None and needed > self.max_memory:
            fit = self.max_memory // (4 * sum(self.widths.values()))
            raise FFMergeError(
                f"max_memory: {format_bytes(self.max_memory)}, but {m} rows of {len(self.widths)} layers take "
                f"{format_bytes(needed)}: give that much, or sketch={fit}"
            )
        return SketchedMoments(self.widths, m, self.device, self.activation)

    def _check_arguments(self) -> None:
        if self.compute not in _COMPUTE:
            raise FFMergeError(f"compute: got {self.compute!r}, want one of {', '.join(_COMPUTE)}")
        check_activation(self.activation, optional=True)
        if not self.widths:
            raise FFMergeError("widths: empty, want at least one layer")
        for key, width in self.widths.items():
            if width < 1:
                raise FFMergeError(f"widths: layer {key!r} has width {width}, want at least 1")
        if len({str(key) for key in self.widths}) < len(self.widths):
            raise FFMergeError(f"widths: keys {list(self.widths)} are not different as strings; rename them")

    def _distinct(self, pairs: Iterable[Pair]) -> list[Pair]:
        """The pairs in their order, each of two layers once."""
        found: dict[Pair, None] = {}
        for a, b in pairs:
            unknown = [key for key in (a, b) if key not in self.widths]
            if unknown:
                raise FFMergeError(f"pairs: ({a!r}, {b!r}) names layer {unknown[0]!r}, which is not in widths")
            if (b, a) not in found:
                found[a, b] = None
        return list(found)

    def _layer(self, key: Key) -> LayerSums:
        if key not in self.widths:
            raise FFMergeError(f"key: got {key!r}, want one of the layers {list(self.widths)}")
        return self._moments.layers[key]

    def _closed(self, key: Key) -> LayerSums:
        self._no_open_batch()
        layer = self._layer(key)
        if not layer.tokens:
            raise FFMergeError(f"layer {key!r} has seen no tokens: accumulate features first")
        return self._moments.layer(key)

    def _no_open_batch(self) -> None:
        if self._batch.tokens:
            raise FFMergeError(f"a batch is open (pushed: layers {list(self._batch.tokens)}): call end_batch() first")

    def _stored(self, a: Key, b: Key) -> Pair:
        """The pair of two layers that have seen tokens, as it is stored."""
        if self.sketch is None and b not in self._partners.get(a, ()):
            raise FFMergeError(f"pair ({a!r}, {b!r}) was not accumulated: name it in pairs")
        pair = self._partners.get(a, {}).get(b, (a, b))
        for key in pair:
            self._closed(key)
        self._moments.check_pair(pair)
        return pair
