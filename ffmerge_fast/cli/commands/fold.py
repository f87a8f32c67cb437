"""`ffmerge fold`"""

from __future__ import annotations

from pathlib import Path

from ..options import argument, model_options, out_options
from ..results import Result, save_model
from ..values import path

HELP = "write the small model of a run of `project` that was stopped"
OPTIONS = (model_options, argument("work_dir", type=path, help="its work folder (OUT.project)"), out_options)


def run(args, inputs) -> Result:
    from ...driver.project_run import fold_run

    folded = fold_run(inputs.model, Path(args.work_dir))
    save_model(args, inputs, folded)
    count = sum(p.numel() for p in folded.parameters())
    return Result(
        {"folder": str(args.out), "parameters": count}, f"{args.out}: {type(folded).__name__}, {count:,} parameters"
    )
