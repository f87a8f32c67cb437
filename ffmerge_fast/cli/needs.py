"""Options that do something only beside others: one that would be ignored is an error, before any work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from ..support.errors import FFMergeError


class Need(NamedTuple):
    """In these commands (all where empty) these options do nothing unless `met`; `wanted` says what they need."""

    commands: str
    options: str
    met: Callable[[argparse.Namespace], bool]
    wanted: str


def collects(args: argparse.Namespace) -> bool:
    """Whether statistics are collected, by `merge` or `search`, rather than read or not needed."""
    needed = args.command == "search" or (not args.plan and (args.window or args.method == "permute"))
    return bool(needed and not args.statistics)


def _recovers(args: argparse.Namespace) -> bool:
    return args.command == "merge" and args.recover != "none"


def _reconstructs(args: argparse.Namespace) -> bool:
    return not (args.no_reconstruct or args.no_residual)


_FALLING = ("linear", "cosine")
_PLACED = "collect search merge eval finetune project"
_COLLECTED = "features cache_dir sketch exact"
NEEDS = (
    Need("verify env demo", "device dtype", lambda a: False, "a command that runs a model"),
    Need("inspect", "device", lambda a: False, "a command that runs a model"),
    Need("plan", "device dtype ffn_layers ffn_up ffn_down ffn_gate ffn_stack", lambda a: a.model, "--model"),
    Need("", "ffn_layers ffn_down ffn_gate ffn_stack", lambda a: a.ffn_up, "--ffn-up"),
    Need("collect merge plan", "window", lambda a: not a.layers, "no --layers"),
    Need("collect", "anchor", lambda a: a.layers, "--layers"),
    Need("merge", "layers window anchor method statistics", lambda a: not a.plan, "no --plan"),
    Need("merge", "ridge recover_rounds private", lambda a: "refit" in a.recover, "--recover refit or refit+distill"),
    Need("merge", "recover_steps recover_lr", lambda a: "distill" in a.recover, "--recover distill or refit+distill"),
    Need("merge", "delta_rank", lambda a: "distill" in a.recover, "--recover distill or refit+distill"),
    Need("merge", "delta_rank", lambda a: not a.private, "no --private: a layer has neurons or deltas of its own"),
    Need("merge", "data tokens", lambda a: collects(a) or _recovers(a), "statistics to collect, or --recover"),
    Need("merge search", _COLLECTED, collects, "statistics to collect: no --statistics or --plan given"),
    Need("search", "tokens", collects, "statistics to collect: no --statistics given"),
    Need("merge", "max_memory", lambda a: collects(a) or a.statistics, "statistics, which this merge has no use for"),
    Need("merge", "eval_data task max_length prefix batch_size", lambda a: a.data, "--data"),
    Need("collect merge", "metric stride num_beams eval_limit", lambda a: False, "a command that evaluates"),
    Need("search", "batch_size", lambda a: collects(a) or a.evaluate == "proxy", "no --statistics, or proxy"),
    Need("search", "metric stride num_beams eval_limit resume", lambda a: a.evaluate == "metric", "--evaluate metric"),
    Need("search", "proxy_tokens", lambda a: a.evaluate == "proxy", "--evaluate proxy"),
    Need("plan", "csv", lambda a: a.sweep, "--sweep"),
    Need("plan", "layers window method model out", lambda a: not a.sweep, "no --sweep"),
    Need("eval", "stream_budget", lambda a: a.stream, "--stream disk or --stream host"),
    Need("eval", "place budget host_memory dry_run", lambda a: not a.stream, "no --stream, which says how"),
    Need(_PLACED, "device", lambda a: a.place != "cpu", "no --place cpu, which says so"),
    Need("finetune", "alpha", lambda a: a.teacher, "--teacher"),
    Need("project", "alpha", lambda a: a.teacher or a.distill, "--teacher or --distill"),
    Need("project", "teacher", lambda a: not a.distill, "no --distill, which takes the base model as the teacher"),
    Need("project", "ridge local_steps local_lr", _reconstructs, "no --no-reconstruct and no --no-residual"),
    Need("project", "no_reconstruct", lambda a: not a.no_residual, "no --no-residual, which says so too"),
    Need("project", "clone", lambda a: a.distill, "--distill"),
    Need("project", "clone_weight", lambda a: a.clone, "--clone"),
    Need("project", "method", lambda a: not a.importance, "no --importance"),
    Need("project", "calibration", lambda a: not a.importance or _reconstructs(a), "importances to measure"),
    Need("finetune project", "lr_end decay_steps", lambda a: a.schedule in _FALLING, "a linear or cosine --schedule"),
)  # fmt: skip
ONLY_OF = {"stride": "lm", "prefix": "translation", "num_beams": "translation"}  # kinds of task, known with the model


def check_needs(args: argparse.Namespace) -> None:
    """Raise FFMergeError for an option that was typed and would be ignored."""
    for need in NEEDS:
        typed = [name for name in need.options.split() if name in args.given]
        if typed and args.command in (need.commands.split() or [args.command]) and not need.met(args):
            raise FFMergeError(f"{flag(typed[0])}: does nothing here, it needs {need.wanted}; leave it out")


def check_kind(args: argparse.Namespace, kind: str) -> None:
    """The same for options that belong to another kind of task."""
    for name, only in ONLY_OF.items():
        if name in args.given and kind != only:
            raise FFMergeError(
                f"{flag(name)}: does nothing here, it needs data of a task {only}, got {kind}; leave it out"
            )


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
