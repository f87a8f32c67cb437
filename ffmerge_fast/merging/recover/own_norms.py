"""The norm that gives one layer's FFN its input, where nothing else takes it: the layer's own, merged or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...calibration.blocks import is_pre_norm
from ...calibration.passes import Passes
from ...models.sublayers import FFNSublayer, join
from ...support.errors import FFMergeError
from ...support.tensors import same_values


def own_norms(model: nn.Module, ffns: Sequence[FFNSublayer], batch: Any) -> dict[str, str]:
    """{FFN key: path of its norm}, of the layers that have such a norm, by one batch through the unmerged model.

    In post-norm blocks that norm is the stream's, and in parallel ones the attention's too: they have none.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with Passes(model, {f.stack for f in ffns}) as passes:
        for path, module in (leaf for ffn in ffns for leaf in _leaves(model, ffn)):
            passes.on_input(path, partial(inputs.__setitem__, path))
            if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters()):
                passes.on_output(path, partial(outputs.__setitem__, path))
        passes.take(batch, 0)
    found = {ffn.key: _only_reader(model, ffn, inputs, outputs) for ffn in ffns}
    return {f.key: found[f.key] for f in ffns if found[f.key] is not None and _outside_of_stream(model, f, batch)}


def _leaves(model: nn.Module, ffn: FFNSublayer) -> Iterator[tuple[str, nn.Module]]:
    """The modules without children of an FFN's block, by path."""
    for name, module in model.get_submodule(ffn.path).named_modules():
        if not any(True for _ in module.children()):
            yield join(ffn.path, name), module


def _only_reader(
    model: nn.Module, ffn: FFNSublayer, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> str | None:
    """The norm whose output is the input of this FFN, and of no other leaf of its block."""
    x = inputs.get(ffn.up_path)
    if x is None:  # it did not run
        return None
    paths = [path for path, _ in _leaves(model, ffn)]
    norm = next((path for path in paths if path in outputs and same_values(outputs[path], x)), None)
    readers = {path for path in paths if isinstance(inputs.get(path), Tensor) and same_values(inputs[path], x)}
    return norm if readers <= {ffn.up_path, ffn.gate_path} else None


def _outside_of_stream(model: nn.Module, ffn: FFNSublayer, batch: Any) -> bool:
    try:
        return is_pre_norm(model, ffn, batch)
    except FFMergeError:  # of neither kind: the stream may be anywhere
        return False
