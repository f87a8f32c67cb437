"""Apply a plan: permute, average and tie the FFNs of each group; and undo, inspect and count ties."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.elsewhere import copied, elsewhere, needs_weights, reader_of
from ..models.projections import describe_own, out_dim, own_capacity, own_parameters_of
from ..models.streamed import refuse_streamed
from ..models.sublayers import FFNs, FFNSublayer, find_ffns, set_module
from ..models.summary import ModelSummary
from ..models.ties import config_section, groups_among
from ..support.distributed import is_sharded
from ..support.errors import FFMergeError
from ..support.sizes import format_bytes
from ..support.tensors import not_inference
from .plain import make_plain_, widths_of_plain
from .plan import MergeGroup, MergePlan


@not_inference
def merge_(model: nn.Module, plan: MergePlan) -> nn.Module:
    """Merge the FFNs of `model` in place: k modules of each group become one shared module (paper A, eqs. 3 to 6).

    W_up, W_gate and their biases are averaged over permuted rows, W_down over permuted columns, b_down as it is; in
    float32, rounded once. A transformers model becomes an instance of `FFMerged<its class>` (a subclass), so that its
    own `save_pretrained`, and any trainer's, writes each shared weight once and the result loads. (With a warning, a
    model of a class from elsewhere is merged in memory only.)

    Raises:
        FFMergeError: the plan is of another model, or the model is merged already. Nothing is changed then.
    """
    refuse_streamed(model, "merge_")
    return _merge_checked_(model, plan, _checked(model, plan))


@not_inference
def merge(model: nn.Module, plan: MergePlan) -> nn.Module:
    """`merge_` on a copy; `model` stays as it is."""
    refuse_streamed(model, "merge")
    ffns = _checked(model, plan)
    return _merge_checked_(copy.deepcopy(model), plan, ffns)


@contextlib.contextmanager
def merged(model: nn.Module, plan: MergePlan, checked: ModelSummary) -> Iterator[nn.Module]:
    """The merged model inside; exactly the original modules again afterwards, also after an error.

    Args:
        checked: `summary_of_unmerged(model)`, which is made once for many plans.
    """
    ffns = _fitting(model, plan, checked)
    originals = {path: model.get_submodule(path) for ffn in ffns for path in ffn.shared}
    try:
        for group in plan.groups:
            members = ffns.of(group.stack, group.layers)
            _share(model, members, _merged_modules(model, members, group))
        yield model
    finally:
        for path, module in originals.items():
            set_module(model, path, module)


@not_inference
def expand_(model: nn.Module) -> nn.Module:
    """Undo the tie in place: every layer gets its own copy of its FFN, for tools that cannot share.

    The model computes the same and has its original size and stock class again. Low-rank deltas become part of the
    weights, rounded once. Neurons that layers have of their own become neurons as the others: all layers of their
    stack get wider by as many, those that were not merged by neurons of zeros, and the config says so.
    """
    refuse_streamed(model, "expand_")
    ffns = find_ffns(model)
    if own_capacity(model):
        needs_weights(model, "expand_")
    groups = [ffns.of(stack, layers) for stack, layers in groups_among(ffns, model)]
    widths = widths_of_plain(model, groups)
    if getattr(getattr(model, "config", None), "ffmerge", None):
        from ..remote_code import modeling_ffmerge

        modeling_ffmerge.release_(model)
    if own_capacity(model):
        make_plain_(model, ffns, groups)
        for field, width in widths.items():
            setattr(model.config, field, width)
        return model
    for path in (path for members in groups for ffn in members[1:] for path in ffn.shared):
        set_module(model, path, copied(model, model.get_submodule(path)))
    return model


def print_parameters(model: nn.Module) -> None:
    """Print how many parameters and bytes the model has, and would have with every FFN on its own."""
    seen = {id(p): p for p in model.parameters()}.values()
    stored, nbytes = sum(p.numel() for p in seen), sum(p.numel() * p.element_size() for p in seen)
    ffns = find_ffns(model)
    groups = groups_among(ffns, model)
    removed = [ffn for stack, layers in groups for ffn in ffns.of(stack, layers[1:])]
    own = own_parameters_of(model)
    extra, extra_bytes = sum(p.numel() for p in own), sum(p.nbytes for p in own)
    full = stored - extra + sum(f.parameters for f in removed)
    text = ", ".join(f"{stack} {'+'.join(map(str, layers))}" for stack, layers in groups) or "none"
    print(
        f"parameters {stored:,} of {full:,} ({stored / full - 1:+.1%}), {format_bytes(nbytes)} of "
        f"{format_bytes(nbytes - extra_bytes + sum(f.nbytes for f in removed))}; shared FFNs: {text}"
        + (f", with {describe_own(own_capacity(model))}: {extra:,}" if own else "")
    )


# ------------------------------------------------------------------------------------------------------------ private


def check_unmerged(model: nn.Module, ffns: FFNs) -> None:
    """Raise FFMergeError if layers of `model` hold one FFN."""
    if groups_among(ffns, model):
        raise FFMergeError(
            "merge: this model's FFNs are merged already; start from the original, or call expand_ first"
        )


def summary_of_unmerged(model: nn.Module) -> ModelSummary:
    """What plans and `merged` need to know of a model; FFMergeError if its FFNs are merged already."""
    ffns = find_ffns(model)
    check_unmerged(model, ffns)
    return ModelSummary.of(model, ffns)


def _checked(model: nn.Module, plan: MergePlan) -> FFNs:
    return _fitting(model, plan, summary_of_unmerged(model))


def _fitting(model: nn.Module, plan: MergePlan, found: ModelSummary) -> FFNs:
    plan.model.check(found, "plan")
    plan.check(found.ffns)
    for group in plan.groups:
        _check_parameters(model, found.ffns.of(group.stack, group.layers))
    return found.ffns


def _merge_checked_(model: nn.Module, plan: MergePlan, ffns: FFNs) -> nn.Module:
    merged = [_merged_modules(model, ffns.of(group.stack, group.layers), group) for group in plan.groups]
    for group, modules in zip(plan.groups, merged, strict=True):
        _share(model, ffns.of(group.stack, group.layers), modules)
    _record(model, ffns, plan.groups)
    return model


def _check_parameters(model: nn.Module, members: Sequence[FFNSublayer]) -> None:
    if any(is_sharded(parameter) for path in members[0].shared for _, parameter in _named(model, path)):
        raise FFMergeError(
            "merge: FSDP2 has sharded this model, whose blocks hold their own parts of each FFN; merge before "
            "fully_shard, or write the plan and merge its folder (ffmerge merge --plan)"
        )

    def layout(ffn: FFNSublayer) -> list:
        return [(name, p.shape, p.dtype, p.device) for path in ffn.shared for name, p in _named(model, path)]

    for ffn in members[1:]:
        if layout(ffn) != layout(members[0]):
            raise FFMergeError(
                f"merge: FFNs {members[0].key} and {ffn.key} differ in parameters, dtype or device; group equal FFNs"
            )


def _named(model: nn.Module, path: str):
    return model.get_submodule(path).named_parameters()


@torch.no_grad()
def _merged_modules(model: nn.Module, members: Sequence[FFNSublayer], group: MergeGroup) -> list[nn.Module]:
    """New modules for `members[0].shared`, holding the average of all members' permuted parameters.

    Of a model whose weights are elsewhere the new ones are, too: averaged when they are read.
    """
    parts: dict[int, list[_Part]] = {}  # by identity of the first member's parameters
    for ffn in members:
        for parameter, mine in _paired(model, members[0], ffn):
            dim = _neuron_dim(model, ffn, parameter)
            parts.setdefault(id(mine), []).append(_Part(parameter, dim, group.permutations[ffn.index], ffn.fused))
    read, places, modules = reader_of(model), elsewhere(model), []
    for path in members[0].shared:
        original = model.get_submodule(path)
        module = copied(model, original)
        for new, old in zip(module.parameters(), original.parameters(), strict=True):
            if new.is_meta and places is not None:
                places.put(new, partial(_average, parts[id(old)], read))
            else:
                new.data = _average(parts[id(old)], read).to(new.device)
            new.grad = None  # deepcopy brings the first layer's along
        modules.append(module)
    return modules


class _Part(NamedTuple):
    """One member's share of an average."""

    parameter: Tensor
    dim: int | None  # that runs over the neurons
    permutation: Tensor
    fused: bool


@torch.no_grad()
def _average(parts: Sequence[_Part], read: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of the permuted parameters, in float32 at least and rounded once."""
    mean, dtype = None, parts[0].parameter.dtype
    for count, part in enumerate(parts, start=1):
        permuted = _permute(read(part.parameter), part.dim, part.permutation, part.fused)
        permuted = permuted.to(torch.promote_types(dtype, torch.float32))
        # a running mean, so that equal layers average to exactly themselves
        mean = permuted.clone() if mean is None else mean.lerp_(permuted, 1 / count)
    return mean.to(dtype)


def _paired(model: nn.Module, first: FFNSublayer, ffn: FFNSublayer) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter of `ffn`, the same parameter of `first`)."""
    for path, first_path in zip(ffn.shared, first.shared, strict=True):
        yield from zip(
            model.get_submodule(path).parameters(), model.get_submodule(first_path).parameters(), strict=True
        )


def _neuron_dim(model: nn.Module, ffn: FFNSublayer, parameter: Tensor) -> int | None:
    """The axis of a parameter that runs over the hidden neurons; None for what lives in d_model (b_down)."""
    for path in filter(None, (ffn.gate_path, ffn.up_path)):
        module = model.get_submodule(path)
        if parameter is module.weight:
            return out_dim(module)
        if parameter is module.bias:
            return 0
    down = model.get_submodule(ffn.down_path)
    if parameter is down.weight:
        return 1 - out_dim(down)
    if parameter is down.bias:
        return None
    raise FFMergeError(
        f"merge: the FFN {ffn.key} has a parameter of shape {list(parameter.shape)} besides its projections; register "
        "the family without module=, so that only the projections are shared"
    )


def _permute(parameter: Tensor, dim: int | None, permutation: Tensor, fused: bool) -> Tensor:
    """The parameter with its neurons in the anchor's order; in a fused gate and up, both halves alike."""
    if dim is None:
        return parameter
    permutation = permutation.to(parameter.device)
    if fused and parameter.shape[dim] == 2 * len(permutation):
        permutation = torch.cat([permutation, permutation + len(permutation)])
    return parameter.index_select(dim, permutation)


def _share(model: nn.Module, members: Sequence[FFNSublayer], modules: Sequence[nn.Module]) -> None:
    for ffn in members:
        for path, module in zip(ffn.shared, modules, strict=True):
            set_module(model, path, module)


def _record(model: nn.Module, ffns: FFNs, groups: Sequence[MergeGroup]) -> None:
    """Make a transformers model an instance of its FFMerged class, whose config lists the groups."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return
    from ..remote_code import modeling_ffmerge

    if not modeling_ffmerge.can_adopt(model):
        warnings.warn(
            f"merged in memory only: {type(model).__name__} is not a class of transformers itself, so its code cannot "
            "travel in a checkpoint; before saving, call expand_ or keep its state dict",
            stacklevel=4,
        )
        return
    members = [ffns.of(group.stack, group.layers) for group in groups]
    modeling_ffmerge.adopt_(model, config_section(model, members))
