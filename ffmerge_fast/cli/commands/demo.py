"""`ffmerge demo`"""

from __future__ import annotations

from pathlib import Path

from ..options import argument
from ..results import Result
from ..values import path

HELP = "train, merge and tune two small models on this machine, without downloads"
OPTIONS = (
    argument("out", type=path, nargs="?", default="ffmerge-demo", help="folder to write"),
    argument("--overwrite", action="store_true"),
)


def run(args, inputs) -> Result:
    from ...driver.demo import demo

    return Result(*demo(Path(args.out), seed=args.seed, overwrite=args.overwrite))
