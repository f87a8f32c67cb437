"""What a command gives back: values for machines, text for people, and files."""

from __future__ import annotations

import os
import warnings
from typing import Any, NamedTuple

from ..support.errors import FFMergeError


class Result(NamedTuple):
    """What a command found or did."""

    values: dict[str, Any]  # for --json
    text: str

    def print(self, as_json: bool) -> None:
        from ..support.files import json_text

        print(json_text(self.values, indent=1) if as_json else self.text)


def is_first_rank() -> bool:
    """Whether this process is the one of several that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def one_line(error: Exception) -> str:
    """An error's message in one line, with its kind unless it is ours."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if isinstance(error, FFMergeError) else f"{type(error).__name__}: {message}"


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

    if is_first_rank():
        if inputs.processor is None:
            warnings.warn(f"{args.model} holds no tokenizer or image processor, nor does {args.out}", stacklevel=2)
        trust = getattr(args, "trust_remote_code", False)
        save_pretrained(
            model, args.out, inputs.processor, args.overwrite, args.max_shard_size, extras, args.model, trust
        )


def write_plan(path: str | None, plan: Any) -> None:
    """Write a plan file where one is asked for, by one of several processes."""
    from ..support.files import write_json

    if path and is_first_rank():
        write_json(path, plan.to_dict(), indent=None)
