"""`ffmerge.json`: what a saved folder holds, by hashes, ties and reference logits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.elsewhere import elsewhere, reader_of
from ..models.forward import evaluating, run, to_device
from ..models.projections import own_capacity
from ..models.sublayers import FFNs, find_ffns
from ..models.ties import shared_groups
from ..runtime.streaming.plan import Steps
from ..runtime.streaming.stream import stream_
from ..support.errors import FFMergeError
from ..support.files import one_line
from ..support.sealed import DamagedError, read_sealed_json
from .beside import MANIFEST
from .contents import is_file_name, parse

_VERSION = 2  # of the manifest
_CRC = "crc32:"
_BYTES, _VOCABULARIES = {".safetensors", ".py", ".jinja", ".model", ".spm", ".tiktoken"}, {"merges.txt", "vocab.txt"}
_OF_A_SAVE = {"transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "is_local", "local_files_only"}
# Of the largest reference logit: machines and versions round differently; `.to(bf16)` rounds more than loading does.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-1}


def describe(model: nn.Module, folder: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a model whose files are in `folder`; `hashes` of those that were hashed while written."""
    manifest = {
        "version": _VERSION,
        "groups": groups_of(model),
        "files": {
            p.name: hashes.get(p.name) or checksum_of(p)
            for p in sorted(folder.iterdir())
            if p.suffix in _BYTES or p.name in _VOCABULARIES
        },
        "parsed": {p.name: _sha256_of_content(p) for p in sorted(folder.glob("*.json"))},
        "shared": hashes_of_shared(model),
    }
    if hasattr(model, "config"):
        manifest |= _reference(model)
    return manifest


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """The layers that share an FFN, as the manifest lists them."""
    own = own_capacity(model)
    return [{"stack": stack, "layers": list(layers), **own} for stack, layers in shared_groups(model)]


def hashes_of_shared(model: nn.Module) -> dict[str, str]:
    """{parameter name under the lowest layer: sha256} of every shared FFN."""
    groups, read = shared_groups(model), reader_of(model)
    ffns = find_ffns(model) if groups else FFNs()
    return {
        f"{path}.{name}": digest(read(parameter))
        for stack, layers in groups
        for path in ffns.at(stack, layers[0]).shared
        for name, parameter in model.get_submodule(path).named_parameters()
    }


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's values."""
    raw = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashlib.sha256(raw).hexdigest()


def checksum_of(path: Path) -> str:
    """Of a file's bytes: CRC-32, which finds what is damaged and costs no more than reading it; who means harm can
    write the manifest, too."""
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return shown(crc)


def shown(crc: int) -> str:
    """A CRC-32 as the manifest has it."""
    return f"{_CRC}{crc:08x}"


def _sha256(path: Path) -> str:  # of manifests of version 1
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """groups, files, shared and, if there are any, logits; FFMergeError if the file is damaged or too new."""
    try:
        manifest = read_sealed_json(path)
        read = {
            "groups": [
                {"stack": g["stack"], "layers": [int(i) for i in g["layers"]]}
                | {name: int(g[name]) for name in ("delta_rank", "private_neurons") if name in g}
                for g in manifest["groups"]
            ],
            "files": {name: str(digest) for name, digest in manifest["files"].items()},
            "parsed": {name: str(digest) for name, digest in manifest.get("parsed", {}).items()},
            "shared": {name: str(digest) for name, digest in manifest["shared"].items()},
        }
        if "reference" in manifest:
            read["logits"] = [float(value) for value in manifest["reference"]["logits"]]
        if outside := [name for name in (*read["files"], *read["parsed"]) if not is_file_name(name)]:
            raise ValueError(f"it names {outside[0]!r}, which is no file of this folder")
        newer = manifest["version"] > _VERSION
    except (DamagedError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, DamagedError) else one_line(error)
        raise FFMergeError(f"{path} cannot be read ({reason}); save the model again") from error
    if newer:
        raise FFMergeError(f"{path} is of version {manifest['version']}, this ffmerge_fast reads {_VERSION}: update it")
    return read


def check_hashes(path: Path, manifest: dict[str, Any]) -> None:
    """Raise FFMergeError unless the folder's files are those that were saved."""
    _check(path, manifest["parsed"], _sha256_of_content)
    _check(path, {n: d for n, d in manifest["files"].items() if d.startswith(_CRC)}, checksum_of)
    _check(path, {n: d for n, d in manifest["files"].items() if not d.startswith(_CRC)}, _sha256)


def check_parsed(path: Path) -> None:
    """`check_hashes` of configs and tokenizer alone, if the folder has a manifest."""
    if (path / MANIFEST).exists():
        manifest = read_manifest(path / MANIFEST)
        bytes_of = {name: digest for name, digest in manifest["files"].items() if not name.endswith(".safetensors")}
        check_hashes(path, manifest | {"files": bytes_of})


def _check(path: Path, saved: dict[str, str], digest: Callable[[Path], str]) -> None:
    for name, wanted in saved.items():
        if not (path / name).exists():
            raise FFMergeError(f"{path / name} is missing; copy the folder again")
        if digest(path / name) != wanted:
            raise FFMergeError(
                f"{path / name} is not what was saved (its checksum differs); copy the folder again, or delete "
                f"{MANIFEST} if you or another tool saved over it"
            )


def _sha256_of_content(path: Path) -> str:
    """Of what a JSON file says, without what every save writes anew."""
    content = parse(path)
    if path.name.endswith("config.json"):
        content = _without_save(content)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_save(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_save(v) for v in value]
    if not isinstance(value, dict):
        return value
    return {"dtype" if k == "torch_dtype" else k: _without_save(v) for k, v in value.items() if k not in _OF_A_SAVE}


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
    """{"reference": logits}, or {"no_reference": why}: not every class takes an input that we can make up."""
    try:
        logits = _reference_logits(model)
        reason = "" if all(map(math.isfinite, logits)) else "its logits are not finite"
    except Exception as error:  # whatever the class raises
        reason = one_line(error)
    if not reason:
        return {"reference": {"logits": logits, "torch": torch.__version__}}
    warnings.warn(
        f"{type(model).__name__} is saved without reference logits, which `verify` would compare: {reason}",
        stacklevel=2,
    )
    return {"no_reference": reason}


def _reference_logits(model: nn.Module, count: int = 64) -> list[float]:
    """The first values the model gives for the last position of its reference input."""
    with _on_device(model), evaluating(model), torch.no_grad():
        output = run(model, to_device(reference_inputs(model), model))
    values = output.logits if getattr(output, "logits", None) is not None else output[0]
    return values.reshape(-1, values.shape[-1])[-1, :count].float().cpu().tolist()


def _on_device(model: nn.Module) -> AbstractContextManager:
    """Where a forward pass runs; of a model whose weights are in files, a layer at a time is loaded."""
    if elsewhere(model) is None:
        return contextlib.nullcontext()
    return stream_(model, "cpu", "disk", Steps.of(model).least())


def compare_logits(path: Path, model: nn.Module, manifest: dict[str, Any]) -> float:
    """The largest difference from the saved logits; FFMergeError if it is more than rounding."""
    saved, found = torch.tensor(manifest["logits"]), torch.tensor(_reference_logits(model))
    difference = (found - saved).abs().max().item() if found.shape == saved.shape else math.inf
    if not difference <= _TOLERANCE[model.dtype] * max(1.0, saved.abs().max().item()):
        raise FFMergeError(
            f"{path}: logits differ by {difference:.3g} from the saved ones; config and weights do not fit"
        )
    return difference
