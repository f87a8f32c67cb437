"""A training run's state on disk: written beside and renamed, complete or absent, and never pickled.

`checkpoint-<step>/` holds model.safetensors (trained parameters and buffers, each shared tensor once),
optimizer.safetensors (the optimiser's state by parameter name), rng.safetensors (random states of every rank as
bytes) and trainer_state.json. `best-<step>/` holds model.safetensors only.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...support.distributed import sharded_like, whole
from ...support.errors import FFMergeError
from ...support.files import new_folder
from ...support.sealed import (
    DamagedError,
    read_sealed_json,
    read_sealed_tensors,
    write_sealed_json,
    write_sealed_tensors,
)

CHECKPOINT, BEST = "checkpoint", "best"
_MODEL, _OPTIMIZER, _RNG, _STATE = "model.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer_state.json"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that require gradients and saved buffers, each once, by its first name."""
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = model.state_dict(keep_vars=True)
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's per-parameter state as "<entry>/<parameter name>".

    One whose state several ranks own collects it on rank 0; so every rank must call this.
    """
    if hasattr(optimizer, "named_state"):
        return optimizer.named_state()
    return {
        f"{entry}/{name}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU; sharded ones (DTensor) are gathered, so every rank must call this."""
    return {name: whole(tensor).detach().cpu().contiguous() for name, tensor in tensors.items()}


def save_checkpoint(
    root: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor], rng: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Write `checkpoint-<state["step"]>` of `state["run"]`; on failure nothing is left of it and older ones stay.

    Raises:
        FFMergeError: it cannot be written (no space, no permission).
    """
    path = root / f"{CHECKPOINT}-{state['step']}"
    with new_folder(path, overwrite=True, known=_is_ours) as folder:
        for file, tensors in ((_MODEL, model), (_OPTIMIZER, optimizer), (_RNG, rng)):
            write_sealed_tensors(folder / file, tensors, _origin(path, file, state["run"]))
        write_sealed_json(folder / _STATE, state, indent=2)
    return path


def save_best(root: Path, step: int, model: dict[str, Tensor], run: str) -> None:
    """Write `best-<step>`, the weights only."""
    path = root / f"{BEST}-{step}"
    with new_folder(path, overwrite=True, known=_is_ours) as folder:
        write_sealed_tensors(folder / _MODEL, model, _origin(path, _MODEL, run))


def _is_ours(file: Path) -> bool:
    return str(file) in (_MODEL, _OPTIMIZER, _RNG, _STATE)


def _is_ours(file: Path) -> bool:
    return str(file) in (_MODEL, _OPTIMIZER, _RNG, _STATE)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint: step, settings, best metric."""
    try:
        state = read_sealed_json(checkpoint / _STATE)
    except DamagedError as error:
        raise _damaged(checkpoint, error) from error
    missing = [name for name in ("step", "settings", "best_metric", "best_step", "pending") if name not in state]
    if missing or state["step"] != int(checkpoint.name.rpartition("-")[2]):
        raise _damaged(checkpoint, DamagedError(f"{_STATE} has no {missing[0]}" if missing else "of another step"))
    return state


def load_weights_(folder: Path, model: nn.Module, run: str | None = None) -> None:
    """Copy a checkpoint's weights into the model, shared tensors included.

    Args:
        run: whose they must be; None: whoever's.
    """
    _copy_(model_tensors(model), _load(folder / _MODEL, run), folder)


def holds(folder: Path, tensors: dict[str, Tensor], rounded: Mapping[str, torch.dtype]) -> bool:
    """Whether a checkpoint's weights are these, of which some were rounded to the dtypes in `rounded` since."""
    saved = _load(folder / _MODEL)
    if saved.keys() != tensors.keys():
        return False
    dtypes = {name: rounded.get(name, tensor.dtype) for name, tensor in tensors.items()}
    return all(torch.equal(saved[name].to(dtypes[name]), t.to(dtypes[name])) for name, t in tensors.items())


def load_optimizer_(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: str | None = None) -> None:
    """Set the optimiser's state to the saved one."""
    saved = _load(folder / _OPTIMIZER, run)
    if hasattr(optimizer, "load_named_state"):
        optimizer.load_named_state(saved)
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    known = {names[p] for group in optimizer.param_groups for p in group["params"]}
    unknown = sorted({key.partition("/")[2] for key in saved} - known)
    if unknown:
        raise _damaged(folder, DamagedError(f"{_OPTIMIZER} holds moments of {unknown[0]}, which is not trained"))
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        entries = [key for key in saved if key.partition("/")[2] == names[parameter]]
        # copies: in the file's buffer tensors lie at any address, and products of such round otherwise
        optimizer.state[parameter] = {key.partition("/")[0]: _like(saved[key], parameter).clone() for key in entries}


def seed_all(seed: int) -> None:
    """Seed torch (all devices), NumPy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_states() -> dict[str, Tensor]:
    """This process's random states (torch, CUDA, NumPy, random) as bytes."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": _bytes([kind, keys.tolist(), *rest]),
        "python": _bytes(random.getstate()),
    }
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def load_random_states(folder: Path, rank: int, run: str | None = None) -> None:
    """Set this process's random states to those saved for `rank`."""
    prefix, saved = f"rank{rank}/", _load(folder / _RNG, run)
    states = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
    if missing := {"torch", "numpy", "python"} - states.keys():
        raise _damaged(folder, DamagedError(f"{_RNG} has no {prefix}{min(missing)}"))
    torch.set_rng_state(states["torch"])
    kind, keys, *rest = _value(states["numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = _value(states["python"])
    random.setstate((version, tuple(internal), gauss))
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda{i}"], i)


def folders(root: Path, prefix: str) -> dict[int, Path]:
    """Step -> folder of the checkpoints (or bests) in `root`, ascending."""
    found = {}
    if root.is_dir():
        for path in root.iterdir():
            match = re.fullmatch(rf"{prefix}-(\d+)", path.name)
            if match and path.is_dir():
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def prune(root: Path, prefix: str, keep: Iterable[int | None]) -> None:
    """Remove the `prefix`-folders of all steps but `keep`."""
    keep = set(keep)
    for step, path in folders(root, prefix).items():
        if step not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _copy_(tensors: dict[str, Tensor], saved: dict[str, Tensor], folder: Path) -> None:
    if set(tensors) != set(saved):
        odd = sorted(set(tensors) ^ set(saved))[0]
        raise FFMergeError(
            f"resume: {folder} holds another model: {odd} is only in one of the two; give the model that was trained "
            "there (merged the same way), or another output_dir"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != saved[name].shape:
                raise FFMergeError(
                    f"resume: {name} has shape {list(saved[name].shape)} in {folder} and {list(tensor.shape)} in the "
                    "model; give the model that was trained there, or another output_dir"
                )
            tensor.copy_(_like(saved[name], tensor))


def _like(saved: Tensor, tensor: Tensor) -> Tensor:
    """`saved` on the device of `tensor`, and sharded as it is; a scalar (AdamW's step) stays as it is."""
    if saved.ndim == 0 and tensor.ndim:
        return saved
    return sharded_like(saved.to(tensor.device), tensor)


def _origin(folder: Path, file: str, run: str | None) -> dict[str, str | None]:
    """Where a file belongs: one that was moved from elsewhere is noticed."""
    return {"file": f"{folder.name}/{file}", "run": run}


def _load(file: Path, run: str | None = None) -> dict[str, Tensor]:
    try:
        tensors, origin = read_sealed_tensors(file)
        wanted = _origin(file.parent, file.name, run)
        for name, value in wanted.items() if origin is not None else ():
            if value is not None and origin.get(name) != value:
                raise DamagedError(f"{file.name} is of another {name}: {origin.get(name)}")
    except DamagedError as error:
        raise _damaged(file.parent, error) from error
    return tensors


def _damaged(folder: Path, error: DamagedError) -> FFMergeError:
    return FFMergeError(f"resume: {folder} cannot be read ({error}); remove it to go on without it")


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(encoded: Tensor) -> Any:
    return json.loads(encoded.numpy().tobytes())
