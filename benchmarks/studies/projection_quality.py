"""Held-out loss of models made half as large and trained for a few steps: projected, hard-pruned, or from scratch.

    nice -n 5 python -m benchmarks.studies.projection_quality ../shared [--models vit-cifar10 ...]

All variants have the same sizes, batches, number of steps and schedule (linear, 10 % warm-up); the dimensions kept are
chosen by activation importance. The learning rate of each is chosen with the first seed on validation data: 3e-4 and
1e-3 are tried, and for as long as the best is at an end of those tried, the next one beyond it (steps of 1 : 3).
Scores are of test data that no choice has seen. A run that was stopped goes on: rows in the CSV are not made again.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import ffmerge_fast as ff
from benchmarks.harness.measure import machine
from benchmarks.studies import quality
from ffmerge_fast.driver.tasks.task import Task

RESULTS = Path(__file__).parents[1] / "results"
COLUMNS = ("model", "keep", "variant", "steps", "batch_size", "seed", "lr", "start", "validation", "test")
GRID = (3e-4, 1e-3)  # to begin with
RATES = [float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3)]


@dataclass(frozen=True)
class Case:
    """A model, its training, and how many examples are calibrated on and scored."""

    batch_size: int
    steps: int
    calibration: int
    validation: int
    test: int


CASES = {
    "gpt2-pystdlib": Case(batch_size=8, steps=50, calibration=256, validation=48, test=120),
    "vit-cifar10": Case(batch_size=64, steps=40, calibration=1024, validation=500, test=1000),
}

Made = tuple[nn.Module, torch.optim.Optimizer | None]  # a model to train, with AdamW if there is no optimiser


def _pruned(model: nn.Module, keep: float, scores: ff.Importance, lr: float, seed: int) -> Made:
    return ff.hard_prune(model, keep, importance=scores), None


def _svd_only(model: nn.Module, keep: float, scores: ff.Importance, lr: float, seed: int) -> Made:
    """The student that begins with the SVD, trained as the plain small model it is."""
    return ff.project(model, keep, importance=scores, init="svd").student, None


def _from_scratch(model: nn.Module, keep: float, scores: ff.Importance, lr: float, seed: int) -> Made:
    return ff.from_scratch(model, keep, seed=seed), None


def _projected(**options) -> Callable[..., Made]:
    def make(model: nn.Module, keep: float, scores: ff.Importance, lr: float, seed: int) -> Made:
        projector = ff.project(model, keep, importance=scores, **options)
        return projector.student, projector.optimizer(lr=lr)

    return make


VARIANTS: dict[str, Callable[..., Made]] = {
    "pruned": _pruned,
    "projected": _projected(),
    "projected, no R": _projected(residual=False),
    "SVD": _svd_only,
    "projected from SVD": _projected(init="svd"),
    "from scratch": _from_scratch,
}


class Runs:
    """The rows of one model, each made once and kept in a CSV."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.case, self.keep = name, CASES[name], args.keep
        self.steps = args.steps or self.case.steps
        self.path = args.out / f"projection_quality_{name}.csv"
        self.rows = _read(self.path)
        self.model = ff.from_pretrained(str(args.shared / "models" / name)).eval()
        self.task: Task = quality.CASES[name].build(args.shared, self.model)
        self.task.metric, self.task.higher_is_better = "loss", False
        calibration = self.task.batches("train", self.case.batch_size, shuffle=True, limit=self.case.calibration)
        self.scores = ff.importance(self.model, calibration)

    def validation(self, variant: str, lr: float, seed: int) -> float:
        return float(self.row(variant, lr, seed)["validation"])

    def row(self, variant: str, lr: float, seed: int) -> dict:
        key = {"keep": f"{self.keep:g}", "variant": variant, "steps": str(self.steps), "seed": str(seed)}
        key |= {"batch_size": str(self.case.batch_size), "lr": f"{lr:g}"}
        found = next((row for row in self.rows if all(row[k] == v for k, v in key.items())), None)
        if found is None:
            found = {"model": self.name} | key
            found |= {k: f"{v:.4f}" for k, v in self._train(variant, lr, seed).items()}
            self.rows.append(found)
            _append(self.path, found)
            print(", ".join(f"{k} {v}" for k, v in found.items()), flush=True)
        return found

    def _train(self, variant: str, lr: float, seed: int) -> dict[str, float]:
        model, optimizer = VARIANTS[variant](self.model, self.keep, self.scores, lr, seed)
        start = self._score(model, "validation")
        try:
            ff.finetune(
                model, self.task, self.steps, lr, batch_size=self.case.batch_size, schedule="linear",
                warmup=self.steps // 10, optimizer=optimizer, seed=seed,
            )  # fmt: skip
        except ff.FFMergeError as error:
            if "lower lr" not in str(error):  # it did not diverge
                raise
            return {"start": start, "validation": math.inf, "test": math.inf}
        return {"start": start} | {split: self._score(model, split) for split in ("validation", "test")}

    def _score(self, model: nn.Module, split: str) -> float:
        return self.task.score(model, split, limit=getattr(self.case, split))

    def base(self) -> float:
        return self._score(self.model, "test")


def best_rate(loss: Callable[[float], float]) -> float:
    """The learning rate of the lowest loss: of the grid, prolonged until the best is inside."""
    first, last = RATES.index(GRID[0]), RATES.index(GRID[-1])
    while True:
        tried = RATES[first : last + 1]
        best = min(tried, key=loss)
        if best == tried[0] and first > 0:
            first -= 1
        elif best == tried[-1] and last < len(RATES) - 1:
            last += 1
        else:
            return best


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _append(path: Path, row: dict) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(runs: Runs, seeds: list[int], variants: list[str]) -> str:
    """Markdown: a line per variant, mean ± standard deviation over the seeds at its best learning rate."""
    lines = [
        f"{runs.name}, {runs.steps} steps of {runs.case.batch_size} examples, {len(seeds)} seeds; test loss of the "
        f"full-size model: {runs.base():.3f}\n",
        "| variant | learning rate | validation loss, untrained | test loss |",
        "|---|---|---|---|",
    ]
    for variant in variants:
        lr = best_rate(lambda rate, variant=variant: runs.validation(variant, rate, seeds[0]))
        rows = [runs.row(variant, lr, seed) for seed in seeds]
        start, test = ([float(row[k]) for row in rows] for k in ("start", "test"))
        spread = f" ± {statistics.stdev(test):.3f}" if len(seeds) > 1 else ""
        cells = (variant, f"{lr:g}", f"{statistics.mean(start):.3f}", f"{statistics.mean(test):.3f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="folder with models/ and data/")
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--keep", type=float, default=0.5, help="share of the parameters")
    parser.add_argument("--steps", type=int, help="default: the model's own (see CASES)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for projection_quality_<model>.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        print(f"{table(Runs(name, args), args.seeds, args.variants)}\n", flush=True)
    print(machine())


if __name__ == "__main__":
    main()
