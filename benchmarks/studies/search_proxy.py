"""How well the proxy score ranks windows: beside the exact score, on real trained models.

    python -m benchmarks.studies.search_proxy ../shared [--models gpt2-pystdlib ...] [--sizes 2 3 4 6] [--tokens 2048]

For every window of each size: the validation loss of the model with it merged (permute, un-tuned), the proxy score, and
the mean matched correlation. Printed per size: Spearman's rank correlation of the loss with the proxy and with the
(negated) correlation, the loss of the window that each chooses, and the CPU seconds of three searches: exact with every
block run for every window (whole), exact as it is, and by proxy.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import ffmerge_fast as ff
from benchmarks.harness.measure import machine
from benchmarks.harness.render import windows_by_size
from benchmarks.studies.quality import CASES, RESULTS
from ffmerge_fast.driver import evaluate
from ffmerge_fast.support.tables import format_table

COLUMNS = (
    "model", "size", "layers", "loss", "proxy", "mean_correlation", "tokens", "whole_seconds", "exact_seconds",
    "proxy_seconds",
)  # fmt: skip


def rows_of(name: str, shared: Path, sizes: list[int], tokens: int, limit: int | None = None) -> Iterator[dict]:
    """A row per window; CPU seconds (one thread) are those of the search over all windows of that size.

    Args:
        limit: validation and calibration examples, instead of the case's.
    """
    case, model = CASES[name], ff.from_pretrained(str(shared / "models" / name))
    task = case.build(shared, model)
    calibration = list(task.batches("train", case.batch_size, shuffle=True, limit=limit or case.calibration))
    validation = list(task.batches("validation", case.batch_size, limit=limit or case.validation))
    stats = ff.collect(model, calibration, window=max(sizes))

    def validate(merged: nn.Module) -> float:
        return evaluate.loss(merged, validation)

    for size in sizes:
        by_correlation = dict(ff.plan(stats, window=size).search)  # first: the alignments are kept, nobody's time
        searches = {
            "whole": {"evaluate": validate, "prefix_memory": 0},
            "exact": {"evaluate": validate},
            "proxy": {"evaluate": "proxy", "batches": calibration, "max_tokens": tokens},
        }
        found, seconds = {}, {}
        for key, options in searches.items():
            started = time.process_time()
            found[key] = ff.search(model, stats, size, **options)
            seconds[f"{key}_seconds"] = time.process_time() - started
        whole, exact, proxy = found.values()
        if exact.search != whole.search:
            raise SystemExit(f"{name}, windows of {size}: branched scores differ from those of whole runs")
        scores = dict(proxy.search)
        for layers, loss in exact.search:
            row = {"model": name, "size": size, "layers": layers, "loss": loss, "proxy": scores[layers]}
            row |= {"mean_correlation": by_correlation[layers], "tokens": tokens}
            yield row | {key: round(value, 2) for key, value in seconds.items()}


def summary(rows: list[dict]) -> str:
    """A line per model and size."""
    headers, *lines = windows_by_size(rows)
    return format_table(headers, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="folder with models/ and data/")
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=("gpt2-pystdlib", "vit-cifar10"))
    parser.add_argument("--sizes", nargs="+", type=int, default=[2, 3, 4, 6])
    parser.add_argument("--tokens", type=int, default=2048, help="that the proxy takes")
    parser.add_argument("--out", type=Path, default=RESULTS / "search_proxy.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in args.models for row in rows_of(name, args.shared, args.sizes, args.tokens)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{summary(rows)}\n{machine()}")


if __name__ == "__main__":
    main()
