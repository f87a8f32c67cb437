"""What commands take on models that fill memory: whole processes, by the largest resident size and time.

    python -m benchmarks.memory [--layers 6 12 24] [--place auto cpu] [--commands merge verify ...]
    python -m benchmarks.memory --computed     # Llama-3 8B, 70B, 405B on one 80 GB GPU with 128 GB of host memory

Random Llama models of 2048 x 5632 in bfloat16 are written below TMPDIR. Every command is a process of its own, as a
user starts it; "above torch" is its peak less that of a process which only imports torch, transformers and this
package. `--place cpu` is the way with the whole model in memory, "copy" the time that copying the folder takes.
Resident pages of files that are mapped count, as the system counts them.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks.harness.measure import machine

RESULTS = Path(__file__).parent / "results"
LAYERS = (6, 12, 24)  # 0.6, 1.2, 2.3 GB
COLUMNS = ("command", "model_gb", "place", "budget", "seconds", "peak_mib", "above_torch_mib", "copy_seconds", "status")
_IMPORTS = "import torch, accelerate; from transformers import LlamaForCausalLM; import ffmerge_fast as ff; ff.merge_"
_DATA = ["--data", "{here}/text.txt", "--max-length", "256", "--batch-size", "8"]
_FEW = ["--tokens", "2048"]
# name: arguments; {m} model, {o} output, {here} folder. In this order: later ones read what earlier ones wrote.
COMMANDS = {
    "inspect": "inspect {m}",
    "collect one group": "collect {m} {o}.stats --layers 1-2 --exact {data} {few}",
    "collect windows of 5": "collect {m} {o}.windows --window 5 --sketch 256 {data} {few}",
    "merge": "merge {m} {o}.merged --overwrite --layers 1-4 --method average",
    "merge by statistics": "merge {m} {o}.aligned --overwrite --layers 1-2 --statistics {o}.stats",
    "verify": "verify {o}.merged",
    "export --expand": "export {o}.merged {o}.expanded --overwrite --expand",
    "merge and refit": (
        "merge {m} {o}.refit --overwrite --layers 1-2 --statistics {o}.stats --recover refit {data} {few}"
    ),
    "eval": "eval {m} {data} --eval-limit 8",
    "project, 1 step": "project {m} {o}.small --overwrite --keep 0.5 --steps 1 --calibration 2 {data}",
    "project, 1 step, paper's start": (
        "project {m} {o}.pruned --overwrite --keep 0.5 --no-reconstruct --steps 1 --calibration 2 {data}"
    ),
}
PLACED = {"collect one group", "collect windows of 5", "merge", "merge by statistics", "merge and refit", "eval"}


def make_model(folder: Path, layers: int) -> None:
    """A random model and its tokenizer."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(_text().splitlines(), vocab_size=512, special_tokens=["<|end|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=16,
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


def run(layers: int, places: list[str], names: list[str], here: Path) -> list[dict]:
    """The rows of one size."""
    folder = here / f"llama{layers}"
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.memory", "--make", str(layers), str(folder)], check=True)
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
            row = dict(
                zip(
                    COLUMNS,
                    (
                        name,
                        f"{gb:.2f}",
                        place,
                        budget,
                        f"{seconds:.1f}",
                        peak,
                        peak - base,
                        f"{_copy(folder):.1f}",
                        status,
                    ),
                    strict=True,
                )
            )
            print(row, flush=True)
            rows.append(row)
    return rows


def _copy(folder: Path) -> float:
    started = time.perf_counter()
    shutil.copytree(folder, folder.with_suffix(".copy"))
    seconds = time.perf_counter() - started
    shutil.rmtree(folder.with_suffix(".copy"))
    return seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS)
    parser.add_argument("--place", nargs="+", default=["auto", "cpu", "stream"], help="ways to hold the model")
    parser.add_argument("--commands", nargs="+", choices=tuple(COMMANDS), default=tuple(COMMANDS))
    parser.add_argument("--here", type=Path, help="folder for the models, kept (default: a temporary one)")
    parser.add_argument("--make", nargs=2, metavar=("LAYERS", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.make:
        make_model(Path(args.make[1]), int(args.make[0]))
        return 0
    header = machine()
    path = RESULTS / f"memory_{header['machine'].split('(')[0].strip().lower().replace(' ', '-')}.csv"
    with tempfile.TemporaryDirectory() as temporary:
        rows = [row for n in args.layers for row in run(n, args.place, args.commands, args.here or Path(temporary))]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *header], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | header for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
