"""One FFN on a batch of tokens; or two layers that share it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import ffmerge_fast as ff
from benchmarks.harness import cuda_graphs
from benchmarks.ops import BF16, FP32, Case, Job

FFN_SHAPES = {  # d, d_ff, activation, gated
    "tiny": (64, 128, "gelu", False),  # for rehearsals
    "d128": (128, 512, "gelu", False),  # here a call's Python takes as long as its products
    "d256": (256, 1024, "gelu", False),
    "marian": (512, 2048, "silu", False),
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


def shared_ffn_layers_case(
    size: str, shape: str, tokens: int, dtype: torch.dtype, layers: int = 24, compiled: bool = True
) -> Case:
    """Without gradients, `layers` times one after the other, on CUDA in one graph: a tied FFN in a decode step.

    `compiled`: also by torch.compile, which takes minutes.
    """

    def build(device: str) -> Job:
        weights = ffn_weights(shape, dtype, device)
        x = torch.randn(tokens, FFN_SHAPES[shape][0], generator=torch.Generator().manual_seed(1)).to(device, dtype)
        options = {"activation": FFN_SHAPES[shape][2]}
        once = {
            "ffmerge": lambda: ff.ops.shared_ffn(x, **weights, **options),
            "torch": lambda: ffn_torch(x, **weights, **options),
        }
        if compiled:
            torch_compile = cuda_graphs.compiled(partial(ffn_torch, **options), device)
            once["torch.compile"] = lambda: torch_compile(x, **weights)
        with torch.inference_mode():
            runs = {name: cuda_graphs.calls(run, layers, device) for name, run in once.items()}
        nbytes = layers * sum(weight.nbytes for weight in weights.values())  # less where a cache holds them all
        return _ffn_job(runs, ffn_torch(x.double(), **_double(weights), **options), nbytes)

    return Case("shared_ffn", f"{shape} forward x{layers} T{tokens} {_short(dtype)}", size, build)


def _ffn_job(runs: dict[str, Callable], truth: torch.Tensor, nbytes: int = 0) -> Job:
    def inference(run):
        def once():
            with torch.inference_mode():
                return run()

        return once

    candidates = {name: inference(run) for name, run in runs.items()}
    plain = _relative_error([candidates["torch"]()], [truth])
    few_ulps = 8 * torch.finfo(candidates["torch"]().dtype).eps
    return Job(candidates, lambda y: _relative_error([y], [truth]), limit=2 * plain + few_ulps, nbytes=nbytes)


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


CASES = [
    *(shared_ffn_forward_case("small", "gpt2", tokens, FP32) for tokens in (1, 4, 8)),
    shared_ffn_forward_case("small", "gpt2", 4, BF16),
    shared_ffn_training_case("small", "gpt2", 128, FP32),
    *(
        shared_ffn_forward_case("full", shape, tokens, dtype)
        for shape in FFN_SHAPES
        if shape != "tiny"
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
