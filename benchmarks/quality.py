"""Quality after merging real trained models, with and without the closed-form refit.

    python -m benchmarks.quality ../shared [--models vit-cifar10 ...] [--layers 2-7 ...] [--rounds 4] [--tune 200]

Merged are 1/3, 1/2 and all FFNs of each stack: of all windows of a size the one that `ffmerge_fast.search` finds best
on validation data (method permute, un-tuned), or what --layers says. Methods: average, permute, and copy (the anchor's
FFN in place of all). All scores are of test data that neither the search nor the fits have seen. Rounds are judged by
the loss on a tenth of the calibration data.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import ffmerge_fast as ff
from benchmarks.measure import machine
from ffmerge_fast.driver.data import Task, load_images, load_parallel, load_task
from ffmerge_fast.models import by_stack

RESULTS = Path(__file__).parent / "results"
METHODS = ("average", "permute", "copy")
SHARES = (1 / 3, 1 / 2, 1)
COLUMNS = ("model", "layers", "merged", "method", "recover", "tuned_steps", "metric", "score", "before", "seconds")


@dataclass(frozen=True)
class Case:
    """A model, and how much of its data is calibrated on, searched with and tested on (examples)."""

    build: Callable[[Path, nn.Module], Task]
    metric: str
    calibration: int
    validation: int
    test: int
    batch_size: int
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
    "vit-cifar10": Case(_images, "accuracy", 1400, 500, 2000, 100, 1e-4),
    "gpt2-pystdlib": Case(_source_code, "loss", 192, 40, 240, 16, 1e-4),
    "marian-en-de": Case(_translation, "loss", 1500, 300, 1000, 50, 1e-4),
}


def rows_of(name: str, args: argparse.Namespace) -> Iterator[dict]:
    """One row per window, method and recovery, each also after tuning if --tune asks for it."""
    case = CASES[name]
    model = ff.from_pretrained(str(args.shared / "models" / name))
    task = case.build(args.shared, model)
    batches = list(task.batches("train", case.batch_size, shuffle=True, limit=case.calibration))

    def score(m: nn.Module) -> float:
        return task.score(m, "test", limit=case.test)

    def validate(m: nn.Module) -> float:
        return task.score(m, "validation", limit=case.validation)

    sizes = windows_of(model)
    stats = ff.collect(model, batches, window=max(sizes), max_tokens=args.tokens)
    if args.layers:
        plans = [ff.plan(stats, layers) for layers in args.layers]
    else:
        plans = [ff.search(model, stats, size, validate, higher_is_better=task.higher_is_better) for size in sizes]
    common = {"model": name, "metric": case.metric, "before": score(model)}
    for plan in plans:
        share = f"{len(plan.groups[0].layers)}/{len(by_stack(ff.find_ffns(model))[plan.groups[0].stack])}"
        for method in METHODS:
            for recover, made, seconds in recovered(model, plan, stats, method, batches, args):
                row = common | {"layers": plan.layers, "merged": share, "method": method, "recover": recover}
                yield row | {"tuned_steps": 0, "score": score(made), "seconds": round(seconds, 1)}
                if args.tune:
                    started = time.monotonic()
                    tune(made, task, case, args)
                    seconds = time.monotonic() - started
                    yield row | {"tuned_steps": args.tune, "score": score(made), "seconds": round(seconds, 1)}


def windows_of(model: nn.Module) -> list[int]:
    """Window sizes that merge 1/3, 1/2 and all FFNs of a stack, each size once."""
    layers = min(map(len, by_stack(ff.find_ffns(model)).values()))
    return sorted({max(2, round(share * layers)) for share in SHARES})


def recovered(model, plan, stats, method, batches, args) -> Iterator[tuple[str, nn.Module, float]]:
    """(recovery, merged model, seconds the recovery took)."""
    if method == "copy":
        merged = ff.tie_without_average(model, plan.layers)
    else:
        merged = ff.merge(model, ff.plan(stats, plan.layers, method=method))
    yield "none", copy.deepcopy(merged), 0.0
    started = time.monotonic()
    refit = copy.deepcopy(merged)
    ff.refit_(refit, model, batches, ridge=args.ridge, weights=args.weights, max_tokens=args.tokens)
    yield "refit", refit, time.monotonic() - started
    if args.rounds:
        started = time.monotonic()
        ff.refit_(merged, model, batches, args.ridge, rounds=args.rounds, weights=args.weights, max_tokens=args.tokens)
        yield f"refit, {args.rounds} rounds", merged, time.monotonic() - started


def tune(model: nn.Module, task: Task, case: Case, args: argparse.Namespace) -> None:
    """The same short training for every variant."""
    from ffmerge_fast.driver.finetune import finetune

    train = task.batches("train", 32, shuffle=True, seed=1, epochs=None)
    finetune(model, train, steps=args.tune, lr=case.lr, schedule="linear", warmup=args.tune // 10)


def table(rows: list[dict]) -> str:
    """Markdown: a line per window and recovery, a column per method."""
    first = rows[0]
    lines = [
        f"{first['model']}: {first['metric']}, {first['before']:.4g} before merging\n",
        f"| merged | layers | recovery | tuning steps | {' | '.join(METHODS)} |",
        "|---" * (4 + len(METHODS)) + "|",
    ]
    cells = {}
    for row in rows:
        key = (row["merged"], row["layers"], row["recover"], row["tuned_steps"])
        cells.setdefault(key, {})[row["method"]] = f"{row['score']:.4g}"
    for key, scores in sorted(cells.items(), key=lambda item: (_order(item[0]), item[0][3])):
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(scores.get(m, '') for m in METHODS)} |")
    return "\n".join(lines)


def _order(key: tuple) -> tuple:
    merged, of = map(int, key[0].split("/"))
    return merged / of, key[1]


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
        rows = []
        with open(args.out / f"quality_{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row in rows_of(name, args):
                rows.append(row)
                writer.writerow(row)
                file.flush()
        print(f"{table(rows)}\n", flush=True)
    print(machine())


if __name__ == "__main__":
    main()
