"""Which tokens of a batch count: those that are not padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..models.families import DECODER, ENCODER


def token_masks(batch: Any, model: nn.Module, stacks: Sequence[str]) -> dict[str, Tensor]:
    """Per stack, which tokens are not padding, as far as the batch says."""
    if not isinstance(batch, Mapping):
        return {}
    labels = batch.get("labels")
    of_tokens = labels is not None and labels.ndim == 2 and not labels.is_floating_point()
    from_labels = labels != -100 if of_tokens else None
    two_stacks = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    masks = {}
    if ENCODER in stacks and getattr(model, "main_input_name", "") != "input_features":  # audio is never masked
        mask = batch.get("attention_mask")
        masks[ENCODER] = mask if mask is not None else _torch_mask(batch, "src_key_padding_mask", model)
    if DECODER in stacks:
        mask = batch.get("decoder_attention_mask" if two_stacks else "attention_mask")
        mask = mask if mask is not None else _torch_mask(batch, "tgt_key_padding_mask", model)
        masks[DECODER] = mask if mask is not None else from_labels
    return {stack: mask for stack, mask in masks.items() if mask is not None}


def _torch_mask(batch: Mapping, name: str, model: nn.Module) -> Tensor | None:
    """The tokens that one of nn.Transformer's padding masks [batch, length] (True or -inf: padding) leaves."""
    padding = batch.get(name)
    if padding is None:
        return None
    batch_first = all(m.batch_first for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    return padding == 0 if batch_first else (padding == 0).T
