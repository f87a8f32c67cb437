"""One FFN, and what tying it buys: ours, the torch expression, oneDNN on packed weights, torch.compile.

`pytest benchmarks/ops/bench_shared_ffn.py`: a group per small case; every result is checked before it is timed.
`python -m benchmarks.run --op shared_ffn --size full`: the shapes of real models, 1 to 2048 tokens.
`python -m benchmarks.ops.bench_shared_ffn`: torch.compile as a peer, and whole decode steps of a model like GPT-2, tied
and untied, into benchmarks/results/<machine>.csv; memory of training into benchmarks/results/shared_ffn_memory.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ffmerge_fast as ff
from benchmarks import run
from benchmarks.harness import measure
from benchmarks.harness.small import small_jobs, time_candidate
from benchmarks.ops import BF16, FP32, Case, Job
from benchmarks.ops.shared_ffn import FFN_SHAPES, ffn_torch, ffn_weights, shared_ffn_forward_case
from ffmerge_fast.support.tables import format_table

CANDIDATES = ["ffmerge", "ffmerge, recompute full", "torch", "oneDNN prepacked"]
LAYERS = {"gpt2": 12, "gpt2-medium": 24, "gpt2-large": 36}
CONTEXT = 128  # tokens in the cache of a decode step


job = small_jobs("shared_ffn")


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_shared_ffn(benchmark, job, candidate):
    time_candidate(benchmark, job, candidate)


# --- torch.compile


def compiled(x: Tensor, activation: str, **weights: Tensor) -> Callable[[], Tensor]:
    """The torch expression through Inductor, for this shape; compiling is outside the clock."""
    function = torch.compile(partial(ffn_torch, activation=activation), dynamic=False)
    function(x, **weights)
    return lambda: function(x, **weights)


def compile_cases() -> list[Case]:
    peers = {"torch.compile": compiled}
    shapes = [("gpt2", t, FP32) for t in (1, 4, 8, 512)] + [("gpt2", t, BF16) for t in (1, 4)]
    return [shared_ffn_forward_case("full", *shape, peers=peers) for shape in shapes]


# --- a decode step


class Decoder:
    """Layers of GPT-2's shape with a key and value cache: one step of one token for each of `batch` sequences.

    Args:
        shape: key of `FFN_SHAPES`.
        groups: how many different FFNs there are; layers in a row share one.
    """

    def __init__(self, shape: str, batch: int, dtype: torch.dtype, groups: int):
        self.d, d_ff, self.activation, _ = FFN_SHAPES[shape]
        layers, g = LAYERS[shape], torch.Generator().manual_seed(0)

        def weight(*size: int) -> Tensor:
            return (torch.randn(size, generator=g) / size[-1] ** 0.5).to(dtype)

        self.qkv = [weight(3 * self.d, self.d) for _ in range(layers)]
        self.out = [weight(self.d, self.d) for _ in range(layers)]
        ffns = [{"up": weight(d_ff, self.d), "down": weight(self.d, d_ff)} for _ in range(groups)]
        self.ffn = [ffns[i * groups // layers] for i in range(layers)]
        heads = (batch, self.d // 64, CONTEXT, 64)
        self.cache = [[torch.randn(heads, generator=g).to(dtype) for _ in range(2)] for _ in range(layers)]
        self.x = torch.randn(batch, self.d, generator=g).to(dtype)

    @torch.inference_mode()
    def step(self, ffn: Callable) -> Tensor:
        x, batch = self.x, len(self.x)
        for qkv, out, weights, (keys, values) in zip(self.qkv, self.out, self.ffn, self.cache, strict=True):
            q, k, v = F.linear(F.layer_norm(x, (self.d,)), qkv).view(batch, 3, -1, 1, 64).unbind(1)
            keys[:, :, -1:], values[:, :, -1:] = k, v
            attention = F.scaled_dot_product_attention(q, keys, values)
            x = x + F.linear(attention.reshape(batch, self.d), out)
            x = x + ffn(F.layer_norm(x, (self.d,)), **weights, activation=self.activation)
        return x


def decode_case(shape: str, batch: int, dtype: torch.dtype) -> Case:
    """Every layer with an FFN of its own; half of all layers in one group; all layers in one."""

    def build(device: str) -> Job:
        layers = LAYERS[shape]
        models = {"untied": layers, "half tied": None, "all tied": 1}
        models = {name: Decoder(shape, batch, dtype, groups or layers) for name, groups in models.items()}
        half = models["half tied"].ffn
        half[layers // 4 : layers // 4 + layers // 2] = [half[layers // 4]] * (layers // 2)
        expected = {name: model.step(ffn_torch).double() for name, model in models.items()}

        def candidate(name: str, ffn: Callable) -> Callable:
            return lambda: (name, models[name].step(ffn))

        def error(result: tuple[str, Tensor]) -> float:
            name, x = result
            return ((x.double() - expected[name]).abs().max() / expected[name].abs().max()).item()

        candidates = {"ffmerge": candidate("half tied", ff.ops.shared_ffn)}
        candidates |= {f"ffmerge, {name}": candidate(name, ff.ops.shared_ffn) for name in ("untied", "all tied")}
        candidates |= {f"torch, {name}": candidate(name, ffn_torch) for name in models}
        return Job(candidates, error, limit=64 * torch.finfo(dtype).eps)

    return Case("shared_ffn", f"{shape} decode step B{batch} {str(dtype)[6:]}", "full", build)


# --- memory of training


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that torch's CPU allocator held at once during `work`, above what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def training_memory(shape: str, tokens: int, layers: int) -> list[dict]:
    """Activations and gradients of `layers` residual layers that share an FFN: forward and backward."""
    d, _, activation, _ = FFN_SHAPES[shape]
    weights = {n: w.requires_grad_() for n, w in ffn_weights(shape, FP32, "cpu").items()}
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(1))

    def training(ffn: Callable) -> list[Tensor]:
        for w in weights.values():
            w.grad = None
        y = x
        for _ in range(layers):
            y = y + ffn(F.layer_norm(y, (d,)), **weights, activation=activation)
        y.square().mean().backward()
        return [w.grad for w in weights.values()]

    ways = {"torch": ffn_torch}
    ways |= {f"ffmerge, {p}": partial(ff.ops.shared_ffn, recompute=p) for p in ("none", "activation", "full")}
    expected = [g.clone() for g in training(ffn_torch)]
    for name, ffn in ways.items():
        errors = [((g - e).abs().max() / e.abs().max()).item() for g, e in zip(training(ffn), expected, strict=True)]
        if not max(errors) <= 1e-4:
            raise measure.RedGate(f"{name}: gradients differ by {max(errors):.1e}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, ffn in ways.items():
            start = time.thread_time_ns()
            training(ffn)
            times[name].append((time.thread_time_ns() - start) / 1e6)
    rows = [(name, statistics.median(times[name]), peak_bytes(partial(training, ffn))) for name, ffn in ways.items()]
    _, plain_ms, plain_bytes = rows[0]
    return [
        {
            "case": f"{shape} {layers} tied layers T{tokens} float32",
            "candidate": name,
            "ms": f"{ms:.1f}",
            "time_ratio": f"{ms / plain_ms:.2f}",
            "peak_MiB": f"{peak / 2**20:.1f}",
            "memory_ratio": f"{peak / plain_bytes:.2f}",
        }
        for name, ms, peak in rows
    ]


def write_memory(rows: list[dict]) -> None:
    machine = measure.machine()
    with (run.RESULTS / "shared_ffn_memory.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | machine for row in rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.bench_shared_ffn", description=__doc__)
    parser.add_argument(
        "--parts", nargs="+", default=["compile", "decode", "memory"], help="of compile, decode, memory"
    )
    parser.add_argument("--shapes", nargs="+", default=["gpt2"], choices=LAYERS, help="of decode steps and of memory")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output", type=Path, help="CSV file; default benchmarks/results/<machine>.csv")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit 1 where a result was wrong."""
    args = parse(argv)
    torch.set_num_threads(1)
    todo = compile_cases() if "compile" in args.parts else []
    if "decode" in args.parts:
        kinds = [(b, t) for t in (FP32, BF16) for b in (1, 4)]
        todo += [decode_case(shape, *kind) for shape in args.shapes for kind in kinds]
    red = run.time_cases(todo, args) if todo else 0
    if "memory" in args.parts:
        memory = [row for shape in args.shapes for row in training_memory(shape, 1024, 6)]
        print(format_table(list(memory[0]), [list(row.values()) for row in memory]))
        write_memory(memory)
    return red


if __name__ == "__main__":
    sys.exit(main())
