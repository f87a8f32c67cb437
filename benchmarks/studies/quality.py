"""Quality after merging real trained models, with and without the closed-form refit.

    python -m benchmarks.studies.quality ../shared [--models vit-cifar10 ...] [--layers 2-7 ...] [--tune 200]

Merged are 1/3, 1/2 and all FFNs of each stack: of all windows of a size the one that `ffmerge_fast.search` finds best
on validation data (method permute, un-tuned), or what --layers says. Methods: average, permute, and copy (the anchor's
FFN in place of all). All scores are of test data that neither the search nor the fits have seen. Rounds are judged by
the loss on a tenth of the calibration data. With --tune the original model and every merged one are also trained for a
short time, all on the same batches. Rows that the CSV already has, with the same settings, are not made again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import ffmerge_fast as ff
from benchmarks.harness.measure import machine
from ffmerge_fast.driver.tasks.images import load_images
from ffmerge_fast.driver.tasks.load import load_task
from ffmerge_fast.driver.tasks.task import Task
from ffmerge_fast.driver.tasks.text import load_parallel

RESULTS = Path(__file__).parents[1] / "results"
METHODS = ("average", "permute", "copy")
SHARES = (1 / 3, 1 / 2, 1)
SETTINGS = ("tokens", "ridge", "weights")
KEY = ("model", "layers", "merged", "method", "recover", "tuned_steps", *SETTINGS)
COLUMNS = (*KEY, "metric", "score", "before", "seconds")


@dataclass(frozen=True)
class Case:
    """A model, and how much of its data is calibrated on, searched with and tested on (examples)."""

    build: Callable[[Path, nn.Module], Task]
    metric: str
    calibration: int
    validation: int
    test: int
    batch_size: int
    tuning_batch: int
    lr: float


def _images(shared: Path, model: nn.Module) -> Task:
    """Calibration: training images; test: the first 2,000 test images; validation: the next 500."""
    data = shared / "data" / "cifar10.npz"
    unseen = load_images(data, "test")
    splits = {"validation": unseen.select(range(2000, 2500)), "test": unseen.select(range(2000))}
    return load_task(model, str(shared / "models" / "vit-cifar10"), train=load_images(data, "train"), **splits)


def _source_code(shared: Path, model: nn.Module) -> Task:
    """Calibration: the standard library's modules that are not in the model's held-out text; that text is halved."""
    folder = shared / "models" / "gpt2-pystdlib"
    held_out = (folder / "eval.txt").read_text()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [text for file in files if (text := file.read_text(errors="ignore")) and text[:300] not in held_out]
    half = len(held_out) // 2
    splits = {"train": texts, "validation": [held_out[:half]], "test": [held_out[half:]]}
    return load_task(model, str(folder), **splits, metric="loss")


def _translation(shared: Path, model: nn.Module) -> Task:
    pairs = [
        load_parallel(*(shared / "data" / f"m30k_{s}.{x}" for x in ("en", "de"))) for s in ("train", "val", "test")
    ]
    splits = dict(zip(("train", "validation", "test"), pairs, strict=True))
    return load_task(model, str(shared / "models" / "marian-en-de"), **splits, metric="loss")


CASES = {  # calibration enough for --tokens and the batches put aside
    "vit-cifar10": Case(_images, "accuracy", 1400, 500, 2000, 100, 32, 1e-4),
    "gpt2-pystdlib": Case(_source_code, "loss", 192, 40, 240, 16, 8, 1e-4),
    "marian-en-de": Case(_translation, "loss", 1500, 300, 1000, 50, 32, 1e-4),
}


class Run:
    """One model's rows.

    Args:
        done: {values of KEY: row} of an earlier run.
    """

    def __init__(self, name: str, args: argparse.Namespace, done: dict[tuple, dict]):
        self.args, self.done, self.case = args, done, CASES[name]
        self.model = ff.from_pretrained(str(args.shared / "models" / name))
        self.task = self.case.build(args.shared, self.model)
        limit = self.case.calibration
        self.batches = list(self.task.batches("train", self.case.batch_size, shuffle=True, limit=limit))
        self.common = {"model": name, "metric": self.case.metric, "before": self.score(self.model)}
        self.common |= {name: getattr(args, name) for name in SETTINGS}
        if any(row["before"] != self.common["before"] for row in done.values()):
            raise SystemExit(f"{args.out}: the rows of {name} are of another model or other data; delete them")

    def rows(self) -> Iterator[dict]:
        """One row per window, method and recovery, each also after tuning if --tune asks for it."""
        layers = len(next(iter(ff.find_ffns(self.model).by_stack().values())))
        if self.args.tune:
            none = {"layers": "", "merged": f"0/{layers}", "method": "none", "recover": "none"}
            yield from self.variant(none, lambda: copy.deepcopy(self.model))
        stats = ff.collect(self.model, self.batches, window=max(windows_of(self.model)), max_tokens=self.args.tokens)
        for plan in self.plans(stats):
            merged = f"{len(plan.groups[0].layers)}/{layers}"
            for method in METHODS:
                row = {"layers": plan.layers, "merged": merged, "method": method}
                merge = partial(self.merge, stats, plan, method)
                yield from self.variant(row | {"recover": "none"}, merge)
                yield from self.variant(row | {"recover": "refit"}, merge, self.refit)
                if rounds := self.args.rounds:
                    refit = partial(self.refit, rounds=rounds)
                    yield from self.variant(row | {"recover": f"refit, {rounds} rounds"}, merge, refit)

    def plans(self, stats: ff.CorrelationStats) -> list[ff.MergePlan]:
        if self.args.layers:
            return [ff.plan(stats, layers) for layers in self.args.layers]
        higher = self.task.higher_is_better
        return [ff.search(self.model, stats, k, self.validate, higher_is_better=higher) for k in windows_of(self.model)]

    def variant(self, values: dict, make: Callable[[], nn.Module], recover: Callable | None = None) -> Iterator[dict]:
        """The rows of one model, before and after tuning; `seconds` are those of the recovery and of the tuning."""
        rows = [self.common | values | {"tuned_steps": steps} for steps in sorted({0, self.args.tune})]
        known = [self.done.get(tuple(row[name] for name in KEY)) for row in rows]
        if all(known):
            return (yield from known)
        made, started = make(), time.monotonic()
        for row, found in zip(rows, known, strict=True):
            if row["tuned_steps"]:
                started = time.monotonic()
                self.tune(made)
            elif recover:
                recover(made)
            seconds = round(time.monotonic() - started, 1)
            yield found or row | {"score": self.score(made), "seconds": seconds}

    def merge(self, stats: ff.CorrelationStats, plan: ff.MergePlan, method: str) -> nn.Module:
        if method == "copy":
            return ff.tie_without_average(self.model, plan.layers)
        return ff.merge(self.model, ff.plan(stats, plan.layers, method=method))

    def refit(self, merged: nn.Module, rounds: int = 0) -> None:
        args = self.args
        options = dict(rounds=rounds, weights=args.weights, max_tokens=args.tokens)
        ff.refit_(merged, self.model, self.batches, args.ridge, **options)

    def tune(self, model: nn.Module) -> None:
        """The same short training for every variant."""
        from ffmerge_fast.driver.training.finetune import finetune

        train = self.task.batches("train", self.case.tuning_batch, shuffle=True, seed=1, epochs=None)
        steps = self.args.tune
        finetune(model, train, steps=steps, lr=self.case.lr, schedule="linear", warmup=steps // 10)

    def score(self, model: nn.Module) -> float:
        return self.task.score(model, "test", limit=self.case.test)

    def validate(self, model: nn.Module) -> float:
        return self.task.score(model, "validation", limit=self.case.validation)


def windows_of(model: nn.Module) -> list[int]:
    """Window sizes that merge 1/3, 1/2 and all FFNs of a stack, each size once."""
    layers = min(map(len, ff.find_ffns(model).by_stack().values()))
    return sorted({max(2, round(share * layers)) for share in SHARES})


def table(rows: list[dict]) -> str:
    """Markdown: a line per window and recovery, a column per method."""
    first = rows[0]
    tuned = [
        f", {row['score']:.4g} after {row['tuned_steps']} tuning steps without merging"
        for row in rows
        if row["method"] == "none" and row["tuned_steps"]
    ]
    lines = [
        f"{first['model']}: {first['metric']}, {first['before']:.4g} before merging{''.join(tuned)}\n",
        f"| merged | layers | recovery | tuning steps | {' | '.join(METHODS)} |",
        "|---" * (4 + len(METHODS)) + "|",
    ]
    cells = {}
    for row in (row for row in rows if row["method"] in METHODS):
        key = (row["merged"], row["layers"], row["recover"], row["tuned_steps"])
        cells.setdefault(key, {})[row["method"]] = f"{row['score']:.4g}"
    for key, scores in sorted(cells.items(), key=lambda item: (_order(item[0]), item[0][3])):
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(scores.get(m, '') for m in METHODS)} |")
    return "\n".join(lines)


def _order(key: tuple) -> tuple:
    merged, of = map(int, key[0].split("/"))
    return merged / of, key[1]


def read(path: Path) -> list[dict]:
    """The rows of an earlier run, with the types of a new one."""
    if not path.exists():
        return []
    types = dict.fromkeys(("score", "before", "seconds", "ridge"), float) | {"tuned_steps": int, "tokens": int}
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: types.get(name, str)(value) for name, value in row.items()} for row in csv.DictReader(file)]


def write(path: Path, rows: list[dict]) -> None:
    beside = path.with_suffix(".tmp")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="folder with models/ and data/")
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--layers", nargs="+", help="these windows instead of the search's, such as 2-7")
    parser.add_argument("--tokens", type=int, default=20_480, help="calibration tokens")
    parser.add_argument("--ridge", type=float, default=1e-2)
    parser.add_argument("--weights", default="stream", choices=("stream", "output", "equal"))
    parser.add_argument("--rounds", type=int, default=0, help="also refit with so many rounds on the merged stream")
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS", help="also tune every variant")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for quality_<model>.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        path = args.out / f"quality_{name}.csv"
        done = {tuple(row[column] for column in KEY): row for row in read(path)}
        rows = []
        for row in Run(name, args, dict(done)).rows():
            rows.append(row)
            done[tuple(row[column] for column in KEY)] = row
            write(path, list(done.values()))
        print(f"{table(rows)}\n", flush=True)
    print(machine())


if __name__ == "__main__":
    main()
