"""What a GPU run must show, in minutes: one list, one CSV, each row behind its own gate; a failed row stops no other.

    python -m benchmarks.gpu               # on a GPU: results/<machine>.csv (make gpu: after the CUDA tests)
    python -m benchmarks.gpu --rehearse    # anywhere: the same list at tiny sizes, kernels in Triton's interpreter

The list: correlation beside cuBLAS with float32 results, self products, sketches with the bytes that they move,
assignment with the copy to the host counted, an FFN of a decode step inside one CUDA graph, projection beside its
products by cuBLAS. "GB/s" and "of copy" are the bytes that a row cannot avoid, by its time, and beside the card's own
copy.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path


def run_list(tiny: bool) -> list:
    """The cases; `tiny`: for the interpreter."""
    import torch

    from benchmarks.ops import assignment, correlation, projection, shared_ffn

    bf16, rounded, accurate = torch.bfloat16, correlation.ROUNDED, correlation.ACCURATE
    widths, tokens, rows = ((64, 96), 128, 64) if tiny else ((1280, 3072, 5120, 14336), 4096, 1024)
    cases = []
    for width in widths:
        options = {"layers": 2, "batches": 1, "tokens": tokens, "width": width, "dtype": bf16}
        cases.append(correlation.correlation_case("gpu", **options, peers=rounded))
        cases.append(correlation.correlation_case("gpu", **options | {"layers": 1}, pairs="self", peers=rounded))
        cases.append(correlation.sketch_case("gpu", 2 * tokens, width, bf16, rows))
    some = widths[1]
    cases.append(correlation.correlation_case("gpu", 3, 1, tokens, some, torch.float32, peers=accurate))
    cases.append(correlation.sketch_case("gpu", 2 * tokens, some, torch.float32, rows))
    for kind in ("related", "ffn"):
        cases.append(assignment.assignment_case("gpu", kind, some, peers=assignment.gpu_peers()))
    for shape in ("tiny",) if tiny else ("gpt2-large", "llama-1b", "llama-8b"):
        layers = {"layers": 2 if tiny else 24, "compiled": False}
        cases += [shared_ffn.shared_ffn_layers_case("gpu", shape, m, bf16, **layers) for m in (1, 4, 16)]
    for shape in ("tiny",) if tiny else ("gpt2", "llama-1b"):
        cases.append(shared_ffn.shared_ffn_training_case("gpu", shape, 16 if tiny else 2048, bf16))
    shapes = [((64, 96), (32, 48))] if tiny else [((4096, 4096), (2048, 2048)), ((14336, 4096), (7168, 2048))]
    cases += [projection.projection_case("gpu", shape, kept, bf16) for shape, kept in shapes]
    d, f = (64, 96) if tiny else (2048, 8192)
    cases.append(projection.projection_step_case("gpu", d, f, (d // 2, f // 2), 1, 16 if tiny else 4096, bf16))
    return cases


def main(argv: list[str] | None = None) -> int:
    """Exit 1 where a row was wrong or failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in Triton's interpreter, on the CPU")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no further row after so many")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output", type=Path, help="CSV file; default benchmarks/results/<machine>.csv")
    args = parser.parse_args(argv)
    if args.rehearse and os.environ.get("TRITON_INTERPRET") != "1":  # to be set before triton is imported
        command = [sys.executable, "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode

    from benchmarks.run import time_cases
    from ffmerge_fast.support.machine import why_no_gpu

    if not args.rehearse and (reason := why_no_gpu()):
        print(f"error: {reason}; --rehearse tries the list without one", file=sys.stderr)
        return 1
    args.device = "cpu" if args.rehearse else "cuda"
    if args.rehearse:
        args.runs = 1
        args.output = args.output or Path(os.devnull)
    end = time.monotonic() + 60 * args.minutes
    return time_cases(run_list(args.rehearse), args, until=end)


if __name__ == "__main__":
    sys.exit(main())
