"""Widths that the class cannot have, or whose config cannot be written or read, are known before any work."""

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.tiny_models import tiny_inputs, tiny_model

transformers = pytest.importorskip("transformers", minversion="5")
SMALL = dict(
    vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
)  # fmt: skip
LONG = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)


def llama(**values):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | values)).eval()


def saved(small, path):
    ff.save_pretrained(small, path)
    again = ff.from_pretrained(path)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    return again


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.6, 0.8])
def test_keep_takes_widths_that_can_be_saved(keep, tied, tmp_path):
    """Llama's config refuses a hidden size that is no multiple of the heads, though heads stay as wide as they are."""
    model = llama(tie_word_embeddings=tied)
    proj = ff.project(model, keep=keep, importance=ff.importance(model, method="magnitude"))
    small = saved(proj.fold(), tmp_path / "m")
    assert small.config.hidden_size % 6 == 0 and small.config.hidden_size < 48
    share = small.num_parameters() / model.num_parameters()
    assert abs(share / keep - 1) < 0.25, share  # the next multiple of 6 is that far away


def test_a_refusal_names_the_nearest_widths_that_work(tmp_path):
    model = llama()
    for make in (ff.project, ff.hard_prune, ff.from_scratch):
        with pytest.raises(ff.FFMergeError, match="^d_model: got 38, .*; nearest that work: 36 and 42$") as error:
            make(model, d_model=38, d_ff=76)
        assert "(38) is not a multiple of the number of attention heads (6)" in str(error.value)
        assert "\n" not in str(error.value)
    for d_model in (36, 42):
        saved(ff.hard_prune(model, d_model=d_model, d_ff=76), tmp_path / str(d_model))
    with pytest.raises(ff.FFMergeError, match="nearest that work: 24$"):
        ff.project(llama(num_attention_heads=24, num_key_value_heads=2, head_dim=8), d_model=20)


def test_one_width_only():
    """Longrope's factors are counted by the hidden size; the base's own width stays."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(**SMALL, original_max_position_embeddings=32, rope_scaling=LONG)
    model = transformers.Phi3ForCausalLM(config)
    with pytest.raises(ff.FFMergeError, match="^d_model: got 24, .*short_factor.*; nearest that work: 48$"):
        ff.project(model, d_model=24, d_ff=48)
    with pytest.raises(
        ff.FFMergeError, match="^keep: got 0.5, but Phi3ForCausalLM cannot have other widths .*short_fac"
    ):
        ff.project(model, keep=0.5)
    assert ff.hard_prune(model, d_ff=48).config.intermediate_size == 48


def test_grouped_attention_that_follows_the_width_is_refused_by_name():
    torch.manual_seed(0)
    model = transformers.StableLmForCausalLM(transformers.StableLmConfig(**SMALL, partial_rotary_factor=0.5))
    for use in (lambda: ff.importance(model, [tiny_inputs(model)]), lambda: ff.project(model, keep=0.5)):
        with pytest.raises(ff.FFMergeError, match="^project: .*self_attn has fewer keys than queries.*'stablelm'$"):
            use()


@pytest.mark.parametrize("name", ["gpt2", "opt", "mistral", "bert", "vit", "marian", "t5"])
def test_architectures_without_such_rules_get_what_they_got(name):
    """The nearest width of all, whatever it is."""
    model = tiny_model(name)
    total = sum(p.numel() for p in model.parameters())
    small = ff.from_scratch(model, keep=0.5, untie_embeddings=False)
    got = sum(p.numel() for p in small.parameters())
    step = 8 if name in ("gpt2", "opt", "bert", "vit", "marian") else 1  # whole heads
    d_model = small.config.hidden_size
    others = [n for n in (d_model - step, d_model + step) if 0 < n <= 16]
    counts = [
        sum(p.numel() for p in ff.from_scratch(model, d_model=n, d_ff=2 * n, untie_embeddings=False).parameters())
        for n in others
    ]
    assert all(abs(got - total / 2) <= abs(count - total / 2) for count in counts)
