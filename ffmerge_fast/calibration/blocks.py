"""What flows through the FFNs and blocks of a model, and where the residual stream is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.sublayers import FFNSublayer
from ..support.errors import FFMergeError
from .passes import FFNPasses


@dataclass
class Flow:
    """What went through one FFN and its block in one batch; each [..., features]."""

    x: Tensor | None = None  # into W_up
    h: Tensor | None = None  # into W_down
    y: Tensor | None = None  # out of W_down
    out: Tensor | None = None  # out of the block

    def stream(self, pre_norm: bool) -> Tensor:
        """The residual stream that y is added to, in y's shape: OPT flattens its tokens before the FFN."""
        if not pre_norm:
            return at_least_float32(self.x)
        return at_least_float32(self.out).reshape(self.y.shape) - at_least_float32(self.y)


class BlockPasses(FFNPasses):
    """Passes that call `receive(ffn, flow, mask)` as each FFN's block ends. Layers may share their FFN.

    Args:
        model, ffns, max_tokens: as of `FFNPasses`.
        receive: gets the layer, its Flow and which tokens count, bool [tokens].
        change: of (x, y): replaces the FFNs' outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        ffns: Sequence[FFNSublayer],
        max_tokens: int,
        receive: Callable[[FFNSublayer, Flow, Tensor], Any],
        change: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__(model, ffns, max_tokens)
        self._ffns, self._receive, self._change, self._flow = ffns, receive, change, Flow()

    def __enter__(self):
        super().__enter__()
        hooked: set[int] = set()
        for ffn in self._ffns:
            self.on_input(ffn.path, self._begin)
            self.on_output(ffn.path, partial(self._end, ffn))
            down = id(self.model.get_submodule(ffn.down_path))
            if down not in hooked:
                hooked.add(down)
                self.on_input(ffn.up_path, partial(self._keep, "x"))
                self.on_input(ffn.down_path, partial(self._keep, "h"))
                self.on_output(ffn.down_path, self._output)
        return self

    def _begin(self, _: Any) -> None:
        self._flow = Flow()

    def _keep(self, name: str, value: Tensor) -> None:
        setattr(self._flow, name, value)

    def _output(self, y: Tensor) -> Tensor | None:
        self._flow.y = y
        return self._change(self._flow.x, y) if self._change else None

    def _end(self, ffn: FFNSublayer, output: Any) -> None:
        flow = self._flow
        flow.out = output[0] if isinstance(output, (tuple, list)) else output
        mask = self.mask(ffn.stack, flow.y.shape[:-1].numel(), flow.y.device)
        self._receive(ffn, flow, mask)
        self.saw(ffn)


def is_pre_norm(model: nn.Module, ffn: FFNSublayer, batch: Any) -> bool:
    """Whether a block adds its FFN's output to the stream and is done (pre-norm), or normalises the sum (post-norm).

    The block itself is asked: pre-norm, twice the output moves the block's output by once the output; post-norm, an
    FFN that returns minus its input leaves nothing of any token.

    Raises:
        FFMergeError: neither (a norm after the FFN but inside the residual branch, a scaled branch).
    """
    plain, y = _block_output(model, ffn, batch, lambda x, y: y)
    slack = 8 * torch.finfo(y.dtype).eps * plain.norm()
    doubled, _ = _block_output(model, ffn, batch, lambda x, y: 2 * y)
    if (doubled - plain - y).norm() <= 1e-3 * y.norm() + slack:
        return True
    emptied, _ = _block_output(model, ffn, batch, lambda x, y: -x)
    if (emptied - emptied[:1]).norm() <= 1e-3 * plain.norm() + slack:
        return False
    raise FFMergeError(
        f"the block {ffn.path} ({type(model.get_submodule(ffn.path)).__name__}) neither adds its FFN's output to the "
        "residual stream nor normalises their sum, so the merged stream has no target; use rounds=0, inputs='original'"
    )


def _block_output(model: nn.Module, ffn: FFNSublayer, batch: Any, change: Callable) -> tuple[Tensor, Tensor]:
    """(block output, FFN output) of the counted tokens, [tokens, d_model] each, with the FFN's output changed."""
    found = []

    def receive(_: FFNSublayer, flow: Flow, mask: Tensor) -> None:
        found.extend(t.reshape(len(mask), -1)[mask] for t in (flow.out, flow.y))

    with BlockPasses(model, [ffn], 1 << 62, receive, change) as passes:
        passes.take(batch, 0)
    return at_least_float32(found[0]), found[1]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
