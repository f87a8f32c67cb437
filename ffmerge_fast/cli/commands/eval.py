"""`ffmerge eval`"""

from __future__ import annotations

import contextlib

from ...support.errors import FFMergeError
from ..options import data_options, model_options, place_options, stream_options
from ..results import Result

HELP = "perplexity, accuracy or BLEU of a model"
OPTIONS = (model_options, place_options, data_options, stream_options)


def run(args, inputs) -> Result:
    from ...models.elsewhere import in_memory
    from ...support.tensors import check_weights

    model = inputs.model
    if in_memory(model):
        check_weights(model)
    with _streaming(args, model):
        values = inputs.test_task.evaluate(model, "test", args.batch_size, limit=args.eval_limit)
    if overflown := [name for name, value in values.items() if value != value]:
        raise FFMergeError(
            f"eval: {overflown[0]} is nan although all weights are finite: values overflow in {model.dtype}; give "
            "--dtype float32"
        )
    return Result(values, "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))


def _streaming(args, model):
    """With --stream the blocks' weights are outside of the device meanwhile."""
    from ...runtime.streaming.stream import stream_

    if not args.stream:
        return contextlib.nullcontext()
    return stream_(model, args.device, args.stream, args.stream_budget or "20GiB")
