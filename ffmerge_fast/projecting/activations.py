"""Sums of a model's activations over tokens, along the dimensions that can be left out; filled by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.passes import Passes
from ..models.projections import is_conv1d
from ..models.sublayers import join
from ..support.errors import FFMergeError
from .axes import ATTENTION, ModelAxes


class ActivationPasses(Passes):
    """Passes with hooks on the norms, FFNs and attentions of a model, which sum what they see in each batch.

    Args:
        features: of FFNs: "product", what W_down takes; "up", the output of W_up.
        squared: sum squares, not absolute values.
    """

    def __init__(self, model: nn.Module, layout: ModelAxes, features: str, squared: bool):
        super().__init__(model, layout.stacks())
        self._layout, self._features, self._squared = layout, features, squared
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def __enter__(self):
        super().__enter__()
        self._watch_ffns()
        for ffn in self._layout.ffns:
            for path in _norms(self.model, ffn.path):
                self._watch_output(path, "d_model", ffn.stack, self._layout.d_model)
        self._watch_attentions()
        return self

    def take(self, batch: Any, number: int) -> int:
        """Run one batch; `sums` are of this one then."""
        self._sums, self._tokens = {}, {}
        return super().take(batch, number)

    def sums(self, number: int) -> tuple[int, dict[str, Tensor]]:
        """Tokens counted in the last batch, and {name: sums [width], float64 on the CPU}.

        Raises:
            FFMergeError: a sum is not finite; names the batch by its number.
        """
        sums = {name: total.cpu() for name, total in self._sums.items()}
        for name, total in sums.items():
            if not total.isfinite().all():
                raise FFMergeError(f"importance: batch {number} gives activations of {name} that are not finite")
        return sum(self._tokens.values()), sums

    def _watch_ffns(self) -> None:
        for ffn in self._layout.ffns:
            if ffn.key in self._layout.d_ff and self._features == "product":
                self._watch_input(ffn.down_path, f"d_ff/{ffn.key}", ffn.stack)
            elif ffn.key in self._layout.d_ff:
                self._watch_output(ffn.up_path, f"d_ff/{ffn.key}", ffn.stack, ffn.d_ff)

    def _watch_attentions(self) -> None:
        """What the output projections of attentions are given."""
        for name, axes in self._layout.axes.items():
            axis = next((a for a in axes if a is not None and a.role == ATTENTION), None)
            path = name.removesuffix(".weight")
            module = self.model.get_submodule(path) if path != name else None
            if axis is not None and module is not None and axes[0 if is_conv1d(module) else 1] is axis:
                stack = next(f.stack for f in self._layout.ffns if path.startswith(f"{f.path}."))
                self._watch_input(path, f"attention/{axis.key}", stack)

    def _watch_output(self, path: str, name: str, stack: str, width: int) -> None:
        """Add a module's outputs to the sums of `name`; of a fused gate and up, the up half."""
        self.on_output(path, lambda out: self._add(name, stack, out[..., -width:]))

    def _watch_input(self, path: str, name: str, stack: str) -> None:
        """Add what a module is given to the sums of `name`."""
        self.on_input(path, partial(self._add, name, stack))

    def _add(self, name: str, stack: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        valid = self.valid(stack, len(x))
        x = x if valid is None else x[valid.to(x.device)]
        self._tokens.setdefault(stack, len(x))
        added = (x.float().square() if self._squared else x.abs()).sum(0, dtype=torch.float64)
        self._sums[name] = self._sums[name] + added if name in self._sums else added


def _norms(model: nn.Module, layer: str) -> Iterator[str]:
    """Paths of the norms of a layer's residual stream (those of queries and keys are of heads)."""
    for name, module in model.get_submodule(layer).named_modules():
        if "norm" in type(module).__name__.lower() and not name.endswith(("q_norm", "k_norm")):
            yield join(layer, name)
