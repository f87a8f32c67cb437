"""`ffmerge collect`"""

from __future__ import annotations

from ..options import (
    argument,
    choice_options,
    collect_options,
    data_options,
    model_options,
    place_options,
    validation_option,
)
from ..outputs import file_to_write
from ..results import Result

HELP = "correlate the FFN features of a model on data"
OPTIONS = (
    model_options,
    place_options,
    argument("out", type=file_to_write, help="statistics file to write"),
    choice_options,
    data_options,
    validation_option,
    collect_options,
)


def run(args, inputs) -> Result:
    from ...support.distributed import rank

    stats = inputs.statistics
    if rank() == 0:
        stats.save(args.out)
    counted = ", ".join(f"{stack} {n:,} tokens" for stack, n in stats.tokens.items())
    pairs = sum(map(len, stats.settings["pairs"].values()))
    return Result(
        {
            "statistics": str(args.out),
            "tokens": stats.tokens,
            "sketch": stats.sketch,
            "sketch_error": stats.sketch_error,
            "seconds": inputs.seconds,
        },
        f"{args.out}: {counted}, {pairs} pairs, {inputs.seconds['collect']:.1f} s; {stats.described()}",
    )
