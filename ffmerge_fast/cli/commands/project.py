"""`ffmerge project`"""

from __future__ import annotations

from pathlib import Path

from ..options import (
    data_options,
    finetune_options,
    model_options,
    out_options,
    place_options,
    project_options,
    validation_option,
)
from ..outputs import work_folder_of
from ..results import Result, save_model, say, trained

HELP = "train a smaller model whose weights are projections of the model's, and write it"
OPTIONS = (
    model_options,
    out_options,
    place_options,
    project_options,
    data_options,
    validation_option,
    finetune_options,
)


def run(args, inputs) -> Result:
    from ...driver.project_run import project_and_train

    model, task = inputs.model.requires_grad_(False), inputs.task
    work = Path(work_folder_of(args))
    proj, result = project_and_train(
        model,
        task,
        work,
        args.steps,
        inputs.training,
        options=_projection(args),
        reconstruct=_reconstruct(args),
        scores=args.importance,
        method=args.method,
        calibration=args.calibration,
        optimizer=_optimizer(args),
        teacher=model if args.distill else inputs.teacher,
        clone=args.clone,
        evaluate=inputs.score,
        signature=inputs.signature_of_score(),
        tell=None if args.quiet or args.json else say,
    )
    save_model(args, inputs, proj.fold())  # folded on every rank: it may be sharded
    values, text = trained(args.out, work, task.metric, result)
    before, after = sum(p.numel() for p in model.parameters()), proj.parameters()["student"]
    return Result(
        values | {"parameters": before, "parameters_after": after},
        f"{text}; {after:,} parameters, {after / before:.1%} of the base's",
    )


def _projection(args) -> dict:
    return {
        "keep": args.keep,
        "d_model": args.d_model,
        "d_ff": args.d_ff,
        "attention": args.attention,
        "residual": not args.no_residual,
        "init": args.init,
        "share": args.share,
        "untie_embeddings": False if args.tied else None,
    }


def _reconstruct(args):
    from ...projecting.settings import Reconstructing

    if args.no_reconstruct or args.no_residual:
        return None
    return Reconstructing(args.ridge, args.local_steps, args.local_lr)


def _optimizer(args) -> dict:
    return {
        "weight_decay_on_projections": args.weight_decay_on_projections,
        "state": args.state,
        "offload_base": args.offload_base,
    }
