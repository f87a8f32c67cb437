"""Save a merged model small, load it with one line, and prove that a folder holds what was saved.

A folder is an ordinary Hugging Face folder plus `ffmerge.json` (version, groups, hashes, reference logits).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ._env import online, require
from ._errors import FFMergeError
from .merge.combine import find_ffns, is_merged, shared_groups
from .merge.passes import evaluating, run, to_device
from .models import MERGED_TYPE_PREFIX, FFNSublayer, delta_rank, set_module, supported_families

MANIFEST = "ffmerge.json"
_VERSION = 1  # of the manifest
EXTRAS = "_ffmerge"  # statistics, plan, report: may be deleted
_WEIGHTS = "model.safetensors"
# Of the largest reference logit: machines and versions round differently; `.to(bf16)` rounds more than loading does.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-1}


# ---------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; it appears under its name when the block ends, or not at all.

    Raises:
        FFMergeError: `path` is a file, or a folder with content and not `overwrite`; or it cannot be written.
    """
    check_new_folder(path, overwrite)
    path = Path(path).resolve()  # a linked folder is replaced where it lies
    new_parents = [p for p in path.parents if not p.exists()]
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        beside.mkdir(parents=True)
        yield beside
        _open_permissions(beside)
        _rename_over(beside, path)
    except (OSError, SafetensorError) as error:
        raise FFMergeError(f"{path} could not be written ({_one_line(error)}); nothing was changed there") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty after a success
            for parent in new_parents:
                parent.rmdir()


def check_new_folder(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise FFMergeError if `new_folder(path)` would refuse: to be called before long work."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FFMergeError(f"{path} is a file; give a folder to write")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FFMergeError(f"{path} exists and is not empty; give another folder, or --overwrite (overwrite=True)")
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK):
        raise FFMergeError(f"{path} cannot be written: no permission in {existing}")


def _open_permissions(folder: Path) -> None:
    """Give files the usual permissions of new ones; safetensors makes them readable by their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def _rename_over(new: Path, path: Path) -> None:
    old = None
    if path.exists():
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old:
            old.rename(path)
        raise
    if old:
        shutil.rmtree(old, ignore_errors=True)


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    extras: dict[str, str] | None = None,
) -> None:
    """Write `model` with every shared weight once, and everything needed to load and verify it.

    Args:
        model: merged or not. A transformers model becomes a Hugging Face folder; any other `nn.Module` becomes
            model.safetensors, loaded by `from_pretrained(folder, model=the same module, unmerged)`.
        folder: written beside, then renamed: it is complete or absent.
        tokenizer: tokenizer or image processor to save along.
        overwrite: replace a folder that has content.
        max_shard_size: largest weight file ("5GB").
        extras: {file name: text} for the `_ffmerge` folder (plan, statistics' settings, report).

    Raises:
        FFMergeError: folder not empty or not writable, disk full (what was there before stays); a merged model whose
            class is not transformers' own.
    """
    if hasattr(model, "save_pretrained") and is_merged(model) and not hasattr(model.config, "ffmerge"):
        raise FFMergeError(
            f"{type(model).__name__} is merged in memory only, as it is not a class of transformers itself; call "
            "expand_ before saving, or keep its state dict"
        )
    with new_folder(folder, overwrite) as beside:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(beside, max_shard_size=max_shard_size)
        else:
            _save_plain(model, beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        for name, text in (extras or {}).items():
            (beside / EXTRAS).mkdir(exist_ok=True)
            (beside / EXTRAS / name).write_text(text)
        (beside / MANIFEST).write_text(json.dumps(_manifest(model, beside), indent=1))


def _save_plain(model: nn.Module, folder: Path) -> None:
    save_file({n: t.detach().contiguous() for n, t in _unique_state(model).items()}, folder / _WEIGHTS)


def _unique_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each under its first name only."""
    persistent = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if name in persistent}


def _manifest(model: nn.Module, folder: Path) -> dict[str, Any]:
    files = {p.name: _sha256(p) for pattern in ("*.safetensors", "*.py") for p in sorted(folder.glob(pattern))}
    manifest = {"version": _VERSION, "groups": _groups(model), "files": files, "shared": _hashes_of_shared(model)}
    if hasattr(model, "config"):
        manifest["reference"] = _reference(model)
    return manifest


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    deltas = {"delta_rank": rank} if (rank := delta_rank(model)) else {}
    return [{"stack": stack, "layers": list(layers), **deltas} for stack, layers in shared_groups(model)]


def _hashes_of_shared(model: nn.Module) -> dict[str, str]:
    """{parameter name under the lowest layer: sha256} of every shared FFN."""
    ffns = {(f.stack, f.index): f for f in find_ffns(model)} if shared_groups(model) else {}
    return {
        f"{path}.{name}": hashlib.sha256(_raw(parameter)).hexdigest()
        for stack, layers in (shared_groups(model) if ffns else ())
        for path in ffns[stack, layers[0]].shared
        for name, parameter in model.get_submodule(path).named_parameters()
    }


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- reference logits


def reference_inputs(model: nn.Module) -> dict[str, Tensor]:
    """A small fixed input of the model's kind: token ids, pixels or audio features."""
    config, name = model.config, getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else [config.image_size] * 2
        return {name: _ramp(1, config.num_channels, *size).to(model.dtype)}
    ids = (torch.arange(8) * 7 % min(config.get_text_config().vocab_size, 997))[None]
    if name == "input_features":
        waves = _ramp(1, config.num_mel_bins, 2 * config.max_source_positions)
        return {name: waves.to(model.dtype), "decoder_input_ids": ids}
    return {name: ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {name: ids}


def _ramp(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)


def _reference(model: nn.Module) -> dict[str, Any]:
    return {"logits": _reference_logits(model), "torch": torch.__version__}


def _reference_logits(model: nn.Module, count: int = 64) -> list[float]:
    """The first values the model gives for the last position of its reference input."""
    with evaluating(model), torch.no_grad():
        output = run(model, to_device(reference_inputs(model), model))
    values = output.logits if getattr(output, "logits", None) is not None else output[0]
    return values.reshape(-1, values.shape[-1])[-1, :count].float().cpu().tolist()


# ---------------------------------------------------------------------------------------------------------- reading


def from_pretrained(
    folder: str | os.PathLike, model: nn.Module | None = None, check: bool = True, **options
) -> nn.Module:
    """Load a folder of weights: one of ours, or any Hugging Face folder or (when online) hub id.

    Unlike the Auto classes it takes the class named in the config, and never leaves a weight at its random start.

    Args:
        folder: a local folder; a hub id where `FFMERGE_ONLINE=1`.
        model: for a folder of a plain `nn.Module`: a freshly built, unmerged one, tied and filled here.
        check: compare the weight files with the hashes in `ffmerge.json` first, where there is one.
        options: handed to transformers' `from_pretrained` (`dtype`, `device_map`, ...).

    Raises:
        FFMergeError: no such folder, no weights in it, damaged weights, weights missing for the class.
    """
    path = Path(folder)
    if path.is_dir():
        _check_folder(path, check)
    elif not online() or path.is_absolute() or str(folder).startswith(".") or str(folder).count("/") > 1:
        hint = "check the path" if online() else "check the path, or allow downloads: --online or FFMERGE_ONLINE=1"
        raise FFMergeError(f"{folder} is not a folder; {hint}")
    if model is not None:
        return _load_plain(model, path)
    if path.is_dir() and not (path / "config.json").exists():
        raise FFMergeError(f"{path} has no config.json: for a plain nn.Module, give a freshly built one as model=")
    family = _model_type(path)
    if family.startswith(MERGED_TYPE_PREFIX) and family.removeprefix(MERGED_TYPE_PREFIX) not in supported_families():
        raise FFMergeError(
            f"{path}: family {family.removeprefix(MERGED_TYPE_PREFIX)!r} is not known here; call register_family first "
            "or load it with transformers alone (trust_remote_code=True)"
        )
    transformers = require("transformers", extra="hf")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=not online(), trust_remote_code=False)
        model_class = _class_of(config, transformers)
        options = {"dtype": "auto", "local_files_only": not online(), **options, "ignore_mismatched_sizes": True}
        loaded, info = model_class.from_pretrained(folder, config=config, output_loading_info=True, **options)
    except FFMergeError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds; each ends as one line here
        raise FFMergeError(f"{folder} cannot be loaded: {_one_line(error)}") from error
    for problem, names in (("has other shapes", info["mismatched_keys"]), ("lacks weights", info["missing_keys"])):
        if names:
            first = sorted(n if isinstance(n, str) else n[0] for n in names)[0]
            raise FFMergeError(
                f"{folder} {problem} of {model_class.__name__}, {first} and {len(names) - 1} more; they would start at "
                "random: check that the folder is complete and its config.json belongs to it"
            )
    return loaded


def load_processor(folder: str | os.PathLike) -> Any:
    """The folder's tokenizer, image processor or feature extractor; None if it has none."""
    transformers = require("transformers", extra="hf")
    for name, files in (
        ("AutoTokenizer", ("tokenizer.json", "tokenizer_config.json", "vocab.json")),
        ("AutoImageProcessor", ("preprocessor_config.json",)),
    ):
        if any((Path(folder) / f).exists() for f in files) or not Path(folder).is_dir():
            with contextlib.suppress(OSError, ValueError, ImportError):
                return getattr(transformers, name).from_pretrained(folder)
    return None


def _class_of(config: Any, transformers: Any) -> type:
    names = getattr(config, "architectures", None) or []
    if not names:
        raise FFMergeError('config.json names no architecture: add "architectures": ["<model class>"]')
    if names[0].startswith("FFMerged"):
        from ._modeling import modeling_ffmerge

        return getattr(modeling_ffmerge, names[0])
    if not hasattr(transformers, names[0]):
        raise FFMergeError(
            f"{names[0]} is no class of transformers: load it with its own code and pass the model to ffmerge_fast"
        )
    return getattr(transformers, names[0])


def _check_folder(path: Path, check_hashes: bool) -> None:
    weights = [p for p in path.iterdir() if p.suffix in (".safetensors", ".bin")]
    if not weights:
        raise FFMergeError(f"{path} holds no weights (*.safetensors); give a folder written by save_pretrained")
    for file in weights:
        if file.suffix == ".safetensors":
            _check_readable(file)
    manifest = path / MANIFEST
    if check_hashes and manifest.exists():
        _check_hashes(path, _read_manifest(manifest))


def _check_readable(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise FFMergeError(f"{file} is damaged or cut off ({error}); copy or save it again") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        read = {
            "groups": [
                {"stack": g["stack"], "layers": [int(i) for i in g["layers"]]}
                | ({"delta_rank": int(g["delta_rank"])} if "delta_rank" in g else {})
                for g in manifest["groups"]
            ],
            "files": {name: str(digest) for name, digest in manifest["files"].items()},
            "shared": {name: str(digest) for name, digest in manifest["shared"].items()},
        }
        if "reference" in manifest:
            read["logits"] = [float(value) for value in manifest["reference"]["logits"]]
        newer = manifest["version"] > _VERSION
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FFMergeError(f"{path} cannot be read ({_one_line(error)}); save the model again") from error
    if newer:
        raise FFMergeError(f"{path} is of version {manifest['version']}, this ffmerge_fast reads {_VERSION}: update it")
    return read


def _check_hashes(path: Path, manifest: dict[str, Any]) -> None:
    for name, wanted in manifest["files"].items():
        if not (path / name).exists():
            raise FFMergeError(f"{path / name} is missing; copy the folder again")
        if _sha256(path / name) != wanted:
            raise FFMergeError(
                f"{path / name} is not what was saved (its sha256 differs); copy the folder again, or delete "
                f"{MANIFEST} if another tool saved over it"
            )


def _load_plain(model: nn.Module, folder: Path) -> nn.Module:
    ffns = {(f.stack, f.index): f for f in find_ffns(model)}
    tensors, groups = load_file(folder / _WEIGHTS), _read_manifest(folder / MANIFEST)["groups"]
    keys = [[(group["stack"], i) for i in group["layers"]] for group in groups]
    members = [[ffns[key] for key in group if key in ffns] for group in keys]
    aliases = tuple(f"{path}." for group in members for ffn in group[1:] for path in ffn.shared)
    wanted = {name: tensor for name, tensor in _unique_state(model).items() if not name.startswith(aliases)}
    undelta = {name: tensor for name, tensor in tensors.items() if not name.rpartition(".")[2].startswith("delta_")}
    if any(key not in ffns for group in keys for key in group) or _shapes(undelta) != _shapes(wanted):
        raise FFMergeError(f"{folder / _WEIGHTS} does not fit this {type(model).__name__}: names or shapes differ")
    for group, ffns_of_group in zip(groups, members, strict=True):
        _share_plain_(model, ffns_of_group, group.get("delta_rank", 0))
    state = _unique_state(model)
    if _shapes(state) != _shapes(tensors):
        raise FFMergeError(f"{folder / _WEIGHTS} does not hold the deltas that {MANIFEST} names; save the model again")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])
    return model


def _share_plain_(model: nn.Module, ffns: Sequence[FFNSublayer], rank: int) -> None:
    """Make the layers share the first one's FFN, or with deltas its weights."""
    first, *others = ffns
    if rank:
        require("transformers", extra="hf")
        from ._modeling import modeling_ffmerge

        for name in first.projections:
            modeling_ffmerge.add_deltas_(model, [ffn.projections[name] for ffn in ffns], rank)
        return
    for ffn in others:
        for path, kept in zip(ffn.shared, first.shared, strict=True):
            set_module(model, path, model.get_submodule(kept))


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


# --------------------------------------------------------------------------------------------------------- verifying


def verify(folder: str | os.PathLike, model: nn.Module | None = None) -> dict[str, Any]:
    """Check that a folder holds the merged model that was saved: hashes, ties and reference logits.

    Args:
        folder: written by `save_pretrained`.
        model: for a folder of a plain `nn.Module`: a freshly built, unmerged one (it is filled).

    Returns:
        {"groups", "parameters", "bytes", "logit_difference" (None for a plain module)}.

    Raises:
        FFMergeError: one line that says what is wrong with the folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FFMergeError(f"{folder} is not a folder")
    if not (path / MANIFEST).exists():
        raise FFMergeError(f"{path} has no {MANIFEST}: it was not written by ffmerge_fast.save_pretrained")
    manifest = _read_manifest(path / MANIFEST)
    model = from_pretrained(path, model)
    found = _groups(model)
    if found != manifest["groups"]:
        raise FFMergeError(f"{path}: layers {found} share FFNs, but {manifest['groups']} were saved as shared")
    hashes = _hashes_of_shared(model)
    if differ := sorted(n for n in manifest["shared"] if hashes.get(n) != manifest["shared"][n]):
        raise FFMergeError(f"{path}: {differ[0]} is not what was saved ({len(differ)} shared tensors differ)")
    return {
        "groups": found,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.stat().st_size for p in path.glob("*.safetensors")),
        "logit_difference": _compare_logits(path, model, manifest) if "logits" in manifest else None,
    }


def _compare_logits(path: Path, model: nn.Module, manifest: dict[str, Any]) -> float:
    saved, found = torch.tensor(manifest["logits"]), torch.tensor(_reference_logits(model))
    difference = (found - saved).abs().max().item() if found.shape == saved.shape else math.inf
    if not difference <= _TOLERANCE[model.dtype] * max(1.0, saved.abs().max().item()):
        raise FFMergeError(
            f"{path}: logits differ by {difference:.3g} from the saved ones; config and weights do not fit"
        )
    return difference


def is_merged_folder(folder: str | os.PathLike) -> bool:
    """Whether a local folder's config says that it holds a merged model."""
    return _model_type(Path(folder)).startswith(MERGED_TYPE_PREFIX)


def _model_type(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return str(json.loads((folder / "config.json").read_text()).get("model_type", ""))
    return ""


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
