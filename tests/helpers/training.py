"""Small tied models, batches and a tokenizer for the driver's tests."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

import ffmerge_fast as ff
from tests.helpers.tiny_models import VOCABULARY, tiny_model


def tied_gpt2(dropout: float = 0.0) -> nn.Module:
    """Four blocks, of which 1 and 2 share one FFN module."""
    model = tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.transformer.h[2].mlp = model.transformer.h[1].mlp
    return model


def delta_gpt2() -> nn.Module:
    """Four blocks, of which 1 and 2 share the weights of one FFN and have low-rank deltas. No dropout."""
    teacher = untied(tied_gpt2())
    model = ff.merge(teacher, ff.plan(layers="1-2", method="average", model=teacher))
    ff.local_distill_(model, teacher, lm_batches(4, seed=5), steps=2, delta_rank=2)
    return model


def tied_marian() -> nn.Module:
    """Two stacks of four layers; in both, layers 1 and 2 share fc1 and fc2. No dropout."""
    model = tiny_model("marian")
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    for stack in (model.model.encoder, model.model.decoder):
        stack.layers[2].fc1, stack.layers[2].fc2 = stack.layers[1].fc1, stack.layers[1].fc2
    return model


def untied(model: nn.Module) -> nn.Module:
    """A copy of `tied_gpt2` with an FFN of its own in block 2."""
    model = copy.deepcopy(model)
    model.transformer.h[2].mlp = copy.deepcopy(model.transformer.h[1].mlp)
    return model


def lm_batches(count: int, size: int = 2, length: int = 12, seed: int = 0, padded: bool = False) -> list[dict]:
    """Random batches of ids; with `padded`, sequences of different lengths, -100 beyond."""
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(4, VOCABULARY, (size, length), generator=g)
        labels = ids.clone()
        if padded:
            lengths = torch.randint(3, length + 1, (size, 1), generator=g)
            labels[torch.arange(length) >= lengths] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def joined(batches: list[dict]) -> dict:
    """One batch of several of equal length."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def tiny_tokenizer(folder: Path, appends_end: bool = False):
    """A tokenizer of single bytes, saved in `folder`: <pad> 0, </s> 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if appends_end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def byte_model(name: str) -> nn.Module:
    """A tiny model whose vocabulary is `tiny_tokenizer`'s."""
    model = tiny_model(name)
    model.resize_token_embeddings(258)
    for part in (model.config, getattr(model, "generation_config", None)):
        part.pad_token_id, part.eos_token_id, part.decoder_start_token_id = 0, 1, 0
    return model
