"""`ffmerge env`"""

from __future__ import annotations

from ..results import Result

HELP = "versions, backends, CPU and GPU, and what is missing"
OPTIONS = ()


def run(args, inputs) -> Result:
    from ...driver.environment import format_report, report

    values = report()
    return Result(values, format_report(values))
