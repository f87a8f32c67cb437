"""Save a merged model small, load it with one line, and prove that a folder holds what was saved.

A folder is an ordinary Hugging Face folder plus `ffmerge.json` (version, groups, hashes, reference logits).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..models.elsewhere import elsewhere, in_memory
from ..models.sublayers import FFNSublayer, find_ffns, set_module
from ..models.ties import is_merged
from ..models.wrapped import refuse_adapters
from ..support.env import online, require
from ..support.errors import FFMergeError
from ..support.files import new_folder, one_line, write_tensors, write_text
from ..support.sealed import write_sealed_json
from ..support.sizes import parse_bytes
from ..support.tensors import check_weights, not_inference
from .beside import EXTRAS, MANIFEST, carry_over, check_out, contents, known_in
from .contents import WEIGHTS, check_model
from .copying import reading_from, write_weights
from .manifest import check_hashes, describe, read_manifest
from .trusted import load_model
from .written import check_written

# ---------------------------------------------------------------------------------------------------------- writing


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    extras: dict[str, str] | None = None,
    source: str | os.PathLike | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write `model` with every shared weight once, and everything needed to load and verify it.

    Args:
        model: merged or not. A transformers model becomes a Hugging Face folder; any other `nn.Module` becomes
            model.safetensors, loaded by `from_pretrained(folder, model=the same module, unmerged)`.
        folder: written beside, then renamed: it is complete or absent.
        tokenizer: tokenizer or image processor to save along.
        overwrite: replace a folder that holds a saved model, and nothing else.
        max_shard_size: bytes of the largest weight file, or text such as "5GB".
        extras: {file name: text} for the `_ffmerge` folder (plan, statistics' settings, report).
        source: folder that the model came from: what belongs to it beside the weights (processors, chat templates,
            vocabularies, licences) is copied, unless `tokenizer` wrote it; a warning names what is not.
        trust_remote_code: copy its Python files, too.

    Raises:
        FFMergeError: folder not empty, the source, a mount point, with files that are no part of a saved model, not
            writable, disk full (what was there before stays); a merged model whose class is not transformers' own; NaN
            or Inf in a weight; adapters of peft in the model; what was written is not the model.
    """
    refuse_adapters(model)
    if in_memory(model):
        check_weights(model)
    if hasattr(model, "save_pretrained") and is_merged(model) and not hasattr(model.config, "ffmerge"):
        raise FFMergeError(
            f"{type(model).__name__} is merged in memory only, tied by hand or not a class of transformers itself; "
            "call expand_ before saving, share layers by merge_, or keep the state dict"
        )
    shard = parse_bytes(max_shard_size, "max_shard_size")
    check_out(folder, overwrite, source)
    with new_folder(folder, overwrite, known_in(folder)) as beside:
        hashes: dict[str, str] = {}
        if elsewhere(model) is not None:
            hashes = _save_from_files(model, beside, shard)
        elif hasattr(model, "save_pretrained"):
            _save_transformers(model, beside, shard)
        else:
            _save_plain(model, beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        for name, text in (extras or {}).items():
            write_text(beside / EXTRAS / name, text)
        if source is not None and os.path.isdir(source):
            carry_over(Path(source), beside, trust_remote_code)
        with reading_from(model, beside):
            manifest = describe(model, beside, hashes)
        write_sealed_json(beside / MANIFEST, manifest | {"contents": contents(beside)})
        check_written(beside, model)


def _save_transformers(model: nn.Module, folder: Path, shard: int, **options: Any) -> None:
    try:
        model.save_pretrained(folder, max_shard_size=shard, **options)
    except (RuntimeError, ValueError) as error:
        if "GenerationConfig" in str(error) or "generation config" in str(error).lower():
            raise FFMergeError(
                f"model.generation_config cannot be saved ({one_line(error)}); correct it, or the file it came from"
            ) from error
        if "shared tensors" not in str(error):
            raise
        raise FFMergeError(
            f"{type(model).__name__} has weights that are one tensor, though its class ties none of them: share layers "
            "by merge_, or give each its own copy"
        ) from error


def _save_from_files(model: nn.Module, folder: Path, shard: int) -> dict[str, str]:
    """Config and code by the class itself, weights from where they are; returns the hashes of the files."""
    _save_transformers(model, folder, shard, state_dict={})
    return write_weights(model, elsewhere(model), folder, shard)


def _save_plain(model: nn.Module, folder: Path) -> None:
    write_tensors(folder / WEIGHTS, {n: t.detach().contiguous() for n, t in _unique_state(model).items()})


def _unique_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each under its first name only."""
    persistent = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if name in persistent}


# ---------------------------------------------------------------------------------------------------------- reading


@not_inference
def from_pretrained(
    folder: str | os.PathLike,
    model: nn.Module | None = None,
    check: bool = True,
    trust_remote_code: bool = False,
    leave_out: Sequence[str] = (),
    **options,
) -> nn.Module:
    """Load a folder of weights: one of ours, or any Hugging Face folder or (when online) hub id.

    Unlike the Auto classes it takes the class named in the config, and never leaves a weight at its random start.

    Args:
        folder: a local folder; a hub id where `FFMERGE_ONLINE=1`.
        model: for a folder of a plain `nn.Module`: a freshly built, unmerged one, tied and filled here.
        check: compare the files with the hashes in `ffmerge.json` first, where there is one.
        trust_remote_code: run the folder's own code for a class that transformers does not have.
        leave_out: names of weights (with * and ?) that the class has no place for and that may be dropped.
        options: handed to transformers' `from_pretrained` (`dtype`, `device_map`, ...).

    Raises:
        FFMergeError: no such folder, no weights in it, damaged or edited files, weights missing for the class or
            without a place in it, an adapter.
    """
    path = Path(folder)
    if path.is_dir():
        check_model(path)
        if check and (path / MANIFEST).exists():
            check_hashes(path, read_manifest(path / MANIFEST))
    elif not online() or path.is_absolute() or str(folder).startswith(".") or str(folder).count("/") > 1:
        hint = "check the path" if online() else "check the path, or allow downloads: --online or FFMERGE_ONLINE=1"
        raise FFMergeError(f"{folder} is not a folder; {hint}")
    if model is not None:
        return _load_plain(model, path)
    if path.is_dir() and not (path / "config.json").exists():
        raise FFMergeError(f"{path} has no config.json: for a plain nn.Module, give a freshly built one as model=")
    return load_model(folder, trust_remote_code, list(leave_out), options)


def _load_plain(model: nn.Module, folder: Path) -> nn.Module:
    ffns = {(f.stack, f.index): f for f in find_ffns(model)}
    tensors, groups = load_file(folder / WEIGHTS), read_manifest(folder / MANIFEST)["groups"]
    keys = [[(group["stack"], i) for i in group["layers"]] for group in groups]
    members = [[ffns[key] for key in group if key in ffns] for group in keys]
    aliases = tuple(f"{path}." for group in members for ffn in group[1:] for path in ffn.shared)
    wanted = {name: tensor for name, tensor in _unique_state(model).items() if not name.startswith(aliases)}
    own = ("delta_", "private_")
    common = {name: tensor for name, tensor in tensors.items() if not name.rpartition(".")[2].startswith(own)}
    if any(key not in ffns for group in keys for key in group) or _shapes(common) != _shapes(wanted):
        raise FFMergeError(f"{folder / WEIGHTS} does not fit this {type(model).__name__}: names or shapes differ")
    for group, ffns_of_group in zip(groups, members, strict=True):
        _share_plain_(model, ffns_of_group, group)
    state = _unique_state(model)
    if _shapes(state) != _shapes(tensors):
        raise FFMergeError(
            f"{folder / WEIGHTS} does not hold the deltas or neurons that {MANIFEST} names; save the model again"
        )
    if wrong := [n for n, t in state.items() if t.is_floating_point() != tensors[n].is_floating_point()]:
        raise FFMergeError(
            f"{folder / WEIGHTS}: {wrong[0]} is {tensors[wrong[0]].dtype}, wanted {state[wrong[0]].dtype}"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])
    return model


def _share_plain_(model: nn.Module, ffns: Sequence[FFNSublayer], group: Mapping[str, Any]) -> None:
    """Make the layers share the first one's FFN, or its weights beside deltas or neurons of their own."""
    first, *others = ffns
    if "delta_rank" in group or "private_neurons" in group:
        require("transformers", extra="hf")
        from ..remote_code import modeling_ffmerge

        for name in first.projections:
            paths = [ffn.projections[name] for ffn in ffns]
            if "delta_rank" in group:
                modeling_ffmerge.add_deltas_(model, paths, group["delta_rank"])
            else:
                halves = 2 if first.fused and name == "up" else 1
                modeling_ffmerge.add_private_(model, paths, group["private_neurons"], halves, name == "down")
        return
    for ffn in others:
        for path, kept in zip(ffn.shared, first.shared, strict=True):
            set_module(model, path, model.get_submodule(kept))


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
