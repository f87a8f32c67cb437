"""How much of what merging costs each recovery brings back, and in how much time.

    python -m benchmarks.recovery ../shared [--models gpt2-pystdlib ...] [--layers 4-9 0-11] [--steps 400]

A model is merged (permute) and recovered: by the closed-form refit, by training the shared FFNs on their layers' own
inputs (distill), by both, and by end-to-end training of the whole merged model, from the merged and from the refitted
one, for as many CPU seconds (one thread) as refit and distill take together. Tuning draws on all training data, the
others on the calibration examples among it. Scores are of test data; `recovered` is the share of the test loss lost by
merging that came back.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import ffmerge_fast as ff
from benchmarks.measure import machine
from benchmarks.quality import CASES, RESULTS
from ffmerge_fast._table import format_table
from ffmerge_fast.driver import evaluate
from ffmerge_fast.driver.finetune import finetune

LAYERS = {"gpt2-pystdlib": ("4-9", "0-11"), "vit-cifar10": ("3-8", "0-11"), "marian-en-de": ("0-1", "0-3")}
COLUMNS = ("model", "layers", "recovery", "steps", "cpu_seconds", "metric", "score", "loss", "recovered")


class Run:
    """One model's rows.

    Args:
        limit: calibration and test examples, instead of the case's.
    """

    def __init__(self, name: str, shared: Path, tokens: int, steps: int, limit: int | None = None):
        self.name, self.case, self.tokens, self.steps = name, CASES[name], tokens, steps
        self.model = ff.from_pretrained(str(shared / "models" / name))
        self.task = self.case.build(shared, self.model)
        self.limits = {"train": limit or self.case.calibration, "test": limit or self.case.test}
        size = self.case.batch_size
        self.batches = list(self.task.batches("train", size, shuffle=True, limit=self.limits["train"]))
        self.test = list(self.task.batches("test", size, limit=self.limits["test"]))
        self.base = evaluate.loss(self.model, self.test)

    def rows(self, layers: str) -> Iterator[dict]:
        stats = ff.collect(self.model, self.batches, layers=layers, max_tokens=self.tokens)
        merged = ff.merge(self.model, ff.plan(stats, layers))
        self.unrecovered = evaluate.loss(merged, self.test)
        yield self.row(layers, "none", merged)
        refitted = copy.deepcopy(merged)
        seconds = _cpu_seconds(lambda: ff.refit_(refitted, self.model, self.batches, max_tokens=self.tokens))
        yield self.row(layers, "refit", refitted, seconds)
        for recovery, start, before in (("distill", merged, 0.0), ("refit + distill", refitted, seconds)):
            made = copy.deepcopy(start)
            took = before + _cpu_seconds(lambda made=made: self.distill(made))
            yield self.row(layers, recovery, made, took, self.steps)
        for recovery, start, before in (("tune", merged, 0.0), ("refit + tune", refitted, seconds)):
            made, steps = copy.deepcopy(start), self.tuning_steps(start, took - before)
            spent = before + _cpu_seconds(lambda made=made, steps=steps: self.tune(made, steps))
            yield self.row(layers, recovery, made, spent, steps)

    def row(self, layers: str, recovery: str, model: nn.Module, seconds: float = 0.0, steps: int = 0) -> dict:
        loss = evaluate.loss(model, self.test)
        score = self.task.score(model, "test", limit=self.limits["test"])
        recovered = (self.unrecovered - loss) / (self.unrecovered - self.base)
        values = (self.name, layers, recovery, steps, round(seconds, 1), self.case.metric, score, loss, recovered)
        return dict(zip(COLUMNS, values, strict=True))

    def distill(self, model: nn.Module) -> None:
        ff.local_distill_(model, self.model, self.batches, steps=self.steps, max_tokens=self.tokens)

    def tuning_steps(self, model: nn.Module, seconds: float) -> int:
        """Training steps that fit into so many CPU seconds."""
        trial = copy.deepcopy(model)
        return max(1, round(seconds / (_cpu_seconds(lambda: self.tune(trial, 4)) / 4)))

    def tune(self, model: nn.Module, steps: int) -> None:
        train = self.task.batches("train", self.case.tuning_batch, shuffle=True, seed=1, epochs=None)
        finetune(model, train, steps=steps, lr=self.case.lr, schedule="linear", warmup=steps // 10)


def _cpu_seconds(work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="folder with models/ and data/")
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=("gpt2-pystdlib", "vit-cifar10"))
    parser.add_argument("--layers", nargs="+", help="these windows instead of half and all of the FFNs")
    parser.add_argument("--tokens", type=int, default=20_480, help="calibration tokens")
    parser.add_argument("--steps", type=int, default=400, help="of distill")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for recovery_<model>.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        run = Run(name, args.shared, args.tokens, args.steps)
        with (args.out / f"recovery_{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            rows = []
            for row in (row for layers in args.layers or LAYERS[name] for row in run.rows(layers)):
                rows.append(row)
                writer.writerow(row)
                file.flush()
        print(f"{name}: test loss {run.base:.4f} before merging")
        print(f"{format_table(COLUMNS[1:], [list(row.values())[1:] for row in rows])}\n", flush=True)
    print(machine())


if __name__ == "__main__":
    main()
