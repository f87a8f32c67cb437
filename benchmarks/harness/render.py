"""Tables and a plot of the committed results: reads results/*.csv, writes results/README.md and results/*.png.

python -m benchmarks.harness.render
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"

Row = dict[str, str]
Table = list[list[str]]  # headers first


@dataclass(frozen=True)
class Section:
    """A heading of results/README.md, with a table for each of its files."""

    title: str
    command: str
    text: str
    files: tuple[str, ...]
    table: Callable[[list[Row]], Table]
    op: str = ""  # only rows of this op
    machine: str = ""  # where the CSV does not say it

    def render(self) -> str:
        parts = [f"## {self.title}", f"`{self.command}`", self.text]
        for name in self.files:
            rows = [row for row in read(name) if not self.op or row["op"] == self.op]
            if rows:
                parts += [f"[{name}]({name}), {self.machine or machine(rows)}:", markdown(self.table(rows))]
        return "\n\n".join(parts)


def read(name: str) -> list[Row]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def machine(rows: list[Row]) -> str:
    """What the rows' times depend on, in words."""
    isa, threads, torch, python = (
        " or ".join(sorted({row[key] for row in rows})) for key in ("isa", "threads", "torch", "python")
    )
    names = " or ".join(sorted({row["machine"] for row in rows}))
    return f"{names} ({isa}), threads: {threads}, torch {torch}, Python {python}"


def markdown(table: Table) -> str:
    headers, *lines = table
    return "\n".join(f"| {' | '.join(line)} |" for line in (headers, ["---"] * len(headers), *lines))


# ------------------------------------------------------------------------------------------------------------- tables


def cell(row: Row, column: str) -> str:
    """A value of a row; `column` is its name, or name:format for numbers."""
    name, _, form = column.partition(":")
    return format(float(row[name]), form) if form and row[name] else row[name]


def heading(column: str) -> str:
    return column.partition(":")[0].replace("_", " ")


def columns(*names: str) -> Callable[[list[Row]], Table]:
    """These columns of the CSV."""
    return lambda rows: [[heading(name) for name in names], *([cell(row, name) for name in names] for row in rows)]


def pivot(index: tuple[str, ...], spread: str, value: Callable[[Row], str]) -> Callable[[list[Row]], Table]:
    """A line per values of `index`, a column per value of `spread`."""

    def table(rows: list[Row]) -> Table:
        heads = list(dict.fromkeys(row[spread] for row in rows))
        lines: dict[tuple, Row] = {}
        for row in rows:
            lines.setdefault(tuple(cell(row, name) for name in index), {})[row[spread]] = value(row)
        body = [[*key, *(line.get(head, "") for head in heads)] for key, line in lines.items()]
        return [[*map(heading, index), *heads], *body]

    return table


def time_or_ratio(row: Row) -> str:
    """Our milliseconds; for others, how many times as long they take."""
    return f"{cell(row, 'median_ms:.4g')} ms" if row["candidate"] == "ffmerge" else row["ratio"]


def at_best_rate(rows: list[Row]) -> Table:
    """A line per size, number of steps and variant: mean and deviation over the seeds, at the rate that validation data
    chose with the first."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["keep"], row["steps"], row["variant"]), []).append(row)
    lines = []
    for (keep, steps, variant), tried in sorted(groups.items(), key=lambda g: (-float(g[0][0]), int(g[0][1]))):
        first = [row for row in tried if row["seed"] == tried[0]["seed"]]
        rate = min(first, key=lambda row: float(row["validation"]))["lr"]
        test = [float(row["test"]) for row in tried if row["lr"] == rate]
        spread = f" ± {statistics.stdev(test):.3f}" if len(test) > 1 else ""
        lines.append([keep, steps, variant, rate, str(len(test)), f"{statistics.mean(test):.3f}{spread}"])
    return [["keep", "steps", "variant", "learning rate", "seeds", "test loss"], *lines]


def by_sketch(rows: list[Row]) -> Table:
    """A line per window and recovery, a column per way of matching: the least and the largest score of its seeds."""
    named = {row["matched by"] for row in rows}
    ways = ["exact", "average", *sorted((way for way in named if way.isdigit()), key=int)]
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        searched = row["layers"] == "search"
        line = ("search: the best window" if searched else row["layers"], "" if searched else row["recover"])
        found.setdefault(line, {}).setdefault(row["matched by"], []).append(float(row["score"]))

    def cell(values: list[float]) -> str:
        low, high = f"{min(values):.4g}", f"{max(values):.4g}"
        return low if low == high else f"{low} to {high}"

    lines = [[*line, *(cell(scores[way]) if way in scores else "" for way in ways)] for line, scores in found.items()]
    return [["layers", "recover", *(f"m = {way}" if way.isdigit() else way for way in ways)], *lines]


def lost_by_rows(rows: list[Row]) -> Table:
    """A line per width, a column per m: the mean share of the objective that is lost, and that was expected to be."""
    sizes = sorted({int(row["rows"]) for row in rows})
    lines = []
    for width in sorted({int(row["width"]) for row in rows}):
        line = [f"{width}"]
        for m in sizes:
            chosen = [row for row in rows if (int(row["width"]), int(row["rows"])) == (width, m)]
            means = [statistics.mean(float(row[name]) for row in chosen) for name in ("lost", "expected") if chosen]
            line.append(f"{means[0]:.2%} ({means[1]:.2%}), {len(chosen)} seeds" if chosen else "")
        lines.append(line)
    return [["d", *(f"m = {m}" for m in sizes)], *lines]


def windows_by_size(rows: list[Row]) -> Table:
    """A line per model and window size: how well each score ranks the windows, and what each would choose."""
    sizes: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        sizes.setdefault((row["model"], row["size"]), []).append(row)
    lines = []
    for (model, size), members in sizes.items():
        loss, proxy, match = ([float(row[key]) for row in members] for key in ("loss", "proxy", "mean_correlation"))
        unlike = [-value for value in match]
        ranked = [f"{spearman(loss, score):.4g}" for score in (proxy, unlike)]
        chosen = [f"{loss[score.index(min(score))]:.4g}" for score in (loss, proxy, unlike)]
        seconds = [str(members[0][f"{search}_seconds"]) for search in ("whole", "exact", "proxy")]
        lines.append([model, str(size), str(len(loss)), *ranked, *chosen, *seconds])
    headers = (
        "model, size, windows, rho proxy, rho match, loss exact, loss proxy, loss match, whole s, exact s, proxy s"
    )
    return [headers.split(", "), *lines]


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation of two lists without equal values."""
    return statistics.correlation(*([sorted(values).index(value) for value in values] for values in (a, b)))


# ----------------------------------------------------------------------------------------------------------- sections

_OPS = ("amd-epyc.csv",)
_OP_TABLE = pivot(("case",), "candidate", time_or_ratio)
_HERE = "AMD EPYC, one thread"
_METHOD_SCORES = pivot(
    ("metric", "before:.4g", "merged", "layers", "recover", "tuned_steps"), "method", lambda row: cell(row, "score:.4g")
)

_ON_GPU = {  # one run on a lent GPU, which ended before the last cases of shared_ffn
    "correlation": "And `--size full`. A state is made, fed and read in every run: up to 3,000 tokens that, not the "
    "products, takes most of our time.",
    "projection": "`--size full`. One matrix or FFN of this size waits for Python and its launches.",
    "shared_ffn": "24 calls in one CUDA graph (x24). Since then ungated FFNs go to torch where no gradient is kept, "
    "and gated ones have a larger tile.",
}

SECTIONS = (
    Section(
        "The demo",
        "python -m benchmarks.studies.demo",
        "Two tiny models, trained for seconds, made smaller in every way `ffmerge demo` knows. The picture: "
        "correlation of one layer's FFN features with the anchor's, as trained and after the permutation."
        "\n\n![correlations](demo.png)",
        ("demo.csv",),
        columns("case", "variant", "parameters", "bytes", "metric", "value:.4g"),
    ),
    Section(
        "Real models",
        "python -m benchmarks.studies.real_models ../shared --out benchmarks/results/real_models.csv",
        "The command line on trained models: the best window by validation data, merged with and without "
        "permutation, un-tuned; test data. `parameters`: change of their number.",
        ("real_models.csv",),
        columns(
            "model", "tokens", "window", "metric", "before:.4g", "permute:.4g", "average:.4g", "parameters:.1%",
            "collect s:.1f", "search s:.1f", "assignment s:.2f", "merge s:.3f",
        ),
        machine=_HERE,
    ),
    Section(
        "Quality after tuning",
        "python -m benchmarks.studies.quality ../shared --models vit-cifar10 --tune 100",
        "Test score by method, merged only and after the same tuning for each (gpt2-pystdlib: `--tune 40`; "
        "marian-en-de: none; rounds: `--rounds 4` without `--tune`). `copy`: the anchor's FFN in place of all; "
        "`none`: not merged. One run each; of 2,000 images one point is about the standard error.",
        ("quality_vit-cifar10.csv", "quality_gpt2-pystdlib.csv", "quality_marian-en-de.csv"),
        _METHOD_SCORES,
        machine=_HERE,
    ),
    Section(
        "Recovery",
        "python -m benchmarks.studies.recovery ../shared --models gpt2-pystdlib vit-cifar10 marian-en-de",
        "What merging (permute) costs in test loss, and the share of it that came back. Tuning trains the merged "
        "model end to end for the CPU seconds that refit and distill take together; deltas are trained for half "
        "the steps; neurons of each layer's own (`refit_(private=)`) are fitted, then trained for half the steps. "
        "`ffns`: parameters left of the layers' FFNs, deltas and neurons included, in FFNs. One run each.",
        ("recovery_gpt2-pystdlib.csv", "recovery_vit-cifar10.csv", "recovery_marian-en-de.csv"),
        columns(
            "layers", "recovery", "ffns:.2f", "steps", "cpu_seconds", "loss:.4g", "recovered:.2f", "metric", "score:.4g"
        ),
        machine=_HERE,
    ),
    Section(
        "Window search",
        "python -m benchmarks.studies.search_proxy ../shared",
        "All windows of a size merged (permute, un-tuned), validation loss. rho: Spearman's rank correlation of "
        "the loss with the proxy score and with the negated mean matched correlation; then the loss of the window "
        "that each way chooses, and CPU seconds of the search with every block run for every window, of the exact "
        "search (scores bit for bit the same) and by proxy. Assignments are made before.",
        ("search_proxy.csv",),
        windows_by_size,
        machine=_HERE,
    ),
    Section(
        "Quality of projected models",
        "nice -n 5 python -m benchmarks.studies.projection_quality ../shared",
        "The same sizes, batches and steps for all, each variant at the learning rate that is best for it on "
        "validation data.",
        (
            "projection_quality_gpt2-pystdlib.csv",
            "projection_quality_vit-cifar10.csv",
            "projection_quality_marian-en-de.csv",
        ),
        at_best_rate,
        machine=_HERE,
    ),
    Section(
        "Quality of projected models after more steps",
        "python -m benchmarks.studies.projection_quality ../shared --models marian-en-de vit-cifar10 "
        "--variants pruned SVD reconstructed --steps 200 1000 --device cuda",
        "The same, trained on a GPU until its time was up: lines of fewer than three seeds are unfinished, and "
        "Marian's `reconstructed` after 1,000 steps tried two rates only.",
        ("projection_quality_marian-en-de_nvidia-h200.csv", "projection_quality_vit-cifar10_nvidia-h200.csv"),
        at_best_rate,
        machine="NVIDIA H200, torch 2.11.0+cu130, Python 3.12.3",
    ),
    Section(
        "Reconstruction of a large student",
        "python -m benchmarks.studies.reconstruction",
        "Half of a random Llama, batches of 512 tokens. `forward`: one pass of the teacher over the tokens; `passes`: "
        "the walk without its solves in such passes (limit 3); `peak`: above both models, beside its bound.",
        ("reconstruction_amd-epyc.csv",),
        columns("case", "forward_s", "walk_s", "solves_s", "passes", "peak_mib", "bound_mib"),
    ),
    Section(
        "Pipeline",
        "python -m benchmarks.studies.pipeline",
        "Collect, assign and merge by sketches (1,024 rows) and exactly, beside the published algorithm: 36 layers, "
        "d_model 1280, d_ff 5120, window 12, 10,000 tokens. Peak memory above the model.",
        ("pipeline_amd-epyc.csv",),
        columns(
            "stage", "sketch s", "exact s", "published s", "sketch, times faster", "exact, times faster",
            "sketch MiB", "exact MiB", "published MiB", "sketch, of the memory", "exact, of the memory",
        ),
    ),
    Section(
        "Sketched correlations",
        "python -m benchmarks.studies.sketch ../shared",
        "Test scores after merging by sketches of m rows per layer, by exact correlations and without alignment; from "
        "the least to the largest of the seeds, each with the calibration examples in another order (five, where the "
        "study was finished). `search`: of all windows of a size, the exact validation score of the one that is found.",
        ("sketch_gpt2-pystdlib.csv", "sketch_vit-cifar10.csv", "sketch_marian-en-de.csv"),
        by_sketch,
    ),
    Section(
        "Sketched correlations: the objective",
        "python -m benchmarks.studies.sketch --objective 3072 5120 14336",
        "Share of the assignment's objective that matching on a sketch loses (and expects to lose, without the exact "
        "correlations) on features of two related random FFNs, 10,000 tokens; means.",
        ("sketch_objective.csv",),
        lost_by_rows,
    ),
    Section(
        "Streamed weights",
        "python -m benchmarks.studies.stream --runs 15",
        "Decode steps of 12 layers of GPT-2 Large's width (float32), blocks read from disk under one budget; "
        "`resident`: the same step in memory; `read`: the same reads with nothing computed. `--keep-cache` for the "
        "first lines.",
        ("stream_amd-epyc.csv",),
        columns(
            "case", "tied FFNs", "step s", "resident s", "read s", "MB read", "times faster", "fewer bytes",
            "share reached", "reads faster",
        ),
    ),
    Section(
        "Memory of commands",
        "python -m benchmarks.memory",
        "Whole processes on random Llama models in bfloat16, by the largest resident size; `above torch`: less that of "
        "a process that only imports. `cpu`: the whole model in memory; `stream`: block by block, with a budget of one "
        "fifth of the model; `auto` writes from folder to folder. `copy seconds`: the time of copying the folder.",
        ("memory_intel-r-xeon-r-processor-2-50ghz.csv",),
        columns("command", "model_gb", "place", "budget", "seconds", "copy_seconds", "peak_mib", "above_torch_mib",
                "status"),
    ),
    Section(
        "Memory of commands on large models (computed)",
        "python -m benchmarks.memory --computed",
        "Nothing of this was run: it is the plan that the commands print (`--dry-run`), for one GPU of 80 GB and 400 "
        "TFLOP/s, 128 GB of host memory and a disk of 3 GB/s; without the time of the assignments. Folder to folder, "
        "`disk` is what is written.",
        ("memory_computed.csv",),
        columns("model", "command", "weights", "device_gb", "host_gb", "disk_gb", "minutes"),
        machine="no machine",
    ),
    Section(
        "shared_ffn",
        "python -m benchmarks.run --op shared_ffn --size full",
        "Our time; the others' as a multiple of it: above 1, ours is faster. Decode steps and `torch.compile`: "
        "`python -m benchmarks.ops.bench_shared_ffn`.\n\n![speed over torch by tokens](shared_ffn.png)",
        _OPS,
        _OP_TABLE,
        op="shared_ffn",
    ),
    Section(
        "shared_ffn: memory of training",
        "python -m benchmarks.ops.bench_shared_ffn",
        "Activations and gradients of a training step, by what is kept for the backward pass (`recompute=`).",
        ("shared_ffn_memory.csv",),
        columns("case", "candidate", "ms", "time_ratio", "peak_MiB", "memory_ratio"),
    ),
    Section(
        "correlation",
        "python -m benchmarks.run --op correlation --size full",
        "As above. Streams of narrow layers: `python -m benchmarks.ops.bench_correlation`.",
        _OPS,
        _OP_TABLE,
        op="correlation",
    ),
    Section(
        "assignment",
        "python -m benchmarks.ops.bench_assignment",
        "As above; scipy and lapx without a certificate, ours with one.",
        _OPS,
        _OP_TABLE,
        op="assignment",
    ),
    Section(
        "projection",
        "python -m benchmarks.run --op projection --size full",
        "As above; steps include AdamW.",
        _OPS,
        _OP_TABLE,
        op="projection",
    ),
    *(
        Section(
            f"{op} on a GPU",
            f"python -m benchmarks.run --device cuda --op {op} --size large",
            text,
            ("nvidia-h100-80gb-hbm3.csv", "nvidia-h200.csv"),
            _OP_TABLE,
            op=op,
        )
        for op, text in _ON_GPU.items()
    ),
)  # fmt: skip


def page() -> str:
    """results/README.md."""
    head = "# Results\n\nWritten from the CSVs beside it by `python -m benchmarks.harness.render`; rules and peers: "
    return "\n\n".join([f"{head}[benchmarks/README.md](../README.md).", *(s.render() for s in SECTIONS)]) + "\n"


# --------------------------------------------------------------------------------------------------------------- plot


def speed_by_tokens(rows: list[Row], dtype: str) -> dict[str, list[tuple[int, float]]]:
    """{a model's shape: [(tokens, torch's time over ours)]} of the forward passes of one FFN."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        match = re.fullmatch(rf"(\S+) forward T(\d+) {dtype}", row["case"])
        if match and row["candidate"] == "torch":
            found.setdefault(match[1], []).append((int(match[2]), float(row["ratio"])))
    return {shape: sorted(points) for shape, points in found.items() if not shape.startswith("d")}


def plot_shared_ffn(path: Path) -> None:
    """How many times as fast as torch `shared_ffn` is, by tokens: a line per model's shape, a panel per dtype."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in read("amd-epyc.csv") if row["op"] == "shared_ffn"]
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, dtype in ((left, "float32"), (right, "bfloat16")):
        for shape, points in speed_by_tokens(rows, dtype).items():
            axes.plot(*zip(*points, strict=True), marker=".", label=shape)
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(dtype, fontsize=10)
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter("{x:.0f}")
    left.set_ylabel("torch's time / ours")
    figure.suptitle(f"One FFN, {machine(rows)}", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    (RESULTS / "README.md").write_text(page(), encoding="utf-8")
    plot_shared_ffn(RESULTS / "shared_ffn.png")


if __name__ == "__main__":
    main()
