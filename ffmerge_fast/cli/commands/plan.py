"""`ffmerge plan`"""

from __future__ import annotations

import csv

from ...support.tables import format_table
from ..options import WINDOW, argument, choice_options, loading_options, memory_option, method_option
from ..outputs import file_to_write
from ..results import Result, plan_values, write_plan
from ..values import file, numbers, path

HELP = "choose and align layers from statistics"
OPTIONS = (
    argument("statistics", type=file, help="file written by `ffmerge collect`"),
    argument("--model", type=path, help="the model's folder, for --method weights"),
    loading_options,
    choice_options,
    method_option,
    memory_option,
    argument("--out", type=file_to_write, help="plan file to write"),
    argument("--sweep", type=numbers(WINDOW), metavar="2,3,4", help="rank all windows of these sizes"),
    argument("--csv", type=file_to_write, help="write the sweep here"),
)


def run(args, inputs) -> Result:
    if args.sweep:
        return _sweep(args, inputs)
    write_plan(args.out, inputs.plan)
    return Result(plan_values(inputs.plan), str(inputs.plan))


def _sweep(args, inputs) -> Result:
    from ...merging.search.search import sweep
    from ...support.files import new_file

    rows = sweep(inputs.statistics, args.sweep, args.anchor)
    if args.csv:
        with new_file(args.csv) as beside, open(beside, "w", newline="") as table:
            writer = csv.DictWriter(table, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return Result({"sweep": rows}, format_table(list(rows[0]), [list(row.values()) for row in rows]))
