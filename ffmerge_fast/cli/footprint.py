"""What a command keeps in memory beside the model's weights, from its arguments."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..support.errors import FFMergeError
from .needs import collects

if TYPE_CHECKING:
    from torch import nn

_TOKENS = 1024  # of a batch, by default
_REFIT = 40  # bytes, times d_ff squared, that a refit of one group takes: sums, and two solutions in float64
_USUAL = 128  # tokens of an example, where the model does not say


def placement(args: argparse.Namespace, model: nn.Module) -> Any:
    """How a command holds the model, which may be on "meta"; None: whole. FFMergeError if it cannot."""
    from ..driver.placement import Machine, ModelSize, place

    try:
        size = ModelSize.of(model)
    except FFMergeError:
        if args.command != "eval" or args.place == "stream":
            raise
        return None  # a family that is not known can be evaluated whole
    machine = Machine.here(args.device)
    work = work_of(args, model, args.budget or machine.device_memory)
    return place(size, work, machine, args.place, args.budget, args.host_memory)


def work_of(args: argparse.Namespace, model: nn.Module, room: int) -> Any:
    """What a command keeps beside the weights, with so many bytes on the device."""
    from ..driver.placement import Work

    if args.command in ("finetune", "project"):
        return Work(_training(args, model), 0, 0, _length(args, model), args.batch_size, trains=True)
    if args.command == "merge" and args.recover == "none" and not collects(args):
        return Work(batch_size=0, files=True)
    sums, kept, token = _sums(args, model, room)
    logits = 0 if args.command == "collect" else 2 * 4 * getattr(model.config.get_text_config(), "vocab_size", 0)
    tokens, examples = getattr(args, "tokens", 0), 0
    if args.data:
        examples = args.batch_size if args.command in ("eval", "search") else calibration_batch(args, model)
    return Work(sums, kept, tokens, _length(args, model), examples, token=token + logits)


def calibration_batch(args: argparse.Namespace, model: nn.Module) -> int:
    """Examples at once that calibrate: as many as were asked for, on a CPU by default at most 16 and about a
    thousand tokens."""
    if "batch_size" in args.given or args.device.startswith("cuda"):
        return args.batch_size
    return max(1, min(args.batch_size, _TOKENS // _length(args, model)))


def _sums(args: argparse.Namespace, model: nn.Module, room: int) -> tuple[int, int, int]:
    """(bytes of the statistics and of what is solved with them, of features that are kept instead of products, of a
    token's features that wait for those of other layers); sets `args.sketch` or `args.max_memory` to what fits."""
    from ..merging.collect import wanted_pairs
    from ..merging.sketching import chosen_rows, exact_cost, fitting_rows, sketch_cost, usual_rows
    from ..models.sublayers import find_ffns

    ffns = find_ffns(model)
    widest = max(ffn.d_ff for ffn in ffns)
    refit = _REFIT * widest**2 if "refit" in getattr(args, "recover", "") else 0
    if args.command == "eval" or (args.command != "collect" and not collects(args)):
        return refit, 0, 0
    layers, window = getattr(args, "layers", None), args.window
    pairs = wanted_pairs(ffns, None if layers else window, None, layers, args.anchor)
    rows = chosen_rows(None if args.exact else args.sketch or "auto", pairs, ffns, args.tokens, args.max_memory)
    exact = exact_cost(pairs, ffns, args.tokens).nbytes
    free = not (args.exact or args.max_memory or "sketch" in args.given)
    on_cpu = not args.device.startswith("cuda")
    if args.budget and free and on_cpu and (rows is not None or exact > room // 3):
        rows = args.sketch = fitting_rows(rows or usual_rows(pairs, ffns), room // 3, pairs, ffns)
    if rows is not None:
        return max(refit, sketch_cost(pairs, ffns, args.tokens, rows).nbytes), 0, 0
    waiting = 4 * widest * (1 if layers else window - 1)
    if args.max_memory is None and not on_cpu and exact > room // 2:
        args.max_memory = 4 * widest**2  # of one pair: features are kept, and multiplied when a pair is read
    if args.max_memory is None or exact <= args.max_memory:
        return max(refit, exact), 0, waiting
    of_pair = 8 * widest**2  # its products, and a copy in the solver's order
    seen = {(stack, i) for stack, each in pairs.items() for pair in each for i in pair}
    kept = args.tokens * sum(ffns.at(*layer).d_ff for layer in seen) * next(model.parameters()).element_size()
    return max(refit, of_pair), kept, waiting


def _training(args: argparse.Namespace, model: nn.Module) -> int:
    """Bytes beside the model: gradients, moments, float32 copies; of `project` the student, P and R with theirs."""
    itemsize = next(model.parameters()).element_size()
    if args.command == "finetune":
        copies = 4 if itemsize < 4 else 0
        return sum(weight.numel() for weight in model.parameters()) * (itemsize + copies + 8)
    from ..projecting.projector import resolve
    from ..projecting.selection import trained_numbers
    from ..projecting.settings import Widths

    untied = False if args.tied else None
    layout, sizes = resolve(model, Widths(args.keep, args.d_model, args.d_ff, args.attention, untied))
    student, beside = trained_numbers(model, layout, sizes)
    return 2 * itemsize * student + beside * (6 if args.state == "8bit" else 12)


def _length(args: argparse.Namespace, model: nn.Module) -> int:
    """Tokens of an example."""
    from ..driver.evaluate import context_length

    if args.max_length:
        return args.max_length
    config = model.config
    if hasattr(config, "patch_size") and hasattr(config, "image_size"):
        return (config.image_size // config.patch_size) ** 2 + 1
    return _USUAL if config.is_encoder_decoder else min(context_length(model) or _USUAL, 1024)
