"""The accumulators of the correlation op: sums per layer, product sums per pair of layers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..._errors import FFMergeError
from .._activations import check_activation
from . import op

Key = Hashable
_COMPUTE = ("auto", "bf16", "bf16x3", "fp32", "fp64")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SUMS = ("count", "pivot", "sum", "sumsq")
_EPS = torch.finfo(torch.float32).eps
_SETTLED = 64  # tokens that make a good pivot; one from fewer is refined at the end of the next batches


@dataclass
class _Layer:
    count: Tensor  # [] int64
    pivot: Tensor  # [d] the mean of the first batch that has tokens
    sum: Tensor  # [d] float64, Σ (x - pivot)
    sumsq: Tensor  # [d] float64, Σ (x - pivot)²
    tokens: int = 0  # count as of the last end_batch, on the host

    @classmethod
    def empty(cls, width: int, dtype: torch.dtype, device: torch.device) -> _Layer:
        sums = (torch.zeros(width, dtype=t, device=device) for t in (dtype, torch.float64, torch.float64))
        return cls(torch.zeros((), dtype=torch.int64, device=device), *sums)

    def total(self) -> Tensor:
        """Σ x, in float64."""
        return self.pivot.double() * self.count + self.sum

    def move_pivot_(self, pivot: Tensor) -> Tensor:
        """Express the sums around another pivot; returns old minus new pivot [d] in float64."""
        pivot = pivot.to(self.pivot.dtype)
        shift = self.pivot.double() - pivot.double()
        self.sumsq += shift * (2 * self.sum + self.count * shift)
        self.sum += self.count * shift
        self.pivot.copy_(pivot)
        return shift


@dataclass
class _Batch:
    """What was pushed since the last `end_batch`."""

    masks: dict[Key, Tensor | None] = field(default_factory=dict)  # as given; its keys are the layers seen
    flat: tuple[Tensor, Tensor] | None = None  # the last mask, as given and as [T] bool
    features: dict[Key, Tensor] = field(default_factory=dict)  # held until the layer's last partner came


class CorrelationState:
    """Streaming second moments of FFN features, per layer and per pair of layers (paper A, eq. 1).

    Kept are Σ(x - pivot) and Σ(x - pivot)² per layer in float64, and Σ(x_a - pivot_a)ᵀ(x_b - pivot_b) per pair in
    float32. The pivot is the mean of the first batch (of the first batches, until 64 tokens are in), so large means
    cost no accuracy.

    Args:
        widths: {layer key: number of features}; a key is any hashable, such as 3 or "encoder.3".
        pairs: pairs of keys to correlate; (b, a) is the transposed view of (a, b). A pair (a, a) is legal.
        device: where the sums live and the features come from.
        compute: "fp32"; "fp64"; "bf16" rounds the pivoted features once (correlations good to about 1e-4); "bf16x3"
            float32-grade accuracy on bfloat16 hardware; "auto" lets the backend choose, never worse than "bf16x3".
        activation: applied to the features first (relu, gelu, gelu_tanh, silu, relu2, quick_gelu), or None.

    Raises:
        FFMergeError: unknown key in `pairs`, width below 1, unknown `compute` or `activation`.
    """

    def __init__(
        self,
        widths: Mapping[Key, int],
        pairs: Iterable[tuple[Key, Key]],
        device: torch.device | str = "cpu",
        compute: str = "auto",
        activation: str | None = None,
    ):
        self.widths, self.compute, self.activation = dict(widths), compute, activation
        self.device = torch.empty(0, device=device).device  # "cuda" -> "cuda:0"
        self.pairs: list[tuple[Key, Key]] = []
        self._check_arguments()
        self._partners: dict[Key, set[Key]] = {key: set() for key in self.widths}
        for a, b in pairs:
            self._add_pair(a, b)
        dtype = torch.float64 if compute == "fp64" else torch.float32
        self._layers = {key: _Layer.empty(width, dtype, self.device) for key, width in self.widths.items()}
        self._products = {
            (a, b): torch.zeros(self.widths[a], self.widths[b], dtype=dtype, device=self.device) for a, b in self.pairs
        }
        self._batch = _Batch()

    def __repr__(self) -> str:
        return f"CorrelationState({len(self.widths)} layers, {len(self.pairs)} pairs, {self.compute}, {self.device})"

    # Accumulate

    def push(self, key: Key, x: Tensor, mask: Tensor | None = None) -> None:
        """Add one layer of the current batch.

        The products of a pair are formed as soon as both its sides were pushed, and a layer's features are released
        after its last partner: with the pairs of a window, only a band of layers is held.

        Args:
            key: the layer.
            x: its features [T, d] or [..., d]; not kept.
            mask: tokens to count (bool or 0/1, T elements in any shape); masked features may hold anything.

        Raises:
            FFMergeError: unknown key, layer pushed twice in a batch, or width, dtype, device, number of tokens or mask
                that does not fit. Nothing was added then.
        """
        batch = self._batch
        x = self._check_features(key, x)
        if key in batch.masks:
            raise FFMergeError(f"layer {key!r} was pushed twice in one batch: call end_batch() between batches")
        flat = self._flat_mask(mask, len(x))
        arrived = [partner for partner in self._partners[key] if partner in batch.features]
        for partner in arrived:
            self._check_same_tokens(key, x, mask, partner)
        layer = self._layers[key]
        sums = (layer.count, layer.pivot, layer.sum, layer.sumsq)
        with torch.no_grad():
            features = op.accumulate_layer_(x, flat, *sums, self.activation, self.compute, not layer.tokens)
            batch.masks[key], batch.features[key] = mask, features
            for partner in arrived + [key] * (key in self._partners[key]):
                a, b = self._stored(key, partner)
                op.accumulate_pair_(batch.features[a], batch.features[b], self._products[a, b])
        for held in [*arrived, key]:
            if self._partners[held] <= batch.masks.keys():
                del batch.features[held]

    def end_batch(self) -> None:
        """Close the batch: every layer must have been pushed, and all sums must be finite (one device sync).

        Raises:
            FFMergeError: layers are missing, or sums are not finite (NaN, Inf or beyond float32), naming the layers.
        """
        seen, self._batch = self._batch.masks, _Batch()
        missing = [key for key in self.widths if key not in seen]
        if missing:
            raise FFMergeError(f"end_batch: layers {missing} were not pushed in this batch; push every layer once")
        largest = torch.finfo(torch.float64 if self.compute == "fp64" else torch.float32).max
        finite = [(layer.sumsq <= largest).all() & layer.sum.isfinite().all() for layer in self._layers.values()]
        counts = [layer.count for layer in self._layers.values()]
        finite, counts = torch.stack([torch.stack(finite).long(), torch.stack(counts)]).tolist()
        bad = [key for key, ok in zip(self.widths, finite, strict=True) if not ok]
        if bad:
            raise FFMergeError(f"features of layers {bad} hold NaN, Inf or values beyond float32; start a new state")
        better = {}
        for (key, layer), count in zip(self._layers.items(), counts, strict=True):
            if 0 < layer.tokens < min(_SETTLED, count):
                better[key] = layer.total() / count
            layer.tokens = count
        if better:
            self._move_pivots_(better)

    def check_batch(self, features: Mapping[Key, Tensor], mask: Tensor | None = None) -> None:
        """Raise FFMergeError unless `features` are one whole batch of this state; changes nothing."""
        if self._batch.masks:
            raise FFMergeError(f"layers {list(self._batch.masks)} were pushed already: call end_batch() first")
        missing = [key for key in self.widths if key not in features]
        if missing:
            raise FFMergeError(f"features: layers {missing} are missing; give every layer of the state")
        tokens = {key: len(self._check_features(key, x)) for key, x in features.items()}
        if len(set(tokens.values())) > 1:
            raise FFMergeError(f"features: layers have different token counts {tokens}; use push for separate stacks")
        if tokens:
            self._flat_mask(mask, next(iter(tokens.values())))

    # Read

    def count(self, key: Key) -> int:
        """Number of tokens counted for a layer, as of the last `end_batch`."""
        return self._layer(key).tokens

    def mean(self, key: Key) -> Tensor:
        """Mean of each feature, float64 [d]."""
        layer = self._closed(key)
        return layer.total() / layer.count

    def variance(self, key: Key) -> Tensor:
        """Variance of each feature (1/n), float64 [d]; exactly 0 where it is only rounding noise of a constant."""
        layer = self._closed(key)
        mean = layer.sum / layer.count
        variance = layer.sumsq / layer.count - mean.square()
        noise = (2 * _EPS * (layer.pivot + mean)).square()  # of float32 values around the mean: one unit either way
        return variance.masked_fill(variance <= noise.clamp(min=torch.finfo(torch.float32).tiny), 0)

    def covariance(self, a: Key, b: Key) -> Tensor:
        """Covariance (1/n) of the features of two layers, float32 [d_a, d_b]; rows are those of `a`."""
        return self._oriented(a, b, self._centred)

    def correlation(self, a: Key, b: Key) -> Tensor:
        """Pearson correlation of the features of two layers, float32 [d_a, d_b] in [-1, 1]; rows are those of `a`.

        A feature without variance (a dead neuron) has correlation 0 with everything.
        """
        first, second = self._stored(a, b)
        scales = [_inverse_std(self.variance(key)) for key in (first, second)]

        def correlate(layer_a: _Layer, layer_b: _Layer, products: Tensor) -> Tensor:
            covariance = self._centred(layer_a, layer_b, products)
            scale_a, scale_b = (scale.to(covariance.dtype) for scale in scales)
            return covariance.mul_(scale_a[:, None]).mul_(scale_b).clamp_(-1, 1)

        return self._oriented(a, b, correlate)

    # Merge, save, load

    def merge_(self, other: CorrelationState) -> CorrelationState:
        """Add the tokens of another state of the same layers and pairs (Chan et al. 1979: exact for any split).

        Raises:
            FFMergeError: the states differ in layers, widths, pairs or activation, or a batch is open.
        """
        for name in ("widths", "pairs", "activation"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise FFMergeError(f"merge_: the states differ in {name}: {mine} and {theirs}")
        for state in (self, other):
            state._no_open_batch()
        other = other._copy_to(self)
        pivots = {}
        for key, layer in self._layers.items():
            count = (layer.count + other._layers[key].count).clamp(min=1)
            pivots[key] = (layer.total() + other._layers[key].total()) / count
        self._move_pivots_(pivots)
        other._move_pivots_(pivots)
        for key, layer in self._layers.items():
            for name in ("count", "sum", "sumsq"):
                getattr(layer, name).add_(getattr(other._layers[key], name))
            layer.tokens += other._layers[key].tokens
        for pair, products in self._products.items():
            products += other._products[pair]
        return self

    def all_reduce_(self, group=None) -> CorrelationState:
        """Make every process hold the moments of all processes' tokens; ranks without tokens are legal.

        Collective: all ranks of the `torch.distributed` group call it once, with the same layers and pairs.
        """
        import torch.distributed as dist

        self._no_open_batch()
        layers = list(self._layers.values())
        totals = torch.cat([torch.cat([layer.count.double()[None], layer.total()]) for layer in layers])
        dist.all_reduce(totals, group=group)
        pivots, counts = {}, []
        for key, part in zip(self.widths, totals.split([w + 1 for w in self.widths.values()]), strict=True):
            counts.append(part[0].round().long())
            pivots[key] = part[1:] / part[0].clamp(min=1)
        self._move_pivots_(pivots)
        sums = torch.cat([torch.cat([layer.sum, layer.sumsq]) for layer in layers])
        dist.all_reduce(sums, group=group)
        for layer, count, part in zip(layers, counts, sums.split([2 * w for w in self.widths.values()]), strict=True):
            layer.count.copy_(count)
            layer.sum, layer.sumsq = (half.clone() for half in part.chunk(2))
            layer.tokens = int(count)
        for products in self._products.values():
            dist.all_reduce(products, group=group)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """All sums, not copied: "layer/<key>/count|pivot|sum|sumsq" and "pair/<a>|<b>"."""
        self._no_open_batch()
        tensors = {f"layer/{key}/{name}": getattr(la, name) for key, la in self._layers.items() for name in _SUMS}
        return tensors | {f"pair/{a}|{b}": products for (a, b), products in self._products.items()}

    def load_state_dict_(self, tensors: Mapping[str, Tensor]) -> CorrelationState:
        """Replace the sums by those of `state_dict()` of a state with the same layers and pairs.

        Raises:
            FFMergeError: a tensor is missing, unknown or of another shape or dtype. Nothing was changed then.
        """
        mine = self.state_dict()
        if mine.keys() != tensors.keys():
            missing, unknown = sorted(mine.keys() - tensors.keys())[:3], sorted(tensors.keys() - mine.keys())[:3]
            raise FFMergeError(f"state_dict: {missing=}, {unknown=}; make the state with the same layers and pairs")
        for name, tensor in tensors.items():
            got, want = ((t.dtype, list(t.shape)) for t in (tensor, mine[name]))
            if got != want:
                raise FFMergeError(f"state_dict: {name} is {got[0]} {got[1]}, want {want[0]} {want[1]}")
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
        for layer in self._layers.values():
            layer.tokens = int(layer.count)
        return self

    # Private

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

    def _add_pair(self, a: Key, b: Key) -> None:
        unknown = [key for key in (a, b) if key not in self.widths]
        if unknown:
            raise FFMergeError(f"pairs: ({a!r}, {b!r}) names layer {unknown[0]!r}, which is not in widths")
        if b not in self._partners[a]:
            self.pairs.append((a, b))
            self._partners[a].add(b)
            self._partners[b].add(a)

    def _layer(self, key: Key) -> _Layer:
        if key not in self._layers:
            raise FFMergeError(f"key: got {key!r}, want one of the layers {list(self.widths)}")
        return self._layers[key]

    def _closed(self, key: Key) -> _Layer:
        self._no_open_batch()
        layer = self._layer(key)
        if not layer.tokens:
            raise FFMergeError(f"layer {key!r} has seen no tokens: accumulate features first")
        return layer

    def _no_open_batch(self) -> None:
        if self._batch.masks:
            raise FFMergeError(f"a batch is open (pushed: layers {list(self._batch.masks)}): call end_batch() first")

    def _stored(self, a: Key, b: Key) -> tuple[Key, Key]:
        for pair in ((a, b), (b, a)):
            if pair in self._products:
                return pair
        raise FFMergeError(f"pair ({a!r}, {b!r}) was not accumulated: name it in pairs")

    def _oriented(self, a: Key, b: Key, compute) -> Tensor:
        first, second = self._stored(a, b)
        result = compute(self._closed(first), self._closed(second), self._products[first, second]).float()
        return result if (a, b) == (first, second) else result.T

    @staticmethod
    def _centred(layer_a: _Layer, layer_b: _Layer, products: Tensor) -> Tensor:
        mean_a, sum_b = layer_a.sum / layer_a.count, layer_b.sum
        centred = torch.addr(products, mean_a.to(products.dtype), sum_b.to(products.dtype), alpha=-1)
        return centred.div_(layer_a.count)

    def _check_features(self, key: Key, x: Tensor) -> Tensor:
        """x as [T, d], or the reason why it is not this layer's."""
        self._layer(key)
        width = self.widths[key]
        if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise FFMergeError(f"features of layer {key!r}: got {got}, want a float32, bfloat16 or float16 tensor")
        if x.ndim == 0 or x.shape[-1] != width:
            raise FFMergeError(f"features of layer {key!r}: got shape {list(x.shape)}, want [tokens, {width}]")
        if x.device != self.device:
            raise FFMergeError(f"features of layer {key!r}: on {x.device}, but the state is on {self.device}")
        return x.detach().reshape(x.shape[:-1].numel(), width)

    def _flat_mask(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        if mask is None:
            return None
        if mask.numel() != tokens:
            raise FFMergeError(f"mask: got shape {list(mask.shape)}, want {tokens} elements, one per token")
        if self._batch.flat is None or self._batch.flat[0] is not mask:
            self._batch.flat = (mask, mask.reshape(-1).to(self.device, torch.bool))
        return self._batch.flat[1]

    def _check_same_tokens(self, key: Key, x: Tensor, mask: Tensor | None, partner: Key) -> None:
        tokens, partners_mask = len(self._batch.features[partner]), self._batch.masks[partner]
        if len(x) != tokens:
            raise FFMergeError(f"layer {key!r} has {len(x)} tokens, its pair {partner!r} has {tokens}: want the same")
        if mask is partners_mask:
            return
        if mask is None or partners_mask is None or not torch.equal(mask.bool(), partners_mask.bool()):
            raise FFMergeError(f"mask: layers {key!r} and {partner!r} are a pair but got different masks")

    def _move_pivots_(self, pivots: Mapping[Key, Tensor]) -> None:
        """Express the sums around new pivots: Σ(x_a+s_a)ᵀ(x_b+s_b) = Σx_aᵀx_b + s_aᵀΣx_b + (Σx_a)ᵀs_b + n s_aᵀs_b."""
        old_sums = {key: layer.sum.clone() for key, layer in self._layers.items()}
        shifts = {key: layer.move_pivot_(pivots.get(key, layer.pivot)) for key, layer in self._layers.items()}
        for (a, b), products in self._products.items():
            moved = (old_sums[a], shifts[b], shifts[a], self._layers[b].sum)  # the last one is Σx_b + n s_b
            sum_a, shift_b, shift_a, sum_b = (v.to(products.dtype) for v in moved)
            products.addr_(sum_a, shift_b).addr_(shift_a, sum_b)

    def _copy_to(self, like: CorrelationState) -> CorrelationState:
        """A copy on the device and with the accumulator type of `like`."""
        copy = CorrelationState(like.widths, like.pairs, like.device, like.compute, like.activation)
        tensors, mine = copy.state_dict(), self.state_dict()
        for name, tensor in tensors.items():
            tensor.copy_(mine[name])
        for key, layer in copy._layers.items():
            layer.tokens = self._layers[key].tokens
        return copy


def _inverse_std(variance: Tensor) -> Tensor:
    """1 / std, 0 where the variance is 0."""
    return torch.where(variance > 0, variance.rsqrt(), 0)
