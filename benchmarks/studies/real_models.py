"""Merge a third of the FFNs of real trained models by the command line, and report quality and seconds per stage.

    python -m benchmarks.studies.real_models ../shared [--limit N] [--out benchmarks/results/real_models.csv]

For each model: statistics, search over all windows on validation data, then the best window merged with and without
permutation, un-tuned, and scored on test data. Models and data are described in the READMEs of the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness.measure import machine
from ffmerge_fast.cli.main import main as ffmerge
from ffmerge_fast.support.tables import format_table


@dataclass(frozen=True)
class Case:
    """A model with its calibration, validation and test data (paths in the shared folder), and its window."""

    name: str
    window: int  # how many FFNs become one, per stack
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    options: tuple[str, ...] = ()


_TRANSLATION = tuple((f"data/m30k_{split}.en", f"data/m30k_{split}.de") for split in ("train", "val", "test"))
CASES = (
    Case("vit-cifar10", 5, ("data/cifar10.npz",), (), ("data/cifar10.npz",), ("--batch-size", "64")),
    Case("gpt2-pystdlib", 5, ("models/gpt2-pystdlib/eval.txt",), (), ("models/gpt2-pystdlib/eval.txt",)),
    Case("marian-en-de", 2, *_TRANSLATION),
)


def run(shared: Path, case: Case, work: Path, limit: int | None = None) -> dict:
    """One row: metric before and after merging the best window (permute, average), and seconds per stage.

    Args:
        shared: the folder with models/ and data/.
        work: folder to write into.
        limit: evaluate on at most so many examples.
    """
    model, statistics = str(shared / "models" / case.name), str(work / "statistics.safetensors")
    train, validation, test = ([str(shared / p) for p in paths] for paths in (case.train, case.validation, case.test))
    few = ["--eval-limit", str(limit)] if limit else []
    scored = ["--data", *train, *(["--eval-data", *validation] if validation else []), *few]
    tested = ["--data", *test, *case.options, *few]
    collected = _ffmerge("collect", model, statistics, "--window", case.window, "--data", *train, *case.options)
    found = _ffmerge("search", model, "--statistics", statistics, "--window", case.window, *scored)
    row = {"model": case.name, "tokens": sum(collected["tokens"].values()), "window": found["layers"]}
    before = _ffmerge("eval", model, *tested)
    row |= {"metric": found["metric"], "before": before[found["metric"]]}
    seconds = {"collect": collected["seconds"]["collect"], "search": found["seconds"]["search"]}
    for method in ("permute", "average"):
        out = str(work / method)
        merged = _ffmerge(
            "merge", model, out, "--statistics", statistics, "--layers", found["layers"], "--method", method
        )
        row[method] = _ffmerge("eval", out, *tested)[found["metric"]]
        if method == "permute":
            seconds |= {"assignment": merged["seconds"]["align"], "merge": merged["seconds"]["merge"]}
            row["parameters"] = merged["parameters_after"] / merged["parameters"] - 1
        _ffmerge("verify", out)
    return row | {f"{stage} s": value for stage, value in seconds.items()}


def _ffmerge(*argv) -> dict:
    """The JSON one command prints."""
    printed, mistakes = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(mistakes):
        status = ffmerge([*map(str, argv), "--json"])
    if status:
        raise SystemExit(f"ffmerge {' '.join(map(str, argv))}: {mistakes.getvalue().strip()}")
    return json.loads(printed.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="folder with models/ and data/")
    parser.add_argument("--limit", type=int, help="evaluate on at most so many examples")
    parser.add_argument("--out", type=Path, help="CSV to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as work:
            rows.append(run(args.shared, case, Path(work), args.limit))
        print(format_table(list(rows[-1]), [list(rows[-1].values())]), flush=True)
    print(machine())
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
