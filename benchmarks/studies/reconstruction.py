"""Time and memory of reconstructing a large student: a random Llama of 16 layers, d_model 1536, d_ff 4096, half kept.

    python -m benchmarks.studies.reconstruction [--layers 16] [--d-model 1536] [--tokens 2048]

Time is that of the walk, in passes of the teacher over the same tokens (measured before it, in the same process), and
the share of it that the solves take. Memory is the peak above both models, beside its bound: one block of each model,
the streams 2 · tokens · (d + d'), and the moments of the widest matrix with the four matrices that its solution needs.
Exit 1 if the peak is above the bound, or the walk without its solves above three passes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import ffmerge_fast as ff
from benchmarks.harness import measure
from benchmarks.run import RESULTS, write
from benchmarks.studies.pipeline import PeakMemory, resident
from ffmerge_fast.projecting import fits
from ffmerge_fast.support.tables import format_table

_BATCH, _LENGTH = 4, 128


def model_of(args: argparse.Namespace) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=args.d_model, intermediate_size=args.d_model * 8 // 3, num_hidden_layers=args.layers,
        num_attention_heads=args.d_model // 64, num_key_value_heads=args.d_model // 128, vocab_size=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Solves:
    """Seconds that the solutions take, the moments apart."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self) -> Solves:
        self._plain = {name: getattr(fits.Fits, name) for name in ("readers", "writer")}
        for name, method in self._plain.items():
            setattr(fits.Fits, name, lambda *args, method=method: self._add(timed(lambda: method(*args))))
        return self

    def __exit__(self, *exception) -> None:
        for name, method in self._plain.items():
            setattr(fits.Fits, name, method)

    def _add(self, seconds: float) -> None:
        self.seconds += seconds


def row_of(args: argparse.Namespace) -> dict[str, str]:
    model = model_of(args)
    generator = torch.Generator().manual_seed(1)
    shape = (args.tokens // _LENGTH, _LENGTH)
    batches = [{"input_ids": ids} for ids in torch.randint(0, 8192, shape, generator=generator).split(_BATCH)]
    projector = ff.project(model, 0.5)
    student = projector.student
    with torch.no_grad():
        forward = timed(lambda: [model(**batch, use_cache=False) for batch in batches])
    base = resident()
    with PeakMemory() as memory, Solves() as solves:
        walk = timed(lambda: projector.reconstruct_(batches))
    peak, bound = (memory.peak - base) / 2**20, _bound(model, student, args.tokens) / 2**20
    return {
        "op": "reconstruction", "case": f"{args.layers} layers, d_model {args.d_model}, {args.tokens} tokens",
        "forward_s": f"{forward:.1f}", "walk_s": f"{walk:.1f}", "solves_s": f"{solves.seconds:.1f}",
        "passes": f"{(walk - solves.seconds) / forward:.2f}", "peak_mib": f"{peak:.0f}", "bound_mib": f"{bound:.0f}",
    }  # fmt: skip


def _bound(model: torch.nn.Module, student: torch.nn.Module, tokens: int) -> float:
    """Bytes: see above. Moments are kept in float32, solutions made in float64."""
    block = sum(p.numel() * 4 for m in (model, student) for p in m.model.layers[0].parameters())
    d, small, wide = model.config.hidden_size, student.config.hidden_size, student.config.intermediate_size
    moments = wide * (wide + small) * 4 + 4 * wide * wide * 8
    return block + 2 * tokens * (d + small) * 4 + moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--d-model", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    row, header = row_of(args), measure.machine()
    print(format_table([*row], [[*row.values()]]))
    write(RESULTS / f"reconstruction_{measure.slug(header['machine'])}.csv", header, [row])
    if float(row["peak_mib"]) > float(row["bound_mib"]) or float(row["passes"]) > 3:
        raise SystemExit("the walk takes more memory or time than it may")


if __name__ == "__main__":
    main()
