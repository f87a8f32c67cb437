"""What is saved: a plain transformers folder that computes what the student does."""

import json

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.projecting import FAMILIES, batches, equal, projector, tied_layers, train, weights
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_folder_is_stock_transformers(family, tmp_path):
    """Acceptance fact 13: no trace of the package, and not a bit of difference."""
    import transformers

    model, proj = projector(family, layers=1)
    train(proj.student, proj.optimizer(lr=1e-2), batches(model, 2))
    folded = proj.fold()
    folded.save_pretrained(tmp_path)
    files = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert not any(b"ffmerge" in content for content in files.values()) and "ffmerge.json" not in files
    loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path).eval()
    inputs = tiny_inputs(model)
    proj.student.eval()
    assert (logits(loaded, inputs) - logits(proj.student, inputs)).abs().max() == 0
    assert type(folded) is type(model) and not folded.training
    config = json.loads(files["config.json"])
    if family in ("llama", "olmo", "qwen2", "qwen3"):
        assert config["head_dim"] == 8
    if family in ("gpt2", "opt", "bert"):
        assert config["tie_word_embeddings"] is False


def test_a_folded_model_is_on_its_own():
    model, proj = projector("gpt2", layers=1)
    optimizer = proj.optimizer(lr=1e-2)
    proj.student(**tiny_inputs(model)).loss.backward()
    folded = proj.fold()
    before = weights(folded)
    assert all(p.grad is None for p in folded.parameters())
    assert all(p.grad is not None for p in proj.student.parameters())
    optimizer.step()
    assert equal(weights(folded), before) and not equal(weights(proj.student), before)


def test_our_folder_of_a_folded_model(tmp_path):
    model, proj = projector("vit", layers=1)
    ff.save_pretrained(proj.fold(), tmp_path)
    assert ff.verify(tmp_path)["logit_difference"] == 0
    assert torch.equal(
        logits(ff.from_pretrained(tmp_path), tiny_inputs(model)), logits(proj.student, tiny_inputs(model))
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit", "marian"])
def test_merged_and_smaller(family, tmp_path):
    """A x B on disk: the folder is verified as any merged one, and smaller than either alone."""
    base = tiny_model(family, layers=4)
    merged = tied_layers(base)
    proj = ff.project(merged, d_model=8, d_ff=12)
    train(proj.student, proj.optimizer(lr=1e-2), batches(merged, 2))
    folded = proj.fold()
    sizes = {}
    for name, model in (("both", folded), ("merged", merged), ("projected", ff.hard_prune(base, d_model=8, d_ff=12))):
        ff.save_pretrained(model, tmp_path / name)
        sizes[name] = ff.verify(tmp_path / name)["parameters"]
    assert sizes["both"] < min(sizes["merged"], sizes["projected"])
    loaded, inputs = ff.from_pretrained(tmp_path / "both"), tiny_inputs(merged)
    assert ff.shared_groups(loaded) == ff.shared_groups(merged)
    assert torch.equal(logits(loaded, inputs), logits(folded, inputs))
