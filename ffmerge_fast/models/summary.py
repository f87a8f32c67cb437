"""What is remembered of a model: its type, fingerprint, sizes and FFNs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..support.errors import FFMergeError
from ..support.tensors import check_weights
from .elsewhere import elsewhere, in_memory, reader_of
from .sublayers import FFNs, FFNSublayer, base_model_type, find_ffns


@dataclass(frozen=True)
class ModelSummary:
    """What statistics and plans remember of a model, to recognise it and to count what merging saves."""

    model_type: str
    fingerprint: str
    parameters: int
    nbytes: int
    ffns: FFNs

    @classmethod
    def of(cls, model: nn.Module, ffns: FFNs | None = None) -> ModelSummary:
        """Read a model once, to be handed down from there; weights that are not in memory one by one.

        Args:
            ffns: the model's, where they are known already.

        Raises:
            FFMergeError: as `find_ffns`; NaN or Inf in a weight in memory; weights on "meta" that are nowhere else.
        """
        ffns = find_ffns(model) if ffns is None else ffns
        if in_memory(model):
            check_weights(model)
        weights = list(model.parameters())
        return cls(
            model_type=base_model_type(model),
            fingerprint=fingerprint(model, ffns),
            parameters=sum(w.numel() for w in weights),
            nbytes=sum(w.numel() * w.element_size() for w in weights),
            ffns=ffns,
        )

    @property
    def stacks(self) -> list[str]:
        return list(dict.fromkeys(f.stack for f in self.ffns))

    def check(self, given: ModelSummary, what: str) -> None:
        """Raise FFMergeError unless `what` (the owner of this summary) was made from the given model."""
        if given.fingerprint != self.fingerprint:
            raise FFMergeError(
                f"{what} is of another model ({self.model_type} {self.fingerprint}; this one is {given.model_type} "
                f"{given.fingerprint}): make it again from this model"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it."""
        return vars(self) | {"ffns": [asdict(ffn) for ffn in self.ffns]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSummary:
        ffns = FFNs(FFNSublayer(**{**f, "shared": tuple(f["shared"])}) for f in values["ffns"])
        return cls(**{**values, "ffns": ffns})


def fingerprint(model: nn.Module, ffns: FFNs) -> str:
    """Short hash of the FFN layout and of every weight of the layers around the FFNs, equal for fp32 and bf16 copies.

    Embeddings and heads do not count: they are cut off and resized. A weight is read once and costs a few integer sums
    where it is, well below a forward pass.

    Raises:
        FFMergeError: the model's weights are not in memory.
    """
    digest, read, places = hashlib.sha256(), reader_of(model), elsewhere(model)
    known = {} if places is None else places.checksums
    for ffn in ffns:
        digest.update(repr((ffn.key, ffn.signature)).encode())
        for name, weight in model.get_submodule(ffn.path).named_parameters():
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            if weight not in known:
                known[weight] = _checksums_of(read(weight), f"{ffn.path}.{name}")
            digest.update(known[weight])
    return digest.hexdigest()[:16]


def _checksums_of(values: Tensor, name: str) -> bytes:
    if values.is_meta:
        raise FFMergeError(
            f"{name} is not in memory (on 'meta', or offloaded by accelerate): load the model without device_map"
        )
    return _checksums(values).numpy().tobytes()


def _checksums(weight: Tensor) -> Tensor:
    """Sums over the rows and over the columns of a weight's bits, as bfloat16, in a table of int64 words [n, 256].

    Integers wrap, so the sums are exact on every device. One changed value changes two of them, and a permutation
    their order.
    """
    values = weight.reshape(-1).to(torch.bfloat16)
    if padding := -len(values) % 1024:
        values = nn.functional.pad(values, (0, padding))
    words = values.view(torch.int64).view(-1, 256)
    return torch.cat([words.sum(0), words.sum(1)]).cpu()
