"""One open batch of a state: what was pushed since the last `end_batch`, and whether the next layer fits to it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...support.errors import FFMergeError
from ...support.tensors import check_memory

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Batch:
    tokens: dict[Hashable, int] = field(default_factory=dict)  # rows of each layer pushed, masked ones included
    masks: dict[Hashable, Tensor | None] = field(default_factory=dict)  # as given
    _flat: tuple[Tensor, Tensor] | None = None  # the last mask, as given and as [T] bool

    def add(self, key: Hashable, tokens: int, mask: Tensor | None) -> None:
        self.tokens[key], self.masks[key] = tokens, mask

    def check_partners(self, key: Hashable, tokens: int, mask: Tensor | None, partners: Iterable[Hashable]) -> None:
        """Raise FFMergeError unless layer `key` has the tokens of its partners in this batch."""
        for partner in partners:
            if tokens != self.tokens[partner]:
                raise FFMergeError(
                    f"layer {key!r} has {tokens} tokens, its pair {partner!r} has {self.tokens[partner]}: want the same"
                )
            other = self.masks[partner]
            if mask is other:
                continue
            if mask is None or other is None or not torch.equal(mask.bool(), other.bool()):
                raise FFMergeError(f"mask: layers {key!r} and {partner!r} are a pair but got different masks")

    def flat_mask(self, mask: Tensor | None, tokens: int, device: torch.device) -> Tensor | None:
        """The mask as [T] bool on `device`; layers mostly share one, so the last is remembered."""
        if mask is None:
            return None
        check_memory("mask", mask)
        if mask.numel() != tokens:
            raise FFMergeError(f"mask: got shape {list(mask.shape)}, want {tokens} elements, one per token")
        if self._flat is None or self._flat[0] is not mask:
            self._flat = (mask, mask.reshape(-1).to(device, torch.bool))
        return self._flat[1]


def flat_features(key: Hashable, x: Tensor, width: int, device: torch.device) -> Tensor:
    """x as [T, d], or FFMergeError with the reason why it is not this layer's."""
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise FFMergeError(f"features of layer {key!r}: got {got}, want a float32, bfloat16 or float16 tensor")
    if x.ndim == 0 or x.shape[-1] != width:
        raise FFMergeError(f"features of layer {key!r}: got shape {list(x.shape)}, want [tokens, {width}]")
    check_memory(f"features of layer {key!r}", x)
    if x.device != device:
        raise FFMergeError(f"features of layer {key!r}: on {x.device}, but the state is on {device}")
    return x.detach().reshape(x.shape[:-1].numel(), width)
