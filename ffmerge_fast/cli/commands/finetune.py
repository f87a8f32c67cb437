"""`ffmerge finetune`"""

from __future__ import annotations

from ..options import data_options, finetune_options, model_options, out_options, place_options, validation_option
from ..outputs import work_folder_of
from ..results import Result, save_model, trained

HELP = "fine-tune a (merged) model"
OPTIONS = (model_options, out_options, place_options, data_options, validation_option, finetune_options)


def run(args, inputs) -> Result:
    from ...driver.training.finetune import finetune
    from ...integrations.fsdp2 import copy_whole_
    from ...support.distributed import is_distributed

    model, task = inputs.model, inputs.task
    work = work_folder_of(args)
    result = finetune(
        model,
        task,
        args.steps,
        settings=inputs.training,
        teacher=inputs.teacher,
        evaluate=inputs.score,
        signature=inputs.signature_of_score(),
        output_dir=work,
    )
    if args.parallel == "fsdp2" and is_distributed():
        model = copy_whole_(model, inputs.load_model())
    save_model(args, inputs, model)
    return trained(args.out, work, task.metric, result)
