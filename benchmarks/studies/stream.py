"""Decode steps of a model whose weights are streamed from disk: untied, and with windows of tied FFNs, same streamer.

`python -m benchmarks.studies.stream` builds 12 layers of GPT-2 Large's width (random weights), ties 4, 6 and 12 FFNs,
saves all models under TMPDIR, and times decode steps under one budget: what the untied model needs to load a block
while another one runs. Logits must be bit-equal to the model's in memory before any time is taken. Wall time, in turns,
until all reads that a step began have ended; beside it the step of the same model in memory ("resident") and the same
reads while nothing is computed ("read"): a step takes at least the longer of the two, which is "of the bound" = 1.
Before every step the kernel is asked to drop the files from its page cache (`--keep-cache`: it is not); a cache below
the machine, of a virtual disk for instance, cannot be dropped from here, so the GB/s are printed, too.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import ffmerge_fast as ff
from benchmarks.harness import measure
from benchmarks.run import RESULTS, write
from ffmerge_fast.support.tables import format_table


@dataclass
class Side:
    """One streamed model: `window` of its FFNs are one (0: none are)."""

    window: int
    model: nn.Module
    resident: nn.Module  # the same in memory
    stream: ff.WeightStream
    files: list[Path]
    token: Tensor
    wanted: Tensor
    past: dict[int, object] = field(default_factory=dict)

    def step(self, model: nn.Module) -> Tensor:
        """One decode step; the cache grows by one token."""
        with torch.no_grad():
            output = model(self.token, past_key_values=self.past.get(id(model)), use_cache=True)
        self.past[id(model)] = output.past_key_values
        return output.logits

    def streamed(self) -> None:
        """A step, and what it began to read for the next one."""
        self.step(self.model)
        self.stream._loader.wait()

    def read(self) -> None:
        """What a step reads, parcel by parcel."""
        for parcel in self.stream._parcels:
            self.stream._source.load(parcel.weights)

    def parts(self, keep_cache: bool) -> dict[str, float]:
        """Seconds of a step, of the same in memory, and of its reads alone."""
        seconds = {}
        for name, run in (("step", self.streamed), ("resident", lambda: self.step(self.resident)), ("read", self.read)):
            if not keep_cache:
                self.drop_cache()
            start = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - start
        return seconds

    def drop_cache(self) -> None:
        for path in self.files:
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def main(argv: list[str] | None = None) -> int:
    """Print and write the table; exit 1 where streamed logits differ."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    header = measure.machine()
    case = f"{args.layers} layers, d_model {args.width}, d_ff {4 * args.width}, decode, page cache "
    case += "kept" if args.keep_cache else "dropped"
    print("\n".join(f"# {key}: {value}" for key, value in header.items()) + f"\n# {case}")
    with tempfile.TemporaryDirectory(prefix="ffmerge-bench-") as folder:
        sides = [build(args, window, Path(folder) / str(window)) for window in (0, *args.windows)]
        wrong = [side.window for side in sides if not torch.equal(side.step(side.model), side.wanted)]
        if wrong:
            print(f"RED: streamed logits differ with windows {wrong}", file=sys.stderr)
            return 1
        rows = compare(sides, args)
        for side in sides:
            side.stream.close()
    print(format_table(list(rows[0]), [list(row.values()) for row in rows]))
    path = args.output or RESULTS / f"stream_{measure.slug(header['machine'])}.csv"
    write(path, header, [{"op": "stream", "case": case, **row} for row in rows])
    print(f"# written: {path}")
    return 0


def build(args: argparse.Namespace, window: int, folder: Path) -> Side:
    """A model with random weights, saved to `folder`, synced to disk and streamed from there."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=args.layers,
        n_embd=args.width,
        n_head=args.width // 64,
        vocab_size=1000,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    budget = untied_budget(model)
    if window:
        start = (args.layers - window) // 2
        model = ff.tie_without_average(model, f"{start}-{start + window - 1}")
    token = torch.tensor([[7]])
    with torch.no_grad():
        wanted = model(token, use_cache=True).logits
    ff.save_pretrained(model, folder)
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # pages that are not on disk yet cannot be dropped
    resident = copy.deepcopy(model)
    stream = ff.stream_(model, "cpu", "disk", budget, folder=folder)
    gc.collect()
    return Side(window, model, resident, stream, files, token, wanted)


def untied_budget(model: nn.Module) -> int:
    """Two blocks beside what lies outside of the blocks."""
    blocks = model.transformer.h
    outside = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in blocks.parameters())
    return outside + sum(b.nbytes for b in model.buffers()) + 2 * sum(p.nbytes for p in blocks[0].parameters())


def compare(sides: list[Side], args: argparse.Namespace) -> list[dict]:
    """One row per side: medians over all turns, of the times and of the ratios to the untied side in the same turn."""
    seconds: dict[int, list[dict[str, float]]] = {side.window: [] for side in sides}
    read = {}
    for _ in range(args.runs):
        for side in sides:
            before = side.stream.read_bytes
            seconds[side.window].append(side.parts(args.keep_cache))
            read[side.window] = side.stream.read_bytes - before
    rows = []
    for side in sides:
        runs, ratio = seconds[side.window], read[0] / read[side.window]
        own = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        faster = {
            part: statistics.median(u[part] / run[part] for u, run in zip(seconds[0], runs, strict=True))
            for part in own
        }
        steps = [run["step"] for run in runs]
        rows.append(
            {
                "tied FFNs": side.window,
                "step s": f"{own['step']:.3f}",
                "min s": f"{min(steps):.3f}",
                "max s": f"{max(steps):.3f}",
                "resident s": f"{own['resident']:.3f}",
                "read s": f"{own['read']:.3f}",
                "of the bound": f"{max(own['read'], own['resident']) / own['step']:.2f}",
                "MB read": f"{read[side.window] / 1e6:.1f}",
                "GB/s": f"{read[side.window] / 1e9 / own['step']:.2f}",
                "times faster": f"{faster['step']:.2f}",
                "fewer bytes": f"{ratio:.2f}",
                "share reached": f"{faster['step'] / ratio:.2f}",
                "reads faster": f"{faster['read']:.2f}",
                "resident MB": f"{side.stream.fixed_bytes / 1e6:.1f}",
                "runs": len(steps),
            }
        )
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.stream", description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1280, help="d_model; d_ff is four times as much")
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 6, 12], help="how many FFNs are tied")
    parser.add_argument("--runs", type=int, default=21, help="decode steps of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-cache", action="store_true", help="files may lie in the page cache")
    parser.add_argument("--output", type=Path, help="CSV file; default benchmarks/results/stream_<machine>.csv")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
