"""Groups of layers as users write them: "12-16", "0-2,6-8", "1+4+7", "encoder:2-4,decoder:2-4"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..models.sublayers import FFNs, FFNSublayer
from ..support.errors import FFMergeError

Group = tuple[str, tuple[int, ...]]  # (stack, layer indices in rising order)
_SYNTAX = (
    "write '4-7' (layers 4 to 7, counted from 0), '0-2,6-8' (two groups), '1+4+7' (one group), "
    "'encoder:2-4,decoder:2-4' (one stack each)"
)
_TERM = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def parse_layers(layers: str | Sequence | Mapping, ffns: FFNs) -> list[Group]:
    """Groups of layers to merge, checked against the model.

    Args:
        layers: text as above, a list of lists of indices, or {"encoder": [[2, 3, 4]], ...}. Without a stack's name a
            group is taken from every stack (encoder and decoder in step, as in paper A).
        ffns: the model's FFN sublayers.

    Raises:
        FFMergeError: bad syntax, unknown stack or layer, fewer than two layers in a group, overlapping groups, or FFNs
            that differ in shape, activation, gating or bias.
    """
    stacks = ffns.by_stack()
    groups: list[Group] = []
    for stack, indices in _terms(layers):
        groups += [(name, tuple(sorted(indices))) for name in ([stack] if stack else stacks)]
    check_groups(groups, ffns)
    return groups


def check_groups(groups: Sequence[Group], ffns: FFNs) -> None:
    """Raise FFMergeError unless every group has two equal FFNs or more of one stack, and no FFN is in two groups."""
    stacks = ffns.by_stack()
    if not groups:
        raise FFMergeError("layers: got no group, wanted at least one")
    for stack, indices in groups:
        if stack not in stacks:
            raise FFMergeError(f"layers: stack {stack!r} not in this model, which has {', '.join(stacks)}")
        _check_group(stack, indices, stacks[stack])
    _check_disjoint(groups)


def format_layers(groups: Sequence[Group], stacks: Sequence[str]) -> str:
    """The inverse of `parse_layers`: "encoder:2-4,decoder:2-4"; the name is left out for a single stack."""
    prefix = "" if len(stacks) == 1 else "{}:"
    return ",".join(prefix.format(stack) + format_indices(indices) for stack, indices in groups)


def format_indices(indices: Sequence[int]) -> str:
    """Layers of one group: "4-7", or "1+4+7"."""
    if len(indices) > 1 and list(indices) == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}-{indices[-1]}"
    return "+".join(map(str, indices))


def windows(ffns: FFNs, size: int) -> list[list[Group]]:
    """All windows of `size` adjacent layers: N - size + 1 of them, encoder and decoder in step.

    Raises:
        FFMergeError: a window of fewer than two layers, or one larger than a stack; FFNs of no window fit together.
    """
    stacks = ffns.by_stack()
    shortest = min(map(len, stacks.values()))
    if not 2 <= size <= shortest:
        raise FFMergeError(f"window: got {size}, wanted 2 to {shortest} (this model's stack has {shortest} FFNs)")
    found = []
    for start in range(shortest - size + 1):
        groups = [(stack, tuple(f.index for f in members[start : start + size])) for stack, members in stacks.items()]
        if all(len({f.signature for f in stacks[s][start : start + size]}) == 1 for s in stacks):
            found.append(groups)
    if not found:
        raise FFMergeError(f"window: no {size} adjacent FFNs of this model have equal shapes and activations")
    return found


def anchor_of(indices: Sequence[int], anchor: str) -> int:
    """The layer the others are aligned to: "first" (paper A's default), "middle" or "last" of the group."""
    positions = {"first": 0, "middle": len(indices) // 2, "last": -1}
    if anchor not in positions:
        raise FFMergeError(f"anchor: got {anchor!r}, wanted 'first', 'middle' or 'last'")
    return indices[positions[anchor]]


def _terms(layers: str | Sequence | Mapping) -> list[tuple[str, list[int]]]:
    if isinstance(layers, str):
        return [_parse_group(part) for part in layers.split(",")]
    if isinstance(layers, Mapping) and layers:
        return [(stack, list(group)) for stack, groups in layers.items() for group in _as_groups(groups)]
    return [("", list(group)) for group in _as_groups(layers)]


def _as_groups(groups: Sequence) -> list[Sequence[int]]:
    if _are_indices(groups):
        return [groups]
    if not isinstance(groups, Sequence) or not groups or not all(map(_are_indices, groups)):
        raise FFMergeError(f"layers: got {groups!r}; {_SYNTAX}, or lists of layer numbers")
    return list(groups)


def _are_indices(values: object) -> bool:
    return isinstance(values, Sequence) and len(values) > 0 and all(isinstance(i, int) for i in values)


def _parse_group(text: str) -> tuple[str, list[int]]:
    stack, _, body = text.strip().rpartition(":")
    indices: list[int] = []
    for term in body.split("+"):
        match = _TERM.fullmatch(term.strip())
        if not match:
            raise FFMergeError(f"layers: {text.strip()!r} is not a group of layers; {_SYNTAX}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise FFMergeError(f"layers: {term.strip()!r} runs backwards; write '{last}-{first}'")
        indices += range(first, last + 1)
    return stack.strip(), indices


def _check_group(stack: str, indices: Sequence[int], members: Sequence[FFNSublayer]) -> None:
    known = {f.index: f for f in members}
    unknown = [i for i in indices if i not in known]
    if unknown:
        raise FFMergeError(
            f"layers: {stack} layer {unknown[0]} does not exist; it has FFNs in {min(known)}-{max(known)}"
        )
    if len(set(indices)) < 2 or len(set(indices)) < len(indices):
        raise FFMergeError(f"layers: a group needs at least two different layers, got {list(indices)}")
    first = known[indices[0]]
    for i in indices[1:]:
        if known[i].signature != first.signature:
            names = ("stack", "d_model", "d_ff", "activation", "gated", "fused", "bias")
            differ = [
                f"{name} {a} and {b}"
                for name, a, b in zip(names, first.signature, known[i].signature, strict=True)
                if a != b
            ]
            raise FFMergeError(
                f"layers: FFNs {first.key} and {known[i].key} differ ({', '.join(differ)}); group equal FFNs"
            )


def _check_disjoint(groups: Sequence[Group]) -> None:
    seen: set[tuple[str, int]] = set()
    for stack, indices in groups:
        twice = seen.intersection((stack, i) for i in indices)
        if twice:
            raise FFMergeError(f"layers: {stack} layer {min(twice)[1]} is in two groups; groups must not overlap")
        seen.update((stack, i) for i in indices)
