"""Sums of a model's activations over tokens, along the dimensions that can be left out; filled by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..models.projections import is_conv1d
from ..models.sublayers import FFNSublayer, find_ffns
from ..support.errors import FFMergeError
from .axes import ATTENTION, ModelAxes


@contextlib.contextmanager
def sums_over_tokens(model: nn.Module, layout: ModelAxes, features: str, squared: bool) -> Iterator[BatchSums]:
    """Hooks on the norms, FFNs and attentions of a model, which are removed in the end.

    Args:
        features: of FFNs: "product", what W_down takes; "up", the output of W_up.
        squared: sum squares, not absolute values.
    """
    sums, ffns = BatchSums(squared), find_ffns(model)
    try:
        _watch_ffns(sums, model, ffns, layout, features)
        for ffn in ffns:
            for norm in _norms(model.get_submodule(ffn.path)):
                sums.watch_output(norm, "d_model", ffn.stack, layout.d_model)
        _watch_attentions(sums, model, layout, {ffn.path: ffn.stack for ffn in ffns})
        yield sums
    finally:
        sums.remove()


class BatchSums:
    """Sums over the tokens of one batch: `start`, a forward pass, `finish`."""

    def __init__(self, squared: bool):
        self._squared = squared
        self._masks: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._hooks = contextlib.ExitStack()

    def watch_output(self, module: nn.Module, name: str, stack: str, width: int) -> None:
        """Add a module's outputs to the sums of `name`; of a fused gate and up, the up half."""
        hook = module.register_forward_hook(lambda module, args, out: self._take(name, stack, out[..., -width:]))
        self._hooks.callback(hook.remove)

    def watch_input(self, module: nn.Module, name: str, stack: str) -> None:
        """Add what a module is given to the sums of `name`."""
        hook = module.register_forward_pre_hook(lambda module, args: self._take(name, stack, args[0]))
        self._hooks.callback(hook.remove)

    def remove(self) -> None:
        """Take all hooks off."""
        self._hooks.close()

    def start(self, masks: dict[str, Tensor]) -> None:
        """Forget the batch before; masks {stack: which tokens count}."""
        self._masks, self._sums, self._tokens = masks, {}, {}

    def finish(self, number: int) -> tuple[int, dict[str, Tensor]]:
        """Tokens counted, and {name: sums [width], float64 on the CPU}.

        Raises:
            FFMergeError: a sum is not finite; names the batch by its number.
        """
        sums = {name: total.cpu() for name, total in self._sums.items()}
        for name, total in sums.items():
            if not total.isfinite().all():
                raise FFMergeError(f"importance: batch {number} gives activations of {name} that are not finite")
        return sum(self._tokens.values()), sums

    def _take(self, name: str, stack: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        mask = self._masks.get(stack)
        if mask is not None:
            if mask.numel() != len(x):
                raise FFMergeError(
                    f"the {stack}'s attention_mask has shape {list(mask.shape)}, but its layers saw {len(x)} tokens; "
                    "wanted one value per token"
                )
            x = x[mask.reshape(-1).bool().to(x.device)]
        self._tokens.setdefault(stack, len(x))
        added = (x.float().square() if self._squared else x.abs()).sum(0, dtype=torch.float64)
        self._sums[name] = self._sums[name] + added if name in self._sums else added


def _watch_ffns(
    sums: BatchSums, model: nn.Module, ffns: Sequence[FFNSublayer], layout: ModelAxes, features: str
) -> None:
    for ffn in ffns:
        if ffn.key in layout.d_ff and features == "product":
            sums.watch_input(model.get_submodule(ffn.down_path), f"d_ff/{ffn.key}", ffn.stack)
        elif ffn.key in layout.d_ff:
            sums.watch_output(model.get_submodule(ffn.up_path), f"d_ff/{ffn.key}", ffn.stack, ffn.d_ff)


def _norms(layer: nn.Module) -> Iterator[nn.Module]:
    """The norms of a layer's residual stream (those of queries and keys are of heads)."""
    for name, module in layer.named_modules():
        if "norm" in type(module).__name__.lower() and not name.endswith(("q_norm", "k_norm")):
            yield module


def _watch_attentions(sums: BatchSums, model: nn.Module, layout: ModelAxes, stack_of: dict[str, str]) -> None:
    """What the output projections of attentions are given; stack_of {path of a layer: its stack}."""
    for name, axes in layout.axes.items():
        axis = next((a for a in axes if a is not None and a.role == ATTENTION), None)
        path = name.removesuffix(".weight")
        module = model.get_submodule(path) if path != name else None
        if axis is not None and module is not None and axes[0 if is_conv1d(module) else 1] is axis:
            stack = next(s for p, s in stack_of.items() if path.startswith(f"{p}."))
            sums.watch_input(module, f"attention/{axis.key}", stack)
