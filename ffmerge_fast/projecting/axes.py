"""Which axes of which parameter run over the residual stream, an FFN's neurons or an attention's channels.

Nothing here is written per family. The model's class is built once more on the meta device with a wider d_model; the
axes that grew with it follow d_model. Among those, `find_ffns` and the names of the four attention projections tell
neurons and attention channels from the residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.config_widths import d_ff_field
from ..models.projections import describe_own, is_conv1d, out_features, own_capacity
from ..models.sublayers import FFNs, base_model_type, find_ffns, get, join
from ..support.errors import FFMergeError

MODEL, FFN, ATTENTION = "model", "ffn", "attention"
QUERY_KEY, VALUE_OUTPUT = "query_key", "value_output"  # channels of a head that belong together


@dataclass(frozen=True)
class Axis:
    """What one axis of a parameter runs over.

    Attributes:
        role: "model", "ffn" or "attention".
        key: FFN ("decoder.3") or path of the attention; "" for the residual stream.
        parts: what is stacked along it: ("",), twice for a fused gate and up; for attention "query_key" or
            "value_output", three for a fused query, key and value.
        by_head: the parts are stacked inside each head (GPT-NeoX) instead of around all heads.
    """

    role: str
    key: str = ""
    parts: tuple[str, ...] = ("",)
    by_head: bool = False

    def split(self, values: Tensor, head_dim: int | None) -> Tensor:
        """One value per entry of the axis, by parts: [n] -> [parts, n / parts]."""
        if self.by_head:
            return values.view(-1, len(self.parts), head_dim).transpose(0, 1).flatten(1)
        return values.view(len(self.parts), -1)


@dataclass(frozen=True)
class Attention:
    """One attention sublayer whose width (heads · head_dim) follows d_model."""

    path: str
    heads: int
    head_dim: int
    query: str  # paths of the projections; query and key are the same module where they are fused
    key: str

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class ModelAxes:
    """The axes of every parameter of one model.

    Attributes:
        ffns: the model's FFNs.
        d_model: width of the residual stream.
        d_ff: {FFN key: width}; layers that share one FFN appear once, under the first.
        attention: {path: Attention}, only those whose width follows d_model.
        readers: {path of a query, key or value projection: path of its attention}, of every attention.
        axes: {parameter name: one Axis or None per axis, as stored}; aliases of shared parameters included.
    """

    ffns: FFNs
    d_model: int
    d_ff: dict[str, int]
    attention: dict[str, Attention]
    readers: dict[str, str]
    axes: dict[str, tuple[Axis | None, ...]]

    @classmethod
    def of(cls, model: nn.Module) -> ModelAxes:
        """The axes of a transformers model: read once, to be handed down from there.

        Raises:
            FFMergeError: not a transformers model; a family that `find_ffns` does not know; attention of no known
                form, or grouped and of a width that follows d_model; FFNs of unequal width in one stack; low-rank
                deltas.
        """
        _check_kind(model)
        ffns = find_ffns(model)
        widths, of_neurons = _ffn_axes(model, ffns)
        attentions, readers, of_channels = _attention_axes(model, [f.path for f in ffns])
        grew = _growing_axes(model, ffns)
        axes = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            known = of_neurons.get(id(parameter), {}) | {
                d: a for d, a in of_channels.get(name, {}).items() if d in grew[name]
            }
            axes[name] = tuple(known.get(d, Axis(MODEL) if d in grew[name] else None) for d in range(parameter.ndim))
        used = {axis.key for of in axes.values() for axis in of if axis is not None and axis.role == ATTENTION}
        attentions = {path: attention for path, attention in attentions.items() if path in used}
        for path, attention in attentions.items():
            if attention.key != attention.query and out_features(model.get_submodule(attention.key)) != attention.width:
                raise FFMergeError(
                    f"project: {path} has fewer keys than queries, and its width follows d_model: not supported for "
                    f"this {base_model_type(model)!r}"
                )
        return cls(ffns, model.config.hidden_size, widths, attentions, readers, axes)

    @property
    def head_dim(self) -> int | None:
        """Width of a head where the attention follows d_model."""
        return next((a.head_dim for a in self.attention.values()), None)

    @property
    def heads(self) -> int | None:
        return next((a.heads for a in self.attention.values()), None)

    def width(self, axis: Axis, d_model: int, d_ff: Mapping[str, int]) -> int:
        """Length of an axis in a model of width `d_model` with `d_ff` neurons ({stack: count}) in its FFNs."""
        return len(axis.parts) * (d_ff[axis.key.partition(".")[0]] if axis.role == FFN else d_model)

    def shape(self, name: str, shape: torch.Size, d_model: int, d_ff: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of a parameter in such a model."""
        return tuple(
            n if axis is None else self.width(axis, d_model, d_ff)
            for n, axis in zip(shape, self.axes[name], strict=True)
        )

    def stacks(self) -> dict[str, int]:
        """{stack: d_ff}."""
        return {key.partition(".")[0]: width for key, width in self.d_ff.items()}


def _check_kind(model: nn.Module) -> None:
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise FFMergeError(
            f"project: {type(model).__name__} is not a transformers model; a smaller one is built from its config"
        )
    if own := own_capacity(model):
        raise FFMergeError(f"project: layers of this model have {describe_own(own)}; call expand_ first")


# ------------------------------------------------------------------------------------------------------------- config


def resized(model: nn.Module, d_model: int, d_ff: Mapping[str, int], heads: int | None = None) -> Any:
    """A copy of the model's config with other widths; heads and head_dim stay where the config can say so.

    Args:
        d_ff: {stack: neurons}.
        heads: of attention whose width follows d_model; None keeps the number.
    """
    config = copy.deepcopy(model.config)
    old = config.hidden_size
    if hasattr(config, "num_key_value_heads"):  # Llama and its relatives: head_dim is a setting of its own
        config.head_dim = getattr(config, "head_dim", None) or old // config.num_attention_heads
    config.hidden_size = d_model
    for name in ("word_embed_proj_dim", "pooler_output_size"):  # OPT, ViT: follow d_model unless set apart
        if getattr(config, name, None) == old:
            setattr(config, name, d_model)
    for stack, width in d_ff.items():
        setattr(config, d_ff_field(config, stack), width)
    if heads is not None:
        names = [n for n in ("encoder_attention_heads", "decoder_attention_heads") if hasattr(config, n)]
        for name in names or ["num_attention_heads"]:
            setattr(config, name, heads)
    config._name_or_path = ""
    return config


def _growing_axes(model: nn.Module, ffns: FFNs) -> dict[str, tuple[int, ...]]:
    """{parameter name: axes whose length grows with d_model}."""
    d_model = model.config.hidden_size + 2 * model.config.num_attention_heads  # heads stay, and even for rotary halves
    config = resized(model, d_model, {f.stack: f.d_ff for f in ffns})
    with torch.device("meta"):
        wider = dict(type(model)(config).named_parameters(remove_duplicate=False))
    named = dict(model.named_parameters(remove_duplicate=False))
    if named.keys() != wider.keys():
        odd = sorted(named.keys() ^ wider.keys())[0]
        raise FFMergeError(
            f"project: {type(model).__name__} built from its config differs in {odd}; expected no change"
        )
    return {n: tuple(d for d in range(p.ndim) if p.shape[d] != wider[n].shape[d]) for n, p in named.items()}


# ------------------------------------------------------------------------------------------------- FFNs and attention


def _ffn_axes(model: nn.Module, ffns: FFNs) -> tuple[dict[str, int], dict[int, dict[int, Axis]]]:
    """{FFN key: d_ff} and {id of parameter: {axis: Axis}} of the neurons."""
    widths: dict[str, int] = {}
    axes: dict[int, dict[int, Axis]] = {}
    for ffn in ffns:
        down = model.get_submodule(ffn.down_path)
        if id(down.weight) in axes:  # shared with an earlier layer
            continue
        widths[ffn.key] = ffn.d_ff
        axes[id(down.weight)] = {0 if is_conv1d(down) else 1: Axis(FFN, ffn.key)}
        for path in filter(None, (ffn.gate_path, ffn.up_path)):
            module = model.get_submodule(path)
            axis = Axis(FFN, ffn.key, ("", "") if ffn.fused else ("",))
            axes[id(module.weight)] = {1 if is_conv1d(module) else 0: axis}
            if module.bias is not None:
                axes[id(module.bias)] = {0: axis}
    if any(len({f.d_ff for f in members}) > 1 for members in ffns.by_stack().values()):
        raise FFMergeError(f"project: the FFNs of one stack differ in width ({widths}); its config cannot say that")
    return widths, axes


# (query, key, value, output) below the attention's own path; equal names are one fused module
_FORMS = (
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
    ("c_attn", "c_attn", "c_attn", "c_proj"),
    ("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"),
    ("query_key_value", "query_key_value", "query_key_value", "dense"),
    ("q", "k", "v", "o"),
)
_BY_HEAD = "query_key_value"


def _attentions(model: nn.Module) -> Iterator[tuple[str, tuple[str, str, str, str]]]:
    for path, _ in model.named_modules():
        for form in _FORMS:
            if all(get(model, join(path, name)) is not None for name in form):
                yield path, tuple(join(path, name) for name in form)
                break


def _attention_axes(
    model: nn.Module, layers: list[str]
) -> tuple[dict[str, Attention], dict[str, str], dict[str, dict[int, Axis]]]:
    """Attention sublayers, their readers, and {parameter name: {axis: Axis}} of their channels."""
    found: dict[str, Attention] = {}
    readers: dict[str, str] = {}
    axes: dict[str, dict[int, Axis]] = {}
    for path, (query, key, value, output) in _attentions(model):
        heads = _head_count(model, path)
        width = model.get_submodule(output).weight.shape[0 if is_conv1d(model.get_submodule(output)) else 1]
        found[path] = Attention(path, heads, width // heads, query, key)
        readers |= dict.fromkeys((query, key, value), path)
        axes[f"{output}.weight"] = {
            0 if is_conv1d(model.get_submodule(output)) else 1: Axis(ATTENTION, path, (VALUE_OUTPUT,))
        }
        kinds = {name: (QUERY_KEY,) for name in (query, key)} | {value: (VALUE_OUTPUT,)}
        if query == value:
            kinds = {value: (QUERY_KEY, QUERY_KEY, VALUE_OUTPUT)}
        for name, parts in kinds.items():
            module = model.get_submodule(name)
            axis = Axis(ATTENTION, path, parts, by_head=name.endswith(_BY_HEAD))
            if axis.by_head and len(module.weight) != 3 * width:
                raise FFMergeError(f"project: {name} has not one query, key and value per head: not supported")
            axes[f"{name}.weight"] = {1 if is_conv1d(module) else 0: axis}
            axes[f"{name}.bias"] = {0: axis}
    for layer in layers:
        if not any(path.startswith(f"{layer}.") for path in found):
            raise FFMergeError(
                f"project: no attention of a known form in {layer} of this {base_model_type(model)!r}; it has query, "
                "key, value and output projections under other names"
            )
    return found, readers, axes


def _head_count(model: nn.Module, path: str) -> int:
    stack = next((s for s in ("encoder", "decoder") if s in path.split(".")), None)
    config = model.config
    return getattr(config, f"{stack}_attention_heads", None) or config.num_attention_heads
