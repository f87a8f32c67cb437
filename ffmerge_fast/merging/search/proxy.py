"""Score windows without evaluating the model: how far each shared FFN is from its layers' own outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ...calibration.blocks import at_least_float32
from ...models.ffn_weights import check_activation, ffn_weights
from ...models.sublayers import FFNs
from ...ops.shared_ffn.op import apply_ffn
from ...support.distributed import on_all_ranks, share_of_rank, sum_over_ranks
from ...support.errors import FFMergeError
from ...support.progress import progress
from ..groups import Group
from ..recover.recording import LayerData, record


def proxy_scores(
    model: nn.Module,
    ffns: FFNs,
    windows: Mapping[str, Sequence[Group]],
    merged_at: Callable[[Sequence[Group]], AbstractContextManager],
    batches: Iterable[Any],
    max_tokens: int,
) -> dict[str, float]:
    """Each window's summed output errors: Σ_i mean (FFN_shared(x_i) − y_i)² / variance of the stream after block i.

    x_i and y_i are layer i's own input and output in the original model, from one forward pass. In a distributed job
    each rank records its share of the tokens, scores all windows on it, and all get the same sums.

    Args:
        ffns: of the model.
        merged_at: the model with a window's groups merged, inside of a context.
    """
    with on_all_ranks("search"):
        for ffn in ffns:
            check_activation(ffn)
        data = record(model, ffns, batches, share_of_rank(max_tokens), "search")
        keys = [ffn.key for ffn in ffns]
        errors = torch.zeros(len(windows), len(keys), dtype=torch.float64)
        for row, groups in enumerate(progress(windows.values(), len(windows), "search by proxy", "window")):
            with merged_at(groups):
                for key, error in _errors(model, groups, ffns, data).items():
                    errors[row, keys.index(key)] = error
    moments = [data[key].moments for key in keys]
    errors = errors.to(moments[0].device)
    sum_over_ranks([errors, *moments])
    if any(m[0, 0] < 2 for m in moments):
        raise FFMergeError("search: a stack saw fewer than 2 tokens; give more data in batches=")
    numbers = [m[0].sum() for m in moments]  # tokens · d_model
    scale = torch.stack([(data[k].variance * n).to(errors.device) for k, n in zip(keys, numbers, strict=True)])
    values = (errors / scale.clamp(min=torch.finfo(torch.float32).tiny)).sum(1)
    return dict(zip(windows, values.tolist(), strict=True))


@torch.no_grad()
def _errors(model: nn.Module, groups: Sequence[Group], ffns: FFNs, data: Mapping[str, LayerData]) -> dict[str, float]:
    """Sum of squares of what each merged layer's output is off by, over tokens and features."""
    found = {}
    for group in groups:
        members = ffns.of(*group)
        weights = ffn_weights(model, members[0])
        xs = [data[f.key].x.to(weights.up) for f in members]
        ys = apply_ffn(xs, weights, members[0].activation)
        for ffn, y in zip(members, ys, strict=True):
            off = at_least_float32(y) - at_least_float32(data[ffn.key].y)
            found[ffn.key] = off.square().sum(dtype=torch.float64).item()
    return found
