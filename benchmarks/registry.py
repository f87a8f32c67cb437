"""What is timed: per op, the cases and the candidates. Ours is first and is called "ffmerge"; the others are its peers.

A case is built on demand. All its candidates do the whole job, from the same input tensors to the same kind of result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment

import ffmerge_fast as ff

from .measure import Candidates


@dataclass(frozen=True)
class Job:
    """Candidates on one input, the error of a result, and the error above which no time is taken."""

    candidates: Candidates
    error: Callable[[Any], float]
    limit: float


@dataclass(frozen=True)
class Case:
    """One row group of the table. `size`: "small" (seconds), "full" (of real models), "large" (those for a GPU)."""

    op: str
    name: str
    size: str
    build: Callable[[str], Job]  # device -> Job


# --- correlation: features of several layers, batch by batch, to the correlations of all pairs of neighbours


def features(layers: int, batches: int, tokens: int, width: int, dtype: torch.dtype, device: str) -> list[dict]:
    """Made-up features, [tokens, width] per layer and batch: layers share directions, as trained neighbours do."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    mixing = random(width // 4, width) / (width // 4) ** 0.5

    def batch() -> dict[int, torch.Tensor]:
        common = random(tokens, width // 4) @ mixing
        return {i: (common + random(tokens, width)).to(dtype) for i in range(layers)}

    return [batch() for _ in range(batches)]


def correlation_ffmerge(batches: list[dict], pairs: list[tuple[int, int]], compute: str = "auto") -> dict:
    first = batches[0]
    widths = {i: x.shape[-1] for i, x in first.items()}
    state = ff.CorrelationState(widths, pairs, device=first[0].device, compute=compute)
    for batch in batches:
        ff.ops.correlation_accumulate_(state, batch)
    return {pair: state.correlation(*pair) for pair in pairs}


def correlation_dense(batches: list[dict], pairs: list[tuple[int, int]]) -> dict:
    """Two passes over all tokens at once, in fp32: keeps every feature in memory, and is the accurate plain way."""
    return _two_pass(batches, pairs, torch.float32)


def correlation_published(batches: list[dict], pairs: list[tuple[int, int]]) -> dict:
    """The loop of the method's published code: raw fp32 sums, self products kept for their diagonals, E[xy]-E[x]E[y].

    Without its copies to the host, which would only slow it down.
    """
    layers = sorted(batches[0])
    sums = {i: batches[0][i].new_zeros(batches[0][i].shape[-1], dtype=torch.float32) for i in layers}
    products: dict[tuple[int, int], torch.Tensor] = {}
    count = 0
    for batch in batches:
        x = {i: batch[i].float() for i in layers}
        count += x[layers[0]].shape[0]
        for i in layers:
            sums[i] += x[i].sum(0)
        for a, b in [*pairs, *((i, i) for i in layers)]:
            product = x[a].T @ x[b]
            products[a, b] = products[a, b] + product if (a, b) in products else product
    means = {i: sums[i] / count for i in layers}
    covariance = {(a, b): p / count - torch.outer(means[a], means[b]) for (a, b), p in products.items()}
    std = {i: covariance[i, i].diagonal().sqrt() for i in layers}
    return {(a, b): covariance[a, b] / torch.outer(std[a], std[b]) for a, b in pairs}


def correlation_raw(batches: list[dict], pairs: list[tuple[int, int]], add: Callable) -> dict:
    """Raw sums in fp32, `add(products, x, y)` for products += xᵀy: what one would write on tensor cores."""
    count, sums, squares = 0, dict.fromkeys(batches[0], 0.0), dict.fromkeys(batches[0], 0.0)
    x = batches[0]
    products = {(a, b): torch.zeros(x[a].shape[1], x[b].shape[1], device=x[a].device) for a, b in pairs}
    for x in batches:
        count += len(x[0])
        for i, value in x.items():
            sums[i] = sums[i] + value.sum(0, dtype=torch.float32)
            squares[i] = squares[i] + value.float().square().sum(0)
        for a, b in pairs:
            add(products[a, b], x[a], x[b])
    means = {i: total / count for i, total in sums.items()}
    std = {i: (squares[i] / count - means[i].square()).sqrt() for i in sums}
    return {
        (a, b): (p / count - torch.outer(means[a], means[b])) / torch.outer(std[a], std[b])
        for (a, b), p in products.items()
    }


def cuda_additions() -> dict[str, Callable]:
    """Ways to add products of bfloat16 features to a float32 matrix on a GPU, as far as this torch has them."""
    additions = {"mm + add_": lambda p, x, y: p.add_((x.T @ y).float())}  # rounds each product to bfloat16
    if hasattr(torch.ops.aten.mm, "dtype"):
        additions["mm(fp32) + add_"] = lambda p, x, y: p.add_(torch.mm(x.T, y, out_dtype=torch.float32))
    if hasattr(torch.ops.aten.addmm, "dtype_out"):
        additions["addmm(fp32)"] = lambda p, x, y: torch.addmm(p, x.T, y, out_dtype=torch.float32, out=p)
    return additions


def _two_pass(batches: list[dict], pairs: list[tuple[int, int]], dtype: torch.dtype) -> dict:
    centred = {}
    for i in batches[0]:
        x = torch.cat([batch[i] for batch in batches]).to(dtype)
        x = x - x.mean(0)
        centred[i] = x / x.norm(dim=0)
    return {(a, b): centred[a].T @ centred[b] for a, b in pairs}


def correlation_case(size: str, layers: int, batches: int, tokens: int, width: int, dtype: torch.dtype) -> Case:
    def build(device: str) -> Job:
        data = features(layers, batches, tokens, width, dtype, device)
        pairs = [(i, i + 1) for i in range(layers - 1)]
        truth = _two_pass(data, pairs, torch.float64)

        def error(result: dict) -> float:
            return max((result[p].double() - truth[p]).abs().max().item() for p in pairs)

        candidates = {
            "ffmerge": lambda: correlation_ffmerge(data, pairs),
            "torch dense": lambda: correlation_dense(data, pairs),
            "published loop": lambda: correlation_published(data, pairs),
        }
        limit = 2 * error(correlation_dense(data, pairs)) + 1e-6
        if device == "cuda" and dtype == torch.bfloat16:  # with peers that round; the table has everyone's error
            candidates["ffmerge bf16"] = lambda: correlation_ffmerge(data, pairs, "bf16")
            for peer, add in cuda_additions().items():
                candidates[peer] = partial(correlation_raw, data, pairs, add)
            limit = 1e-2
        return Job(candidates, error, limit)

    name = f"L{layers} T{batches}x{tokens} d{width} {str(dtype).removeprefix('torch.')}"
    return Case("correlation", name, size, build)


# --- assignment: one score matrix to the permutation with the largest sum


def score_matrix(kind: str, width: int) -> torch.Tensor:
    """float32 [width, width]. "noise": no structure, as between untrained layers; "related": correlations of two
    layers that share directions; "dead": the same with one neuron in ten without variance on either side (scores 0).
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randn(width, width, generator=generator)
    (batch,) = features(layers=2, batches=1, tokens=2 * width, width=width, dtype=torch.float32, device="cpu")
    scores = _two_pass([batch], [(0, 1)], torch.float32)[0, 1]
    scores = scores[:, torch.randperm(width, generator=generator)].contiguous()
    if kind == "dead":
        scores[torch.randperm(width, generator=generator)[: width // 10]] = 0
        scores[:, torch.randperm(width, generator=generator)[: width // 10]] = 0
    return scores


def assignment_ffmerge(scores: torch.Tensor) -> torch.Tensor:
    return ff.ops.assign(scores, maximize=True).permutation


def assignment_scipy(scores: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(linear_sum_assignment(scores.cpu().numpy(), maximize=True)[1])


def assignment_case(size: str, kind: str, width: int) -> Case:
    def build(device: str) -> Job:
        scores = score_matrix(kind, width).to(device)
        exact = scores.cpu().double()
        rows = torch.arange(width)
        best = exact[rows, assignment_scipy(scores)].sum().item()

        def error(permutation: torch.Tensor) -> float:
            permutation = permutation.cpu()
            if not torch.equal(permutation.sort().values, rows):
                return float("inf")
            return abs(best - exact[rows, permutation].sum().item()) / max(abs(best), 1.0)

        candidates = {"ffmerge": lambda: assignment_ffmerge(scores), "scipy": lambda: assignment_scipy(scores)}
        return Job(candidates, error, limit=1e-9)

    return Case("assignment", f"{kind} d{width}", size, build)


CASES = [
    correlation_case("small", layers=3, batches=2, tokens=512, width=512, dtype=torch.float32),
    correlation_case("small", layers=3, batches=2, tokens=512, width=512, dtype=torch.bfloat16),
    correlation_case("full", layers=3, batches=4, tokens=2048, width=3072, dtype=torch.float32),
    correlation_case("full", layers=3, batches=4, tokens=2048, width=3072, dtype=torch.bfloat16),
    correlation_case("full", layers=3, batches=4, tokens=2048, width=5120, dtype=torch.bfloat16),
    correlation_case("large", layers=6, batches=2, tokens=8192, width=3072, dtype=torch.bfloat16),
    correlation_case("large", layers=6, batches=2, tokens=8192, width=5120, dtype=torch.bfloat16),
    correlation_case("large", layers=2, batches=2, tokens=4096, width=14336, dtype=torch.bfloat16),
    *(assignment_case("small", kind, 512) for kind in ("noise", "related", "dead")),
    *(assignment_case("full", kind, 3072) for kind in ("noise", "related", "dead")),
]


def cases(op: str | None = None, size: str | None = None) -> list[Case]:
    """The cases of one op (or of all) and one size (or of both)."""
    return [c for c in CASES if op in (None, c.op) and size in (None, c.size)]


def ops() -> list[str]:
    """The ops that have cases, in the order of the table."""
    return list(dict.fromkeys(case.op for case in CASES))
