"""The files of a model's folder beside its weights: what goes along with the model, what may be replaced."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from ..support.errors import FFMergeError
from ..support.files import check_new_folder

MANIFEST = "ffmerge.json"
EXTRAS = "_ffmerge"  # statistics, plan, report: may be deleted
CODE = "modeling_ffmerge.py"
_WEIGHTS = """model.safetensors model-*-of-*.safetensors model.safetensors.index.json
    pytorch_model.bin pytorch_model-*-of-*.bin pytorch_model.bin.index.json""".split()
# What every saved model may hold; whatever else is in a folder of ours, its manifest lists.
_SAVED = f"""{MANIFEST} {CODE} config.json generation_config.json *token*.json vocab.json vocab.txt merges.txt
    *preprocessor_config.json processor_config.json chat_template.* normalizer.json *.spm *.tiktoken
    spiece.model tokenizer.model sentencepiece*.model""".split()
# What goes along with a model from the folder that it was made of.
_BESIDE = """*.json *.jinja *.model *.spm *.tiktoken *.bpe bpe.codes *.vocab vocab*.txt merges*.txt
    *.md LICEN[CS]E* NOTICE* USE_POLICY* COPYING* COPYRIGHT*""".split()
# What has a new version, or is of the training or the parts of another model.
_LEFT = f"""{MANIFEST} {EXTRAS} {CODE} .* checkpoint-* runs trainer_state.json training_args.bin optimizer.* scheduler.*
    scaler.pt rng_state* *_results.json metrics.json""".split()
_LARGEST = 256_000_000  # bytes of one file that goes along; large vocabularies have 40 million


def check_out(folder: str | os.PathLike, overwrite: bool = False, source: str | os.PathLike | None = None) -> None:
    """Raise FFMergeError if `save_pretrained` would refuse the folder: to be called before long work.

    Args:
        folder: may hold a saved model and nothing else.
        overwrite: replace that model.
        source: folder of the model that is worked on, which is never replaced.
    """
    if source is not None and os.path.isdir(source) and os.path.isdir(folder):
        out, of_model = Path(folder).resolve(), Path(source).resolve()
        if out in (of_model, *of_model.parents):
            raise FFMergeError(
                f"{folder} is or holds the model's own folder, which is not replaced; give another folder"
            )
    check_new_folder(folder, overwrite, known_in(folder))


def known_in(folder: str | os.PathLike) -> Callable[[Path], bool]:
    """A function that tells whether a file of the folder, by its path inside, is part of a saved model."""
    listed: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        listed = json.loads((Path(folder) / MANIFEST).read_text("utf-8"))["contents"]

    def known(file: Path) -> bool:
        alone = len(file.parts) == 1 and _like(file.name, _WEIGHTS + _SAVED)
        return alone or file.parts[0] == EXTRAS or file.as_posix() in listed

    return known


def contents(folder: Path) -> list[str]:
    """The files in a folder, by their paths inside."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def weight_bytes(folder: str | os.PathLike) -> int:
    """What the weights in a folder take on disk; a second format of them does not count."""
    sizes = {".safetensors": 0, ".bin": 0}
    for file in Path(folder).iterdir():
        if file.suffix in sizes and _like(file.name, _WEIGHTS) and file.is_file():
            sizes[file.suffix] += file.stat().st_size
    return sizes[".safetensors"] or sizes[".bin"]


def carry_over(source: Path, folder: Path, code: bool = False) -> None:
    """Copy what belongs to the model in `source` and is not in `folder` yet: processors, chat templates, vocabularies,
    licences, the modules of sentence transformers. A warning names what stays behind.

    Args:
        code: Python files, too.

    Raises:
        FFMergeError: a file cannot be copied.
    """
    modules, behind = _modules(source), []
    for path in sorted(source.iterdir()):
        if _like(path.name, _WEIGHTS + _LEFT) or (folder / path.name).exists():
            continue
        if path.name in modules and path.is_dir():
            _copy(shutil.copytree, path, folder / path.name)
            for file in () if code else sorted((folder / path.name).rglob("*.py")):
                file.unlink()
                behind.append(str(file.relative_to(folder)))
        elif path.is_file() and path.stat().st_size <= _LARGEST and _goes_along(path, code):
            _copy(shutil.copyfile, path, folder / path.name)
        else:
            behind.append(f"{path.name}/" if path.is_dir() else path.name)
    if behind:
        more = f" and {len(behind) - 8} more" if len(behind) > 8 else ""
        warnings.warn(
            f"not copied from {source}: {', '.join(behind[:8])}{more}; copy what belongs to the model", stacklevel=2
        )


def _goes_along(file: Path, code: bool) -> bool:
    return (_like(file.name, _BESIDE) and not file.name.startswith("adapter_")) or (code and file.suffix == ".py")


def _modules(source: Path) -> set[str]:
    """The folders that modules.json of sentence transformers names."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return {module["path"] for module in json.loads((source / "modules.json").read_text("utf-8"))}
    return set()


def _copy(copy: Callable[[Path, Path], object], source: Path, target: Path) -> None:
    try:
        copy(source, target)
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or "one of its files"
        raise FFMergeError(f"{source} cannot be copied to {target.name} ({reason}); check its permissions") from error


def _like(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
