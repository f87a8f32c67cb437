"""The one place where transformers reads configs, models and processors: a folder's own code does not run, nor does
anything ask whether it may, unless the caller said so."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from ..models.families import MERGED_TYPE_PREFIX, FFNSpec, register_family, supported_families
from ..support.env import online, require
from ..support.errors import FFMergeError
from ..support.files import one_line
from .contents import OLD_BUFFERS, check_files, read_json, whole_numbers
from .manifest import check_parsed

_CODE = "with its own code (trust_remote_code=True, --trust-remote-code), if you trust it"
_PROCESSORS = {  # what a folder may hold: files of which it has one, Auto classes that read them
    "tokenizer": (
        "tokenizer.json tokenizer_config.json vocab.json vocab.txt spiece.model tokenizer.model source.spm".split(),
        ["AutoTokenizer"],
    ),
    "image processor": (["preprocessor_config.json"], ["AutoImageProcessor", "AutoFeatureExtractor"]),
}


def load_model(folder: str | os.PathLike, trust: bool, leave_out: list[str], options: dict[str, Any]) -> nn.Module:
    """The model in a folder, of the class that its config names, every weight in its place.

    Args:
        folder: or a hub id, when online.
        trust: whether the folder's own code may run.
        leave_out: names of weights (with * and ?) that the class does not have and that may be dropped.
        options: of transformers' `from_pretrained`.

    Raises:
        FFMergeError: as `folder.from_pretrained`.
    """
    family = model_type(folder)
    if family.startswith(MERGED_TYPE_PREFIX):
        trust = False  # our own class loads it, not the file that travels with it
        _learn_layout(folder, family.removeprefix(MERGED_TYPE_PREFIX))
    transformers = require("transformers", extra="hf")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_access(trust))
        model_class = _class_of(config, transformers, trust)
        options = {"dtype": "auto", **_access(trust), **options, "ignore_mismatched_sizes": True}
        loaded, info = model_class.from_pretrained(folder, config=config, output_loading_info=True, **options)
        if (Path(folder) / "generation_config.json").exists():  # transformers passes over a damaged one
            transformers.GenerationConfig.from_pretrained(folder)
    except FFMergeError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds; each ends as one line here
        if "custom code" in str(error):
            raise FFMergeError(f"{folder} needs code that lies in it: load it {_CODE}") from error
        raise FFMergeError(f"{folder} cannot be loaded: {one_line(error)}") from error
    if getattr(loaded, "_hf_peft_config_loaded", False):  # of the hub; a folder's is found before
        raise FFMergeError(f"{folder} holds an adapter, wanted a whole model: merge it (peft's merge_and_unload)")
    _check_complete(folder, loaded, info, leave_out)
    return loaded


def load_processor(folder: str | os.PathLike, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, image processor or feature extractor; None if it has none.

    Raises:
        FFMergeError: it is damaged, not what was saved, or needs the folder's own code.
    """
    path = Path(folder)
    if path.is_dir():
        check_files(path)
        check_parsed(path)
    for what, (files, classes) in _PROCESSORS.items():
        found = [path / name for name in files if (path / name).exists()]
        says = [read_json(file) for file in found if file.suffix == ".json"]
        failed = None
        for name in classes if found or not path.is_dir() else ():
            try:
                auto_class = getattr(require("transformers", extra="hf"), name)
                return auto_class.from_pretrained(folder, **_access(trust_remote_code))
            except Exception as error:  # of as many kinds as there are processors
                failed = failed or error
        if failed and path.is_dir():
            code = f"load it {_CODE}" if any("auto_map" in values for values in says) else "copy these files again"
            raise FFMergeError(
                f"{path}: its {what} ({', '.join(file.name for file in found)}) cannot be loaded ({one_line(failed)}); "
                f"{code}, or remove them to go on without it"
            ) from failed
    return None


def model_type(folder: str | os.PathLike) -> str:
    """What config.json of a folder or hub id calls the model's type."""
    return str(config_values(folder).get("model_type", ""))


def config_values(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of config.json of a folder, or of a hub id."""
    if Path(folder).is_dir():
        return read_json(Path(folder) / "config.json")
    transformers = require("transformers", extra="hf")
    try:
        return transformers.PretrainedConfig.get_config_dict(folder, local_files_only=not online())[0]
    except Exception as error:  # of the network, of the hub
        raise FFMergeError(f"{folder} cannot be loaded: {one_line(error)}") from error


def _access(trust: bool) -> dict[str, bool]:
    return {"trust_remote_code": trust, "local_files_only": not online()}


def _class_of(config: Any, transformers: Any, trust: bool) -> Any:
    """The class that a config names: of transformers, ours, or with `trust` the Auto class that finds the folder's."""
    names = getattr(config, "architectures", None) or []
    if not names:
        raise FFMergeError('config.json names no architecture: add "architectures": ["<model class>"]')
    if names[0].startswith("FFMerged"):
        from ..remote_code import modeling_ffmerge

        return getattr(modeling_ffmerge, names[0])
    own = {str(v).rpartition(".")[2]: k for k, v in (getattr(config, "auto_map", None) or {}).items()} if trust else {}
    found = getattr(transformers, own.get(names[0], names[0]), None)
    if not hasattr(found, "from_pretrained"):
        raise FFMergeError(
            f"{names[0]} is no class of transformers: load it {_CODE}, or yourself and pass the model to ffmerge_fast"
        )
    return found


def _learn_layout(folder: str | os.PathLike, family: str) -> None:
    """Register a family that is not in the table as the merged folder's config.json describes it."""
    if family in supported_families():
        return
    section = config_values(folder).get("ffmerge")
    layout = section.get("layout") if isinstance(section, dict) else None
    if not layout:
        raise FFMergeError(
            f"{folder}: family {family!r} is not known here; call register_family first (--ffn-layers, --ffn-up, "
            "--ffn-down) or load it with transformers alone (trust_remote_code=True)"
        )
    try:
        specs = [FFNSpec(**values) for values in layout]
    except TypeError as error:
        raise FFMergeError(f"{folder}: ffmerge.layout of its config.json is none ({error}); copy it again") from error
    register_family(family, specs)


def _check_complete(folder: str | os.PathLike, model: nn.Module, info: dict, leave_out: list[str]) -> None:
    """Raise FFMergeError unless every weight of the model comes from the folder, and none of the folder is dropped."""
    name = type(model).__name__
    for problem, names in (("has other shapes", info["mismatched_keys"]), ("lacks weights", info["missing_keys"])):
        if names:
            first = sorted(n if isinstance(n, str) else n[0] for n in names)[0]
            raise FFMergeError(
                f"{folder} {problem} of {name}, {first} and {len(names) - 1} more; they would start at random: check "
                "that the folder is complete and its config.json belongs to it"
            )
    prefix, buffers = f"{model.base_model_prefix}.", {buffer for buffer, _ in model.named_buffers()}

    def is_weight(key: str) -> bool:
        names = {key, prefix + key, key.removeprefix(prefix)}
        return not names & buffers and not OLD_BUFFERS.search(key) and not any(fnmatchcase(key, p) for p in leave_out)

    if dropped := sorted(filter(is_weight, info["unexpected_keys"])):  # without those that the class itself declares
        raise FFMergeError(
            f"{folder} has weights that {name} has no place for, {dropped[0]} and {len(dropped) - 1} more; check that "
            f"its config.json belongs to it, or drop them by name: leave_out=[{dropped[0]!r}] (--leave-out)"
        )
    quantised = getattr(model.config, "quantization_config", None)
    if not quantised and (rounded := sorted(filter(is_weight, whole_numbers(folder)))):
        raise FFMergeError(
            f"{folder}: {rounded[0]} holds whole numbers, wanted float32, bfloat16 or float16 weights (a quantised "
            "model's config.json has a quantization_config); save the model again"
        )
