"""`ffmerge demo` with its figures and its picture kept: results/demo.csv and results/demo.png.

python -m benchmarks.studies.demo
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import measure
from benchmarks.run import RESULTS, write
from ffmerge_fast.driver.demo import demo


def main() -> None:
    torch.set_num_threads(1)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as work:
        values, text = demo(Path(work) / "demo")
        seconds = round(time.process_time() - started)
        shutil.copy(Path(work) / "demo" / "correlation.png", RESULTS / "demo.png")
    rows = [{"op": "demo", "case": row.pop("model"), **row, "cpu_seconds": seconds} for row in values["rows"]]
    write(RESULTS / "demo.csv", measure.machine(), rows)
    print(f"{text}\n{seconds} s of processor time")


if __name__ == "__main__":
    main()
