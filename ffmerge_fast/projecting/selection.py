"""How small the student is, and which of the base model's dimensions it starts from."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.projections import matrix
from ..support.errors import FFMergeError
from .axes import ATTENTION, FFN, MODEL, QUERY_KEY, Axis, ModelAxes, resized
from .importance import Importance
from .settings import ATTENTION_MODES, Widths


@dataclass(frozen=True)
class Sizes:
    """Widths of a student: d_model, {stack: d_ff}, how attention that follows d_model gets narrower, and whether the
    head gets a table of its own."""

    d_model: int
    d_ff: dict[str, int]
    attention: str
    untie: bool

    def heads(self, layout: ModelAxes) -> int | None:
        """The config's number of heads, where it changes."""
        if layout.heads is None or self.attention == "head_dim":
            return None
        return self.d_model // layout.head_dim

    def config(self, model: nn.Module, layout: ModelAxes) -> Any:
        """The small model's config."""
        config = resized(model, self.d_model, self.d_ff, self.heads(layout))
        if self.untie:
            config.tie_word_embeddings = False
        return config

    def fault(self, model: nn.Module, layout: ModelAxes) -> str:
        """Why the model's class cannot have these sizes, "" if it can: its config is written and read, and a model
        without values built from it."""
        try:
            config = self.config(model, layout)
            config = type(config).from_dict(json.loads(config.to_json_string()))
            with torch.device("meta"):
                built = dict(type(model)(config).named_parameters(remove_duplicate=False))
        except Exception as error:  # each class has its own words for sizes that it cannot have
            return " ".join(str(error).split("\n")[-1].split())
        for name, parameter in model.named_parameters(remove_duplicate=False):
            wanted = layout.shape(name, parameter.shape, self.d_model, self.d_ff)
            if name in built and built[name].shape != wanted:
                return f"{name} would be {list(built[name].shape)}, not {list(wanted)}"
        return ""


def resolve_sizes(model: nn.Module, layout: ModelAxes, wanted: Widths) -> Sizes:
    """The student's widths, from the share of parameters to keep or from the widths themselves.

    Raises:
        FFMergeError: neither or both are given, a width beyond the base's or that the architecture cannot have; a head
            that cannot be untied.
    """
    untied, attention, d_model = _untied_names(model, layout, wanted), wanted.attention, wanted.d_model
    if attention not in ATTENTION_MODES:
        raise FFMergeError(f"attention: got {attention!r}, wanted 'heads' (fewer heads) or 'head_dim' (narrower ones)")
    if attention == "head_dim" and layout.attention and any("Rotary" in type(m).__name__ for m in model.modules()):
        raise FFMergeError("attention: 'head_dim' would change the rotary positions' frequencies; use 'heads'")
    if (wanted.keep is None) == (d_model is None and wanted.d_ff is None):
        raise FFMergeError("project: give either keep= (a share of the parameters) or d_model= and/or d_ff=")
    if wanted.keep is not None:
        return _sizes_for(model, layout, wanted.keep, attention, untied)
    d_model = layout.d_model if d_model is None else d_model
    widths = _ffn_widths(layout, wanted.d_ff)
    for name, value, base in (
        ("d_model", d_model, layout.d_model),
        *((f"d_ff ({stack})", widths[stack], width) for stack, width in layout.stacks().items()),
    ):
        if not isinstance(value, int) or not 1 <= value <= base:
            raise FFMergeError(f"{name}: got {value!r}, wanted an integer from 1 to the base model's {base}")
    step = _step(layout, attention)
    if d_model % step:
        what = f"whole heads of {layout.head_dim}" if attention == "heads" else f"{layout.heads} heads of even width"
        raise FFMergeError(f"d_model: got {d_model}, wanted a multiple of {step} ({what}); or the other attention=")
    sizes = Sizes(d_model, widths, attention, bool(untied))
    if fault := sizes.fault(model, layout):
        others = [str(n) for n in _nearest_that_work(model, layout, sizes, step)]
        hint = f"nearest that work: {' and '.join(others)}" if others else "no other d_model works either"
        raise FFMergeError(f"d_model: got {d_model}, which {type(model).__name__} cannot have ({fault}); {hint}")
    return sizes


def _nearest_that_work(model: nn.Module, layout: ModelAxes, sizes: Sizes, step: int) -> Iterator[int]:
    """The next smaller and the next larger d_model whose model can be built and saved, where there are such."""
    for candidates in (
        range(sizes.d_model - step, 0, -step),
        range(sizes.d_model + step, layout.d_model + 1, step),
    ):
        fitting = (n for n in candidates if not replace(sizes, d_model=n).fault(model, layout))
        yield from itertools.islice(fitting, 1)


def _ffn_widths(layout: ModelAxes, d_ff: int | Mapping[str, int] | None) -> dict[str, int]:
    stacks = layout.stacks()
    if d_ff is None:
        return stacks
    if not isinstance(d_ff, Mapping):
        return dict.fromkeys(stacks, d_ff)
    if unknown := sorted(set(map(str, d_ff)) - set(stacks)):
        raise FFMergeError(
            f"d_ff: got a width for {unknown[0]}; a config of transformers has one d_ff per stack, so wanted a number, "
            f"or a dict of {', '.join(stacks)}"
        )
    return stacks | dict(d_ff)


def _step(layout: ModelAxes, attention: str) -> int:
    """What d_model must be a multiple of."""
    if layout.heads is None:
        return 1
    return layout.head_dim if attention == "heads" else layout.heads


def _fine_step(width: int, step: int = 1) -> int:
    """A multiple of `step`, about a thirty-second of `width` and a power of two, for kernels' sake."""
    return math.lcm(step, 2 ** max(0, min(6, int(math.log2(max(1, width // 32))))))


def _sizes_for(model: nn.Module, layout: ModelAxes, keep: float, attention: str, untied: Collection[str]) -> Sizes:
    """d_model and d_ff in the base's proportion, whose model has nearest to `keep` of the base's parameters.

    Widths are multiples of `_fine_step`. Where the architecture cannot have the nearest, those of smaller powers of two
    are tried too, until one is at most a sixteenth off.
    """
    if not 0 < keep <= 1:
        raise FFMergeError(f"keep: got {keep}, wanted a share above 0 and at most 1")
    unique = {name: p.shape for name, p in model.named_parameters()}
    total = sum(s.numel() for s in unique.values())
    unique |= {n: p.shape for n, p in model.named_parameters(remove_duplicate=False) if n in untied}

    def sizes_of(step: int) -> list[tuple[float, Sizes]]:
        """How far off each is, as a share of what is wanted; the nearest first."""
        found = []
        for d_model in range(step, layout.d_model + 1, step):
            widths = {s: _scaled(width, d_model / layout.d_model) for s, width in layout.stacks().items()}
            count = sum(math.prod(layout.shape(n, shape, d_model, widths)) for n, shape in unique.items())
            found.append((abs(count / (keep * total) - 1), Sizes(d_model, widths, attention, bool(untied))))
        return sorted(found, key=lambda entry: entry[0])

    least = _step(layout, attention)
    step = _fine_step(layout.d_model, least)
    far, wished = sizes_of(step)[0]
    if far > 1:  # more than twice of what was asked for
        raise FFMergeError(f"keep: got {keep}, wanted at least {keep * (1 + far):.2g}, of the smallest widths")
    fault = wished.fault(model, layout)
    if not fault:
        return wished
    found: list[tuple[float, Sizes]] = []
    for finer in dict.fromkeys(math.lcm(least, 2**power) for power in reversed(range(step.bit_length()))):
        smaller = (entry for entry in sizes_of(finer) if entry[1].d_model < layout.d_model)
        found += itertools.islice((entry for entry in smaller if not entry[1].fault(model, layout)), 1)
        if found and found[-1][0] <= 1 / 16:
            break
    if not found:
        raise FFMergeError(f"keep: got {keep}, but {type(model).__name__} cannot have other widths ({fault})")
    return min(found, key=lambda entry: entry[0])[1]


def _scaled(width: int, ratio: float) -> int:
    step = _fine_step(width)
    return max(step, min(width, round(width * ratio / step) * step))


def _untied_names(model: nn.Module, layout: ModelAxes, wanted: Widths) -> set[str]:
    """Names of the parameters that get a table of their own instead of the input embedding's."""
    tied = tied_names(model)
    shrinks = wanted.keep is not None or (wanted.d_model is not None and wanted.d_model != layout.d_model)
    untie = len(tied) == 1 and shrinks if wanted.untie_embeddings is None else wanted.untie_embeddings
    if untie and len(tied) > 1:
        raise FFMergeError(
            f"untie_embeddings: {type(model).__name__} ties {len(tied) + 1} tables, and its config can only untie them "
            "all; leave them tied"
        )
    return tied if untie else set()


def tied_names(model: nn.Module) -> set[str]:
    """Names of parameters that share the input embedding's tensor under another name (the head's)."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)  # images have patches instead
    named = list(model.named_parameters(remove_duplicate=False))
    first = next((name for name, p in named if p is embedding), None)
    return {name for name, p in named if p is embedding and name != first}


def trained_numbers(model: nn.Module, layout: ModelAxes, sizes: Sizes) -> tuple[int, int]:
    """(parameters of the student, numbers that are trained instead), without projections in common."""
    student, beside = 0, 0
    for name, parameter in model.named_parameters():
        small = layout.shape(name, parameter.shape, sizes.d_model, sizes.d_ff)
        student += math.prod(small)
        beside += math.prod(small)  # R
        if parameter.ndim > 1:
            beside += sum(new * old for new, old in zip(small, parameter.shape, strict=True) if new != old)
    return student, beside


# ---------------------------------------------------------------------------------------------------------- selection


@dataclass(frozen=True, eq=False)
class Choice:
    """Which entries of one axis are kept, in `len(block)` equal blocks: S of P = S + Δ.

    Block b of the small axis takes entries `inner[b]` of block `block[b]` of the base axis, whose blocks have `width`
    entries. A whole axis is one block; heads, and fused projections, are one each, and never mix.
    """

    block: Tensor  # int64 [B]
    inner: Tensor  # int64 [B, r], ascending in a row
    width: int

    @property
    def index(self) -> Tensor:
        """int64 [B · r]: positions in the base axis."""
        return (self.block[:, None] * self.width + self.inner).reshape(-1)

    def __len__(self) -> int:
        return self.inner.numel()


@dataclass(frozen=True)
class Selection:
    """The kept dimensions of a model; indices ascend.

    Attributes:
        d_model: int64 [d_model'].
        d_ff: {FFN key: int64 [d_ff']}.
        channels: {(attention path, "query_key" or "value_output"): (heads int64 [H'], channels int64 [H', head_dim'])}.
    """

    layout: ModelAxes
    d_model: Tensor
    d_ff: dict[str, Tensor]
    channels: dict[tuple[str, str], tuple[Tensor, Tensor]]

    def choice(self, axis: Axis) -> Choice:
        """What is kept along one axis of a parameter."""
        if axis.role == MODEL:
            return Choice(torch.zeros(1, dtype=torch.int64), self.d_model[None], self.layout.d_model)
        if axis.role == FFN:
            index, parts = self.d_ff[axis.key], len(axis.parts)
            return Choice(torch.arange(parts), index.expand(parts, -1), self.layout.d_ff[axis.key])
        attention = self.layout.attention[axis.key]
        kept = [self.channels[axis.key, part] for part in axis.parts]
        if axis.by_head:  # part p of head h is block h · parts + p
            block = torch.stack([heads * len(kept) + part for part, (heads, _) in enumerate(kept)], dim=1)
            return Choice(block.flatten(), torch.stack([c for _, c in kept], dim=1).flatten(0, 1), attention.head_dim)
        block = torch.cat([heads + part * attention.heads for part, (heads, _) in enumerate(kept)])
        return Choice(block, torch.cat([c for _, c in kept]), attention.head_dim)

    def state(self) -> dict[str, Any]:
        """Everything that decides the student's start, as lists."""
        channels = {f"{path}/{part}": [h.tolist(), c.tolist()] for (path, part), (h, c) in self.channels.items()}
        d_ff = {key: index.tolist() for key, index in self.d_ff.items()}
        return {"d_model": self.d_model.tolist(), "d_ff": d_ff, "channels": channels}


def select(model: nn.Module, layout: ModelAxes, sizes: Sizes, scores: Importance) -> Selection:
    """The most important dimensions; of equal ones the lowest."""
    d_ff = {key: _best(scores.scores[f"d_ff/{key}"], sizes.d_ff[key.partition(".")[0]]) for key in layout.d_ff}
    channels = {}
    for path, attention in layout.attention.items():
        of_output = scores.scores[f"attention/{path}"].view(attention.heads, attention.head_dim)
        heads = torch.arange(attention.heads)
        width = attention.head_dim
        if sizes.attention == "heads":
            heads = _best(of_output.sum(1), sizes.d_model // attention.head_dim)
        else:
            width = sizes.d_model // attention.heads
        of_query = of_output if scores.method == "random" else _query_key_scores(model, layout, path)
        for part, values in ((QUERY_KEY, of_query), ("value_output", of_output)):
            channels[path, part] = (heads, _best(values[heads], width))
    return Selection(layout, _best(scores.scores["d_model"], sizes.d_model), d_ff, channels)


def _best(scores: Tensor, count: int) -> Tensor:
    """Ascending positions of the `count` highest scores along the last axis."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


@torch.no_grad()
def _query_key_scores(model: nn.Module, layout: ModelAxes, path: str) -> Tensor:
    """[heads, head_dim]: what a channel can add to attention scores, ‖row of W_q‖ · ‖row of W_k‖."""
    attention = layout.attention[path]
    norms = []
    for part, name in enumerate((attention.query, attention.key)):
        module = model.get_submodule(name)
        norm = matrix(module).double().norm(dim=1).cpu()
        if attention.query == attention.key:  # fused
            axis = next(a for a in layout.axes[f"{name}.weight"] if a is not None and a.role == ATTENTION)
            norm = axis.split(norm, attention.head_dim)[part]
        norms.append(norm.view(attention.heads, attention.head_dim))
    return norms[0] * norms[1]
