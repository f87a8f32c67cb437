"""Features of several layers, batch by batch, to the correlations of all pairs of neighbours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import ffmerge_fast as ff
from benchmarks.ops import BF16, FP32, Case, Job
from ffmerge_fast.ops.correlation import registered
from ffmerge_fast.ops.correlation.ring import signs


def features(layers: int, batches: int, tokens: int, width: int, dtype: torch.dtype, device: str) -> list[dict]:
    """Made-up features, [tokens, width] per layer and batch: layers share directions, as trained neighbours do."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width // 4, width, generator=generator) / (width // 4) ** 0.5

    def batch() -> dict[int, torch.Tensor]:
        common = torch.randn(tokens, width // 4, generator=generator) @ mixing
        return {i: (common + torch.randn(tokens, width, generator=generator)).to(device, dtype) for i in range(layers)}

    return [batch() for _ in range(batches)]


def correlation_ffmerge(batches: list[dict], pairs: list[tuple], activation: str | None, compute="auto") -> dict:
    first = batches[0]
    widths = {i: x.shape[-1] for i, x in first.items()}
    state = ff.CorrelationState(widths, pairs, device=first[0].device, compute=compute, activation=activation)
    for batch in batches:
        ff.ops.correlation_accumulate_(state, batch)
    return {pair: state.correlation(*pair) for pair in pairs}


def correlation_dense(batches: list[dict], pairs: list[tuple], activation: str | None) -> dict:
    """Two passes over all tokens at once, in fp32: keeps every feature in memory, and is the accurate plain way."""
    return two_pass(batches, pairs, activation, torch.float32)


def correlation_addmm(batches: list[dict], pairs: list[tuple], activation: str | None) -> dict:
    """What one would write: fp32 features, column sums of x and x², one `addmm_` per pair (MKL, where torch has it)."""

    def multiply(products, a, b):
        return products.addmm_(a.T, b)

    return _streaming(batches, pairs, activation, torch.float32, multiply)


def correlation_bf16(batches: list[dict], pairs: list[tuple], activation: str | None) -> dict:
    """The same with a bf16 GEMM (oneDNN), whose result is rounded to bf16 before it is added."""
    return _streaming(batches, pairs, activation, torch.bfloat16, lambda products, a, b: products.add_(a.T @ b))


def correlation_bf16_transposed(batches: list[dict], pairs: list[tuple], activation: str | None) -> dict:
    """The same, with the left side copied to row-major first."""
    return _streaming(
        batches, pairs, activation, torch.bfloat16, lambda products, a, b: products.add_(a.T.contiguous() @ b)
    )


def correlation_published(batches: list[dict], pairs: list[tuple], activation: str | None) -> dict:
    """The loop of the method's published code: raw fp32 sums, self products kept for their diagonals, E[xy]-E[x]E[y].

    Without its copies to the host, which would only slow it down.
    """
    layers = sorted(batches[0])
    sums = {i: batches[0][i].new_zeros(batches[0][i].shape[-1], dtype=torch.float32) for i in layers}
    products: dict[tuple[int, int], torch.Tensor] = {}
    count = 0
    for batch in batches:
        x = {i: _activated(batch[i], activation, torch.float32) for i in layers}
        count += x[layers[0]].shape[0]
        for i in layers:
            sums[i] += x[i].sum(0)
        for a, b in dict.fromkeys([*pairs, *((i, i) for i in layers)]):
            product = x[a].T @ x[b]
            products[a, b] = products[a, b] + product if (a, b) in products else product
    means = {i: sums[i] / count for i in layers}
    covariance = {(a, b): p / count - torch.outer(means[a], means[b]) for (a, b), p in products.items()}
    std = {i: covariance[i, i].diagonal().sqrt() for i in layers}
    return {(a, b): covariance[a, b] / torch.outer(std[a], std[b]) for a, b in pairs}


def _activated(x: torch.Tensor, activation: str | None, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if activation is None else getattr(torch.nn.functional, activation)(x.to(dtype))


def _streaming(batches, pairs, activation, dtype, multiply) -> dict:
    widths = {i: x.shape[-1] for i, x in batches[0].items()}
    device = batches[0][pairs[0][0]].device
    sums, squares = ({i: torch.zeros(w, device=device) for i, w in widths.items()} for _ in range(2))
    products = {(a, b): torch.zeros(widths[a], widths[b], device=device) for a, b in pairs}
    count = 0
    for batch in batches:
        x = {i: _activated(value, activation, dtype) for i, value in batch.items()}
        count += len(x[pairs[0][0]])
        for i, value in x.items():
            sums[i] += value.sum(0, dtype=torch.float32)
            squares[i] += value.float().square().sum(0)
        for a, b in pairs:
            multiply(products[a, b], x[a], x[b])
    mean = {i: s / count for i, s in sums.items()}
    scale = {i: (squares[i] / count - mean[i].square()).rsqrt() for i in widths}
    return {
        (a, b): p.div_(count).addr_(mean[a], mean[b], alpha=-1).mul_(scale[a][:, None]).mul_(scale[b])
        for (a, b), p in products.items()
    }


def two_pass(batches: list[dict], pairs: list[tuple], activation: str | None, dtype: torch.dtype) -> dict:
    centred = {}
    for i in batches[0]:
        x = torch.cat([_activated(batch[i], activation, dtype) for batch in batches])
        x = x - x.mean(0)
        centred[i] = x / x.norm(dim=0)
    return {(a, b): centred[a].T @ centred[b] for a, b in pairs}


ACCURATE = {
    "ffmerge": correlation_ffmerge,
    "fp32 addmm_": correlation_addmm,
    "torch dense": correlation_dense,
    "published loop": correlation_published,
}
ROUNDED = {  # to bf16: good to about 1e-2
    "ffmerge": lambda *job: correlation_ffmerge(*job, compute="bf16"),
    "fp32 addmm_": correlation_addmm,
    "bf16 mm": correlation_bf16,
    "bf16 mm, transposed": correlation_bf16_transposed,
}


def cuda_peers() -> dict[str, Callable]:
    """cuBLAS on bfloat16 features with float32 results, as far as this torch has it: the strongest peers on a GPU."""
    adds = {}
    if hasattr(torch.ops.aten.mm, "dtype"):
        adds["mm(fp32) + add_"] = lambda p, x, y: p.add_(torch.mm(x.T, y, out_dtype=torch.float32))
    if hasattr(torch.ops.aten.addmm, "dtype_out"):
        adds["addmm(fp32)"] = lambda p, x, y: torch.addmm(p, x.T, y, out_dtype=torch.float32, out=p)
    return {name: partial(_streaming, dtype=torch.bfloat16, multiply=add) for name, add in adds.items()}


PAIRS = {
    "chain": lambda layers: [(i, i + 1) for i in range(layers - 1)],
    "window": lambda layers: [(0, i) for i in range(1, layers)],
    "self": lambda layers: [(i, i) for i in range(layers)],
}


def correlation_case(
    size: str,
    layers: int,
    batches: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    pairs: str = "chain",
    activation: str | None = None,
    peers: dict[str, Callable] = ACCURATE,
) -> Case:
    """Accurate peers must come within twice the error of the dense fp32 way, rounded ones within 2e-2."""

    def build(device: str) -> Job:
        data, wanted = features(layers, batches, tokens, width, dtype, device), PAIRS[pairs](layers)
        truth = two_pass(data, wanted, activation, torch.float64)

        def error(result: dict) -> float:
            return max((result[p] - truth[p]).abs().max().item() for p in wanted)

        rivals = peers | cuda_peers() if device == "cuda" and peers is ROUNDED else peers
        candidates = {name: partial(run, data, wanted, activation) for name, run in rivals.items()}
        dense = error(correlation_dense(data, wanted, activation))
        return Job(candidates, error, limit=2e-2 if peers is ROUNDED else 2 * dense + 2e-6)

    name = f"L{layers} {pairs} T{batches}x{tokens} d{width} {str(dtype).removeprefix('torch.')}"
    name += f" {activation}" * bool(activation) + " rounded" * (peers is ROUNDED)
    return Case("correlation", name, size, build)


def sketch_case(size: str, tokens: int, width: int, dtype: torch.dtype, rows: int = 1024) -> Case:
    """One layer's features into its ring. The bytes: the features, and one visit to the ring."""

    def build(device: str) -> Job:
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        sign = signs(0, tokens, x.device)
        order = torch.arange(tokens, device=device) % rows

        def sums():
            ring = torch.zeros(rows, width, device=device)
            return ring, *torch.zeros(2, width, dtype=torch.float64, device=device)

        ours, plain = sums(), sums()
        pivot = torch.zeros(width, device=device)

        def by_ring():
            for each in ours:
                each.zero_()
            ring, total, squares = ours
            registered.accumulate_ring_(x, None, sign, pivot, ring, 0, total, squares, None)
            return ours

        def by_index_add():
            for each in plain:
                each.zero_()
            values = x.float()
            plain[0].index_add_(0, order, values * sign[:, None])
            plain[1].add_(values.sum(0))
            plain[2].add_(values.square().sum(0))
            return plain

        exact = x.double()
        ring = torch.zeros(rows, width, dtype=torch.float64, device=device)
        truth = ring.index_add_(0, order, exact * sign[:, None].double()), exact.sum(0), exact.square().sum(0)

        def error(found) -> float:
            return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, truth, strict=True))

        candidates = {"ffmerge": by_ring, "index_add_": by_index_add}
        return Job(candidates, error, limit=1e-5, nbytes=x.nbytes + 2 * ours[0].nbytes)

    name = f"sketch {rows} T{tokens} d{width} {str(dtype).removeprefix('torch.')}"
    return Case("correlation", name, size, build)


CASES = [
    sketch_case("small", tokens=512, width=768, dtype=FP32),
    *(
        sketch_case("full", tokens=2048, width=width, dtype=dtype)
        for width in (3072, 5120, 14336)
        for dtype in (FP32, BF16)
    ),
    correlation_case("small", layers=3, batches=2, tokens=512, width=512, dtype=FP32),
    correlation_case("small", layers=3, batches=2, tokens=512, width=512, dtype=BF16),
    correlation_case("small", layers=2, batches=1, tokens=2048, width=768, dtype=BF16, activation="gelu"),
    correlation_case("small", layers=2, batches=1, tokens=512, width=512, dtype=BF16, peers=ROUNDED),
    correlation_case("small", layers=6, batches=16, tokens=128, width=768, dtype=BF16, pairs="window"),
    correlation_case("full", layers=3, batches=4, tokens=2048, width=3072, dtype=FP32),
    correlation_case("full", layers=3, batches=4, tokens=2048, width=3072, dtype=BF16),
    correlation_case("full", layers=2, batches=1, tokens=2048, width=3072, dtype=BF16, activation="gelu"),
    correlation_case("full", layers=2, batches=16, tokens=128, width=3072, dtype=BF16),
    correlation_case("full", layers=1, batches=1, tokens=2048, width=3072, dtype=BF16, pairs="self"),
    correlation_case("full", layers=6, batches=1, tokens=2048, width=3072, dtype=BF16, pairs="window"),
    correlation_case("full", layers=2, batches=1, tokens=2048, width=5120, dtype=BF16),
    correlation_case("full", layers=2, batches=1, tokens=2048, width=14336, dtype=BF16),
    *(
        correlation_case("large", layers=6, batches=2, tokens=tokens, width=width, dtype=BF16, peers=ROUNDED)
        for width, tokens in ((3072, 8192), (3072, 2048), (5120, 8192))
    ),
    correlation_case("large", layers=2, batches=2, tokens=4096, width=14336, dtype=BF16, peers=ROUNDED),
]
