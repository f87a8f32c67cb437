"""What commands take on models that fill memory: whole processes, by the largest resident size and time.

    python -m benchmarks.memory [--sizes 0.6 1.2 2.4] [--place auto cpu stream] [--commands merge verify ...]
    python -m benchmarks.memory --computed     # Llama-3 on one GPU, by the plan that the commands print

Random Llama models in bfloat16, of so many GB, are written below TMPDIR. Every command is a process of its own, as a
user starts it; "above torch" is its peak less that of a process which only imports torch, transformers and this
package. `--place cpu` is the way with the whole model in memory; `--place stream` gets a budget of one fifth of the
model; "copy" is the time that copying the folder takes. Resident pages of mapped files count, as the system counts
them.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks.harness.measure import machine, slug
from ffmerge_fast.support.errors import FFMergeError

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "0.6": (1024, 2816, 25),
    "1.2": (1536, 4096, 23),
    "2.4": (2048, 5632, 26),
    "8": (4096, 11264, 21),
}  # d, d_ff, n
COLUMNS = ("command", "model_gb", "place", "budget", "seconds", "peak_mib", "above_torch_mib", "copy_seconds", "status")
_IMPORTS = "import torch, accelerate; from transformers import LlamaForCausalLM; import ffmerge_fast as ff; ff.merge_"
_DATA = ["--data", "{here}/text.txt", "--max-length", "128", "--batch-size", "2"]
_FEW = ["--tokens", "512"]
# name: arguments; {m} model, {o} output, {here} folder. In this order: later ones read what earlier ones wrote.
COMMANDS = {
    "inspect": "inspect {m}",
    "collect one group": "collect {m} {o}.stats --layers 1-2 --exact {data} {few}",
    "collect windows of 5": "collect {m} {o}.windows --window 5 --sketch 128 {data} {few}",
    "merge": "merge {m} {o}.merged --overwrite --layers 1-4 --method average",
    "merge by statistics": "merge {m} {o}.aligned --overwrite --layers 1-2 --statistics {o}.stats",
    "verify": "verify {o}.merged",
    "export --expand": "export {o}.merged {o}.expanded --overwrite --expand",
    "merge and refit": (
        "merge {m} {o}.refit --overwrite --layers 1-2 --statistics {o}.stats --recover refit {data} {few}"
    ),
    "eval": "eval {m} {data} --eval-limit 4",
    "project, 1 step": "project {m} {o}.small --overwrite --keep 0.5 --steps 1 --calibration 2 {data}",
    "project, 1 step, paper's start": (
        "project {m} {o}.pruned --overwrite --keep 0.5 --no-reconstruct --steps 1 --calibration 2 {data}"
    ),
}
PLACED = {"collect one group", "collect windows of 5", "merge", "merge by statistics", "merge and refit", "eval"}


def make_model(folder: Path, size: str) -> None:
    """A random model and its tokenizer."""
    d_model, d_ff, layers = SIZES[size]
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(_text().splitlines(), vocab_size=512, special_tokens=["<|end|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=d_model, intermediate_size=d_ff, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=8192, max_position_embeddings=1024, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)


def _text() -> str:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]
    return "\n".join(file.read_text(errors="replace") for file in files)[:400_000]


def measured(command: list[str]) -> tuple[float, int, str]:
    """(seconds, largest resident size in MiB, how it ended) of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    last = [line for line in said.splitlines() if line.startswith("error")][-1:]
    return time.perf_counter() - started, usage.ru_maxrss // 1024, "" if not code else f"{code} {''.join(last)}"


def run(size: str, places: list[str], names: list[str], here: Path) -> list[dict]:
    """The rows of one size."""
    folder = here / f"llama-{size}"
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.memory", "--make", size, str(folder)], check=True)
    (here / "text.txt").write_text(_text())
    gb = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    base = measured([sys.executable, "-c", _IMPORTS])[1]
    rows = []
    for name in names:
        for place in places if name in PLACED else ["auto"]:
            budget = f"{round(gb * 1e9 / 5 / 2**20)}MiB" if place == "stream" else ""
            line = COMMANDS[name].format(m=folder, o=here / "out", data=" ".join(_DATA), few=" ".join(_FEW), here=here)
            words = [word.replace("{here}", str(here)) for word in line.split()]
            words += ["--place", place] if name in PLACED else []
            words += ["--budget", budget] if budget else []
            seconds, peak, status = measured([sys.executable, "-m", "ffmerge_fast.cli", *words, "-q"])
            took, copied = f"{seconds:.1f}", f"{_copy(folder):.1f}"
            found = (name, f"{gb:.2f}", place, budget, took, peak, peak - base, copied, status)
            row = dict(zip(COLUMNS, found, strict=True))
            print(row, flush=True)
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------------ computed

LLAMAS = {"Llama-3-8B": (4096, 14336, 32, 32, 128256), "Llama-3-70B": (8192, 28672, 80, 64, 128256),
          "Llama-3.1-405B": (16384, 53248, 126, 128, 128256)}  # fmt: skip
COMPUTED = {
    "collect, one group of 8": "collect m o --layers 8-15 --data d --tokens 10000",
    "collect, windows of 5": "collect m o --window 5 --data d --tokens 10000",
    "merge --recover refit": "merge m o --layers 8-15 --statistics s --recover refit --data d --tokens 10000",
    "eval, 100,000 tokens": "eval m --data d",
    "merge": "merge m o --plan p",
}
_GPU = {"device_memory": 80 * 10**9, "host_memory": 128 * 10**9, "flops": 4e14, "reads": 3e9}


def computed() -> list[dict]:
    """What the commands would plan on one GPU; nothing runs."""
    from dataclasses import replace

    import torch
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    from ffmerge_fast.cli.footprint import work_of
    from ffmerge_fast.cli.parser import parse
    from ffmerge_fast.driver.placement import Machine, ModelSize, place

    rows = []
    for name, (d, f, layers, heads, vocabulary) in LLAMAS.items():
        config = LlamaConfig(
            hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, vocab_size=vocabulary, max_position_embeddings=8192,
        )  # fmt: skip
        with init_empty_weights(include_buffers=False):
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        size = ModelSize.of(model)
        for command, line in COMPUTED.items():
            work = work_of(parse([*line.split(), "--device", "cuda"]), model, _GPU["device_memory"])
            work = work if work.tokens else replace(work, tokens=100_000)
            try:
                found = place(size, work, Machine("cuda", **_GPU))
                way = {"stream": f"stream from {found.weights}", "files": "folder to folder"}.get(found.way, found.way)
                of_device = 0 if found.way == "files" else found.on_device
                memory = [f"{nbytes / 1e9:.0f}" for nbytes in (of_device, found.on_host, found.on_disk)]
                row = (name, command, way, *memory, f"{found.seconds / 60:.1f}")
            except FFMergeError as error:
                row = (name, command, f"does not fit: {_least(error)} GB on the device", "", "", "", "")
            rows.append(dict(zip(_COMPUTED, row, strict=True)))
    return rows


def _least(error: FFMergeError) -> str:
    return f"{int(re.search('at least ([0-9]+) bytes', str(error))[1]) / 1e9:.0f}"


_COMPUTED = ("model", "command", "weights", "device_gb", "host_gb", "disk_gb", "minutes")


def _key(row: dict) -> tuple:
    return float(row["model_gb"]), list(COMMANDS).index(row["command"]), row["place"]


def _copy(folder: Path) -> float:
    started = time.perf_counter()
    shutil.copytree(folder, folder.with_suffix(".copy"))
    seconds = time.perf_counter() - started
    shutil.rmtree(folder.with_suffix(".copy"))
    return seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=("0.6", "1.2", "2.4"), help="in GB")
    parser.add_argument("--place", nargs="+", default=["auto", "cpu", "stream"], help="ways to hold the model")
    parser.add_argument("--commands", nargs="+", choices=tuple(COMMANDS), default=tuple(COMMANDS))
    parser.add_argument("--here", type=Path, help="folder for the models, kept (default: a temporary one)")
    parser.add_argument("--computed", action="store_true", help="large Llamas on one GPU, by the plan alone")
    parser.add_argument("--make", nargs=2, metavar=("SIZE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.make:
        make_model(Path(args.make[1]), args.make[0])
        return 0
    if args.computed:
        _write(RESULTS / "memory_computed.csv", _COMPUTED, computed())
        return 0
    header = machine()
    path = RESULTS / f"memory_{slug(header['machine'])}.csv"
    with tempfile.TemporaryDirectory() as temporary:
        for size in args.sizes:
            rows = [row | header for row in run(size, args.place, args.commands, args.here or Path(temporary))]
            _write(path, (*COLUMNS, *header), sorted(_others(path, rows) + rows, key=_key))
    return 0


def _others(path: Path, rows: list[dict]) -> list[dict]:
    """The rows of a file that were not made again."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        made = {_key(row) for row in rows}
        return [row for row in csv.DictReader(file) if _key(row) not in made]


def _write(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
