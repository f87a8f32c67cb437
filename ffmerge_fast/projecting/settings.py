"""What projected compression is told: choices and widths with their help texts. Free of torch, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..support.settings import option

METHODS = ("activation", "magnitude", "wanda", "random")  # of importance
FEATURES = ("product", "up")  # of FFNs: what W_down takes, or what W_up gives
ATTENTION_MODES = ("heads", "head_dim")  # what gets fewer with d_model
SHARES = (None, "qkv", "residual_stream")  # projections in common
INITS = ("selection", "svd")  # what P begins with: coordinates, or directions
STATES = ("fp32", "8bit")  # moments of P and R
PLACES = ("host", "disk")  # where the base's weights wait for their turn
OFFLOADS = {"cpu": "host", "disk": "disk"}  # the words of `offload_base` for them


@dataclass(frozen=True)
class Widths:
    """How much smaller a model shall get: the share of its parameters, or the widths themselves."""

    keep: float | None = option(
        None, "share of the parameters to keep, such as 0.5; or the widths", more_than=0, at_most=1
    )
    d_model: int | None = option(None, "width of the residual stream", at_least=1)
    d_ff: int | Mapping[str, int] | None = option(
        None, "neurons of each FFN, or of each stack's: {stack: neurons}", at_least=1
    )
    attention: str = option("heads", "what gets fewer with d_model", choices=ATTENTION_MODES)
    untie_embeddings: bool | None = option(None, "give the head a table of its own")


@dataclass(frozen=True)
class Reconstructing:
    """How a student is reconstructed; see `Projector.reconstruct_`."""

    ridge: float = option(1e-2, "larger keeps fitted weights closer to the start's", at_least=0)
    local_steps: int | None = option(
        None, "steps of each block alone, after its matrices (default: 400 in post-norm models, else none)", at_least=0
    )
    local_lr: float | None = option(
        None, "of those (default: 0.03 / sqrt(d_model), 1e-3 at 900)", more_than=0, at_most=1000
    )
    seed: int = option(0, "of their order of the batches")
