"""Write a model whose weights are elsewhere as transformers would write it from memory, tensor by tensor.

What no work has changed is copied from its file as bytes, a few megabytes at a time; its checksum is made meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import save
from torch import Tensor, nn

from ..models.elsewhere import Elsewhere, InFile, elsewhere
from ..support.errors import FFMergeError
from ..support.progress import progress
from ..support.tensor_files import DTYPES, bytes_of, chunks_of, entries_of
from ..support.tensors import DAMAGED, check_finite
from .contents import INDEX, WEIGHTS
from .located import OF_MODEL, by_loaded_names, located
from .manifest import shown

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_weights(model: nn.Module, weights: Elsewhere, folder: Path, shard: int) -> dict[str, str]:
    """Write the weights of a transformers model into a folder: the same files, byte for byte, as its own
    `save_pretrained` writes from memory.

    Args:
        shard: bytes of the largest file.

    Returns:
        {file name: checksum}.

    Raises:
        FFMergeError: NaN or Inf in a weight; a file that is read is gone or changes.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    state = _state_to_save(model)
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=shard)
    hashes = {}
    with progress(total=sum(t.nbytes for t in state.values()), desc="write", unit="B") as bar:
        for name, tensors in split.filename_to_tensors.items():
            hashes[name] = _write_file(folder / name, {n: state[n] for n in tensors}, weights, bar)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return hashes


@contextlib.contextmanager
def reading_from(model: nn.Module, folder: Path) -> Iterator[None]:
    """Inside, a model whose weights are elsewhere has them in the files of this folder, where they were written to."""
    before = elsewhere(model)
    if before is not None:
        entries = by_loaded_names(model, entries_of(folder, OF_MODEL))
        before.but(str(folder), located(model, entries)).attach_(model)
    try:
        yield
    finally:
        if before is not None:
            before.attach_(model)


def can_write(model: nn.Module) -> bool:
    """Whether the model's class saves weights by name alone, so that `write_weights` can."""
    try:
        state = _state_to_save(model)
    except Exception:  # of a conversion, which has as many as it has kinds
        return False
    known = {*map(id, model.parameters()), *map(id, model.buffers())}
    return all(id(tensor) in known for tensor in state.values())


def _state_to_save(model: nn.Module) -> dict[str, Tensor]:
    """{name in the files: parameter or buffer}, each once, in the order in which the class saves them."""
    from transformers import modeling_utils

    state = model.state_dict(keep_vars=True)
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = modeling_utils.remove_tied_weights_from_state_dict(state, model)
    if _keeps_old_names(model):
        from transformers.core_model_loading import revert_weight_conversion

        state = revert_weight_conversion(model, state)
    return state


def _keeps_old_names(model: nn.Module) -> bool:
    """Whether the class saves under the names that it was loaded from: not ours, and transformers 4 knows no others."""
    try:
        import transformers.core_model_loading  # noqa: F401
    except ImportError:
        return False
    return getattr(model.config, "ffmerge", None) is None


def _write_file(path: Path, tensors: Mapping[str, Tensor], weights: Elsewhere, bar: Any) -> str:
    """One safetensors file; returns its checksum. Parts are checked while they are written."""
    header, order = _header(tensors)
    crc = zlib.crc32(header)
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        _write(file, memoryview(header))
        for name, part in _all_parts(order, tensors, weights):
            checked = beside.submit(_checked, name, part, crc)
            _write(file, bytes_of(part))
            crc = checked.result()
            bar.update(part.nbytes)
    return shown(crc)


def _checked(name: str, part: Tensor, crc: int) -> int:
    """The checksum that goes on with a part, which must be finite."""
    check_finite("model", [(name, part)], DAMAGED)
    return zlib.crc32(bytes_of(part), crc)


def _write(file: BinaryIO, part: memoryview) -> None:
    while part:
        part = part[file.write(part) :]


def _all_parts(order: list[str], tensors: Mapping[str, Tensor], weights: Elsewhere) -> Iterator[tuple[str, Tensor]]:
    for name in order:
        tensor = tensors[name]
        place = weights.place(tensor) if tensor.is_meta else None
        if isinstance(place, InFile) and place.as_it_is:
            parts = chunks_of(place.entry)
        else:
            parts = iter([weights.read(tensor).cpu().contiguous()])
        for part in parts:
            yield name, part


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """What a safetensors file begins with, and the order of its tensors: that of the library, for the same names."""
    if strange := [f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in _NAMES]:
        raise FFMergeError(f"model: {strange[0]}, wanted float32, bfloat16 or float16 weights")
    raw = save({name: tensor.new_empty(0, device="cpu") for name, tensor in tensors.items()}, {"format": "pt"})
    order = [name for name in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) if name != "__metadata__"]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]
        }  # fmt: skip
        at += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, order
