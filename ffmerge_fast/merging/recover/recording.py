"""What recoveries start from: the merged groups, and what their layers' FFNs take and give in the original model."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.blocks import BlockPasses, Flow
from ...models.ffn_weights import check_activation
from ...models.projections import describe_own, own_capacity
from ...models.sublayers import FFNSublayer, find_ffns
from ...models.ties import is_merged, shared_groups
from ...support.errors import FFMergeError


@dataclass
class LayerData:
    """One FFN's inputs and outputs, token by token, and the size of the stream that its output is added to.

    Attributes:
        x, y: [tokens, d_model], of this process; x may be what goes into the norm before the FFN.
        moments: of the block's output, float64 [3, d_model]: count, Σ out, Σ out²; of this process's tokens, until
            `sum_over_ranks`.
    """

    x: Tensor
    y: Tensor
    moments: Tensor

    @property
    def variance(self) -> Tensor:
        """Mean variance of the stream after the block, over the features; float64 scalar."""
        count, total, squares = self.moments
        return (squares / count - (total / count).square()).clamp(min=0).mean()


@dataclass
class _Parts:
    """The batches' pieces of one LayerData."""

    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    moments: Tensor | float = 0.0

    def add(self, x: Tensor, flow: Flow, mask: Tensor) -> None:
        x, y, out = (t.reshape(len(mask), -1)[mask] for t in (x, flow.y, flow.out))
        self.x.append(x)
        self.y.append(y)
        out = out.double()
        self.moments += torch.stack([torch.ones_like(out).sum(0), out.sum(0), out.square().sum(0)])


def record(
    model: nn.Module,
    ffns: Sequence[FFNSublayer],
    batches: Iterable[Any],
    max_tokens: int,
    name: str,
    norms: Mapping[str, str] | None = None,
) -> dict[str, LayerData]:
    """What goes through each FFN in one forward pass over the first `max_tokens` tokens, by the FFNs' keys.

    Memory: 2 · tokens · d_model numbers of the model's dtype per FFN. `max_tokens` and x, y are this process's own.

    Args:
        norms: {FFN key: path of the norm whose inputs take the place of the FFN's}.
    """
    parts, into_norms = {ffn.key: _Parts() for ffn in ffns}, {}

    def receive(ffn: FFNSublayer, flow: Flow, mask: Tensor) -> None:
        parts[ffn.key].add(into_norms.pop(ffn.key, flow.x), flow, mask)

    with BlockPasses(model, ffns, max_tokens, receive) as passes:
        for key, path in (norms or {}).items():
            passes.on_input(path, partial(into_norms.__setitem__, key))
        for _ in passes.over(batches, name):
            pass
    data = {}
    for ffn in ffns:
        part, empty = parts[ffn.key], model.get_submodule(ffn.up_path).weight.new_empty(0, ffn.d_model)
        moments = part.moments if part.x else empty.new_zeros(3, ffn.d_model, dtype=torch.float64)
        data[ffn.key] = LayerData(torch.cat([empty, *part.x]), torch.cat([empty, *part.y]), moments)
    return data


def stream_weights(variances: Tensor) -> Tensor:
    """Weights of layers' squared errors: 1 / variance, 1 on average; a layer without variance counts as with little.

    Args:
        variances: [layers].
    """
    w = 1 / variances.clamp(min=1e-6 * variances.max()).clamp(min=torch.finfo(torch.float32).tiny)
    return w / w.mean()


def groups_to_recover(
    model: nn.Module, teacher: nn.Module, name: str, may_have: Collection[str] = ()
) -> list[list[FFNSublayer]]:
    """The layers of each merged group of `model`, which `teacher`, the original, must fit.

    Args:
        may_have: what layers may have beside the shared FFN already, by its name in `own_capacity`.

    Raises:
        FFMergeError: nothing is merged; its layers have something else of their own; the teacher is merged or of
            another layout; an activation is not known.
    """
    ffns, originals = find_ffns(model), find_ffns(teacher)
    found = shared_groups(model)
    if not found:
        raise FFMergeError(f"{name}: this model has no merged FFNs; merge first, then {name}")
    own = own_capacity(model)
    if not own.keys() <= set(may_have):
        raise FFMergeError(
            f"{name}: this model's layers have {describe_own(own)} already; start from the merged model without them"
        )
    if is_merged(teacher):
        raise FFMergeError(
            f"{name}: the teacher's FFNs are merged too; give the original model (a copy made before merge_)"
        )
    of_model, of_teacher = ([(f.key, f.path, *f.signature) for f in x] for x in (ffns, originals))
    if of_model != of_teacher:
        differ = next(((a, b) for a, b in itertools.zip_longest(of_model, of_teacher) if a != b))
        mine, other = (" ".join(map(str, x)) if x else "nothing" for x in differ)
        raise FFMergeError(f"{name}: the teacher is another model: its FFN is {other}, where this one's is {mine}")
    groups = [ffns.of(stack, layers) for stack, layers in found]
    for members in groups:
        check_activation(members[0])
    return groups
