"""Low-rank deltas: layers that share the weights W of an FFN, each with a correction of its own, W_i = W + A_i B_i."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.sublayers import FFNSublayer
from ...ops import assign
from ...ops.shared_ffn.weights import FFNWeights, activate
from ...support.distributed import broadcast_, sum_over_ranks


class Delta(NamedTuple):
    """What one layer's projection has of its own: (W + a b) x + bias_of_W + bias."""

    a: Tensor  # [out, rank]
    b: Tensor  # [rank, in]
    bias: Tensor | None  # [out]; None without a bias in W's own


Deltas = dict[str, Delta]  # of one layer, by the projection that has them: "up", "gate", "down"


# ---------------------------------------------------------------------------------------------------- the first values


@torch.no_grad()
def nearest_deltas(ffn: FFNSublayer, theirs: FFNWeights, ours: FFNWeights, x: Tensor, rank: int) -> Deltas:
    """The deltas with which each projection of the shared FFN comes closest to that of the original one.

    The original's neurons are put in the order in which its weights are closest to the shared ones.

    Args:
        ffn: the layer's.
        theirs, ours: the original and the shared weights, these of the device and dtype to work in.
        x: [tokens, d_model], the original layer's inputs, this process's.
    """
    x = x.to(ours.up)
    theirs = _aligned(FFNWeights(*(w if w is None else w.to(x) for w in theirs)), ours, x, ffn.activation)
    parts = ["up"] if ours.gate is None else ["gate", "up"]
    projections = {"up": parts} if ffn.fused else {name: [name] for name in parts}
    found = {name: _nearest(x, _residuals(theirs, ours, p), rank) for name, p in projections.items()}
    return found | {"down": _nearest(theirs.hidden(x, ffn.activation), _residuals(theirs, ours, ["down"]), rank)}


def _residuals(theirs: FFNWeights, ours: FFNWeights, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """W_i − W [out, in] and b_i − b [out] or None, in float64; of several projections one below the other."""

    def residual(name: str) -> tuple[Tensor | None, ...]:
        pairs = zip(theirs.projection(name), ours.projection(name), strict=True)
        return tuple(None if own is None else their.double() - own.double() for their, own in pairs)

    weights, biases = zip(*map(residual, names), strict=True)
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def _nearest(x: Tensor, residuals: tuple[Tensor, Tensor | None], rank: int) -> Delta:
    """A, B and c that minimise Σ_x ‖(R − A B) x + s − c‖² over the tokens x [T, in] of all processes.

    That is the truncated SVD of R L, L Lᵀ = Σ x xᵀ (about the mean, where there is a c): its left singular vectors U
    are the principal components of R x, and A B = U Uᵀ R. A and B get equal singular values.
    """
    residual, shift = residuals
    narrow = len(residual) <= residual.shape[1]
    gram, mean = _moments(F.linear(x, residual.to(x)) if narrow else x, centred=shift is not None)
    if narrow:
        u = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    else:
        values, vectors = torch.linalg.eigh(gram)
        u = torch.linalg.svd(residual @ (vectors * values.clamp(min=0).sqrt()), full_matrices=False).U[:, :rank]
        mean = residual @ mean
    p, s, q = torch.linalg.svd(u.T @ residual, full_matrices=False)
    bias = None if shift is None else shift + mean - u @ (u.T @ mean)
    return Delta((u @ p) * s.sqrt(), s.sqrt()[:, None] * q, bias)


def _moments(x: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Σ x xᵀ [n, n], about the mean or not, and the mean [n]; of the tokens of all processes, in float64."""
    x, mean = x.double(), _mean(x)
    x = x - mean if centred else x
    return sum_over_ranks([x.T @ x])[0], mean


def _mean(x: Tensor) -> Tensor:
    """[tokens, n] -> [n], over the tokens of all processes, in float64."""
    total, count = sum_over_ranks([x.sum(0, dtype=torch.float64), x.new_tensor(len(x), dtype=torch.float64)])
    return total / count.clamp(min=1)


def _aligned(theirs: FFNWeights, ours: FFNWeights, x: Tensor, activation: str) -> FFNWeights:
    """The original FFN with its neurons in the order of the shared one's.

    Weights are compared by what they do to the inputs: ‖w − w'‖² is weighted by the inputs' second moments.
    """
    second, tiny = _moments(x, centred=ours.up_bias is not None)[0], torch.finfo(torch.float64).tiny
    scores = torch.zeros(len(ours.up), len(ours.up), dtype=torch.float64, device=x.device)
    for their, own in ((theirs.up, ours.up), (theirs.gate, ours.gate)):
        if own is not None:
            seen = their.double() @ second
            scores += own.double() @ seen.T / (seen * their).sum().clamp(min=tiny)
    down = theirs.down * _mean(theirs.hidden(x, activation).square())
    scores += ours.down.double().T @ down / (down * theirs.down).sum().clamp(min=tiny)
    order = torch.as_tensor(assign(scores.float()).permutation, device=x.device)
    neurons = {name: getattr(theirs, name) for name in ("up", "gate", "up_bias", "gate_bias")}
    rows = {name: value[order] for name, value in neurons.items() if value is not None}
    return theirs._replace(**rows, down=theirs.down[:, order])


def same_on_all_ranks(deltas: Deltas) -> Deltas:
    """Those of the first process: eigenvectors may be rounded differently elsewhere."""
    same = {name: Delta(*(t if t is None else t.contiguous() for t in delta)) for name, delta in deltas.items()}
    broadcast_([tensor for delta in same.values() for tensor in delta if tensor is not None])
    return same


# --------------------------------------------------------------------------------------------------------- computing


def compute(x: Tensor, weights: FFNWeights, deltas: Deltas, activation: str) -> Tensor:
    """[T, d_model] -> [T, d_model] by the FFN of a layer with deltas; W + A B is never formed.

    This is plain PyTorch: the deltas work on the pre-activations and on the hidden features, which `ops.shared_ffn`
    does not hand out, and in weights widened by A and B it would need a copy of W for each layer.
    """

    def project(x: Tensor, name: str) -> Tensor:
        (weight, bias), (a, b, c) = weights.projection(name), deltas[name]
        return F.linear(x, weight, bias if c is None else bias + c).addmm(F.linear(x, b), a.T)

    pre = [project(x, name) for name in ("up", "gate")[: weights.halves]]
    return project(activate(pre, activation), "down")


def unfused(deltas: Deltas) -> Deltas:
    """Deltas of gate and up, views of those of one projection that holds both, gate first."""
    a, b, c = deltas["up"]
    gate_c, up_c = (None, None) if c is None else c.chunk(2)
    gate_a, up_a = a.chunk(2)
    return {**deltas, "gate": Delta(gate_a, b, gate_c), "up": Delta(up_a, b, up_c)}
