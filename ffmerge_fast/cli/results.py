"""What a command gives back: values for machines, text for people, and files."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from typing import Any, NamedTuple

from ..support.errors import FFMergeError


class Result(NamedTuple):
    """What a command found or did."""

    values: dict[str, Any]  # for --json
    text: str

    def shown(self, as_json: bool) -> str:
        from ..support.files import json_text

        return json_text(self.values, indent=1) if as_json else self.text


def say(line: str) -> None:
    """One line on standard error, if anybody can be told."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(line, file=sys.stderr)


def one_line(error: Exception) -> str:
    """What to say of an error that ends a command: ours as it is, others in our words."""
    message = " ".join(str(error).split())
    if isinstance(error, FFMergeError):
        return message
    if isinstance(error, MemoryError) or any(words in message.lower() for words in _OUT_OF_MEMORY):
        return f"there is too little memory ({message or 'none was left'}); give smaller batches, or free some"
    if isinstance(error, ImportError):
        return f"a package cannot be imported ({message}); install it again, with enough memory free"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}); check the path and its permissions"
    return f"this is a bug ({type(error).__name__}: {message}); please report what --verbose shows"


_OUT_OF_MEMORY = ("out of memory", "cannot allocate memory", "can't allocate memory", "failed to map segment")


def plan_values(plan: Any) -> dict[str, Any]:
    """A plan in figures."""
    return {
        "layers": plan.layers,
        "method": plan.method,
        "mean_correlation": plan.mean_correlation,
        "parameters": plan.model.parameters,
        "parameters_after": plan.parameters_after,
        "bytes": plan.model.nbytes,
        "bytes_after": plan.nbytes_after,
        "search": [{"layers": layers, "score": score} for layers, score in plan.search],
        "sketched": plan.sketched and plan.sketched._asdict(),
    }


def trained(out: str, work: Any, metric: str, run: Any) -> Result:
    """What a training run came to."""
    values = {
        "folder": str(out),
        "metric": metric,
        "best": run.best_metric,
        "best_step": run.best_step,
        "steps": run.steps,
    }
    best = "" if run.best_metric is None else f", best {metric} {run.best_metric:.4g} at {run.best_step}"
    return Result(values, f"{out}: {run.steps} steps{best}; log and checkpoints in {work}")


def save_model(args: Any, inputs: Any, model: Any, extras: dict[str, str] | None = None) -> None:
    """Write the folder that `out_options` name, by one of several processes."""
    from ..checkpoint.folder import save_pretrained
    from ..support.distributed import rank

    if rank() == 0:
        if inputs.processor is None:
            warnings.warn(f"{args.model} holds no tokenizer or image processor, nor does {args.out}", stacklevel=2)
        trust = getattr(args, "trust_remote_code", False)
        save_pretrained(
            model, args.out, inputs.processor, args.overwrite, args.max_shard_size, extras, args.model, trust
        )


def write_plan(path: str | None, plan: Any) -> None:
    """Write a plan file where one is asked for, by one of several processes."""
    from ..support.distributed import rank
    from ..support.files import write_json

    if path and rank() == 0:
        write_json(path, plan.to_dict(), indent=None)
