"""Collect, assign and merge on a model of GPT-2 Large's shape, beside the published algorithm, in one process.

`python -m benchmarks.studies.pipeline` builds 36 layers (d_model 1280, d_ff 5120, random weights) and merges a window
of 12: with sketched and with exact correlations, and as published. --layers, --width, --window and --tokens cut it
down. All see the same model and the same tokens, and what their permutations match, by exact correlations, is compared
before any ratio is printed. Then what all windows of that size take. The table goes to results/pipeline_<machine>.csv.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import ffmerge_fast as ff
from benchmarks.harness import measure
from benchmarks.run import RESULTS, write
from ffmerge_fast.support.tables import format_table

STAGES = ("collect", "assign", "merge")


@dataclass
class Stages:
    """Seconds and peak memory above the start (MiB) of each stage; `forward`: seconds of the bare forward passes."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    forward: float = 0.0

    @contextmanager
    def stage(self, name: str, base: int) -> Iterator[None]:
        with PeakMemory() as memory:
            start = clock()
            yield
            self.seconds[name] = clock() - start
        self.peak[name] = (memory.peak - base) / 2**20


class PeakMemory:
    """The largest resident size of this process while the context is open, sampled every 5 ms."""

    def __enter__(self) -> PeakMemory:
        self.peak, self._done = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, resident())

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, resident())


def resident() -> int:
    """Resident memory of this process in bytes, without mapped files."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def release_memory() -> None:
    """Give freed memory back to the system, so that the next side does not live on what this one left."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def clock() -> float:
    """CPU time of this process with one torch thread (others on the machine do not count), else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    """Print seconds and peak memory per stage, and both sides' totals. Exit 1 if the results differ."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    header = measure.machine()
    print("\n".join(f"# {key}: {value}" for key, value in header.items()))
    case = (
        f"{args.layers} layers, d_model {args.width}, d_ff {4 * args.width}, window {args.window} from layer "
        f"{args.start}, {args.tokens} tokens in batches of {args.batch} x {args.length}"
    )
    print(f"# {case}")
    layers = list(range(args.start, args.start + args.window))
    sides, scores = {}, {}
    model, batches = build(args)
    sides["sketch"], plan = run_ffmerge(model, batches, layers, args.tokens, args.sketch)
    print(f"# {plan.sketched}")
    del model
    model, batches = rebuilt(args)
    sides["exact"], exact = run_ffmerge(model, batches, layers, args.tokens, None)
    del model
    model, batches = rebuilt(args)
    sides["published"], correlations, columns = run_published(model, batches, layers, args.tokens)
    del model
    scores["published"] = matched(correlations, columns)
    for name, made in (("sketch", plan), ("exact", exact)):
        scores[name] = matched(correlations, [made.groups[0].permutations[i] for i in layers[1:]])
    del correlations
    release_memory()
    sides["exact"].forward = sides["sketch"].forward = forward_seconds(args, layers[-1])
    sides["published"].forward = forward_seconds(args)
    rows = compare(sides)
    print(format_table(list(rows[0]), [list(row.values()) for row in rows]))
    print("# share of the correlation matched: " + ", ".join(f"{name} {score:.6f}" for name, score in scores.items()))
    print(f"# peak of the whole process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if not abs(scores["exact"] - scores["published"]) <= 1e-4 * abs(scores["published"]):
        print("RED: the exact sides match different correlations", file=sys.stderr)
        return 1
    if scores["sketch"] < 0.98 * scores["published"]:
        print("RED: the sketch loses more than 2 % of the matched correlation", file=sys.stderr)
        return 1
    print(f"# {all_windows(args)}")
    path = args.output or RESULTS / f"pipeline_{measure.slug(header['machine'])}.csv"
    write(path, header, [{"op": "pipeline", "case": case, **row} for row in rows])
    print(f"# written: {path}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.pipeline", description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--width", type=int, default=1280, help="d_model; d_ff is four times as much")
    parser.add_argument("--window", type=int, default=12)
    parser.add_argument("--start", type=int, default=None, help="first layer of the window; default: in the middle")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sketch", type=int, default=1024, help="rows of each layer's sketch")
    parser.add_argument("--output", type=Path, help="CSV file; default benchmarks/results/pipeline_<machine>.csv")
    args = parser.parse_args(argv)
    if args.start is None:
        args.start = (args.layers - args.window) // 2
    return args


def build(args: argparse.Namespace) -> tuple[nn.Module, list[dict]]:
    """A random GPT-2 and its inputs; the FFNs are noisy permutations of one, as layers of trained models are alike."""
    from transformers import GPT2Config, GPT2LMHeadModel

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=args.layers,
        n_embd=args.width,
        n_head=args.width // 64,
        vocab_size=1000,
        n_positions=args.length,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    blocks = model.transformer.h
    first = [p.detach().clone() for p in (blocks[0].mlp.c_fc.weight, blocks[0].mlp.c_proj.weight)]
    with torch.no_grad():
        for block in blocks:
            order = torch.randperm(4 * args.width, generator=generator)
            noise = [torch.randn(w.shape, generator=generator) * w.std() for w in first]
            block.mlp.c_fc.weight.copy_(first[0][:, order] + 0.7 * noise[0])
            block.mlp.c_proj.weight.copy_(first[1][order] + 0.7 * noise[1])
    tokens = args.batch * args.length
    return model, [
        {"input_ids": torch.randint(1000, (args.batch, args.length), generator=generator)}
        for _ in range(-(-args.tokens // tokens))
    ]


def rebuilt(args: argparse.Namespace) -> tuple[nn.Module, list[dict]]:
    """The same model again, once what the last side left is given back."""
    release_memory()
    return build(args)


def forward_seconds(args: argparse.Namespace, last: int | None = None) -> float:
    """Seconds of the forward passes alone: up to the features of layer `last`, or to the end."""
    model, batches = build(args)
    if last is not None:
        model.transformer.h[last].mlp.c_fc.register_forward_hook(stop)
    start = clock()
    with torch.no_grad():
        for batch in batches:
            with suppress(Stop):
                model(**batch)
    return clock() - start


class Stop(Exception):
    """Ends a forward pass."""


def stop(*_) -> None:
    raise Stop


def run_ffmerge(model, batches: list[dict], layers: list[int], tokens: int, sketch: int | None):
    """(stages, plan)"""
    stages, base = Stages(), resident()
    window = f"{layers[0]}-{layers[-1]}"
    with stages.stage("collect", base):
        stats = ff.collect(model, batches, layers=window, max_tokens=tokens, sketch=sketch)
    with stages.stage("assign", base):
        plan = ff.plan(stats, layers=window)
    with stages.stage("merge", base):
        ff.merge_(model, plan)
    return stages, plan


def all_windows(args: argparse.Namespace) -> str:
    """Seconds and bytes of one sketched pass over all layers, and of ranking every window, beside the exact band."""
    model, batches = build(args)
    start, base = clock(), resident()
    stats = ff.collect(model, batches, window=args.window, max_tokens=args.tokens, sketch=args.sketch)
    collected, kept = clock() - start, (resident() - base) / 2**20
    pairs = sum(map(len, stats.settings["pairs"].values()))
    width = 4 * args.width
    stats.correlation(0, 1)
    start = clock()
    stats.alignment(0, args.window - 1)
    pair = clock() - start
    return (
        f"all windows of {args.window}: {pairs} pairs; collect {collected:.1f} s with its forward passes, {kept:.0f} "
        f"MiB kept, {pair:.2f} s a pair to estimate and assign; exact products would keep "
        f"{pairs * width**2 * 4 / 2**20:.0f} MiB and take {2e-9 * pairs * width**2 * args.tokens:.0f} GFLOP"
    )


def run_published(model: nn.Module, batches: list[dict], layers: list[int], tokens: int):
    """(stages, correlations, columns) of the published algorithm for one window, without its bugs and copies.

    Reference mode: all features of a forward pass are kept; raw fp32 sums; a self product per layer for its variances;
    covariances and correlations beside the products; scipy on one matrix after the other; dense permutation matrices; k
    copies of the average.
    """
    stages, base = Stages(), resident()
    blocks = [model.transformer.h[i] for i in layers]
    with stages.stage("collect", base), torch.no_grad():
        correlations = published_correlations(model, blocks, batches, tokens)
    with stages.stage("assign", base):
        columns = [linear_sum_assignment(c.numpy(), maximize=True)[1] for c in correlations]
    with stages.stage("merge", base), torch.no_grad():
        published_merge(blocks, columns)
    return stages, correlations, [torch.from_numpy(column) for column in columns]


def matched(correlations: list[torch.Tensor], columns: list[torch.Tensor]) -> float:
    """Mean correlation of the neurons that are matched."""
    pairs = zip(correlations, columns, strict=True)
    values = [c[torch.arange(len(c)), p].double().mean().item() for c, p in pairs]
    return sum(values) / len(values)


def published_correlations(model, blocks, batches, tokens) -> list[torch.Tensor]:
    features: dict[int, torch.Tensor] = {}
    hooks = [
        block.mlp.c_fc.register_forward_hook(lambda _, __, out, i=i: features.__setitem__(i, out.flatten(0, 1)))
        for i, block in enumerate(blocks)
    ]
    count, sums, own, cross = 0, {}, {}, {}

    def add(store: dict, key: int, value: torch.Tensor) -> None:
        if key in store:
            store[key] += value
        else:
            store[key] = value

    for batch in batches:
        model(**batch)
        rows = min(tokens - count, len(features[0]))
        count += rows
        for i in range(len(blocks)):
            x = features[i][:rows]
            add(sums, i, x.sum(0))
            add(own, i, x.T @ x)
            if i:
                add(cross, i, features[0][:rows].T @ x)
    for hook in hooks:
        hook.remove()
    means = {i: s / count for i, s in sums.items()}
    variances = {i: (p / count - torch.outer(means[i], means[i])).diagonal().sqrt() for i, p in own.items()}
    covariances = {i: p / count - torch.outer(means[0], means[i]) for i, p in cross.items()}
    return [covariances[i] / torch.outer(variances[0], variances[i]) for i in range(1, len(blocks))]


def published_merge(blocks: list[nn.Module], columns: list) -> None:
    width = len(columns[0])
    sums = [
        [p.clone() for p in (b.mlp.c_fc.weight, b.mlp.c_fc.bias, b.mlp.c_proj.weight, b.mlp.c_proj.bias)]
        for b in blocks[:1]
    ][0]
    for block, column in zip(blocks[1:], columns, strict=True):
        matrix = torch.eye(width)[torch.from_numpy(column)]
        sums[0] = sums[0] + (matrix @ block.mlp.c_fc.weight.T).T
        sums[1] = sums[1] + matrix @ block.mlp.c_fc.bias
        sums[2] = sums[2] + (block.mlp.c_proj.weight.T @ matrix.T).T
        sums[3] = sums[3] + block.mlp.c_proj.bias
    for block in blocks:
        merged = (block.mlp.c_fc.weight, block.mlp.c_fc.bias, block.mlp.c_proj.weight, block.mlp.c_proj.bias)
        for parameter, total in zip(merged, sums, strict=True):
            parameter.copy_(total / len(blocks))


def compare(sides: dict[str, Stages]) -> list[dict[str, str]]:
    """A row per stage. "times faster", "of the memory": beside the published algorithm.

    "total without forward" leaves out each side's own forward passes: ours end at the window's last FFN.
    """
    totals = {name: sum(side.seconds.values()) for name, side in sides.items()}
    forward = {name: side.forward for name, side in sides.items()}
    rest = {name: totals[name] - forward[name] for name in sides}
    rows = [
        compare_stage(
            stage,
            {name: side.seconds[stage] for name, side in sides.items()},
            {name: side.peak[stage] for name, side in sides.items()},
        )
        for stage in STAGES
    ]
    peaks = {name: max(side.peak.values()) for name, side in sides.items()}
    rows += [compare_stage("total", totals, peaks), compare_stage("of it forward", forward)]
    return [*rows, compare_stage("total without forward", rest)]


def compare_stage(name: str, seconds: dict[str, float], peaks: dict[str, float] | None = None) -> dict[str, str]:
    row = {"stage": name} | {f"{side} s": f"{value:.2f}" for side, value in seconds.items()}
    for side in ("sketch", "exact"):
        row[f"{side}, times faster"] = f"{seconds['published'] / seconds[side]:.2f}"
    for side in ("sketch", "exact", "published"):
        row[f"{side} MiB"] = f"{peaks[side]:.0f}" if peaks else ""
    for side in ("sketch", "exact"):
        row[f"{side}, of the memory"] = f"{peaks[side] / peaks['published']:.3f}" if peaks else ""
    return row


if __name__ == "__main__":
    sys.exit(main())
