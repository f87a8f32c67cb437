"""Finds every feed-forward (FFN) sublayer of a model. Everything above speaks of these and never of a family."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from ..support.distributed import is_sharded
from ..support.errors import FFMergeError
from ..support.tensors import has_memory
from .families import MERGED_TYPE_PREFIX, STACKS, FFNSpec, specs_of
from .projections import in_features, out_features
from .wrapped import refuse_wrapper


@dataclass(frozen=True)
class FFNSublayer:
    """One FFN of a model, by dotted paths from the model's root (so it stays valid after merging and copying)."""

    index: int
    stack: str
    path: str
    up_path: str
    down_path: str
    gate_path: str | None
    fused: bool
    shared: tuple[str, ...]
    d_model: int
    d_ff: int
    activation: str
    gated: bool
    bias: bool
    parameters: int
    nbytes: int

    @property
    def key(self) -> str:
        """Name of this FFN in statistics and plans: "decoder.3"."""
        return f"{self.stack}.{self.index}"

    @property
    def signature(self) -> tuple:
        """What FFNs must have in common to be merged."""
        return (self.stack, self.d_model, self.d_ff, self.activation, self.gated, self.fused, self.bias)

    @property
    def projections(self) -> dict[str, str]:
        """{"up": path, "gate": path, if it has a module of its own, "down": path}."""
        paths = {"up": self.up_path, "gate": self.gate_path, "down": self.down_path}
        return {name: path for name, path in paths.items() if path}


# ---------------------------------------------------------------------------------------------------- family table


# -------------------------------------------------------------------------------------------------------- detection


class FFNs(list[FFNSublayer]):
    """The FFN sublayers of a model, encoder first, in layer order."""

    def at(self, stack: str, index: int) -> FFNSublayer:
        """The FFN of one layer; KeyError if there is none."""
        return self._by_layer[stack, index]

    def of(self, stack: str, layers: Iterable[int]) -> list[FFNSublayer]:
        """The FFNs of some layers of a stack."""
        return [self.at(stack, i) for i in layers]

    def by_stack(self) -> dict[str, list[FFNSublayer]]:
        """{stack: its FFNs}."""
        stacks: dict[str, list[FFNSublayer]] = {}
        for ffn in self:
            stacks.setdefault(ffn.stack, []).append(ffn)
        return stacks

    @cached_property
    def _by_layer(self) -> dict[tuple[str, int], FFNSublayer]:
        return {(ffn.stack, ffn.index): ffn for ffn in self}


def find_ffns(model: nn.Module, quantised: bool = False) -> FFNs:
    """Every FFN sublayer of `model`, encoder first, in layer order.

    Args:
        quantised: also those whose weights are of a quantised class with the shape of a weight (torchao's).

    Raises:
        FFMergeError: unknown family (names the spec to write), mixture-of-experts blocks, quantised or
            adapter-wrapped projections, a wrapper of another library around the model.
    """
    refuse_wrapper(model)
    specs, family = _specs(model)
    found: dict[str, list[FFNSublayer]] = {}
    for spec in specs:
        if spec.stack in found:
            continue
        sublayers = _stack_sublayers(model, spec, quantised)
        if sublayers:
            found[spec.stack] = sublayers
    if not found:
        _refuse_experts(model)
        wanted = ", ".join(f"{s.layers}.<i>.{s.up}" for s in specs)
        raise FFMergeError(f"no FFN found in this {type(model).__name__}: family {family!r} expects {wanted}")
    return FFNs(ffn for stack in STACKS for ffn in found.get(stack, []))


def base_model_path(model: nn.Module) -> str:
    """Dotted path of the headless model inside `model` ("transformer"), "" when `model` is it."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def base_model_type(model: nn.Module) -> str:
    """`config.model_type` without our prefix, or the class name of a plain module."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return model_type.removeprefix(MERGED_TYPE_PREFIX) if model_type else type(model).__name__


def _specs(model: nn.Module) -> tuple[list[FFNSpec], str]:
    names = [base_model_type(model), *(c.__name__ for c in type(model).__mro__)]
    if found := specs_of(names):
        return found
    _refuse_experts(model)
    raise FFMergeError(
        f"no FFN layout known for {names[0]!r} ({type(model).__name__}): call ffmerge_fast.register_family("
        f"{names[0]!r}, FFNSpec(layers='<list of blocks>', up='<W_up in a block>', down='<W_down in a block>', "
        "gate=None)) or give --ffn-layers/--ffn-up/--ffn-down/--ffn-gate"
    )


_EXPERTS = re.compile(r"(?i)moe|experts|sparsemlp")


def _refuse_experts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _EXPERTS.search(type(module).__name__) and name:
            raise FFMergeError(
                f"{name} is a mixture of experts ({type(module).__name__}): its experts see different tokens, so one "
                "correlation over all tokens does not exist; only dense FFNs can be merged"
            )


def get(model: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path ("" is the model), or None."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def join(*parts: str) -> str:
    """Dotted path of the non-empty parts."""
    return ".".join(p for p in parts if p)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path that the model has."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _stack_sublayers(model: nn.Module, spec: FFNSpec, quantised: bool) -> list[FFNSublayer]:
    for base in dict.fromkeys((base_model_path(model), "")):
        layers_path = join(base, spec.layers)
        layers = get(model, layers_path)
        if layers is not None and (spec.layers or isinstance(layers, (nn.ModuleList, nn.Sequential))):
            names = [n for n, _ in layers.named_children()]
            paths = [join(layers_path, name) for name in names]
            return [s for i, path in enumerate(paths) if (s := _sublayer(model, spec, i, path, quantised))]
    return []


def _sublayer(model: nn.Module, spec: FFNSpec, index: int, path: str, quantised: bool) -> FFNSublayer | None:
    up, down = get(model, join(path, spec.up)), get(model, join(path, spec.down))
    gate = get(model, join(path, spec.gate)) if spec.gate else None
    if up is None or down is None or (spec.gate and gate is None):
        _refuse_experts(model.get_submodule(path))
        return None
    for name, module in ((spec.up, up), (spec.down, down), (spec.gate, gate)):
        if module is not None:
            _check_projection(join(path, name), module, quantised)
    width = out_features(up)
    d_ff = width // 2 if spec.fused else width
    if in_features(down) != d_ff:
        raise FFMergeError(f"{path}: {spec.up} gives {d_ff} features but {spec.down} takes {in_features(down)}")
    if gate is not None and out_features(gate) != d_ff:
        raise FFMergeError(f"{path}: {spec.gate} gives {out_features(gate)} features but {spec.down} takes {d_ff}")
    shared = (spec.module,) if spec.module else tuple(p for p in (spec.gate, spec.up, spec.down) if p)
    weights = [w for m in (gate, up, down) if m is not None for w in (m.weight, m.bias) if w is not None]
    return FFNSublayer(
        index=index,
        stack=spec.stack,
        path=path,
        up_path=join(path, spec.up),
        down_path=join(path, spec.down),
        gate_path=join(path, spec.gate) if spec.gate else None,
        fused=spec.fused,
        shared=tuple(join(path, s) for s in shared),
        d_model=in_features(up),
        d_ff=d_ff,
        activation=_activation(model, spec, path),
        gated=bool(spec.gate) or spec.fused,
        bias=up.bias is not None,
        parameters=sum(w.numel() for w in weights),
        nbytes=sum(w.numel() * w.element_size() for w in weights),
    )


def _check_projection(path: str, module: nn.Module, quantised: bool) -> None:
    if hasattr(module, "base_layer"):
        raise FFMergeError(
            f"{path} is wrapped by an adapter ({type(module).__name__}): merge or unload the adapter first"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise FFMergeError(f"{path} is a {type(module).__name__}: wanted a linear projection with a 2-d weight")
    if hasattr(module, "weight_orig"):
        raise FFMergeError(f"{path} is masked by torch.nn.utils.prune: call prune.remove(module, 'weight') first")
    wrapped = not has_memory(weight) and not is_sharded(weight)  # such a class may claim to be floating
    whole_numbers = not weight.is_floating_point() or weight.element_size() < 2  # integers, float8
    if whole_numbers or (wrapped and not quantised):
        kind = type(weight).__name__ if wrapped else weight.dtype
        raise FFMergeError(f"{path} is quantised ({kind}): load the model in fp32, bf16 or fp16, merge, then quantise")


# ----------------------------------------------------------------------------------------------- projection modules


# ------------------------------------------------------------------------------------------------------- activation

_ACTIVATIONS = {
    "ReLU": "relu",
    "relu": "relu",
    "GELUActivation": "gelu",
    "gelu": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "BloomGelu": "gelu_tanh",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
    "ReLUSquaredActivation": "relu2",
    "QuickGELUActivation": "quick_gelu",
}
_ACTIVATION_ATTRIBUTES = ("act", "act_fn", "activation_fn", "intermediate_act_fn", "activation", "gelu_impl", "relu")
_CONFIG_ATTRIBUTES = ("hidden_act", "activation_function", "hidden_activation", "activation")
_CONFIG_NAMES = {
    **{name: name for name in ("relu", "gelu", "silu", "relu2", "quick_gelu")},
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh"), "gelu_tanh"),
    "swish": "silu",
}


def _activation(model: nn.Module, spec: FFNSpec, path: str) -> str:
    if spec.activation and spec.activation in _ACTIVATIONS.values():
        return spec.activation
    if spec.activation:
        parent, _, name = join(path, spec.activation).rpartition(".")
        return _activation_name(getattr(get(model, parent), name, None))
    holder = model.get_submodule(join(path, spec.up).rpartition(".")[0])
    found = next((getattr(holder, name) for name in _ACTIVATION_ATTRIBUTES if hasattr(holder, name)), None)
    return _activation_name(found) if found is not None else _activation_of_config(model)


def _activation_of_config(model: nn.Module) -> str:
    """What the config calls it, where no module beside W_up is it."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = (getattr(config, name, None) for name in _CONFIG_ATTRIBUTES)
    return next((_CONFIG_NAMES.get(name, name) for name in names if isinstance(name, str)), "unknown")


def _activation_name(function: object) -> str:
    """Canonical name of an activation module or function; unknown ones keep their class name."""
    if isinstance(function, nn.GELU):
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    name = getattr(function, "__name__", None) or type(function).__name__
    return _ACTIVATIONS.get(name, name)
