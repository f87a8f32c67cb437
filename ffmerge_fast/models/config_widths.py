"""Where a transformers config says how wide the FFNs of a stack are."""

from __future__ import annotations

from typing import Any

from ..support.errors import FFMergeError


def d_ff_field(config: Any, stack: str) -> str:
    """The field that says d_ff of a stack; FFMergeError if there is none."""
    names = (f"{stack}_ffn_dim", "ffn_dim", "n_inner", "intermediate_size", "d_ff")
    name = next((n for n in names if hasattr(config, n)), None)
    if name is None:
        raise FFMergeError(f"the config of {config.model_type!r} has none of {', '.join(names)}, so d_ff cannot change")
    return name
