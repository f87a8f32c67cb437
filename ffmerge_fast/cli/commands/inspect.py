"""`ffmerge inspect`"""

from __future__ import annotations

from ...support.sizes import format_bytes
from ...support.tables import format_table
from ..options import model_options
from ..results import Result

HELP = "list the FFN sublayers of a model"
OPTIONS = (model_options,)
_COLUMNS = ("stack", "index", "path", "d_model", "d_ff", "activation", "gated", "bias", "parameters")


def run(args, inputs) -> Result:
    from ...models.projections import describe_own, own_capacity, own_parameters_of
    from ...models.ties import shared_groups

    summary, model = inputs.summary()
    groups = [{"stack": s, "layers": list(layers)} for s, layers in shared_groups(model)]
    of_ffns = sum(f.parameters for f in summary.ffns) - sum(
        f.parameters for f in summary.ffns for g in groups if f.stack == g["stack"] and f.index in g["layers"][1:]
    )
    shared = "; ".join(f"{g['stack']} {g['layers']}" for g in groups) or "none"
    if own := own_capacity(model):
        extra = sum(p.numel() for p in own_parameters_of(model))
        of_ffns, shared = of_ffns + extra, f"{shared}, with {describe_own(own)}: {extra:,} parameters"
    text = (
        f"{format_table(_COLUMNS, [[getattr(f, c) for c in _COLUMNS] for f in summary.ffns])}\n"
        f"{summary.model_type}: {summary.parameters:,} parameters ({format_bytes(summary.nbytes)}), "
        f"{of_ffns / summary.parameters:.1%} in FFNs; shared: {shared}"
    )
    return Result(summary.to_dict() | {"shared_groups": groups, "ffn_parameters": of_ffns}, text)
