"""What is timed: per op, the cases and the candidates. Ours is first and is called "ffmerge"; the others are its peers.

A case is built on demand. All its candidates do the whole job, from the same input tensors to the same kind of result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

import ffmerge_fast as ff
from ffmerge_fast.ops.projection import chain

from . import cuda_graphs, projection_step
from .measure import Candidates


@dataclass(frozen=True)
class Job:
    """Candidates on one input, the error of a result, and the error above which no time is taken."""

    candidates: Candidates
    error: Callable[[Any], float]
    limit: float
    memory: Callable[[], dict[str, int]] | None = None  # extra bytes of each candidate at its peak


@dataclass(frozen=True)
class Case:
    """One row group of the table. `size` is "small" (seconds) or "full" (the sizes of real models)."""

    op: str
    name: str
    size: str
    build: Callable[[str], Job]  # device -> Job


# --- correlation: features of several layers, batch by batch, to the correlations of all pairs of neighbours


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


# --- assignment: one score matrix to the permutation with the largest sum


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
    with one neuron in ten without variance on either side (scores 0); "dead ffn": the same of "ffn".
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randn(width, width, generator=generator)
    if kind == "random":
        return torch.rand(width, width, generator=generator)
    if kind in ("ties", "binary"):
        return torch.randint(100 if kind == "ties" else 2, (width, width), generator=generator).float()
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


# --- projection: W, P, R and the gradient of W_C to W_C and the gradients of P; and a whole optimiser step


@dataclass(frozen=True)
class ProjectionInputs:
    """W [o, i], S by index and Δ of both sides, R and the gradient of W_C; Δ and R are float32."""

    weight: torch.Tensor
    index_out: torch.Tensor
    index_in: torch.Tensor
    delta_out: torch.Tensor  # [r_out, o]
    delta_in: torch.Tensor  # [r_in, i]
    residual: torch.Tensor
    grad: torch.Tensor

    @staticmethod
    def random(shape: tuple[int, int], kept: tuple[int, int], dtype: torch.dtype, device: str) -> ProjectionInputs:
        generator = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=generator)
        indices = [torch.randperm(n, generator=generator)[:r].sort().values for n, r in zip(shape, kept, strict=True)]
        deltas = [1e-3 * normal(r, n) for n, r in zip(shape, kept, strict=True)]
        tensors = [0.02 * normal(shape), *indices, *deltas, 1e-3 * normal(kept), normal(kept)]
        stored = [dtype, torch.int64, torch.int64, torch.float32, torch.float32, torch.float32, dtype]
        return ProjectionInputs(*(t.to(device, d) for t, d in zip(tensors, stored, strict=True)))

    def projections(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """P_out [r_out, o] and P_in [i, r_in] as matrices."""
        sides = ((self.delta_out, self.index_out), (self.delta_in, self.index_in))
        p_out, p_in = (d.to(dtype).scatter_add(1, i[:, None], d.new_ones(len(d), 1, dtype=dtype)) for d, i in sides)
        return [p_out, p_in.T]


def projection_ffmerge(t: ProjectionInputs, out: torch.Tensor) -> list[torch.Tensor]:
    """What proj.optimizer does: Δ apart from the selection, the cheaper order, W_C straight into its place."""
    sides = [chain.Side(d[None], i) for d, i in ((t.delta_out, t.index_out), (t.delta_in, t.index_in))]
    problem = chain.Problem(t.weight, *sides)
    inner = chain.project_([problem], [out], [t.residual])
    rows, columns = chain.gradients([problem], [t.grad], inner)
    return [out, rows[0][0], columns[0][0].T]


def projection_autograd(t: ProjectionInputs, projections: list[torch.Tensor], input_first: bool | None) -> list:
    """Autograd through P as float32 parameters, products in the dtype of W; None: the cheaper order."""
    p_out, p_in = (p.detach().requires_grad_() for p in projections)
    left, right = p_out.to(t.weight.dtype), p_in.to(t.weight.dtype)
    if input_first is None:
        (r_out, o), (i, r_in) = p_out.shape, p_in.shape
        input_first = o * r_in * (i + r_out) <= r_out * i * (o + r_in)
    product = left @ (t.weight @ right) if input_first else (left @ t.weight) @ right
    value = product + t.residual.to(t.weight.dtype)
    return [value.detach(), *torch.autograd.grad(value, (p_out, p_in), t.grad)]


def projection_autograd_float32(t: ProjectionInputs, projections: list[torch.Tensor]) -> list:
    """The same on a float32 copy of W, made each time: the better way on CPUs without bfloat16 units."""
    value, *gradients = projection_autograd(replace(t, weight=t.weight.float(), grad=t.grad.float()), projections, None)
    return [value.to(t.weight.dtype), *gradients]


def projection_case(size: str, shape: tuple[int, int], kept: tuple[int, int], dtype: torch.dtype) -> Case:
    def build(device: str) -> Job:
        t = ProjectionInputs.random(shape, kept, dtype, device)
        parts = (t.weight, t.index_out, t.index_in, t.delta_out, t.delta_in, t.residual, t.grad)
        exact = ProjectionInputs(*(x.double() if x.is_floating_point() else x for x in parts))
        truth = projection_autograd(exact, exact.projections(torch.float64), None)
        dense = t.projections(torch.float32)
        out = torch.empty(kept, dtype=dtype, device=device)

        def error(result: list) -> float:
            return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(result, truth, strict=True))

        candidates = {
            "ffmerge": partial(projection_ffmerge, t, out),
            "autograd": partial(projection_autograd, t, dense, None),
            "autograd, input first": partial(projection_autograd, t, dense, True),
        }
        if dtype != torch.float32:
            candidates["autograd in float32"] = partial(projection_autograd_float32, t, dense)
        return Job(candidates, error, limit=1e-5 if dtype == torch.float32 else 2e-2)

    sizes = [f"{a}x{b}" for a, b in (shape, kept)]
    return Case("projection", f"{sizes[0]} to {sizes[1]} {str(dtype).removeprefix('torch.')}", size, build)


def projection_step_case(
    size: str, d: int, f: int, kept: tuple[int, int], batches: int, tokens: int, dtype: torch.dtype
) -> Case:
    """A whole step of an FFN; the error is that of the step's change of the weights."""

    def build(device: str) -> Job:
        setting = projection_step.Setting.random(d, f, kept, batches, tokens, dtype)
        limit = 1e-4 if dtype == torch.float32 else 0.1
        memory = partial(projection_step.extra_memory, setting)
        return Job(projection_step.candidates(setting), projection_step.Gate(setting), limit, memory)

    name = f"step FFN {d} to {kept[0]}, {batches}x{tokens} tokens {str(dtype).removeprefix('torch.')}"
    return Case("projection", name, size, build)


# --- shared_ffn: one FFN on a batch of tokens; or two layers that share it, forward and backward

FFN_SHAPES = {  # d, d_ff, activation, gated
    "gpt2": (768, 3072, "gelu_tanh", False),
    "gpt2-medium": (1024, 4096, "gelu_tanh", False),
    "gpt2-large": (1280, 5120, "gelu_tanh", False),
    "vit-b": (768, 3072, "gelu", False),
    "llama-1b": (2048, 8192, "silu", True),
    "llama-8b": (4096, 14336, "silu", True),
}
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
ONEDNN = {"gelu": ("gelu", [], "none"), "gelu_tanh": ("gelu", [], "tanh"), "silu": ("swish", [], "")}


def ffn_weights(shape: str, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """By the argument names of the op; with biases unless gated."""
    d, d_ff, _, gated = FFN_SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    sizes = {"up": (d_ff, d), "down": (d, d_ff)} | ({"gate": (d_ff, d)} if gated else {})
    sizes |= {} if gated else {"up_bias": (d_ff,), "down_bias": (d,)}
    return {n: (torch.randn(s, generator=g) / s[-1] ** 0.5).to(device, dtype) for n, s in sizes.items()}


def ffn_torch(x, up, down, gate=None, up_bias=None, down_bias=None, activation="gelu"):
    """The expression that models are written in."""
    hidden = F.linear(x, up, up_bias)
    act = ACTIVATIONS[activation]
    return F.linear(act(hidden) if gate is None else act(F.linear(x, gate)) * hidden, down, down_bias)


def ffn_onednn(x, up, down, gate=None, up_bias=None, down_bias=None, activation="gelu"):
    """The same on weights that oneDNN has packed for this many tokens, the activation in its epilogue.

    The packing is outside the clock, and doubles the weights' memory.
    """
    linear, plain = torch.ops.mkldnn._linear_pointwise, ("none", [], "")
    up, down, gate = (
        None if w is None else torch.ops.mkldnn._reorder_linear_weight(w, len(x)) for w in (up, down, gate)
    )

    def run():
        if gate is None:
            return linear(linear(x, up, up_bias, *ONEDNN[activation]), down, down_bias, *plain)
        hidden = linear(x, gate, None, *ONEDNN[activation]).mul_(linear(x, up, None, *plain))
        return linear(hidden, down, None, *plain)

    return run


def _relative_error(results: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    pairs = zip(results, truth, strict=True)
    return max(((a.double() - t).abs().max() / t.abs().max()).item() for a, t in pairs)


def shared_ffn_forward_case(
    size: str, shape: str, tokens: int, dtype: torch.dtype, peers: dict[str, Callable] | None = None
) -> Case:
    """Without gradients. `peers`: further candidates, (x, **weights, activation) to a function without arguments."""

    def build(device: str) -> Job:
        weights = ffn_weights(shape, dtype, device)
        x = torch.randn(tokens, FFN_SHAPES[shape][0], generator=torch.Generator().manual_seed(1)).to(device, dtype)
        options = {"activation": FFN_SHAPES[shape][2]}
        runs = {
            "ffmerge": lambda: ff.ops.shared_ffn(x, **weights, **options),
            "torch": lambda: ffn_torch(x, **weights, **options),
        }
        with torch.inference_mode():
            if device == "cpu" and dtype == torch.float32:
                runs["oneDNN prepacked"] = ffn_onednn(x, **weights, **options)
            runs |= {name: make(x, **weights, **options) for name, make in (peers or {}).items()}
        return _ffn_job(runs, ffn_torch(x.double(), **_double(weights), **options))

    return Case("shared_ffn", f"{shape} forward T{tokens} {_short(dtype)}", size, build)


def shared_ffn_layers_case(size: str, shape: str, tokens: int, dtype: torch.dtype, layers: int = 24) -> Case:
    """Without gradients, `layers` times one after the other, on CUDA in one graph: a tied FFN in a decode step."""

    def build(device: str) -> Job:
        weights = ffn_weights(shape, dtype, device)
        x = torch.randn(tokens, FFN_SHAPES[shape][0], generator=torch.Generator().manual_seed(1)).to(device, dtype)
        options = {"activation": FFN_SHAPES[shape][2]}
        torch_compile = cuda_graphs.compiled(partial(ffn_torch, **options), device)
        once = {
            "ffmerge": lambda: ff.ops.shared_ffn(x, **weights, **options),
            "torch": lambda: ffn_torch(x, **weights, **options),
            "torch.compile": lambda: torch_compile(x, **weights),
        }
        with torch.inference_mode():
            runs = {name: cuda_graphs.calls(run, layers, device) for name, run in once.items()}
        return _ffn_job(runs, ffn_torch(x.double(), **_double(weights), **options))

    return Case("shared_ffn", f"{shape} forward x{layers} T{tokens} {_short(dtype)}", size, build)


def _ffn_job(runs: dict[str, Callable], truth: torch.Tensor) -> Job:
    def inference(run):
        def once():
            with torch.inference_mode():
                return run()

        return once

    candidates = {name: inference(run) for name, run in runs.items()}
    plain = _relative_error([candidates["torch"]()], [truth])
    few_ulps = 8 * torch.finfo(candidates["torch"]().dtype).eps
    return Job(candidates, lambda y: _relative_error([y], [truth]), limit=2 * plain + few_ulps)


def shared_ffn_training_case(size: str, shape: str, tokens: int, dtype: torch.dtype, forward: bool = True) -> Case:
    """Two layers that share the FFN: forward and backward, or (`forward` False) backward alone."""

    def build(device: str) -> Job:
        activation = FFN_SHAPES[shape][2]
        g = torch.Generator().manual_seed(1)
        draw = [torch.randn(tokens, FFN_SHAPES[shape][0], generator=g).to(device, dtype) for _ in range(4)]

        def steps(function, kind=dtype):
            xs = [x.detach().to(kind).clone().requires_grad_() for x in draw[:2]]
            dys = [dy.to(kind) for dy in draw[2:]]
            weights = {n: w.to(kind).requires_grad_() for n, w in ffn_weights(shape, dtype, device).items()}
            leaves = [*xs, *weights.values()]

            def outputs():
                return [function(x, **weights, activation=activation) for x in xs]

            kept = None if forward else outputs()

            def run():
                for leaf in leaves:
                    leaf.grad = None
                torch.autograd.backward(kept or outputs(), dys, retain_graph=not forward)
                return [leaf.grad for leaf in leaves]

            return run

        truth = steps(ffn_torch, torch.float64)()
        candidates = {
            "ffmerge": steps(ff.ops.shared_ffn),
            "ffmerge, recompute full": steps(partial(ff.ops.shared_ffn, recompute="full")),
            "torch": steps(ffn_torch),
        }
        if size == "large":
            candidates["torch.compile"] = steps(torch.compile(ffn_torch, dynamic=False))
        plain = _relative_error(candidates["torch"](), truth)
        return Job(candidates, lambda r: _relative_error(r, truth), limit=2 * plain + 8 * torch.finfo(dtype).eps)

    name = f"{shape} {'training' if forward else 'backward'} T2x{tokens} {_short(dtype)}"
    return Case("shared_ffn", name, size, build)


def _double(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: w.double() for n, w in weights.items()}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


FP32, BF16 = torch.float32, torch.bfloat16
CASES = [
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
    *(assignment_case("small", kind, 512) for kind in ("noise", "related", "dead")),
    *(assignment_case("full", kind, 3072) for kind in ("noise", "related", "dead", "ffn", "dead ffn")),
    projection_case("small", (1024, 256), (512, 128), FP32),
    projection_case("small", (256, 256), (128, 128), BF16),
    projection_step_case("small", 256, 1024, (128, 512), batches=4, tokens=256, dtype=FP32),
    projection_case("full", (4096, 1024), (2048, 512), FP32),
    projection_case("full", (1024, 4096), (512, 2048), FP32),
    projection_case("full", (1024, 1024), (512, 512), FP32),
    projection_case("full", (1024, 1024), (512, 512), BF16),
    *(projection_step_case("full", 1024, 4096, (512, 2048), n, tokens=1024, dtype=FP32) for n in (1, 4, 16)),
    *(shared_ffn_forward_case("small", "gpt2", tokens, FP32) for tokens in (1, 4, 8)),
    shared_ffn_forward_case("small", "gpt2", 4, BF16),
    shared_ffn_training_case("small", "gpt2", 128, FP32),
    *(
        shared_ffn_forward_case("full", shape, tokens, dtype)
        for shape in FFN_SHAPES
        for dtype in (FP32, BF16)
        for tokens in (1, 2, 4, 8, 16)
    ),
    *(shared_ffn_forward_case("full", shape, 128, BF16) for shape in ("gpt2", "llama-1b")),
    *(shared_ffn_forward_case("full", "gpt2", tokens, FP32) for tokens in (32, 128, 512, 2048, 8192)),
    shared_ffn_forward_case("full", "llama-8b", 128, FP32),
    *(shared_ffn_forward_case("full", shape, 512, FP32) for shape in ("vit-b", "gpt2-large", "llama-1b")),
    *(
        shared_ffn_training_case("full", shape, tokens, FP32, forward)
        for shape, tokens in (("gpt2", 128), ("gpt2", 512), ("gpt2", 2048), ("vit-b", 512), ("llama-1b", 256))
        for forward in (True, False)
    ),
    shared_ffn_training_case("full", "gpt2", 128, BF16),
    shared_ffn_layers_case("large", "gpt2", 1, BF16),
    *(shared_ffn_layers_case("large", "gpt2-large", tokens, BF16) for tokens in (1, 4, 16)),
    shared_ffn_layers_case("large", "llama-1b", 1, BF16),
    *(shared_ffn_layers_case("large", shape, 8192, BF16, layers=1) for shape in ("gpt2-large", "llama-1b")),
    *(shared_ffn_training_case("large", shape, 8192, BF16) for shape in ("gpt2-large", "llama-1b")),
]


def cases(op: str | None = None, size: str | None = None) -> list[Case]:
    """The cases of one op (or of all) and one size (or of both)."""
    return [c for c in CASES if op in (None, c.op) and size in (None, c.size)]


def ops() -> list[str]:
    """The ops that have cases, in the order of the table."""
    return list(dict.fromkeys(case.op for case in CASES))
