"""One score matrix to the permutation with the largest sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment

import ffmerge_fast as ff
from benchmarks.ops import Case, Job
from benchmarks.ops.correlation import features, two_pass


def ffn_correlation(width: int) -> torch.Tensor:
    """Correlations of GELU features of two random FFNs that read nearly the same low-rank, anisotropic input."""
    generator = torch.Generator().manual_seed(0)
    tokens, model = min(2 * width, 6000), width // 4
    spectrum = torch.arange(1, model + 1) ** -0.5
    inputs = torch.randn(tokens, model, generator=generator) * spectrum
    inputs *= model**0.5 / inputs.norm(dim=1, keepdim=True)
    later = inputs + 0.5 * inputs.std(0) * torch.randn(tokens, model, generator=generator)

    def features(x: torch.Tensor) -> torch.Tensor:
        weight = torch.randn(model, width, generator=generator) / model**0.5
        bias = 0.3 * torch.randn(width, generator=generator) - 0.3
        y = torch.nn.functional.gelu(x @ weight + bias)
        y -= y.mean(0)
        return y / y.norm(dim=0)

    return features(inputs).T @ features(later)


def score_matrix(kind: str, width: int) -> torch.Tensor:
    """float32 [width, width].

    "noise", "random": no structure, normal and uniform; "ties", "binary": whole numbers below 100 and 2; "related":
    correlations of two layers that share directions; "ffn": of two FFNs (see above), the hard kind; "dead": "related"
    with one neuron in ten without variance on either side (scores 0); "dead ffn": the same of "ffn"; "planted": of
    features and the same ones with noise in another order, where no two neurons want the same partner.
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randn(width, width, generator=generator)
    if kind == "random":
        return torch.rand(width, width, generator=generator)
    if kind in ("ties", "binary"):
        return torch.randint(100 if kind == "ties" else 2, (width, width), generator=generator).float()
    if kind == "planted":
        x = torch.randn(2 * width, width, generator=generator)
        noisy = x + 0.7 * torch.randn(2 * width, width, generator=generator)
        order = torch.randperm(width, generator=generator)
        x, noisy = (side / side.norm(dim=0) for side in (x, noisy[:, order]))
        return x.T @ noisy
    if "ffn" in kind:
        scores = ffn_correlation(width)
    else:
        (batch,) = features(layers=2, batches=1, tokens=2 * width, width=width, dtype=torch.float32, device="cpu")
        scores = two_pass([batch], [(0, 1)], None, torch.float32)[0, 1]
        scores = scores[:, torch.randperm(width, generator=generator)].contiguous()
    if "dead" in kind:
        scores[torch.randperm(width, generator=generator)[: width // 10]] = 0
        scores[:, torch.randperm(width, generator=generator)[: width // 10]] = 0
    return scores


def assignment_ffmerge(scores: torch.Tensor) -> torch.Tensor:
    return ff.ops.assign(scores, maximize=True).permutation


def assignment_scipy(scores: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(linear_sum_assignment(scores.cpu().numpy(), maximize=True)[1])


def gpu_peers() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """torch-linear-assignment, where it is installed."""
    try:
        from torch_linear_assignment import batch_linear_assignment
    except ImportError:
        return {}
    return {"torch-linear-assignment": lambda scores: batch_linear_assignment(-scores[None])[0].long().cpu()}


def assignment_case(
    size: str,
    kind: str,
    width: int,
    make: Callable[[str, int], torch.Tensor] = score_matrix,
    peers: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
) -> Case:
    """One matrix; `peers`: further candidates, scores to permutation."""

    def build(device: str) -> Job:
        scores = make(kind, width).to(device)
        exact = scores.cpu().double()
        rows = torch.arange(width)
        best = exact[rows, assignment_scipy(scores)].sum().item()

        def error(permutation: torch.Tensor) -> float:
            permutation = permutation.cpu()
            if not torch.equal(permutation.sort().values, rows):
                return float("inf")
            return abs(best - exact[rows, permutation].sum().item()) / max(abs(best), 1.0)

        candidates = {
            "ffmerge": lambda: assignment_ffmerge(scores),
            "scipy": lambda: assignment_scipy(scores),
            **{name: lambda solve=solve: solve(scores) for name, solve in (peers or {}).items()},
        }
        return Job(candidates, error, limit=1e-9)

    return Case("assignment", f"{kind} d{width}", size, build)


CASES = [
    *(assignment_case("small", kind, 512) for kind in ("noise", "related", "dead")),
    *(assignment_case("full", kind, 3072) for kind in ("noise", "related", "dead", "ffn", "dead ffn")),
    *(assignment_case("full", "planted", width) for width in (512, 3072, 5120)),
]
