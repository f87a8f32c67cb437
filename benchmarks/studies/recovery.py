"""How much of what merging costs each recovery brings back, and in how much time.

    python -m benchmarks.studies.recovery ../shared [--models gpt2-pystdlib ...] [--layers 4-9 0-11] [--steps 400]

A model is merged (permute) and recovered: by the closed-form refit, by training the shared FFNs on their layers' own
inputs (distill), by both, and by end-to-end training of the whole merged model, from the merged and from the refitted
one, for as many CPU seconds (one thread) as refit and distill take together. Tuning draws on all training data, the
others on the calibration examples among it. Scores are of test data; `recovered` is the share of the test loss lost by
merging that came back.

With --ranks, distill also runs with low-rank deltas, for half the steps (and about the time); with --neurons, each
layer gets neurons of its own in the refit, alone and then distilled for half the steps; and what else the parameters
could buy, fewer FFNs merged, a smaller window or more groups. `ffns` is what is left of the FFNs of `layers`, in FFNs'
parameters, deltas and neurons included; `recovered` is of what merging all of `layers` into one costs.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

import ffmerge_fast as ff
from benchmarks.harness.measure import machine
from benchmarks.studies.quality import CASES, RESULTS
from ffmerge_fast.driver import evaluate
from ffmerge_fast.driver.training.finetune import finetune
from ffmerge_fast.merging.groups import parse_layers
from ffmerge_fast.support.tables import format_table

LAYERS = {"gpt2-pystdlib": ("4-9", "0-11"), "vit-cifar10": ("3-8", "0-11"), "marian-en-de": ("0-1", "0-3")}
FEWER = {  # two or three FFNs are left, instead of one and its deltas
    "4-9": ("4-8", "4-6,7-9", "4-5,6-7,8-9"),
    "3-8": ("3-7", "3-5,6-8", "3-4,5-6,7-8"),
    "0-11": ("0-5,6-11", "0-3,4-7,8-11"),
}
COLUMNS = ("model", "layers", "recovery", "ffns", "steps", "cpu_seconds", "metric", "score", "loss", "recovered")


class Run:
    """One model's rows.

    Args:
        ranks, neurons: of deltas, and of each layer's own, to try.
        limit: calibration and test examples, instead of the case's.
    """

    def __init__(
        self,
        name: str,
        shared: Path,
        tokens: int,
        steps: int,
        ranks: Sequence[int] = (),
        limit: int | None = None,
        neurons: Sequence[int] = (),
    ):
        self.ranks, self.neurons = ranks, neurons
        self.name, self.case, self.tokens, self.steps = name, CASES[name], tokens, steps
        self.model = ff.from_pretrained(str(shared / "models" / name))
        self.task = self.case.build(shared, self.model)
        self.limits = {"train": limit or self.case.calibration, "test": limit or self.case.test}
        size = self.case.batch_size
        self.batches = list(self.task.batches("train", size, shuffle=True, limit=self.limits["train"]))
        self.test = list(self.task.batches("test", size, limit=self.limits["test"]))
        self.base = evaluate.loss(self.model, self.test)

    def rows(self, layers: str) -> Iterator[dict]:
        merged = self.merge(layers)
        self.unrecovered = evaluate.loss(merged, self.test)
        yield self.row(layers, "none", merged)
        refitted = copy.deepcopy(merged)
        seconds = _cpu_seconds(lambda: ff.refit_(refitted, self.model, self.batches, max_tokens=self.tokens))
        yield self.row(layers, "refit", refitted, seconds)
        for recovery, start, before in (("distill", merged, 0.0), ("refit + distill", refitted, seconds)):
            made = copy.deepcopy(start)
            took = before + _cpu_seconds(lambda made=made: self.distill(made, self.steps))
            yield self.row(layers, recovery, made, took, self.steps)
            if recovery == "distill" and self.neurons:
                yield from self.with_neurons(layers, merged)
            if recovery == "distill" and self.ranks:
                yield from self.at_more_parameters(layers, merged)
        for recovery, start, before in (("tune", merged, 0.0), ("refit + tune", refitted, seconds)):
            made, steps = copy.deepcopy(start), self.tuning_steps(start, took - before)
            spent = before + _cpu_seconds(lambda made=made, steps=steps: self.tune(made, steps))
            yield self.row(layers, recovery, made, spent, steps)

    def with_neurons(self, layers: str, merged: nn.Module) -> Iterator[dict]:
        """Neurons of each layer's own, fitted, and then trained for half the steps."""
        for neurons in self.neurons:
            made = copy.deepcopy(merged)
            took = _cpu_seconds(
                lambda made=made, k=neurons: ff.refit_(
                    made, self.model, self.batches, max_tokens=self.tokens, private=k
                )
            )
            yield self.row(layers, f"refit, {neurons} neurons", made, took)
            took += _cpu_seconds(lambda made=made: self.distill(made, self.steps // 2))
            yield self.row(layers, f"refit + distill, {neurons} neurons", made, took, self.steps // 2)

    def at_more_parameters(self, layers: str, merged: nn.Module) -> Iterator[dict]:
        """Deltas, with half the steps, so that they take no longer; and what else the parameters could buy."""
        variants = [(f"distill, deltas of rank {rank}", merged, self.steps // 2, rank) for rank in self.ranks]
        variants += [(f"distill, {fewer} merged", self.merge(fewer), self.steps, 0) for fewer in FEWER.get(layers, ())]
        for recovery, start, steps, rank in variants:
            made = copy.deepcopy(start)
            took = _cpu_seconds(lambda made=made, steps=steps, rank=rank: self.distill(made, steps, rank))
            yield self.row(layers, recovery, made, took, steps)

    def merge(self, layers: str) -> nn.Module:
        stats = ff.collect(self.model, self.batches, layers=layers, max_tokens=self.tokens)
        return ff.merge(self.model, ff.plan(stats, layers))

    def row(self, layers: str, recovery: str, model: nn.Module, seconds: float = 0.0, steps: int = 0) -> dict:
        loss = evaluate.loss(model, self.test)
        score = self.task.score(model, "test", limit=self.limits["test"])
        recovered = (self.unrecovered - loss) / (self.unrecovered - self.base)
        ffns = round(self.ffns_kept(layers, model), 2)
        seconds = round(seconds, 1)
        values = (self.name, layers, recovery, ffns, steps, seconds, self.case.metric, score, loss, recovered)
        return dict(zip(COLUMNS, values, strict=True))

    def ffns_kept(self, layers: str, model: nn.Module) -> float:
        """Of the layers' FFNs: those that are left, and the deltas, in FFNs' parameters."""
        whole = ff.find_ffns(self.model)
        saved = sum(p.numel() for p in self.model.parameters()) - sum(p.numel() for p in model.parameters())
        return sum(len(group) for _, group in parse_layers(layers, whole)) - saved / whole[0].parameters

    def distill(self, model: nn.Module, steps: int, rank: int = 0) -> None:
        ff.local_distill_(model, self.model, self.batches, steps=steps, max_tokens=self.tokens, delta_rank=rank)

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
    parser.add_argument("--ranks", type=int, nargs="*", default=(8, 16, 32), help="of deltas; none: without")
    parser.add_argument("--neurons", type=int, nargs="*", default=(8, 40, 80), help="of each layer; none: without")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for recovery_<model>.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        run = Run(name, args.shared, args.tokens, args.steps, args.ranks, neurons=args.neurons)
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
