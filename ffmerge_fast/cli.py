"""The `ffmerge` command: parses arguments, calls the library, prints a table or JSON. No logic lives here."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._errors import FFMergeError
from ._table import format_bytes, format_table

Result = tuple[dict[str, Any], str]  # for --json, for people


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a mistake or failure (one line on stderr), 2 for usage."""
    args = _parser().parse_args(argv)
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
    from ._env import allow_network
    from ._progress import set_quiet

    set_quiet(args.quiet or args.json)
    if args.online:
        allow_network()
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DELAY", "2")  # bars of transformers too: only for what takes longer than two seconds
    if args.quiet or args.json or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
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
    from .merge.combine import shared_groups
    from .merge.statistics import ModelSummary

    model = _model(args)
    summary = ModelSummary.of(model)
    columns = ("stack", "index", "path", "d_model", "d_ff", "activation", "gated", "bias", "parameters")
    rows = [[getattr(f, c) for c in columns] for f in summary.ffns]
    groups = [{"stack": s, "layers": list(layers)} for s, layers in shared_groups(model)]
    of_ffns = sum(f.parameters for f in summary.ffns) - sum(
        f.parameters for f in summary.ffns for g in groups if f.stack == g["stack"] and f.index in g["layers"][1:]
    )
    shared = "; ".join(f"{g['stack']} {g['layers']}" for g in groups) or "none"
    text = (
        f"{format_table(columns, rows)}\n{summary.model_type}: {summary.parameters:,} parameters "
        f"({format_bytes(summary.nbytes)}), {of_ffns / summary.parameters:.1%} in FFNs; shared: {shared}"
    )
    return summary.to_dict() | {"shared_groups": groups, "ffn_parameters": of_ffns}, text


def _collect(args) -> Result:
    stats, seconds = _collect_statistics(args, _model(args))
    if _is_first_rank():
        stats.save(args.out)
    values = {"statistics": str(args.out), "tokens": stats.tokens, "seconds": seconds}
    counted = ", ".join(f"{stack} {n:,} tokens" for stack, n in stats.tokens.items())
    return values, f"{args.out}: {counted}, {len(sum(stats.settings['pairs'].values(), []))} pairs, {seconds:.1f} s"


def _plan(args) -> Result:
    from .merge.align import plan
    from .merge.select import sweep
    from .merge.statistics import CorrelationStats

    stats = CorrelationStats.load(args.statistics)
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
    from .merge.select import search
    from .merge.statistics import CorrelationStats

    model = _model(args)
    stats = CorrelationStats.load(args.statistics) if args.statistics else _collect_statistics(args, model)[0]
    task = _task(args, model, train=args.data, validation=args.eval_data)
    found = search(
        model,
        stats,
        args.window,
        lambda m: task.score(m, limit=args.eval_limit),
        higher_is_better=task.higher_is_better,
        anchor=args.anchor,
        method=args.method,
        seed=args.seed,
        resume=args.resume,
    )
    if args.out and _is_first_rank():
        _write_text(args.out, json.dumps(found.to_dict()))
    table = format_table(["window", task.metric], found.search)
    return _plan_values(found) | {"metric": task.metric}, f"{table}\n\n{found}"


def _merge(args) -> Result:
    from .checkpoint import EXTRAS, check_new_folder, load_processor, save_pretrained
    from .merge.combine import merge_

    check_new_folder(args.out, args.overwrite)
    model = _model(args)
    started = time.monotonic()
    made = _plan_for_merge(args, model)
    planned = time.monotonic()
    merge_(model, made)
    merged = time.monotonic()
    extras = {"plan.json": json.dumps(made.to_dict()), "plan.txt": str(made) + "\n"}
    if _is_first_rank():
        save_pretrained(model, args.out, load_processor(args.model), args.overwrite, args.max_shard_size, extras)
    seconds = {"plan": planned - started, "merge": merged - planned}
    values = _plan_values(made) | {"folder": str(args.out), "seconds": seconds}
    return values, f"{made}\nwritten to {args.out} (plan kept in {EXTRAS}/)"


def _finetune(args) -> Result:
    from .checkpoint import check_new_folder, from_pretrained, load_processor, save_pretrained
    from .driver.finetune import finetune

    check_new_folder(args.out, args.overwrite)
    model = _model(args)
    task = _task(args, model, train=args.data, validation=args.eval_data)
    work = Path(args.work_dir or f"{args.out}.finetune")
    result = finetune(
        model,
        task,
        args.steps,
        args.lr,
        batch_size=args.batch_size,
        schedule=args.schedule,
        warmup=args.warmup,
        lr_end=args.lr_end,
        decay_steps=args.decay_steps,
        weight_decay=args.weight_decay,
        accumulate=args.accumulate,
        max_grad_norm=args.max_grad_norm,
        autocast=args.autocast,
        teacher=from_pretrained(args.teacher).to(args.device) if args.teacher else None,
        alpha=args.alpha,
        evaluate=lambda m: task.score(m, limit=args.eval_limit),
        eval_every=args.eval_every or args.steps,
        higher_is_better=task.higher_is_better,
        restore_best=True,
        output_dir=work,
        save_every=args.save_every,
        parallel=args.parallel,
        seed=args.seed,
    )
    if _is_first_rank():
        save_pretrained(model, args.out, load_processor(args.model), args.overwrite, args.max_shard_size)
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
    model = _model(args)
    task = _task(args, model, test=args.data)
    values = task.evaluate(model, "test", args.batch_size, limit=args.eval_limit)
    return values, "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _export(args) -> Result:
    from .checkpoint import load_processor, save_pretrained
    from .merge.combine import expand_

    model = _model(args)
    if args.expand:
        expand_(model)
    save_pretrained(model, args.out, load_processor(args.model), args.overwrite, args.max_shard_size)
    size = sum(p.stat().st_size for p in Path(args.out).glob("*.safetensors"))
    return {"folder": str(args.out), "bytes": size}, f"{args.out}: {type(model).__name__}, {format_bytes(size)}"


def _verify(args) -> Result:
    from .checkpoint import verify

    values = verify(args.folder)
    groups = "; ".join(f"{g['stack']} {g['layers']}" for g in values["groups"]) or "none"
    text = (
        f"{args.folder} is what was saved: shared FFNs {groups}; {values['parameters']:,} parameters, "
        f"{format_bytes(values['bytes'])}; logits differ by {values['logit_difference']:.2g}"
    )
    return values, text


def _env(args) -> Result:
    from .env_report import format_report, report

    values = report()
    return values, format_report(values)


def _demo(args) -> Result:
    from .driver.demo import demo

    return demo(Path(args.out), seed=args.seed, overwrite=args.overwrite)


# ------------------------------------------------------------------------------------------------- shared by commands


def _model(args) -> Any:
    import torch

    from .checkpoint import from_pretrained

    _register_layout(args)
    options = {} if args.dtype == "auto" else {"dtype": getattr(torch, args.dtype)}
    return from_pretrained(args.model, **options).to(args.device)


def _register_layout(args) -> None:
    """Four dotted paths on the command line describe a family that is not in the table."""
    if not args.ffn_up:
        return
    from .models import FFNSpec, base_model_type_of_folder, register_family

    if not args.ffn_down or args.ffn_layers is None:
        raise FFMergeError("--ffn-up needs --ffn-layers and --ffn-down too (and --ffn-gate if the FFN is gated)")
    spec = FFNSpec(args.ffn_layers, args.ffn_up, args.ffn_down, args.ffn_gate, stack=args.ffn_stack)
    register_family(base_model_type_of_folder(args.model), spec)


def _task(args, model: Any, **splits: list[str] | None) -> Any:
    """Data of each split (lists of paths, as given) made ready for the model."""
    from .driver.data import load_task, task_kind

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
    import torch

    distributed = torch.distributed.is_initialized()
    return task.batches(
        "train",
        args.batch_size,
        shuffle=True,
        seed=args.seed,
        rank=torch.distributed.get_rank() if distributed else 0,
        world=torch.distributed.get_world_size() if distributed else 1,
    )


def _collect_statistics(args, model: Any) -> tuple[Any, float]:
    from .merge.collect import collect

    task = _task(args, model, train=args.data, validation=args.eval_data)
    started = time.monotonic()
    stats = collect(
        model,
        _calibration_batches(args, task),
        window=args.window if not getattr(args, "layers", None) else None,
        layers=getattr(args, "layers", None),
        anchor=args.anchor,
        features=args.features,
        max_tokens=args.tokens,
        cache_dir=args.cache_dir,
    )
    return stats, time.monotonic() - started


def _plan_for_merge(args, model: Any) -> Any:
    from .merge.align import MergePlan, plan
    from .merge.statistics import CorrelationStats

    if args.plan:
        return MergePlan.from_dict(_read_json(args.plan, "plan"))
    if args.statistics:
        stats = CorrelationStats.load(args.statistics)
    elif args.method == "permute" or args.window:
        stats = _collect_statistics(args, model)[0]
    else:
        stats = None
    return plan(stats, args.layers, args.window, args.anchor, args.method, model, args.seed)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ffmerge", description="Make trained Transformers smaller by merging feed-forward sublayers."
    )
    from . import __version__

    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, help_text, groups in _COMMANDS:
        command = commands.add_parser(name, help=help_text, description=help_text)
        for add in (*groups, _common_options):
            add(command)
        command.set_defaults(run=run)
    return parser


def _argument(*names: str, **options) -> Callable[[argparse.ArgumentParser], None]:
    return lambda parser: parser.add_argument(*names, **options)


def _common_options(parser) -> None:
    group = parser.add_argument_group("everywhere")
    group.add_argument("--json", action="store_true", help="print JSON")
    group.add_argument("-v", "--verbose", action="store_true", help="show warnings of libraries, and tracebacks")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bars, no warnings")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    group.add_argument("--online", action="store_true", help="allow downloads from the Hugging Face hub")


def _model_options(parser) -> None:
    parser.add_argument("model", help="folder of a transformers model, or a hub id with --online")
    _layout_options(parser)


def _layout_options(parser) -> None:
    group = parser.add_argument_group("layout of a family that is not known (dotted paths)")
    group.add_argument("--ffn-layers", metavar="PATH", help="list of blocks, such as 'encoder.layers'")
    group.add_argument("--ffn-up", metavar="PATH", help="W_up inside a block, such as 'mlp.up_proj'")
    group.add_argument("--ffn-down", metavar="PATH", help="W_down inside a block")
    group.add_argument("--ffn-gate", metavar="PATH", help="W_gate inside a block, of gated FFNs")
    group.add_argument("--ffn-stack", default="decoder", choices=("encoder", "decoder"))


def _data_options(parser) -> None:
    group = parser.add_argument_group("data")
    help_data = "text file or folder; SOURCE TARGET files; folder of images or .npz; a hub data set with --online"
    group.add_argument("--data", nargs="+", metavar="PATH", help=help_data)
    group.add_argument("--task", choices=("lm", "images", "translation"), help="default: what the model is for")
    group.add_argument("--metric", help="perplexity, loss, accuracy or bleu (default: the task's first)")
    group.add_argument("--max-length", type=int, help="tokens per block or sentence (default: the context; 128)")
    group.add_argument("--stride", type=int, help="of the perplexity's sliding window (default: no overlap)")
    group.add_argument("--prefix", default="", help="put before every source sentence")
    group.add_argument("--num-beams", type=int, default=1, help="of translations")
    group.add_argument("--batch-size", type=int, default=16)
    group.add_argument("--eval-limit", type=int, metavar="N", help="evaluate on at most N examples")


def _validation_option(parser) -> None:
    parser.add_argument("--eval-data", nargs="+", metavar="PATH", help="to evaluate on (default: a tenth of --data)")


def _collect_options(parser) -> None:
    group = parser.add_argument_group("statistics")
    group.add_argument("--tokens", type=int, default=10_000, help="calibration tokens (default 10000)")
    group.add_argument("--features", default="pre", choices=("pre", "post"), help="before or after the activation")
    group.add_argument("--cache-dir", help="keep running sums here, so that a killed run goes on")


def _choice_options(parser) -> None:
    parser.add_argument("--layers", help="'4-7', '0-2,6-8', '1+4+7', 'encoder:2-4,decoder:2-4'")
    parser.add_argument("--window", type=int, help="number of adjacent layers")
    parser.add_argument("--anchor", default="first", choices=("first", "middle", "last"))


def _method_option(parser) -> None:
    from .merge.align import METHODS

    parser.add_argument("--method", default="permute", choices=METHODS)


def _out_options(parser) -> None:
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that has content")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file")


def _finetune_options(parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, required=True)
    group.add_argument("--lr", type=float, default=5e-5)
    group.add_argument("--schedule", default="inverse_sqrt", choices=("inverse_sqrt", "linear", "cosine", "constant"))
    group.add_argument("--warmup", type=int, default=0)
    group.add_argument("--lr-end", type=float, default=0.0, help="floor of the linear and cosine schedules")
    group.add_argument("--decay-steps", type=int, help="steps from --lr to --lr-end (default: all)")
    group.add_argument("--weight-decay", type=float, default=0.0)
    group.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    group.add_argument("--max-grad-norm", type=float, default=1.0)
    group.add_argument("--autocast", choices=("bf16", "fp16"))
    group.add_argument("--teacher", help="folder of a model to distil from")
    group.add_argument("--alpha", type=float, default=0.5, help="weight of the distillation loss")
    group.add_argument("--parallel", default="ddp", choices=("ddp", "fsdp2"), help="under torchrun")
    group.add_argument("--eval-every", type=int, default=0, help="steps (default: once, at the end)")
    group.add_argument("--save-every", type=int, default=0, help="steps; a killed run goes on from the last")
    group.add_argument("--work-dir", help="log and checkpoints (default: OUT.finetune)")


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


_statistics_option = _argument("--statistics", help="file written by `ffmerge collect`")
_COMMANDS = [
    ("demo", _demo, "train, merge and tune two small models on this machine, without downloads", (
        _argument("out", nargs="?", default="ffmerge-demo", help="folder to write"),
        _argument("--overwrite", action="store_true"),
    )),
    ("inspect", _inspect, "list the FFN sublayers of a model", (_model_options,)),
    ("collect", _collect, "correlate the FFN features of a model on data", (
        _model_options, _argument("out", help="statistics file to write"), _choice_options, _data_options,
        _validation_option, _collect_options,
    )),
    ("plan", _plan, "choose and align layers from statistics", (
        _argument("statistics", help="file written by `ffmerge collect`"),
        _argument("--model", help="the model's folder, for --method weights"), _layout_options,
        _choice_options, _method_option, _argument("--out", help="plan file to write"),
        _argument("--sweep", type=_sizes, metavar="2,3,4", help="rank all windows of these sizes"),
        _argument("--csv", help="write the sweep here"),
    )),
    ("search", _search, "try every window on validation data and plan the best", (
        _model_options, _choice_options, _method_option, _statistics_option, _data_options,
        _validation_option, _collect_options,
        _argument("--out", help="plan file to write"), _argument("--resume", help="JSON file that keeps the scores"),
    )),
    ("merge", _merge, "merge FFNs and write the smaller model", (
        _model_options, _out_options, _choice_options, _method_option, _statistics_option,
        _argument("--plan", help="file written by `ffmerge plan` or `search`"), _data_options,
        _validation_option, _collect_options,
    )),
    ("finetune", _finetune, "fine-tune a (merged) model", (
        _model_options, _out_options, _data_options, _validation_option, _finetune_options,
    )),
    ("eval", _eval, "perplexity, accuracy or BLEU of a model", (_model_options, _data_options)),
    ("export", _export, "write a model again, with --expand as a stock checkpoint of full size", (
        _model_options, _out_options, _argument("--expand", action="store_true", help="give every layer its own FFN"),
    )),
    ("verify", _verify, "check hashes, ties and reference logits of a folder", (
        _argument("folder", help="folder written by ffmerge"),
    )),
    ("env", _env, "versions, backends, CPU and GPU, and what is missing", ()),
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
