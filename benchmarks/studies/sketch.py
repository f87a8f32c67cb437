"""Does a sketched correlation merge as well as the exact one?

    python -m benchmarks.studies.sketch ../shared [--models gpt2-pystdlib ...] [--rows 128 ...] [--seeds 5]
    python -m benchmarks.studies.sketch --objective 3072 5120 14336

Models: for each window the test score, un-tuned and after refit, merged by sketches of several sizes, by exact
correlations and without alignment ("average"); a seed puts the calibration examples in another order, and with it
their rows and signs. Of every size the search over windows is run too: the exact score of the window that it finds,
beside the best one's. --objective: which share of the assignment's objective a sketch loses on random FFN features, and
which share it expects to lose. Rows that the CSV already has are not made again.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

import ffmerge_fast as ff
from benchmarks.harness.measure import machine
from benchmarks.studies.quality import CASES, RESULTS

WINDOWS = {
    "gpt2-pystdlib": ("4-7", "2-7", "4-9", "0-11"),
    "vit-cifar10": ("2-7", "4-9", "0-11"),
    "marian-en-de": ("encoder:0-1,decoder:0-1", "encoder:0-3,decoder:0-3"),
}
SEARCHED = {"gpt2-pystdlib": 4, "vit-cifar10": 4, "marian-en-de": 2}  # window sizes
ROWS = (128, 256, 512, 1024, 2048, 4096)
REFITTED = 1024  # rows whose merges are also refitted
TOKENS = 10_240
COLUMNS = ("model", "layers", "matched by", "seed", "recover", "metric", "score", "expected_loss")


class Study:
    """One model's rows."""

    def __init__(self, name: str, shared: Path, rows: list[int], seeds: int):
        self.name, self.rows, self.seeds, self.case = name, rows, seeds, CASES[name]
        self.model = ff.from_pretrained(str(shared / "models" / name))
        self.task = self.case.build(shared, self.model)
        if name != "vit-cifar10":
            self.task.metric, self.task.higher_is_better = "loss", False
        size, limit = self.case.batch_size, self.case.calibration
        self.batches = list(self.task.batches("train", size, shuffle=True, limit=limit))
        self.exact = self.collect(None)

    def collect(self, sketch: int | None, seed: int = 0) -> ff.CorrelationStats:
        order = random.Random(seed)
        batches = [self._shuffled(batch, order) for batch in order.sample(self.batches, len(self.batches))]
        layers = max(map(len, ff.find_ffns(self.model).by_stack().values()))
        return ff.collect(self.model, batches, window=layers, max_tokens=TOKENS, sketch=sketch)

    @staticmethod
    def _shuffled(batch: dict, order: random.Random) -> dict:
        size = len(next(iter(batch.values())))
        rows = torch.tensor(order.sample(range(size), size))
        return {name: value[rows] for name, value in batch.items()}

    def run(self, done: list[dict]) -> Iterator[dict]:
        known = {(row["layers"], row["matched by"], int(row["seed"])) for row in done}
        common = {"model": self.name, "seed": 0, "expected_loss": ""}
        if ("none", "exact", 0) not in known:
            yield common | {"layers": "none", "matched by": "exact", "recover": "none"} | self.score(self.model)
        for layers in WINDOWS[self.name]:
            for method in ("exact", "average"):
                if (layers, method, 0) not in known:
                    plan = ff.plan(self.exact, layers, method="permute" if method == "exact" else method)
                    yield from list(self.merged(plan, common | {"matched by": method}, refit=True))
        if ("search", "exact", 0) not in known:
            yield common | self.found("exact", 0, self.exact)
        for seed in range(self.seeds):
            for m in self.rows:
                wanted = [layers for layers in (*WINDOWS[self.name], "search") if (layers, f"{m}", seed) not in known]
                if not wanted:
                    continue
                stats = self.collect(m, seed)
                for layers in wanted:
                    if layers == "search":
                        yield common | self.found(f"{m}", seed, stats)
                        continue
                    plan = ff.plan(stats, layers)
                    row = common | {"matched by": f"{m}", "seed": seed, "expected_loss": plan.sketched.expected_loss}
                    yield from list(self.merged(plan, row, refit=m == REFITTED))  # both rows, or neither if killed

    def merged(self, plan: ff.MergePlan, row: dict, refit: bool) -> Iterator[dict]:
        merged = ff.merge(self.model, plan)
        row = row | {"layers": plan.layers}
        yield row | {"recover": "none"} | self.score(merged)
        if refit:
            ff.refit_(merged, self.model, self.batches, max_tokens=2 * TOKENS)
            yield row | {"recover": "refit"} | self.score(merged)

    @cached_property
    def by_layers(self) -> dict[str, float]:
        """Every window's score, matched exactly."""
        return dict(self.searched(self.exact).search)

    def found(self, name: str, seed: int, stats: ff.CorrelationStats) -> dict:
        """The window that a search finds, scored as the exact search does."""
        layers = self.searched(stats).layers
        row = {"layers": "search", "matched by": name, "seed": seed, "recover": layers}
        return row | {"metric": f"validation {self.task.metric}", "score": self.by_layers[layers]}

    def searched(self, stats: ff.CorrelationStats) -> ff.MergePlan:
        def validate(model: torch.nn.Module) -> float:
            return self.task.score(model, "validation", limit=self.case.validation)

        higher = self.task.higher_is_better
        return ff.search(self.model, stats, SEARCHED[self.name], validate, higher_is_better=higher)

    def score(self, model: torch.nn.Module) -> dict:
        return {"metric": self.task.metric, "score": self.task.score(model, "test", limit=self.case.test)}


def objective(width: int, wanted: list[tuple[int, int]], tokens: int = 10_000) -> Iterator[dict]:
    """Shares of the objective that are lost, on pre-activations of two related random FFNs; `wanted`: (rows, seed)."""
    g = torch.Generator().manual_seed(5)
    inputs = width // 6
    z = torch.randn(tokens, inputs, generator=g) * torch.arange(1, inputs + 1).float() ** -0.5
    w = torch.randn(inputs, width, generator=g)
    other = torch.relu(z @ torch.randn(inputs, inputs, generator=g) * 0.05 + z)
    x = {0: z @ w, 1: other @ (w + 0.8 * torch.randn(inputs, width, generator=g))}
    truth = correlated(x, None).correlation(0, 1)
    best = ff.ops.assign(truth).objective
    for m, seed in wanted:
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        state = correlated({key: value[order] for key, value in x.items()}, m)
        found = ff.ops.assign(state.correlation(0, 1))
        half = state.half_correlation(0, 1)
        worse = ff.ops.assign(half).objective - _objective(half, found.permutation)
        lost, expected = 1 - _objective(truth, found.permutation) / best, worse / found.objective
        yield {"width": width, "rows": m, "seed": seed, "lost": lost, "expected": expected, "matched": best / width}


def correlated(x: dict, sketch: int | None) -> ff.CorrelationState:
    state = ff.CorrelationState({key: value.shape[1] for key, value in x.items()}, [(0, 1)], sketch=sketch)
    return ff.ops.correlation_accumulate_(state, x)


def _objective(matrix: torch.Tensor, permutation: torch.Tensor) -> float:
    return matrix.gather(1, permutation[:, None]).double().sum().item()


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict]) -> None:
    beside = path.with_suffix(".tmp")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", nargs="?", type=Path, help="folder with models/ and data/")
    parser.add_argument("--models", nargs="+", choices=tuple(WINDOWS), default=tuple(WINDOWS))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--objective", nargs="+", type=int, metavar="WIDTH", help="random features of these widths")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    at = machine()
    if args.objective:
        path = RESULTS / "sketch_objective.csv"
        rows = read(path)
        known = {(int(row["width"]), int(row["rows"]), int(row["seed"])) for row in rows}
        for width in args.objective:
            every = [(m, seed) for m in args.rows for seed in range(args.seeds)]
            for row in objective(width, [each for each in every if (width, *each) not in known]):
                rows.append(row | at)
                print({name: row[name] for name in ("width", "rows", "seed", "lost", "expected")}, flush=True)
                write(path, rows)
        return
    for name in args.models:
        path = RESULTS / f"sketch_{name}.csv"
        rows = read(path)
        for row in Study(name, args.shared, list(args.rows), args.seeds).run(list(rows)):
            rows.append({column: row.get(column, "") for column in COLUMNS} | at)
            print({column: row.get(column, "") for column in COLUMNS}, flush=True)
            write(path, rows)


if __name__ == "__main__":
    main()
