"""`ffmerge verify`"""

from __future__ import annotations

from ...support.sizes import format_bytes
from ..options import argument
from ..results import Result
from ..values import path

HELP = "check hashes, ties and reference logits of a folder"
OPTIONS = (argument("folder", type=path, help="folder written by ffmerge"),)


def run(args, inputs) -> Result:
    from ...checkpoint.verify import verify

    values = verify(args.folder)
    difference = values["logit_difference"]
    logits = "no reference logits were saved" if difference is None else f"logits differ by {difference:.2g}"
    groups = "; ".join(f"{g['stack']} {g['layers']}" for g in values["groups"]) or "none"
    text = (
        f"{args.folder} is what was saved: shared FFNs {groups}; {values['parameters']:,} parameters, "
        f"{format_bytes(values['bytes'])}; {logits}"
    )
    return Result(values, text)
