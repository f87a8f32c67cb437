"""Which models are known, and where their FFN weights lie.

A family is one `FFNSpec` per stack (encoder, decoder), with alternatives for layouts that changed between versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..support.errors import FFMergeError

ENCODER, DECODER = "encoder", "decoder"


MERGED_TYPE_PREFIX = "ffmerge_"  # config.model_type of a merged checkpoint: "ffmerge_gpt2"


@dataclass(frozen=True)
class FFNSpec:
    """Dotted paths to the FFN weights of one stack.

    Args:
        layers: path of the list of blocks, from the model or its base model ("h", "encoder.layers"); "" is the model.
        up: path of W_up inside a block, `[d_ff, d_model]` as nn.Linear, or Conv1D.
        down: path of W_down inside a block.
        gate: path of W_gate inside a block, for gated FFNs (SwiGLU, GeGLU).
        fused: `up` holds gate and up stacked, gate first (`[2 * d_ff, d_model]`, Phi-3).
        module: path inside a block of the module that holds the whole FFN and nothing else. It is what merged layers
            share; without it they share each of the two or three projections.
        stack: "encoder" or "decoder".
        activation: path inside a block of the activation, or its name ("gelu"); None: searched beside `up`.
    """

    layers: str
    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    module: str | None = None
    stack: str = DECODER
    activation: str | None = None

    def __post_init__(self):
        if self.stack not in (ENCODER, DECODER):
            raise FFMergeError(f"FFNSpec(stack=...): got {self.stack!r}, wanted 'encoder' or 'decoder'")
        if self.fused and self.gate:
            raise FFMergeError("FFNSpec: give either gate= or fused=True (gate and up in one weight), not both")


def _gated(layers: str = "layers", mlp: str = "mlp") -> list[FFNSpec]:
    return [FFNSpec(layers, f"{mlp}.up_proj", f"{mlp}.down_proj", f"{mlp}.gate_proj", module=mlp)]


def _plain(
    up: str, down: str, layers: str = "layers", module: str | None = "mlp", stack: str = DECODER
) -> list[FFNSpec]:
    prefix = f"{module}." if module else ""
    return [FFNSpec(layers, prefix + up, prefix + down, module=module, stack=stack)]


def _encoder_decoder() -> list[FFNSpec]:
    return [FFNSpec(f"{stack}.layers", "fc1", "fc2", stack=stack, activation="activation_fn") for stack in STACKS]


def _t5() -> list[FFNSpec]:
    specs = []
    for stack, position in ((ENCODER, 1), (DECODER, 2)):
        ffn = f"layer.{position}.DenseReluDense"
        specs.append(FFNSpec(f"{stack}.block", f"{ffn}.wi", f"{ffn}.wo", module=ffn, stack=stack))
        specs.append(FFNSpec(f"{stack}.block", f"{ffn}.wi_1", f"{ffn}.wo", f"{ffn}.wi_0", module=ffn, stack=stack))
    return specs


STACKS = (ENCODER, DECODER)


_BERT = [
    FFNSpec(
        "encoder.layer",
        "intermediate.dense",
        "output.dense",
        stack=ENCODER,
        activation="intermediate.intermediate_act_fn",
    )
]


_VIT = _plain("fc1", "fc2", stack=ENCODER) + _BERT  # transformers 5, then transformers 4


_FAMILIES: dict[str, list[FFNSpec]] = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode"), _plain("c_fc", "c_proj", layers="h")),
    "gptj": _plain("fc_in", "fc_out", layers="h"),
    "gpt_neox": _plain("dense_h_to_4h", "dense_4h_to_h"),
    "bloom": _plain("dense_h_to_4h", "dense_4h_to_h", layers="h"),
    "falcon": _plain("dense_h_to_4h", "dense_4h_to_h", layers="h"),
    "opt": [FFNSpec("decoder.layers", "fc1", "fc2", activation="activation_fn")],
    "phi": _plain("fc1", "fc2"),
    "starcoder2": _plain("c_fc", "c_proj"),
    "phi3": [FFNSpec("layers", "mlp.gate_up_proj", "mlp.down_proj", fused=True, module="mlp")],
    **dict.fromkeys(
        (
            "llama mistral ministral qwen2 qwen3 olmo olmo2 olmo3 gemma gemma2 gemma3_text smollm3 granite stablelm"
            " cohere cohere2 helium"
        ).split(),
        _gated(),
    ),
    **dict.fromkeys(
        (
            "bert roberta xlm-roberta camembert electra mpnet deberta deberta-v2 longformer ernie rembert megatron-bert"
            " data2vec-text roformer layoutlm"
        ).split(),
        _BERT,
    ),
    "distilbert": [FFNSpec("transformer.layer", "ffn.lin1", "ffn.lin2", stack=ENCODER, activation="ffn.activation")],
    **dict.fromkeys(("vit", "deit", "vit_mae"), _VIT),
    **dict.fromkeys(  # of images and text: the language model's
        ("llava", "mistral3", "qwen2_5_vl", "paligemma", "gemma3"), _gated("language_model.layers")
    ),
    "dinov2": _plain("fc1", "fc2", layers="encoder.layer", stack=ENCODER),
    **dict.fromkeys(("marian", "bart", "mbart", "pegasus", "m2m_100", "whisper", "blenderbot"), _encoder_decoder()),
    **dict.fromkeys(("t5", "mt5"), _t5()),
}


_BUILT_IN = dict(_FAMILIES)
_registration_hooks: list[Callable[[str], None]] = []


def supported_families() -> list[str]:
    """Model types (or class names) that `find_ffns` knows, `register_family`'s additions included."""
    return sorted(_FAMILIES)


def register_family(model_type: str, spec: FFNSpec | Sequence[FFNSpec]) -> None:
    """Teach `find_ffns` a new family.

    Args:
        model_type: `config.model_type` of a transformers model, or the class name of any other `nn.Module`.
        spec: one FFNSpec per stack; of several for one stack, the first whose paths exist is taken.
    """
    _FAMILIES[model_type] = [spec] if isinstance(spec, FFNSpec) else list(spec)
    for hook in _registration_hooks:
        hook(model_type)


def specs_of(names: Iterable[str]) -> tuple[list[FFNSpec], str] | None:
    """(specs, name) of the first of these model types and class names that is known."""
    return next(((_FAMILIES[name], name) for name in names if name in _FAMILIES), None)


def registered_specs(model_type: str) -> list[FFNSpec]:
    """What `register_family` said of a family, which another process does not know; [] of those in the table."""
    specs = _FAMILIES.get(model_type, [])
    return [] if specs is _BUILT_IN.get(model_type) else specs


def on_register(hook: Callable[[str], None]) -> None:
    """Call `hook(model_type)` for every later `register_family`."""
    _registration_hooks.append(hook)
