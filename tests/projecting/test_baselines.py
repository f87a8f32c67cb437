"""The small model from scratch: the pruned model's shape, the architecture's own weights."""

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.projecting import FAMILIES, equal, tied_layers, weights
from tests.helpers.tiny_models import ENCODER_DECODER, logits, tiny_inputs, tiny_model

WIDTHS = dict(d_model=8, d_ff=12)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_pruned_model_with_fresh_weights(family):
    model = tiny_model(family, layers=1 if family in ENCODER_DECODER else 2)
    fresh, pruned = ff.from_scratch(model, **WIDTHS), ff.hard_prune(model, **WIDTHS)
    assert fresh.config.to_dict() == pruned.config.to_dict() and type(fresh) is type(model)
    of_fresh, of_pruned = dict(fresh.named_parameters()), dict(pruned.named_parameters())
    assert list(of_fresh) == list(of_pruned)
    for name, p in of_fresh.items():
        assert p.shape == of_pruned[name].shape and p.requires_grad == of_pruned[name].requires_grad, name
        if p.requires_grad and p.ndim >= 2 and p.any():  # a class token begins as zeros
            assert not torch.equal(p, of_pruned[name]), name
    assert logits(fresh, tiny_inputs(model)).isfinite().all()


def test_weights_follow_the_architecture_and_nothing_of_the_base():
    model, other = tiny_model("gpt2", layers=4), tiny_model("gpt2", layers=4, seed=1)
    fresh = ff.from_scratch(model, **WIDTHS)
    assert equal(weights(fresh), weights(ff.from_scratch(other, **WIDTHS)))
    tables = torch.cat([fresh.transformer.wte.weight.flatten(), fresh.transformer.wpe.weight.flatten()])
    down = torch.cat([block.mlp.c_proj.weight.flatten() for block in fresh.transformer.h])
    scale = model.config.initializer_range
    assert tables.std().item() == pytest.approx(scale, rel=0.1)
    assert down.std().item() == pytest.approx(scale / 8**0.5, rel=0.1)  # GPT-2: by 1 / sqrt(2 · layers)
    assert all((block.ln_1.weight == 1).all() and not block.mlp.c_fc.bias.any() for block in fresh.transformer.h)


def test_the_seed_decides_and_global_random_numbers_stay():
    model = tiny_model("vit", layers=1)
    state = torch.get_rng_state()
    first, again, other = (weights(ff.from_scratch(model, keep=0.5, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first, again)
    assert not torch.equal(*(w["vit.embeddings.patch_embeddings.projection.weight"] for w in (first, other)))


def test_a_merged_model_from_scratch_is_merged():
    merged = tied_layers(tiny_model("llama", layers=4))
    fresh = ff.from_scratch(merged, **WIDTHS)
    assert ff.shared_groups(fresh) == ff.shared_groups(merged)
    assert fresh.model.layers[1].mlp is fresh.model.layers[2].mlp


def test_bad_widths():
    with pytest.raises(ff.FFMergeError, match="give either keep="):
        ff.from_scratch(tiny_model("gpt2", layers=1))
