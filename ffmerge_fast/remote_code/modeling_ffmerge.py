"""Loads a Transformer whose feed-forward sublayers are shared between layers. Needs transformers only.

This file travels inside every merged checkpoint (written by ffmerge_fast), so that it loads anywhere with
`AutoModel....from_pretrained(folder, trust_remote_code=True)`. For any transformers class X it offers `FFMergedX`:
the same class, whose blocks share the modules listed in `config.ffmerge["groups"]`. Classes are made on first use.
"""

import copy
import inspect
import json
import re

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

PREFIX, TYPE_PREFIX = "FFMerged", "ffmerge_"
# Stands in config.json where a class of transformers looks for the name of the weight file: a stock class would
# otherwise load this checkpoint and fill the FFNs it does not find with random numbers. It stops, quoting this.
REFUSAL = "layers share FFNs here: load with trust_remote_code=True, or import ffmerge_fast first"
# Paths of a group, one per layer: "h.{i}.mlp". They come from config.json, so nothing else is understood.
_PATTERN = re.compile(r"(?:\w+\.)*\{i\}(?:\.\w+)*")


class DeltaLinear(nn.Module):
    """The first of some layers' projections that have W and b in common: (W + A B) x + b + c, with its own A, B and c.

    W and b have the names that they had in `linear`, an nn.Linear or Conv1D.
    """

    def __init__(self, linear, rank):
        super().__init__()
        self.transposed, self.training = type(linear).__name__ == "Conv1D", linear.training
        self.register_parameter("weight", linear.weight)
        self.register_parameter("bias", linear.bias)
        _register_delta(self, rank)

    def forward(self, x, delta=None):
        a, b, c = delta or _delta(self)
        weight = self.weight.T if self.transposed else self.weight
        return F.linear(x, weight, self.bias if c is None else self.bias + c) + F.linear(F.linear(x, b), a)


class TiedDeltaLinear(nn.Module):
    """The same projection in another layer: W and b are those of `shared`, a DeltaLinear; A, B and c its own."""

    def __init__(self, shared, rank):
        super().__init__()
        self.shared, self.transposed, self.training = shared, shared.transposed, shared.training
        _register_delta(self, rank)

    weight = property(lambda self: self.shared.weight)
    bias = property(lambda self: self.shared.bias)

    def forward(self, x):
        return self.shared(x, _delta(self))


def _register_delta(module, rank):
    """A [out, rank], B [rank, in] and, beside a bias, c [out]: zeros."""
    weight, bias = module.weight.T if module.transposed else module.weight, module.bias
    zeros = {"a": weight.new_zeros(weight.shape[0], rank), "b": weight.new_zeros(rank, weight.shape[1])}
    for name, value in {**zeros, "bias": None if bias is None else bias.new_zeros(bias.shape)}.items():
        parameter = None if value is None else nn.Parameter(value, requires_grad=weight.requires_grad)
        module.register_parameter(f"delta_{name}", parameter)


def _delta(module):
    return module.delta_a, module.delta_b, module.delta_bias


class PrivateLinear(nn.Module):
    """The first of some layers' projections that have W and b in common, beside neurons that each layer has alone.

    A projection into the neurons gives the layer's own after the shared ones (in each of its `halves`, where it holds
    gate and up); the one `out` of them takes them there. W and b have the names that they had in `linear`.
    """

    def __init__(self, linear, neurons, halves, out):
        super().__init__()
        self.transposed, self.training = type(linear).__name__ == "Conv1D", linear.training
        self.halves, self.out = halves, out
        self.register_parameter("weight", linear.weight)
        self.register_parameter("bias", linear.bias)
        _register_private(self, neurons)

    def forward(self, x, own=None):
        weight = self.weight.T if self.transposed else self.weight
        own_weight, own_bias = own or _private(self)
        if self.out:
            bias = self.bias if own_bias is None else self.bias + own_bias
            shared, private = x.split([weight.shape[1], own_weight.shape[1]], -1)
            return F.linear(shared, weight, bias) + F.linear(private, own_weight)
        shared, private = F.linear(x, weight, self.bias), F.linear(x, own_weight, own_bias)
        if self.halves == 1:
            return torch.cat([shared, private], -1)
        gate, up = shared.chunk(2, -1)
        own_gate, own_up = private.chunk(2, -1)
        return torch.cat([gate, own_gate, up, own_up], -1)


class TiedPrivateLinear(nn.Module):
    """The same projection in another layer: W and b are those of `shared`, a PrivateLinear; its neurons its own."""

    def __init__(self, shared, neurons):
        super().__init__()
        self.shared, self.transposed, self.training = shared, shared.transposed, shared.training
        self.halves, self.out = shared.halves, shared.out
        _register_private(self, neurons)

    weight = property(lambda self: self.shared.weight)
    bias = property(lambda self: self.shared.bias)

    def forward(self, x):
        return self.shared(x, _private(self))


def _register_private(module, neurons):
    """The layer's own rows of W, [halves * neurons, in], and of b; or columns of W, [out, neurons], and c [out]: zeros.

    They lie as those of nn.Linear.
    """
    weight, bias = module.weight.T if module.transposed else module.weight, module.bias
    shape = (weight.shape[0], neurons) if module.out else (module.halves * neurons, weight.shape[1])
    own_bias = None if bias is None else bias.new_zeros(shape[0])
    for name, value in {"weight": weight.new_zeros(shape), "bias": own_bias}.items():
        parameter = None if value is None else nn.Parameter(value, requires_grad=weight.requires_grad)
        module.register_parameter(f"private_{name}", parameter)


def _private(module):
    return module.private_weight, module.private_bias


def share_(model, groups):
    """Make all layers of each group hold the modules of its first layer; or its weights, and something of their own.

    `groups` is a list of {"layers": [1, 2, 4], "modules": ["h.{i}.mlp"]}, paths relative to the base model. Layers with
    low-rank deltas have "delta_rank": 8 and "projections": ["h.{i}.mlp.c_fc", "h.{i}.mlp.c_proj"], W_down last, as
    well; with neurons of their own "private_neurons": 40, the projections, and "fused": whether one holds gate and up.
    """
    base = _base_model(model)
    for group in _present(base, groups):
        for number, paths in enumerate(_paths(group), start=1):
            if "delta_rank" in group:
                add_deltas_(base, paths, group["delta_rank"])
                continue
            if "private_neurons" in group:
                out = number == len(group["projections"])
                add_private_(base, paths, group["private_neurons"], 2 if group["fused"] and not out else 1, out)
                continue
            shared = base.get_submodule(paths[0])
            for path in paths[1:]:
                _set(base, path, shared)
    aliases = _alias_names(model, groups)
    model._keys_to_ignore_on_save = sorted({*(model._keys_to_ignore_on_save or ()), *aliases})


def _present(base, groups):
    """The groups without those of a stack that this class does not have: T5EncoderModel has no decoder."""
    absent = [stack for stack in ("encoder", "decoder") if not hasattr(base, stack)]
    return [group for group in groups if group["modules"][0].partition(".")[0] not in absent]


def _paths(group):
    """The paths of each shared module of a group, one per layer."""
    patterns = group["projections" if _own_parts(group) else "modules"]
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(f"config.ffmerge: got the path {pattern!r}, wanted one like 'h.{{i}}.mlp'")
    return [[pattern.replace("{i}", str(int(i))) for i in group["layers"]] for pattern in patterns]


def add_deltas_(base, paths, rank):
    """Give the projections at these paths the weights of the first one, and deltas of zero."""
    shared = DeltaLinear(base.get_submodule(paths[0]), rank)
    _set(base, paths[0], shared)
    for path in paths[1:]:
        _set(base, path, TiedDeltaLinear(shared, rank))


def add_private_(base, paths, neurons, halves, out):
    """Give the projections at these paths the weights of the first one, and neurons of their own, of zeros."""
    shared = PrivateLinear(base.get_submodule(paths[0]), neurons, halves, out)
    _set(base, paths[0], shared)
    for path in paths[1:]:
        _set(base, path, TiedPrivateLinear(shared, neurons))


def _own_parts(group):
    """Whether the layers of a group share weights only, and have modules of their own."""
    return "delta_rank" in group or "private_neurons" in group


def _set(base, path, module):
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)


def can_adopt(model):
    """Whether the model's class and config are transformers' own, so that any other process has them too."""
    return all(getattr(transformers, c.__name__, None) is c for c in (type(model), type(model.config)))


def adopt_(model, ffmerge):
    """Turn a model of a stock class into its FFMerged class in place; `ffmerge` is the config section."""
    config, model_class = _own_config(model), _ours(type(model))
    config.__class__ = _ours(type(config))
    config.ffmerge = ffmerge
    config.auto_map = auto_map(type(config), model_class)
    register(type(config))
    share_(model, ffmerge["groups"])
    model.__class__ = model_class


def _own_config(model):
    """A copy of the config in its place: other models may have been made of the same object."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.config = own
    return own


def release_(model):
    """Undo `adopt_`: the stock class and config again. The modules stay as they are."""
    config = model.config
    aliases = _alias_names(model, config.ffmerge["groups"])
    model.__class__ = type(model).__bases__[0]
    model._keys_to_ignore_on_save = [k for k in model._keys_to_ignore_on_save if k not in aliases] or None
    model.__dict__.pop("_weight_conversions", None)  # a merged folder's names; the stock class saves its own again
    del config.ffmerge, config.auto_map
    config.__class__ = type(config).__bases__[0]


def auto_map(config_class, model_class):
    """config.json's auto_map: every Auto class of the family, pointing into this file.

    Of several classes behind one Auto class it can name one: that of the model, where it is among them.
    """
    found = _auto_models(config_class).items()
    chosen = {name: model_class if model_class in models else models[0] for name, models in found}
    classes = {name: f"{_file()}.{model.__name__}" for name, model in chosen.items()}
    return {"AutoConfig": f"{_file()}.{config_class.__name__}", **classes}


def register(config_class):
    """Make the Auto classes of this process know the family, so that no trust_remote_code is needed.

    Of several classes behind one of them transformers takes the one that config.architectures names. Trainer and
    pipelines look for the name of a model's class in tables of names: there it stands beside its stock class.
    """
    merged_type = TYPE_PREFIX + config_class.model_type
    for name, models in _auto_models(config_class).items():
        auto = getattr(transformers, name)
        auto.register(config_class, models[0], exist_ok=True)
        if len(models) > 1:
            auto._model_mapping.register(config_class, tuple(models), exist_ok=True)
        auto._model_mapping._model_mapping[merged_type] = models[0].__name__


def _file():
    return __name__.rpartition(".")[2]


def _base_model(model):
    return getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model


def _alias_names(model, groups):
    """Names in the state dict under which shared parameters appear again."""
    base = _base_model(model)
    prefix = "" if base is model else model.base_model_prefix + "."
    names = set()
    for group in _present(base, groups):
        inside = "shared." if _own_parts(group) else ""
        for first, *others in _paths(group):
            parameters = [n for n, _ in base.get_submodule(first).named_parameters()]
            names |= {f"{prefix}{path}.{inside}{n}" for path in others for n in parameters}
    return names


def _auto_models(config_class):
    """{name of an Auto class: FFMerged classes} for the family of `config_class`."""
    stock, found = config_class.__bases__[0], {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is None or not hasattr(transformers, name) or stock not in mapping:
            continue
        models = mapping[stock]
        models = models if isinstance(models, (tuple, list)) else [models]
        ours = [_ours(m) for m in models if m.config_class is stock and hasattr(transformers, m.__name__)]
        if ours:
            found[name] = ours
    tied = [key for m in found.get("AutoModel", ()) for key in m._tied_weights_keys or ()]
    shares = "share_encoder_decoder_embeddings" in inspect.signature(stock.__init__).parameters  # Marian's tie
    if shares or any(key.endswith("decoder.embed_tokens.weight") for key in tied):
        found.pop("AutoModelForCausalLM", None)  # files have the embedding under the whole model's name only
    return found


def _auto_class(model_class):
    """The Auto class that a saved model of this class is loaded with; None where none has it."""
    names = [n for n, models in _auto_models(model_class.config_class).items() if model_class in models]
    names.sort(key=lambda n: n in ("AutoModelForPreTraining", "AutoModelWithLMHead"))
    return names[0] if names else None


def _ours(stock):
    if stock.__name__.startswith(PREFIX):
        return stock
    if getattr(transformers, stock.__name__, None) is not stock:
        raise ValueError(
            f"{stock.__name__} is not a class of transformers itself: its code cannot travel in a checkpoint"
        )
    return __getattr__(PREFIX + stock.__name__)


def __getattr__(name):
    stock = getattr(transformers, name[len(PREFIX) :], None) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in globals():
        return globals()[name]
    is_config = issubclass(stock, transformers.PretrainedConfig)
    made = globals()[name] = (_make_config if is_config else _make_model)(name, stock)
    if not is_config:
        made._auto_class = _auto_class(made)
    return made


def _make_config(name, stock):
    """Its model_type is the stock one, by which libraries know what to do; config.json alone says "ffmerge_<type>"."""

    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super(made, cls).get_config_dict(*args, **kwargs)
        return _stock_values(config_dict), kwargs

    def from_dict(cls, config_dict, **kwargs):
        return super(made, cls).from_dict(_stock_values(config_dict), **kwargs)

    def to_json_string(self, use_diff=True, **kwargs):
        values = json.loads(super(made, self).to_json_string(use_diff, **kwargs))
        values |= {"model_type": TYPE_PREFIX + stock.model_type, "transformers_weights": REFUSAL}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    made = type(
        name,
        (stock,),
        {
            "__module__": __name__,
            "__doc__": f"{stock.__name__} of a model with shared FFNs.",
            "_auto_class": "AutoConfig",
            "get_config_dict": classmethod(get_config_dict),
            "from_dict": classmethod(from_dict),
            "to_json_string": to_json_string,
        },
    )
    return made


def _stock_values(config_dict):
    """What stands in a merged config.json for the stock config class."""
    values = {key: value for key, value in config_dict.items() if key != "transformers_weights"}
    if "model_type" in values:
        values["model_type"] = values["model_type"].removeprefix(TYPE_PREFIX)
    return values


def _make_model(name, stock):
    def __init__(self, config, *args, **kwargs):
        if type(config) not in transformers.AutoModel._model_mapping:
            register(type(config))  # some heads build their base by AutoModel.from_config
        super(made, self).__init__(config, *args, **kwargs)
        try:
            share_(self, config.ffmerge["groups"])
        except AttributeError as error:
            raise ValueError(
                f"{error}: these shared FFNs were saved with transformers {config.transformers_version}, and "
                f"{transformers.__version__} builds {stock.__name__} otherwise or the config was edited"
            ) from error

    def save_pretrained(self, save_directory, **kwargs):
        if "save_original_format" in inspect.signature(super(made, self).save_pretrained).parameters:
            kwargs.setdefault("save_original_format", False)  # that format is keyed by the stock model_type
        super(made, self).save_pretrained(save_directory, **kwargs)

    made = type(
        name,
        (stock,),
        {
            "__module__": __name__,
            "__doc__": f"{stock.__name__} whose blocks share FFNs.",
            "config_class": _ours(stock.config_class),
            "__init__": __init__,
            "save_pretrained": save_pretrained,
        },
    )
    return made
