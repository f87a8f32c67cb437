"""`ffmerge export`"""

from __future__ import annotations

from pathlib import Path

from ...support.sizes import format_bytes
from ..options import argument, model_options, out_options
from ..results import Result, save_model

HELP = "write a model again, with --expand as a stock checkpoint of full size"
OPTIONS = (
    model_options,
    out_options,
    argument("--expand", action="store_true", help="give every layer its own FFN"),
)


def run(args, inputs) -> Result:
    from ...merging.apply import expand_

    model = inputs.to_change
    if args.expand:
        expand_(model)
    save_model(args, inputs, model)
    size = sum(p.stat().st_size for p in Path(args.out).glob("*.safetensors"))
    return Result({"folder": str(args.out), "bytes": size}, f"{args.out}: {type(model).__name__}, {format_bytes(size)}")
