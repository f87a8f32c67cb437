"""`ffmerge merge`"""

from __future__ import annotations

from ..options import (
    argument,
    choice_options,
    collect_options,
    data_options,
    method_option,
    model_options,
    out_options,
    place_options,
    recover_options,
    statistics_option,
    validation_option,
)
from ..results import Result, plan_values, save_model
from ..values import file

HELP = "merge FFNs and write the smaller model"
OPTIONS = (
    model_options,
    place_options,
    out_options,
    choice_options,
    method_option,
    statistics_option,
    argument("--plan", type=file, help="file written by `ffmerge plan` or `search`"),
    data_options,
    validation_option,
    collect_options,
    recover_options,
)


def run(args, inputs) -> Result:
    from ...checkpoint.folder import EXTRAS
    from ...driver.merge_run import merge_and_recover_
    from ...support.files import check_space

    recoveries = () if args.recover == "none" else args.recover.split("+")
    model, teacher = inputs.to_merge(recoveries)
    plan = inputs.plan
    check_space(args.out, plan.nbytes_after)
    merged = merge_and_recover_(
        model, plan, recoveries, batches=inputs.calibration_batches, options=_recovery_options(args), teacher=teacher
    )
    save_model(args, inputs, model, merged.files())
    values = plan_values(plan) | {"folder": str(args.out), "seconds": inputs.seconds | merged.seconds}
    values |= {name: report.to_dict() for name, report in merged.reports.items()}
    return Result(values, f"{merged}\nwritten to {args.out} (plan kept in {EXTRAS}/)")


def _recovery_options(args) -> dict[str, dict]:
    return {
        "refit": {
            "ridge": args.ridge,
            "rounds": args.recover_rounds,
            "max_tokens": args.tokens,
            "private": args.private,
        },
        "distill": {
            "steps": args.recover_steps,
            "lr": args.recover_lr,
            "max_tokens": args.tokens,
            "seed": args.seed,
            "delta_rank": args.delta_rank,
        },
    }
