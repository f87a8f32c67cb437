"""The `ffmerge` command: parses arguments, calls the library, prints a table or JSON. No logic lives here."""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..support.errors import FFMergeError
from ..support.sizes import format_bytes
from ..support.tables import format_table
from .options import (
    anchor_option,
    argument,
    choice_options,
    collect_options,
    common_options,
    data_options,
    finetune_options,
    layout_options,
    memory_option,
    method_option,
    model_options,
    out_options,
    project_options,
    recover_options,
    search_options,
    sizes,
    stream_options,
    validation_option,
)

Result = tuple[dict[str, Any], str]  # for --json, for people


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a mistake or failure (one line on stderr), 2 for usage."""
    args = parser().parse_args(argv)
    _set_up(args)
    try:
        values, text = args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    finally:
        _close_distributed()
    if _is_first_rank():
        print(json.dumps(values, indent=1, default=str) if args.json else text)
    return 0


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    return message if isinstance(error, FFMergeError) else f"{type(error).__name__}: {message}"


def _set_up(args: argparse.Namespace) -> None:
    from ..support.env import allow_network
    from ..support.progress import set_quiet

    set_quiet(args.quiet or args.json)
    if args.online:
        allow_network()
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.quiet or args.json or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers heeds it too
    if not args.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_, **__: args.quiet or print(f"warning: {message}", file=sys.stderr)
    import torch

    torch.manual_seed(args.seed)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():  # under torchrun
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _close_distributed() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------- commands


def _inspect(args) -> Result:
    from ..models.projections import delta_rank, deltas_of
    from ..models.summary import ModelSummary
    from ..models.ties import shared_groups

    model = _model(args)
    summary = ModelSummary.of(model)
    columns = ("stack", "index", "path", "d_model", "d_ff", "activation", "gated", "bias", "parameters")
    rows = [[getattr(f, c) for c in columns] for f in summary.ffns]
    groups = [{"stack": s, "layers": list(layers)} for s, layers in shared_groups(model)]
    of_ffns = sum(f.parameters for f in summary.ffns) - sum(
        f.parameters for f in summary.ffns for g in groups if f.stack == g["stack"] and f.index in g["layers"][1:]
    )
    shared = "; ".join(f"{g['stack']} {g['layers']}" for g in groups) or "none"
    if rank := delta_rank(model):
        extra = sum(p.numel() for p in deltas_of(model))
        of_ffns, shared = of_ffns + extra, f"{shared}, with deltas of rank {rank}: {extra:,} parameters"
    text = (
        f"{format_table(columns, rows)}\n{summary.model_type}: {summary.parameters:,} parameters "
        f"({format_bytes(summary.nbytes)}), {of_ffns / summary.parameters:.1%} in FFNs; shared: {shared}"
    )
    return summary.to_dict() | {"shared_groups": groups, "ffn_parameters": of_ffns}, text


def _collect(args) -> Result:
    seconds: dict[str, float] = {}
    stats = _collect_statistics(args, _model(args), seconds)
    if _is_first_rank():
        stats.save(args.out)
    values = {"statistics": str(args.out), "tokens": stats.tokens, "seconds": seconds}
    counted = ", ".join(f"{stack} {n:,} tokens" for stack, n in stats.tokens.items())
    return (
        values,
        f"{args.out}: {counted}, {len(sum(stats.settings['pairs'].values(), []))} pairs, {seconds['collect']:.1f} s",
    )


def _plan(args) -> Result:
    from ..merging.plan import plan
    from ..merging.search.search import sweep
    from ..merging.statistics import CorrelationStats

    stats = CorrelationStats.load(args.statistics, max_memory=args.max_memory)
    if args.sweep:
        rows = sweep(stats, args.sweep, args.anchor)
        if args.csv:
            _write_csv(args.csv, rows)
        return {"sweep": rows}, format_table(list(rows[0]), [list(r.values()) for r in rows])
    model = _model(args) if args.model else None
    made = plan(stats, args.layers, args.window, args.anchor, args.method, model, args.seed)
    if args.out:
        _write_text(args.out, json.dumps(made.to_dict()))
    return _plan_values(made), str(made)


def _search(args) -> Result:
    from ..merging.search.search import search

    model = _model(args)
    seconds: dict[str, float] = {}
    stats = _statistics(args, model, seconds)
    task = _task(args, model, train=args.data, validation=args.eval_data)
    options = {"anchor": args.anchor, "method": args.method, "seed": args.seed, "resume": args.resume}
    if args.evaluate == "proxy":
        metric, evaluate = "relative error", "proxy"
        options |= {"batches": _calibration_batches(args, task), "max_tokens": args.proxy_tokens}
    else:
        metric, options["higher_is_better"] = task.metric, task.higher_is_better

        def evaluate(merged: Any) -> float:
            return task.score(merged, limit=args.eval_limit)

    with _timed(seconds, "search"):
        found = search(model, stats, args.window, evaluate, **options)
    if args.out and _is_first_rank():
        _write_text(args.out, json.dumps(found.to_dict()))
    table = format_table(["window", metric], found.search)
    return _plan_values(found) | {"metric": metric, "seconds": seconds}, f"{table}\n\n{found}"


def _merge(args) -> Result:
    from ..checkpoint.folder import EXTRAS, load_processor, save_pretrained
    from ..merging.apply import merge_
    from ..merging.plan import MergePlan, plan
    from ..support.files import check_new_folder

    if args.delta_rank and "distill" not in args.recover:
        raise FFMergeError(f"--delta-rank: got --recover {args.recover}, wanted --recover distill or refit+distill")
    check_new_folder(args.out, args.overwrite)
    model = _model(args)
    seconds: dict[str, float] = {}
    if args.plan:
        made = MergePlan.from_dict(_read_json(args.plan, "plan"))
    else:
        needed = args.statistics or args.window or args.method == "permute"
        stats = _statistics(args, model, seconds) if needed else None
        with _timed(seconds, "align"):
            made = plan(stats, args.layers, args.window, args.anchor, args.method, model, args.seed)
    teacher = copy.deepcopy(model) if args.recover != "none" else None
    with _timed(seconds, "merge"):
        merge_(model, made)
    extras = {"plan.json": json.dumps(made.to_dict()), "plan.txt": str(made) + "\n"}
    values, text = _plan_values(made) | {"folder": str(args.out), "seconds": seconds}, str(made)
    for name in args.recover.split("+") if teacher is not None else ():
        with _timed(seconds, name):
            report = _RECOVERIES[name](args, model, teacher)
        extras |= {f"{name}.json": json.dumps(report.to_dict()), f"{name}.txt": f"{report}\n"}
        values, text = values | {name: report.to_dict()}, f"{text}\n\n{report}\n"
    if _is_first_rank():
        save_pretrained(model, args.out, load_processor(args.model), args.overwrite, args.max_shard_size, extras)
    return values, f"{text}\nwritten to {args.out} (plan kept in {EXTRAS}/)"


def _refit(args, model: Any, teacher: Any) -> Any:
    """Refit W_down on the calibration data."""
    from ..merging.recover.refit import refit_

    task = _task(args, model, train=args.data, validation=args.eval_data)
    return refit_(
        model,
        teacher,
        _calibration_batches(args, task),
        ridge=args.ridge,
        rounds=args.recover_rounds,
        max_tokens=args.tokens,
    )


def _distill(args, model: Any, teacher: Any) -> Any:
    """Train the shared FFNs on their layers' inputs and outputs of the calibration data."""
    from ..merging.recover.distill import local_distill_

    task = _task(args, model, train=args.data, validation=args.eval_data)
    return local_distill_(
        model,
        teacher,
        _calibration_batches(args, task),
        steps=args.recover_steps,
        lr=args.recover_lr,
        max_tokens=args.tokens,
        seed=args.seed,
        delta_rank=args.delta_rank,
    )


_RECOVERIES = {"refit": _refit, "distill": _distill}


def _finetune(args) -> Result:
    from ..checkpoint.folder import from_pretrained, load_processor, save_pretrained
    from ..driver.training.finetune import finetune
    from ..integrations.fsdp2 import copy_whole_
    from ..support.files import check_new_folder

    check_new_folder(args.out, args.overwrite)
    model = _model(args)
    task = _task(args, model, train=args.data, validation=args.eval_data)
    work = Path(args.work_dir or f"{args.out}.finetune")
    result = finetune(
        model,
        task,
        args.steps,
        settings=_settings(args, task),
        teacher=from_pretrained(args.teacher).to(args.device) if args.teacher else None,
        evaluate=lambda m: task.score(m, limit=args.eval_limit),
        output_dir=work,
    )
    if args.parallel == "fsdp2" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        model = copy_whole_(model, _model(args))
    if _is_first_rank():
        save_pretrained(model, args.out, load_processor(args.model), args.overwrite, args.max_shard_size)
    return _trained(args, task, result, work)


def _project(args) -> Result:
    from ..checkpoint.folder import from_pretrained, load_processor, save_pretrained
    from ..driver.project_run import project_and_train
    from ..support.files import check_new_folder

    check_new_folder(args.out, args.overwrite)
    if args.distill and args.teacher:
        raise FFMergeError("--distill, --teacher: give one of them; --distill takes the base model as the teacher")
    model = _model(args).requires_grad_(False)
    task = _task(args, model, train=args.data, validation=args.eval_data)
    work = Path(args.work_dir or f"{args.out}.project")
    proj, result = project_and_train(
        model,
        task,
        work,
        args.steps,
        _settings(args, task),
        options={
            "keep": args.keep,
            "d_model": args.d_model,
            "d_ff": args.d_ff,
            "attention": args.attention,
            "residual": not args.no_residual,
            "init": args.init,
            "share": args.share,
            "untie_embeddings": False if args.tied else None,
        },
        scores=args.importance,
        method=args.method,
        calibration=args.calibration,
        optimizer={
            "weight_decay_on_projections": args.weight_decay_on_projections,
            "state": args.state,
            "offload_base": args.offload_base,
        },
        teacher=model if args.distill else from_pretrained(args.teacher).to(args.device) if args.teacher else None,
        evaluate=lambda m: task.score(m, limit=args.eval_limit),
    )
    small = proj.fold()  # on every rank: it may be sharded
    if _is_first_rank():
        save_pretrained(small, args.out, load_processor(args.model), args.overwrite, args.max_shard_size)
    values, text = _trained(args, task, result, work)
    sizes = {"parameters": sum(p.numel() for p in model.parameters()), "parameters_after": proj.parameters()["student"]}
    share = sizes["parameters_after"] / sizes["parameters"]
    return values | sizes, f"{text}; {sizes['parameters_after']:,} parameters, {share:.1%} of the base's"


def _fold(args) -> Result:
    from ..checkpoint.folder import load_processor, save_pretrained
    from ..driver.project_run import fold_run
    from ..support.files import check_new_folder

    check_new_folder(args.out, args.overwrite)
    folded = fold_run(_model(args), Path(args.work_dir))
    save_pretrained(folded, args.out, load_processor(args.model), args.overwrite, args.max_shard_size)
    count = sum(p.numel() for p in folded.parameters())
    return {"folder": str(args.out), "parameters": count}, f"{args.out}: {type(folded).__name__}, {count:,} parameters"


def _settings(args, task: Any) -> Any:
    """What `finetune` is told alike by `ffmerge finetune` and `project`."""
    from ..driver.training.settings import TrainingSettings
    from ..support.settings import options

    given = {o.name: getattr(args, o.name) for o in options(TrainingSettings) if hasattr(args, o.name)}
    given["eval_every"] = args.eval_every or args.steps
    return TrainingSettings(**given, higher_is_better=task.higher_is_better, restore_best=True)


def _trained(args, task: Any, result: Any, work: Path) -> Result:
    values = {
        "folder": str(args.out),
        "metric": task.metric,
        "best": result.best_metric,
        "best_step": result.best_step,
        "steps": result.steps,
    }
    best = "" if result.best_metric is None else f", best {task.metric} {result.best_metric:.4g} at {result.best_step}"
    return values, f"{args.out}: {result.steps} steps{best}; log and checkpoints in {work}"


def _eval(args) -> Result:
    with _streamed_model(args) as model:
        task = _task(args, model, test=args.data)
        values = task.evaluate(model, "test", args.batch_size, limit=args.eval_limit)
    return values, "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _export(args) -> Result:
    from ..checkpoint.folder import load_processor, save_pretrained
    from ..merging.apply import expand_

    model = _model(args)
    if args.expand:
        expand_(model)
    save_pretrained(model, args.out, load_processor(args.model), args.overwrite, args.max_shard_size)
    size = sum(p.stat().st_size for p in Path(args.out).glob("*.safetensors"))
    return {"folder": str(args.out), "bytes": size}, f"{args.out}: {type(model).__name__}, {format_bytes(size)}"


def _verify(args) -> Result:
    from ..checkpoint.folder import verify

    values = verify(args.folder)
    groups = "; ".join(f"{g['stack']} {g['layers']}" for g in values["groups"]) or "none"
    text = (
        f"{args.folder} is what was saved: shared FFNs {groups}; {values['parameters']:,} parameters, "
        f"{format_bytes(values['bytes'])}; logits differ by {values['logit_difference']:.2g}"
    )
    return values, text


def _env(args) -> Result:
    from ..driver.environment import format_report, report

    values = report()
    return values, format_report(values)


def _demo(args) -> Result:
    from ..driver.demo import demo

    return demo(Path(args.out), seed=args.seed, overwrite=args.overwrite)


# ------------------------------------------------------------------------------------------------- shared by commands


@contextlib.contextmanager
def _streamed_model(args) -> Iterator[Any]:
    """The model; with --stream its blocks' weights are outside of the device."""
    from ..runtime.streaming.stream import stream_

    if not args.stream:
        if args.stream_budget:
            raise FFMergeError("--stream-budget: is of streamed weights; give --stream disk or --stream host too")
        yield _model(args)
        return
    model = _model(args, "cpu")
    with stream_(model, args.device, args.stream, args.stream_budget or "20GiB"):
        yield model


def _model(args, device: str | None = None) -> Any:
    import torch

    from ..checkpoint.folder import from_pretrained

    _register_layout(args)
    options = {} if args.dtype == "auto" else {"dtype": getattr(torch, args.dtype)}
    return from_pretrained(args.model, **options).to(device or args.device)


def _register_layout(args) -> None:
    """Four dotted paths on the command line describe a family that is not in the table."""
    if not args.ffn_up:
        return
    from ..models.families import FFNSpec, register_family
    from ..models.sublayers import base_model_type_of_folder

    if not args.ffn_down or args.ffn_layers is None:
        raise FFMergeError("--ffn-up needs --ffn-layers and --ffn-down too (and --ffn-gate if the FFN is gated)")
    spec = FFNSpec(args.ffn_layers, args.ffn_up, args.ffn_down, args.ffn_gate, stack=args.ffn_stack)
    register_family(base_model_type_of_folder(args.model), spec)


def _task(args, model: Any, **splits: list[str] | None) -> Any:
    """Data of each split (lists of paths, as given) made ready for the model."""
    from ..driver.tasks.load import load_task, task_kind

    if not args.data:
        raise FFMergeError("data: give --data (a text file or folder, SOURCE TARGET files, images or .npz)")
    kind = args.task or task_kind(model)
    lengths = {"block": args.max_length} if kind == "lm" else {"max_length": args.max_length or 128}
    return load_task(
        model,
        args.model,
        **{split: _source(paths) for split, paths in splits.items() if paths},
        kind=kind,
        stride=args.stride,
        num_beams=args.num_beams,
        prefix=args.prefix,
        metric=args.metric,
        **lengths,
    )


def _source(paths: list[str]) -> Any:
    return paths[0] if len(paths) == 1 else tuple(paths)


def _calibration_batches(args, task: Any) -> Any:
    from ..support.distributed import rank, world_size

    return task.batches("train", args.batch_size, shuffle=True, seed=args.seed, rank=rank(), world=world_size())


def _statistics(args, model: Any, seconds: dict[str, float]) -> Any:
    from ..merging.statistics import CorrelationStats

    if args.statistics:
        return CorrelationStats.load(args.statistics, max_memory=args.max_memory)
    return _collect_statistics(args, model, seconds)


def _collect_statistics(args, model: Any, seconds: dict[str, float]) -> Any:
    from ..merging.collect import collect

    task = _task(args, model, train=args.data, validation=args.eval_data)
    layers = getattr(args, "layers", None)
    with _timed(seconds, "collect"):
        return collect(
            model,
            _calibration_batches(args, task),
            window=None if layers else args.window,
            layers=layers,
            anchor=args.anchor,
            features=args.features,
            max_tokens=args.tokens,
            cache_dir=args.cache_dir,
            max_memory=args.max_memory,
        )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started


def _plan_values(made: Any) -> dict[str, Any]:
    return {
        "layers": made.layers,
        "method": made.method,
        "mean_correlation": made.mean_correlation,
        "parameters": made.model.parameters,
        "parameters_after": made.parameters_after,
        "bytes": made.model.nbytes,
        "bytes_after": made.nbytes_after,
        "search": [{"layers": layers, "score": score} for layers, score in made.search],
    }


def _read_json(path: str, what: str) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FFMergeError(f"{what}: {path} cannot be read ({_one_line(error)})") from error


def _write_text(path: str, text: str) -> None:
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text)
        os.replace(beside, target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise FFMergeError(f"{path} could not be written ({error.strerror})") from error


def _write_csv(path: str, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------------------------------------------------- arguments


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ffmerge", description="Make trained Transformers smaller: merge feed-forward sublayers, project whole models."
    )
    from .. import __version__

    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, help_text, groups in _COMMANDS:
        command = commands.add_parser(name, help=help_text, description=help_text)
        for add in (*groups, common_options):
            add(command)
        command.set_defaults(run=run)
    return parser


_statistics_option = argument("--statistics", help="file written by `ffmerge collect`")
_COMMANDS = [
    ("demo", _demo, "train, merge and tune two small models on this machine, without downloads", (
        argument("out", nargs="?", default="ffmerge-demo", help="folder to write"),
        argument("--overwrite", action="store_true"),
    )),
    ("inspect", _inspect, "list the FFN sublayers of a model", (model_options,)),
    ("collect", _collect, "correlate the FFN features of a model on data", (
        model_options, argument("out", help="statistics file to write"), choice_options, data_options,
        validation_option, collect_options,
    )),
    ("plan", _plan, "choose and align layers from statistics", (
        argument("statistics", help="file written by `ffmerge collect`"),
        argument("--model", help="the model's folder, for --method weights"), layout_options,
        choice_options, method_option, memory_option, argument("--out", help="plan file to write"),
        argument("--sweep", type=sizes, metavar="2,3,4", help="rank all windows of these sizes"),
        argument("--csv", help="write the sweep here"),
    )),
    ("search", _search, "try every window on validation data and plan the best", (
        model_options, argument("--window", type=int, required=True, help="number of adjacent layers"),
        anchor_option, method_option, _statistics_option, data_options, validation_option, collect_options,
        argument("--out", help="plan file to write"), search_options,
    )),
    ("merge", _merge, "merge FFNs and write the smaller model", (
        model_options, out_options, choice_options, method_option, _statistics_option,
        argument("--plan", help="file written by `ffmerge plan` or `search`"), data_options,
        validation_option, collect_options, recover_options,
    )),
    ("finetune", _finetune, "fine-tune a (merged) model", (
        model_options, out_options, data_options, validation_option, finetune_options,
    )),
    ("project", _project, "train a smaller model whose weights are projections of the model's, and write it", (
        model_options, out_options, project_options, data_options, validation_option, finetune_options,
    )),
    ("fold", _fold, "write the small model of a run of `project` that was stopped", (
        model_options, argument("work_dir", help="its work folder (OUT.project)"), out_options,
    )),
    ("eval", _eval, "perplexity, accuracy or BLEU of a model", (
        model_options, data_options, stream_options,
    )),
    ("export", _export, "write a model again, with --expand as a stock checkpoint of full size", (
        model_options, out_options, argument("--expand", action="store_true", help="give every layer its own FFN"),
    )),
    ("verify", _verify, "check hashes, ties and reference logits of a folder", (
        argument("folder", help="folder written by ffmerge"),
    )),
    ("env", _env, "versions, backends, CPU and GPU, and what is missing", ()),
]  # fmt: skip
