"""Tiny random models of every family, inputs for them, and what the tests know of each family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ffmerge_fast as ff

D_MODEL, D_FF, VOCABULARY, PAD = 16, 32, 64, 1
_POSITIONS = 40

_TEXT = dict(
    hidden_size=D_MODEL, intermediate_size=D_FF, num_attention_heads=2, vocab_size=VOCABULARY,
    max_position_embeddings=_POSITIONS, pad_token_id=PAD, bos_token_id=2, eos_token_id=3,
)  # fmt: skip
_LLAMA = _TEXT | dict(num_key_value_heads=1)
_IMAGE = dict(hidden_size=D_MODEL, intermediate_size=D_FF, num_attention_heads=2, image_size=16, patch_size=8)
_SEQ2SEQ = dict(
    d_model=D_MODEL, encoder_ffn_dim=D_FF, decoder_ffn_dim=D_FF, encoder_attention_heads=2, vocab_size=VOCABULARY,
    decoder_attention_heads=2, pad_token_id=PAD, bos_token_id=2, eos_token_id=3, decoder_start_token_id=PAD,
)  # fmt: skip
_T5 = dict(
    d_model=D_MODEL, d_kv=8, d_ff=D_FF, num_heads=2, vocab_size=VOCABULARY, pad_token_id=PAD, eos_token_id=3,
    decoder_start_token_id=PAD,
)  # fmt: skip
_SMALL_HEADS = dict(head_dim=8)


@dataclass(frozen=True)
class Family:
    """How to build one family's tiny model, and the facts `find_ffns` must report."""

    model: str  # class name in transformers
    config: str
    values: dict
    layers: tuple[str, ...]  # names of the config values that say how many layers
    stacks: tuple[str, ...]
    activation: str
    gated: bool = False
    bias: bool = True
    fused: bool = False
    parts: int = 1  # modules that merged layers share

    @property
    def parameters(self) -> int:
        """Of one FFN."""
        weights = (3 if self.gated else 2) * D_MODEL * D_FF
        return weights + (D_FF + D_MODEL) * self.bias


def _seq2seq(model: str, config: str, **values) -> Family:
    stacks = ("encoder", "decoder")
    return Family(model, config, _SEQ2SEQ | values, ("encoder_layers", "decoder_layers"), stacks, "gelu", parts=2)


def _llama(name: str, activation: str = "silu", **values) -> Family:
    return Family(
        f"{name}ForCausalLM", f"{name}Config", _LLAMA | values, ("num_hidden_layers",), ("decoder",), activation,
        gated=True, bias=False,
    )  # fmt: skip


def _encoder(model: str, config: str, values: dict, parts: int) -> Family:
    return Family(model, config, values, ("num_hidden_layers",), ("encoder",), "gelu", parts=parts)


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config",
        dict(n_embd=D_MODEL, n_inner=D_FF, n_head=2, vocab_size=VOCABULARY, n_positions=_POSITIONS, bos_token_id=2,
             eos_token_id=3),
        ("n_layer",), ("decoder",), "gelu_tanh",
    ),
    "opt": Family(
        "OPTForCausalLM", "OPTConfig",
        dict(hidden_size=D_MODEL, ffn_dim=D_FF, num_attention_heads=2, vocab_size=VOCABULARY, pad_token_id=PAD,
             word_embed_proj_dim=D_MODEL, max_position_embeddings=_POSITIONS, bos_token_id=2, eos_token_id=3),
        ("num_hidden_layers",), ("decoder",), "relu", parts=2,
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT, ("num_hidden_layers",), ("decoder",), "gelu"),
    "llama": _llama("Llama"),
    "mistral": _llama("Mistral"),
    "qwen2": _llama("Qwen2"),
    "qwen3": _llama("Qwen3", **_SMALL_HEADS),
    "olmo": _llama("Olmo"),
    "olmo2": _llama("Olmo2"),
    "gemma2": _llama("Gemma2", "gelu_tanh", **_SMALL_HEADS),
    "phi3": Family(
        "Phi3ForCausalLM", "Phi3Config", _LLAMA, ("num_hidden_layers",), ("decoder",), "silu",
        gated=True, bias=False, fused=True,
    ),
    "bert": _encoder("BertForMaskedLM", "BertConfig", _TEXT, parts=2),
    "roberta": _encoder("RobertaForMaskedLM", "RobertaConfig", _TEXT, parts=2),
    "vit": _encoder("ViTForImageClassification", "ViTConfig", _IMAGE, parts=1),
    "deit": _encoder("DeiTForImageClassification", "DeiTConfig", _IMAGE, parts=1),
    "marian": _seq2seq("MarianMTModel", "MarianConfig", max_position_embeddings=_POSITIONS),
    "bart": _seq2seq("BartForConditionalGeneration", "BartConfig", max_position_embeddings=_POSITIONS),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config", _T5 | dict(feed_forward_proj="relu"),
        ("num_layers", "num_decoder_layers"), ("encoder", "decoder"), "relu", bias=False,
    ),
    "t5-gated": Family(
        "T5ForConditionalGeneration", "T5Config", _T5 | dict(feed_forward_proj="gated-gelu"),
        ("num_layers", "num_decoder_layers"), ("encoder", "decoder"), "gelu_tanh", gated=True, bias=False,
    ),
    "whisper": _seq2seq(
        "WhisperForConditionalGeneration", "WhisperConfig", max_source_positions=16, num_mel_bins=8,
        max_target_positions=_POSITIONS,
    ),
}  # fmt: skip
# Plain torch modules, known to the package through register_family (see `tiny_model`).
PLAIN: dict[str, Family] = {
    "transformer_encoder": Family("TransformerEncoder", "", {}, (), ("encoder",), "relu", parts=2),
    "sequential": Family("Sequential", "", {}, (), ("decoder",), "gelu", parts=1),
}
ALL = FAMILIES | PLAIN
ENCODER_DECODER = tuple(name for name, family in FAMILIES.items() if len(family.stacks) == 2)


def tiny_model(name: str, layers: int = 4, seed: int = 0) -> nn.Module:
    """A random model of one family in evaluation mode: `layers` layers (per stack), d_model 16, d_ff 32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _plain_model(name, layers) if name in PLAIN else _transformers_model(FAMILIES[name], layers)
        _randomize_(model)
    return model.eval()


def tiny_inputs(model: nn.Module, batch: int = 2, length: int = 8, seed: int = 0, padded: bool = False) -> dict:
    """One batch for `model(**batch)`, labels included where the model takes them.

    With `padded`, every sequence but the first is cut to a random length: attention_mask 0 and label -100 beyond.
    Images and audio have their own length and no padding.
    """
    g = torch.Generator().manual_seed(seed)
    if not hasattr(model, "config"):
        return {_plain_argument(model): torch.randn(batch, length, D_MODEL, generator=g)}
    if model.main_input_name == "pixel_values":
        labels = torch.randint(0, model.config.num_labels, (batch,), generator=g)
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=g), "labels": labels}
    ids, mask = _tokens(batch, length, padded, g)
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    target, target_mask = _tokens(batch, length - 1, padded, g)
    labels = {"labels": target.masked_fill(target_mask == 0, -100)}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(batch, 8, 32, generator=g)} | labels
    return {"input_ids": ids, "attention_mask": mask} | labels


def logits(model: nn.Module, inputs: dict) -> Tensor:
    """What the model computes from `tiny_inputs`, without gradients."""
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def _transformers_model(family: Family, layers: int) -> nn.Module:
    import transformers

    config = getattr(transformers, family.config)(**family.values, **dict.fromkeys(family.layers, layers))
    return getattr(transformers, family.model)(config)


def _plain_model(name: str, layers: int) -> nn.Module:
    if name == "transformer_encoder":
        ff.register_family(
            "TransformerEncoder", ff.FFNSpec("layers", "linear1", "linear2", stack="encoder", activation="activation")
        )
        layer = nn.TransformerEncoderLayer(D_MODEL, nhead=2, dim_feedforward=D_FF, batch_first=True)
        return nn.TransformerEncoder(layer, layers)
    ff.register_family("Sequential", ff.FFNSpec("", "ffn.0", "ffn.2", module="ffn", activation="ffn.1"))
    return nn.Sequential(*(Residual() for _ in range(layers)))


class Residual(nn.Module):
    """A block of somebody's own: x + FFN(norm(x))."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D_MODEL)
        self.ffn = nn.Sequential(nn.Linear(D_MODEL, D_FF), nn.GELU(), nn.Linear(D_FF, D_MODEL))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


def _plain_argument(model: nn.Module) -> str:
    return "src" if isinstance(model, nn.TransformerEncoder) else "input"


@torch.no_grad()
def _randomize_(model: nn.Module) -> None:
    """Weights large enough to matter, and biases other than zero; norms keep their weights."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # sinusoids: constants, which Marian does not even save
            continue
        if parameter.ndim >= 2:
            parameter.normal_(std=0.2)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)


def _tokens(batch: int, length: int, padded: bool, g: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, VOCABULARY, (batch, length), generator=g)
    lengths = torch.full((batch,), length)
    if padded:
        lengths[1:] = torch.randint(2, length, (batch - 1,), generator=g)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


@torch.no_grad()
def permute_ffn_(model: nn.Module, ffn: ff.FFNSublayer, permutation: Tensor) -> None:
    """Reorder the hidden neurons of one FFN (its own implementation, to test the package's against)."""

    def reorder(parameter: Tensor, dim: int) -> None:
        halves = parameter.chunk(2, dim) if parameter.shape[dim] == 2 * ffn.d_ff else [parameter]
        parameter.copy_(torch.cat([half.transpose(0, dim)[permutation].transpose(0, dim) for half in halves], dim))

    for path in filter(None, (ffn.gate_path, ffn.up_path)):
        module = model.get_submodule(path)
        reorder(module.weight, int(_is_conv1d(module)))
        if module.bias is not None:
            reorder(module.bias, 0)
    down = model.get_submodule(ffn.down_path)
    reorder(down.weight, 1 - int(_is_conv1d(down)))


@torch.no_grad()
def plant_copies_(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Make every FFN a permuted copy of the first one of its stack.

    Returns {FFN key: permutation that aligns it with the first}, what an alignment must find.
    """
    g = torch.Generator().manual_seed(seed)
    first, planted = {}, {}
    for ffn in ff.find_ffns(model):
        anchor = first.setdefault(ffn.stack, ffn)
        for path, source in zip(ffn.shared, anchor.shared, strict=True):
            model.get_submodule(path).load_state_dict(model.get_submodule(source).state_dict())
        order = torch.arange(ffn.d_ff) if ffn is anchor else torch.randperm(ffn.d_ff, generator=g)
        permute_ffn_(model, ffn, order)
        planted[ffn.key] = order.argsort()
    return planted


def accelerate_(model: nn.Module, recompute: str = "activation") -> nn.Module:
    """Tiny FFNs too, which are too little work for the op outside of tests."""
    return ff.accelerate_(model, recompute, least=0)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


class features_of:
    """Records, for every FFN, what W_up gives and W_down takes, over all batches: `.up[key]`, `.down[key]` lists."""

    def __init__(self, model: nn.Module):
        self.up: dict[str, list[Tensor]] = {}
        self.down: dict[str, list[Tensor]] = {}
        self.gate: dict[str, list[Tensor]] = {}
        self._handles = []
        for ffn in ff.find_ffns(model):
            for store, path in ((self.up, ffn.up_path), (self.gate, ffn.gate_path)):
                if path:
                    self._record(model.get_submodule(path).register_forward_hook, store, ffn.key, "output")
            self._record(model.get_submodule(ffn.down_path).register_forward_pre_hook, self.down, ffn.key, "input")

    def _record(self, register, store: dict, key: str, what: str) -> None:
        seen = store.setdefault(key, [])

        def hook(module, inputs, output=None):
            seen.append((output if what == "output" else inputs[0]).detach().clone())

        self._handles.append(register(hook))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()
