"""Where a command writes: refused before any model is loaded, if it can be known by then. Nothing here needs torch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..support.errors import FFMergeError
from . import values


class NewFile(str):
    """A file that a command writes."""


class NewFolder(str):
    """A folder that a command writes as a whole."""


class WorkFolder(str):
    """A folder that a command keeps files in."""


_READ = ("model", "data", "eval_data", "statistics", "plan", "teacher", "importance")  # options that name inputs
# At least so much of the model's bytes goes to OUT: FFNs have about two thirds of a model, and one of them is left.
_LEAST = {"export": 1.0, "finetune": 1.0, "merge": 1 / 3}


def file_to_write(text: str) -> NewFile:
    """A type of argument: the path of a file that a command writes."""
    return NewFile(values.file(text))


def folder_to_write(text: str) -> NewFolder:
    """A type of argument: the path of a folder that a command writes as a whole."""
    return NewFolder(values.path(text))


def work_folder(text: str) -> WorkFolder:
    """A type of argument: the path of a folder that a command keeps files in."""
    return WorkFolder(values.folder(text))


def work_folder_of(args: argparse.Namespace) -> WorkFolder:
    """Where a command that trains keeps log and checkpoints."""
    return WorkFolder(args.work_dir or f"{args.out}.{args.command}")


def check_outputs(args: argparse.Namespace) -> None:
    """Raise FFMergeError if a file or folder that the arguments name cannot be written, or would destroy another."""
    from ..checkpoint.beside import check_out
    from ..support.files import check_new_file, check_work_folder

    written = {f"--{name}".replace("_", "-"): value for name, value in vars(args).items()}
    written = {name: value for name, value in written.items() if isinstance(value, (NewFile, NewFolder, WorkFolder))}
    if getattr(args, "work_dir", "") is None:
        written["--work-dir"] = work_folder_of(args)
    for value in written.values():
        if isinstance(value, NewFile):
            check_new_file(value)
        elif isinstance(value, WorkFolder):
            check_work_folder(value)
        else:
            check_out(value, args.overwrite, args.model)
    _check_apart(written, _inputs(args))
    _check_space(args)


def _check_apart(written: dict[str, str], read: dict[str, str]) -> None:
    real = {name: Path(value).resolve() for name, value in written.items()}
    for name, value in written.items():
        for other, beside in written.items():
            inside = isinstance(beside, NewFolder) and real[other] in real[name].parents
            holds = isinstance(beside, NewFolder) and real[name] in real[other].parents
            if name != other and (inside or holds or real[name] == real[other]):
                raise FFMergeError(
                    f"{name}: got {value}, which is, holds or is inside of {other} {beside}; keep them apart"
                )
        for path, option in read.items():
            if isinstance(value, NewFile) and os.path.isfile(path) and real[name] == Path(path).resolve():
                raise FFMergeError(f"{name}: got {value}, which is read by {option}; give another file to write")


def _inputs(args: argparse.Namespace) -> dict[str, str]:
    """{path: option} of what is read."""
    given = {name: getattr(args, name, None) or [] for name in _READ}
    return {path: name for name, paths in given.items() for path in ([paths] if isinstance(paths, str) else paths)}


def _check_space(args: argparse.Namespace) -> None:
    from ..checkpoint.beside import weight_bytes
    from ..support.files import check_space

    if args.command in _LEAST and os.path.isdir(args.model):
        halved = 0.5 if args.dtype in ("bfloat16", "float16") else 1.0  # the files may have float32
        check_space(args.out, int(weight_bytes(args.model) * _LEAST[args.command] * halved))
