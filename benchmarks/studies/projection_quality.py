"""Held-out loss of smaller models, untrained and trained for some steps: pruned, SVD, reconstructed, or from scratch.

    nice -n 5 python -m benchmarks.studies.projection_quality ../shared [--models vit-cifar10 ...] [--steps 0 50 200]

Each start is trained plainly, as the small model it is, and projected (P and R behind every matrix). All variants
have the same sizes, batches, number of steps and schedule (linear, 10 % warm-up); the dimensions kept are chosen by
activation importance. A seed decides the calibration data and the order of the training data. The learning rate of
each is chosen with the first seed on validation data: 3e-4 and 1e-3 are tried, and for as long as the best is at an end
of those tried, the next one beyond it (steps of 1 : 3).
Scores are of test data that no choice has seen. A run that was stopped goes on: rows in the CSV are not made again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
import tempfile
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
COLUMNS = (
    "model",
    "keep",
    "variant",
    "steps",
    "batch_size",
    "calibration",
    "seed",
    "lr",
    "start",
    "validation",
    "test",
)
GRID = (3e-4, 1e-3)  # to begin with
RATES = [float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3)]


@dataclass(frozen=True)
class Case:
    """A model, its training, and how many examples are calibrated on and scored."""

    batch_size: int
    calibration: int
    validation: int
    test: int


CASES = {
    "gpt2-pystdlib": Case(batch_size=8, calibration=320, validation=48, test=120),
    "vit-cifar10": Case(batch_size=64, calibration=1024, validation=500, test=1000),
    "marian-en-de": Case(batch_size=16, calibration=2048, validation=200, test=400),
}

Made = tuple[nn.Module, ff.Projector | None]  # a model to train, and what projects it, if it is


@dataclass(frozen=True)
class Data:
    """What starts are made from.

    Attributes:
        batches: of calibration.
        cache: folder that keeps what was reconstructed from them.
    """

    model: nn.Module
    keep: float
    scores: ff.Importance
    batches: list
    seed: int
    cache: Path


def _start(init: str, projected: bool, reconstructed: bool = False, residual: bool = True) -> Callable[[Data], Made]:
    """A student of `project`, trained through P and R or plainly."""

    def make(data: Data) -> Made:
        projector = ff.project(data.model, data.keep, importance=data.scores, init=init, residual=residual)
        if reconstructed:
            projector.reconstruct_(data.batches, cache_dir=data.cache)
        return projector.student, projector if projected else None

    return make


def _from_scratch(data: Data) -> Made:
    return ff.from_scratch(data.model, data.keep, seed=data.seed), None


BASE = "full size"  # keep 1, no steps
VARIANTS: dict[str, Callable[[Data], Made]] = {
    BASE: lambda data: (data.model, None),
    "pruned": _start("selection", projected=False),
    "pruned, projected": _start("selection", projected=True),
    "pruned, projected, no R": _start("selection", projected=True, residual=False),
    "SVD": _start("svd", projected=False),
    "SVD, projected": _start("svd", projected=True),
    "reconstructed": _start("svd", projected=False, reconstructed=True),
    "reconstructed, projected": _start("svd", projected=True, reconstructed=True),
    "from scratch": _from_scratch,
}
_QUICK = tuple(name for name in VARIANTS if "no R" not in name and name not in (BASE, "from scratch"))


class Runs:
    """The rows of one model at one size and number of steps, each made once and kept in a CSV."""

    def __init__(self, name: str, args: argparse.Namespace, keep: float, steps: int, cache: Path):
        self.name, self.case, self.keep, self.steps, self.cache = name, CASES[name], keep, steps, cache
        self.path = args.out / f"projection_quality_{name}.csv"
        self.rows = _read(self.path)
        self.model = ff.from_pretrained(str(args.shared / "models" / name)).eval().to(args.device)
        self.task: Task = quality.CASES[name].build(args.shared, self.model)
        self.task.metric, self.task.higher_is_better = "loss", False

    def validation(self, variant: str, lr: float, seed: int) -> float:
        return float(self.row(variant, lr, seed)["validation"])

    def row(self, variant: str, lr: float, seed: int) -> dict:
        key = {"keep": f"{self.keep:g}", "variant": variant, "steps": str(self.steps), "seed": str(seed)}
        key |= {"batch_size": str(self.case.batch_size), "calibration": str(self.case.calibration), "lr": f"{lr:g}"}
        found = next((row for row in self.rows if all(row[k] == v for k, v in key.items())), None)
        if found is None:
            found = {"model": self.name} | key
            found |= {k: f"{v:.4f}" for k, v in self._train(variant, lr, seed).items()}
            self.rows.append(found)
            _append(self.path, found)
            print(", ".join(f"{k} {v}" for k, v in found.items()), flush=True)
        return found

    def _train(self, variant: str, lr: float, seed: int) -> dict[str, float]:
        model, projector = VARIANTS[variant](self._data(seed))
        start = self._score(model, "validation")
        try:
            if self.steps:
                ff.finetune(
                    model, self.task, self.steps, lr, batch_size=self.case.batch_size, schedule="linear",
                    warmup=self.steps // 10, optimizer=projector.optimizer(lr=lr) if projector else None, seed=seed,
                )  # fmt: skip
        except ff.FFMergeError as error:
            if "lower lr" not in str(error):  # it did not diverge
                raise
            return {"start": start, "validation": math.inf, "test": math.inf}
        return {"start": start} | {split: self._score(model, split) for split in ("validation", "test")}

    def _data(self, seed: int) -> Data:
        size = self.case.batch_size
        stream = self.task.batches("train", size, shuffle=True, seed=seed)
        batches = list(itertools.islice(stream, self.case.calibration // size))
        scores = ff.importance(self.model, batches)
        return Data(self.model, self.keep, scores, batches, seed, self.cache / f"{self.name}-{self.keep:g}-{seed}")

    def _score(self, model: nn.Module, split: str) -> float:
        return self.task.score(model, split, limit=getattr(self.case, split))


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
        f"{runs.name}, keep {runs.keep:g}, {runs.steps} steps of {runs.case.batch_size} examples, {len(seeds)} seeds\n",
        "| variant | learning rate | test loss |",
        "|---|---|---|",
    ]
    for variant in variants:
        lr = best_rate(lambda rate, variant=variant: runs.validation(variant, rate, seeds[0])) if runs.steps else 0.0
        test = [float(runs.row(variant, lr, seed)["test"]) for seed in seeds]
        spread = f" ± {statistics.stdev(test):.3f}" if len(seeds) > 1 else ""
        lines.append(f"| {variant} | {lr:g} | {statistics.mean(test):.3f}{spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="folder with models/ and data/")
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=_QUICK)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="shares of the parameters")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 50], help="of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for projection_quality_<model>.csv")
    parser.add_argument("--device", default="cpu", help="to train and score on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        for name in args.models:
            Runs(name, args, 1.0, 0, Path(cache)).row(BASE, 0.0, args.seeds[0])
        for name, keep, steps in itertools.product(args.models, args.keep, args.steps):
            # a projected start that is not trained is the start itself
            variants = [v for v in args.variants if steps or "projected" not in v]
            print(f"{table(Runs(name, args, keep, steps, Path(cache)), args.seeds, variants)}\n", flush=True)
    print(machine())


if __name__ == "__main__":
    main()
