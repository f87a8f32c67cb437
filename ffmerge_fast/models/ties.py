"""Which layers of a model hold one FFN, and how config.json says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from torch import nn

from .families import registered_specs
from .projections import weight_owner
from .sublayers import FFNSublayer, base_model_path, base_model_type, find_ffns, join

CONFIG_VERSION = 1


def shared_groups(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Which layers hold one FFN, what each has beside it aside: [("decoder", (4, 5, 6, 7)), ...]."""
    return groups_among(find_ffns(model), model)


def groups_among(ffns: Iterable[FFNSublayer], model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """`shared_groups` of a model whose FFNs are known."""
    holders: dict[tuple, list[FFNSublayer]] = {}
    for ffn in ffns:
        owners = (weight_owner(model.get_submodule(path)) for path in ffn.projections.values())
        holders.setdefault(tuple(map(id, owners)), []).append(ffn)
    return [(group[0].stack, tuple(f.index for f in group)) for group in holders.values() if len(group) > 1]


def is_merged(model: nn.Module) -> bool:
    """Whether any two layers of `model` hold one FFN."""
    return bool(shared_groups(model))


def config_section(
    model: nn.Module, groups: Sequence[Sequence[FFNSublayer]], own: Mapping[str, int] | None = None
) -> dict:
    """What config.json says of the groups, and of the layout of a family that is not in the table.

    Args:
        own: what layers have beside the shared FFN, as `own_capacity` gives it.
    """
    layout = [asdict(spec) for spec in registered_specs(base_model_type(model))]
    section = {"version": CONFIG_VERSION, "groups": _config_groups(model, groups, own or {})}
    return section | ({"layout": layout} if layout else {})


def _config_groups(model: nn.Module, groups: Sequence[Sequence[FFNSublayer]], own: Mapping[str, int]) -> list[dict]:
    """Layers, and module paths relative to the base model."""
    base = base_model_path(model)
    prefix = f"{base}." if base else ""

    def patterns(ffn: FFNSublayer, paths: Iterable[str]) -> list[str]:
        parent = ffn.path.rpartition(".")[0].removeprefix(prefix)
        return [join(parent, "{i}", path.removeprefix(ffn.path + ".")) for path in paths]

    entries = []
    for members in groups:
        first = members[0]
        entry = {"layers": [f.index for f in members], "modules": patterns(first, first.shared)}
        if own:
            entry |= {**own, "projections": patterns(first, first.projections.values())}
        if "private_neurons" in own:
            entry["fused"] = first.fused
        entries.append(entry)
    return entries
