"""`ffmerge search`"""

from __future__ import annotations

from ...support.tables import format_table
from ...support.timing import timed
from ..options import (
    WINDOW,
    anchor_option,
    argument,
    collect_options,
    data_options,
    method_option,
    model_options,
    place_options,
    search_options,
    statistics_option,
    validation_option,
)
from ..outputs import file_to_write
from ..results import Result, plan_values, write_plan
from ..values import number

HELP = "try every window on validation data and plan the best"
OPTIONS = (
    model_options,
    place_options,
    argument("--window", type=number(int, WINDOW), required=True, help="number of adjacent layers"),
    anchor_option,
    method_option,
    statistics_option,
    data_options,
    validation_option,
    collect_options,
    argument("--out", type=file_to_write, help="plan file to write"),
    search_options,
)


def run(args, inputs) -> Result:
    from ...merging.search.search import search

    model, stats, task = inputs.model, inputs.statistics, inputs.task
    options = {
        "anchor": args.anchor,
        "method": args.method,
        "seed": args.seed,
        "resume": args.resume,
        "fresh": args.fresh,
    }
    if args.evaluate == "proxy":
        metric, evaluate = "relative error", "proxy"
        options |= {"batches": inputs.calibration_batches(), "max_tokens": args.proxy_tokens}
    else:
        metric, evaluate = task.metric, inputs.score
        options["higher_is_better"] = task.higher_is_better
        options["signature"] = inputs.signature_of_score() if args.resume else None

    with timed(inputs.seconds, "search"):
        plan = search(model, stats, args.window, evaluate, **options)
    write_plan(args.out, plan)
    values = plan_values(plan) | {"metric": metric, "seconds": inputs.seconds}
    return Result(values, f"{format_table(['window', metric], plan.search)}\n\n{plan}")
