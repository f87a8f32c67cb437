"""Heads, headless models and settings beside each family's usual ones."""

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.projecting import equal, scores, weights
from tests.helpers.tiny_models import FAMILIES, tiny_inputs

transformers = pytest.importorskip("transformers")

CASES = {  # class, family whose config it takes, other settings
    "pooler and classifier": ("BertForSequenceClassification", "bert", {}),
    "pooler": ("ViTModel", "vit", {}),
    "pooler of a width of its own": ("ViTModel", "vit", dict(pooler_output_size=24)),
    "no head": ("GPT2Model", "gpt2", {}),
    "token classifier": ("LlamaForSequenceClassification", "llama", dict(num_labels=3)),
    "tied llama": ("LlamaForCausalLM", "llama", dict(tie_word_embeddings=True, attention_bias=True)),
    "tied qwen": ("Qwen2ForCausalLM", "qwen2", dict(tie_word_embeddings=True)),
    "wide heads": ("LlamaForCausalLM", "llama", dict(head_dim=12)),
    "embeddings of a width of their own": ("OPTForCausalLM", "opt", dict(word_embed_proj_dim=8)),
    "norms after": ("OPTForCausalLM", "opt", dict(do_layer_norm_before=False)),
    "one stack of Marian": ("MarianForCausalLM", "marian", dict(is_decoder=True, add_cross_attention=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_projects_trains_and_loads(case, tmp_path):
    name, family, values = CASES[case]
    known = FAMILIES[family]
    config = getattr(transformers, known.config)(**(known.values | values), **dict.fromkeys(known.layers, 1))
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    proj = ff.project(model, d_model=8, d_ff=12, importance=scores(model))
    assert equal(weights(proj.student), weights(ff.hard_prune(model, d_model=8, d_ff=12, importance=scores(model))))
    inputs = {k: v for k, v in tiny_inputs(model).items() if k != "labels"}
    with torch.no_grad():
        wanted = model(**inputs)[0].shape
    optimizer = proj.optimizer(lr=1e-2)
    before = weights(proj.student)
    for _ in range(2):
        optimizer.zero_grad()
        proj.student(**inputs)[0].square().mean().backward()
        optimizer.step()
    moved = [n for n, w in weights(proj.student).items() if not torch.equal(w, before[n])]
    assert any("embed" in n or "wte" in n for n in moved)
    proj.fold().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found, expected = loaded(**inputs)[0], proj.student.eval()(**inputs)[0]
    assert torch.equal(found, expected)
    hidden = name.endswith("Model")
    assert found.shape == (wanted[:-1] + (8,) if hidden else wanted)
