"""collect: the right numbers from the right tokens, and nothing left behind on the model."""

import warnings

import pytest
import torch
from torch import nn

import ffmerge_fast as ff
from ffmerge_fast.ops.common import backends
from tests.helpers.tiny_models import ALL, D_FF, D_MODEL, ENCODER_DECODER, features_of, logits, tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*correlations are noisy")


def batches(model, count=3, seed=0, padded=True, **sizes):
    return [tiny_inputs(model, seed=seed + i, padded=padded, **sizes) for i in range(count)]


def counted(model, batch, stack):
    """Mask of the tokens that must be counted, from the batch as `tiny_inputs` makes it; None: all."""
    if stack == "encoder" or not getattr(model.config, "is_encoder_decoder", False):
        return batch.get("attention_mask")
    return batch["labels"] != -100


def true_features(model, data, kind="up"):
    """{FFN key: float64 [tokens, d_ff]} of the counted tokens, by hooks of the test's own."""
    with features_of(model) as seen:
        for batch in data:
            logits(model, batch)
    found = {}
    for ffn in ff.find_ffns(model):
        rows = []
        for x, batch in zip(getattr(seen, kind)[ffn.key], data, strict=True):
            mask = counted(model, batch, ffn.stack) if hasattr(model, "config") else None
            x = x[..., -D_FF:].reshape(-1, D_FF)
            rows.append(x if mask is None else x[mask.reshape(-1).bool()])
        found[ffn.key] = torch.cat(rows).double()
    return found


def pearson(a, b):
    """Correlation [d, d] in float64; 0 without variance."""
    a, b = (x - x.mean(0) for x in (a, b))
    scale = a.square().sum(0).sqrt()[:, None] * b.square().sum(0).sqrt()
    return torch.where(scale > 0, a.T @ b / scale, 0).float()


def assert_same_stats(a, b, atol=1e-6):
    assert a.tokens == b.tokens and a.settings["pairs"] == b.settings["pairs"]
    for stack, pairs in a.settings["pairs"].items():
        for i, j in pairs:
            torch.testing.assert_close(a.correlation(i, j, stack), b.correlation(i, j, stack), atol=atol, rtol=0)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("name", ALL)
def test_correlations_equal_float64_on_every_family(name):
    model = tiny_model(name, layers=3)
    data = batches(model, batch=3)
    stats, truth = ff.collect(model, data, window=3), true_features(model, data)
    assert hooks(model) == 0
    for stack in ALL[name].stacks:
        assert stats.tokens[stack] == len(truth[f"{stack}.0"])
        assert stats.settings["pairs"][stack] == [[0, 1], [0, 2], [1, 2]]
        for i, j in [(0, 1), (0, 2), (1, 2), (2, 0)]:
            expected = pearson(truth[f"{stack}.{i}"], truth[f"{stack}.{j}"])
            torch.testing.assert_close(stats.correlation(i, j, stack), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "bert", "marian", "t5-gated"])
def test_features_after_the_activation_are_the_input_of_w_down(name):
    model = tiny_model(name, layers=2)
    data = batches(model)
    stats, truth = ff.collect(model, data, window=2, features="post"), true_features(model, data, "down")
    stack = ALL[name].stacks[-1]
    expected = pearson(truth[f"{stack}.0"], truth[f"{stack}.1"])
    torch.testing.assert_close(stats.correlation(0, 1, stack), expected, atol=1e-5, rtol=0)
    pre = ff.collect(model, data, window=2)
    assert (pre.correlation(0, 1, stack) - expected).abs().max() > 0.05


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "marian", "t5"])
def test_padding_counts_as_if_it_were_not_there(name):  # acceptance fact 7
    model = tiny_model(name)
    padded = tiny_inputs(model, batch=5, length=9, padded=True)
    unpadded = []
    for i in range(5):
        row = {k: v[i : i + 1] for k, v in padded.items()}
        length = int(row["attention_mask"].sum())
        row = {k: v[:, :length] if k != "labels" else v for k, v in row.items()}
        unpadded.append(row | {"labels": row["labels"][row["labels"] != -100][None]})
    a, b = ff.collect(model, [padded], window=4), ff.collect(model, unpadded, window=4)
    assert a.tokens[ALL[name].stacks[0]] == int(padded["attention_mask"].sum()) < 45
    assert_same_stats(a, b, atol=1e-5)


def test_without_a_mask_a_decoder_leaves_out_unlabelled_tokens_and_counts_all_without_labels():
    model = tiny_model("gpt2")
    batch = tiny_inputs(model, batch=4, padded=True)
    masked = ff.collect(model, [batch], window=2)
    del batch["attention_mask"]
    assert_same_stats(ff.collect(model, [batch], window=2), masked)
    del batch["labels"]
    assert ff.collect(model, [batch], window=2).tokens == {"decoder": 32}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("additive", [True, False])
def test_torchs_own_encoder_and_its_padding_mask(batch_first, additive):
    model = tiny_model("transformer_encoder")
    for layer in model.layers:
        layer.self_attn.batch_first = batch_first
    x, lengths = tiny_inputs(model, batch=3, length=6)["src"], (6, 2, 4)
    rows = [x[i : i + 1, :n] for i, n in enumerate(lengths)]
    unpadded = ff.collect(model, [{"src": r if batch_first else r.transpose(0, 1)} for r in rows], window=4)
    padding = torch.arange(6) >= torch.tensor(lengths)[:, None]
    padding = torch.zeros(3, 6).masked_fill(padding, -torch.inf) if additive else padding
    batch = {"src": x if batch_first else x.transpose(0, 1), "src_key_padding_mask": padding}
    assert torch.backends.mha.get_fastpath_enabled()
    padded = ff.collect(model, [batch], window=4)
    assert torch.backends.mha.get_fastpath_enabled() and padded.tokens == {"encoder": 12}
    assert_same_stats(padded, unpadded, atol=1e-5)


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_encoder_and_decoder_count_their_own_tokens(name):
    model = tiny_model(name, layers=2)
    batch = tiny_inputs(model, batch=4, length=10, padded=True)
    encoder = 4 * 16 if name == "whisper" else int(batch["attention_mask"].sum())
    decoder = int((batch["labels"] != -100).sum())
    assert ff.collect(model, [batch], window=2).tokens == {"encoder": encoder, "decoder": decoder}
    assert encoder != decoder


def test_a_decoder_attention_mask_goes_before_the_labels():
    model = tiny_model("bart", layers=2)
    batch = tiny_inputs(model, batch=4, padded=True)
    mask = torch.ones_like(batch["labels"])
    mask[:, 3:] = 0
    assert ff.collect(model, [batch | {"decoder_attention_mask": mask}], window=2).tokens["decoder"] == 12


@pytest.mark.parametrize("splits", [(1, 1, 1, 1, 1, 1, 1, 1), (2, 2, 4), (7, 1), (8,)])
def test_the_split_into_batches_does_not_matter(splits):  # acceptance fact 8
    model = tiny_model("llama")
    whole = tiny_inputs(model, batch=8, padded=True)
    parts, at = [], 0
    for size in splits:
        parts.append({k: v[at : at + size] for k, v in whole.items()})
        at += size
    assert_same_stats(ff.collect(model, parts, window=4), ff.collect(model, [whole], window=4))


@pytest.mark.parametrize("budget", [2, 7, 16, 17, 33])
def test_the_token_budget_is_kept_to_the_token(budget):
    model = tiny_model("gpt2", layers=2)
    asked = []

    def stream():
        for i, batch in enumerate(batches(model, 10, batch=2, length=4)):
            asked.append(i)
            yield batch

    stats = ff.collect(model, stream(), window=2, max_tokens=budget)
    data = batches(model, 10, batch=2, length=4)
    truth = true_features(model, data)
    assert stats.tokens == {"decoder": budget}
    expected = pearson(*(truth[f"decoder.{i}"][:budget] for i in (0, 1)))
    torch.testing.assert_close(stats.correlation(0, 1), expected, atol=1e-5, rtol=0)
    needed, total = 0, 0
    while total < budget:
        total += int(data[needed]["attention_mask"].sum())
        needed += 1
    assert asked == list(range(needed))  # no batch is read beyond the budget


def test_the_token_budget_holds_for_each_stack():
    model = tiny_model("marian", layers=2)
    data = batches(model, 6, batch=2, length=6)
    stats = ff.collect(model, data, window=2, max_tokens=15)
    assert stats.tokens == {"encoder": 15, "decoder": 15}
    truth = true_features(model, data)
    for stack in ("encoder", "decoder"):
        expected = pearson(*(truth[f"{stack}.{i}"][:15] for i in (0, 1)))
        torch.testing.assert_close(stats.correlation(0, 1, stack), expected, atol=1e-5, rtol=0)


def test_large_offsets_cost_no_accuracy():  # acceptance fact 6
    model = tiny_model("gpt2", layers=2)
    with torch.no_grad():
        for ffn in ff.find_ffns(model):
            model.get_submodule(ffn.up_path).bias += 1000
    data = batches(model, 4, batch=8)
    truth = true_features(model, data)
    assert 100 < (truth["decoder.0"].mean(0) / truth["decoder.0"].std(0)).median() < 100_000
    got = ff.collect(model, data, window=2).correlation(0, 1)
    torch.testing.assert_close(got, pearson(truth["decoder.0"], truth["decoder.1"]), atol=2e-6, rtol=0)


def test_dead_neurons_have_correlation_zero_and_a_fixed_place():  # acceptance fact 5
    model = tiny_model("gpt2", layers=2)
    for ffn, dead in zip(ff.find_ffns(model), ([0, 5, 9], [1, 5]), strict=True):
        with torch.no_grad():
            up = model.get_submodule(ffn.up_path)
            up.weight[:, dead] = 0
            up.bias[dead] = 3.3
    data = batches(model)
    found = [ff.collect(model, data, window=2) for _ in range(2)]
    scores = found[0].correlation(0, 1)
    assert scores.isfinite().all() and scores.abs().max() <= 1
    assert (scores[[0, 5, 9]] == 0).all() and (scores[:, [1, 5]] == 0).all()
    assert (scores[1] != 0).sum() == D_FF - 2
    permutations = [ff.plan(s, "0-1").groups[0].permutations[1] for s in found]
    assert torch.equal(*permutations) and torch.equal(permutations[0].sort().values, torch.arange(D_FF))


def test_a_bfloat16_model_is_collected_as_its_float64_features_say():
    model = tiny_model("llama", layers=2).bfloat16()
    data = batches(model)
    stats, truth = ff.collect(model, data, window=2), true_features(model, data)
    expected = pearson(truth["decoder.0"], truth["decoder.1"])
    torch.testing.assert_close(stats.correlation(0, 1), expected, atol=1e-5, rtol=0)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


# ------------------------------------------------------------------------------------------------- which pairs, forms


def test_a_window_takes_the_band_and_layers_take_the_anchors_pairs():
    model = tiny_model("gpt2", layers=5)
    data = batches(model, 1)

    def pairs(**wanted):
        return ff.collect(model, data, **wanted).settings["pairs"]["decoder"]

    assert pairs(window=2) == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert pairs(window=3) == [[0, 1], [0, 2], [1, 2], [1, 3], [2, 3], [2, 4], [3, 4]]
    assert pairs(layers="1-3") == [[1, 2], [1, 3]]
    assert pairs(layers="1-3", anchor="last") == [[3, 1], [3, 2]]
    assert pairs(layers="0-1,2+4", anchor="middle") == [[1, 0], [4, 2]]
    assert pairs(pairs=[(0, 4), (3, 1)]) == [[0, 4], [3, 1]]
    assert pairs(pairs=[("decoder.0", "decoder.4"), (0, 4)]) == [[0, 4]]


def test_pairs_of_two_stacks_are_named():
    model = tiny_model("t5", layers=3)
    stats = ff.collect(model, batches(model), pairs=[("encoder.0", "encoder.2"), ("decoder.1", "decoder.2")])
    assert stats.settings["pairs"] == {"encoder": [[0, 2]], "decoder": [[1, 2]]}
    only = ff.collect(model, batches(model), pairs=[("decoder.1", "decoder.2")])
    assert list(only.tokens) == ["decoder"]
    torch.testing.assert_close(only.correlation(1, 2), stats.correlation(1, 2, "decoder"))


def test_dicts_tuples_and_tensors_are_the_same_batch():
    model = tiny_model("gpt2", layers=2)
    ids = [tiny_inputs(model, seed=i)["input_ids"] for i in range(3)]
    of_dicts = ff.collect(model, [{"input_ids": i} for i in ids], window=2)
    assert_same_stats(ff.collect(model, ids, window=2), of_dicts, atol=0)
    assert_same_stats(ff.collect(model, [(i,) for i in ids], window=2), of_dicts, atol=0)
    assert_same_stats(ff.collect(model, [[i] for i in ids], window=2), of_dicts, atol=0)
    assert_same_stats(ff.collect(model, iter(ids), window=2), of_dicts, atol=0)


def test_the_forward_pass_stops_after_the_last_ffn_that_is_wanted():
    model = tiny_model("gpt2", layers=4)
    ran = []
    for name in ("transformer.h.1.mlp.c_fc", "transformer.h.2", "transformer.h.3.mlp.c_fc", "lm_head"):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    ff.collect(model, batches(model, 1), pairs=[(0, 1)])
    assert ran == ["transformer.h.1.mlp.c_fc"]
    ran.clear()
    ff.collect(model, batches(model, 1), window=2)
    assert "transformer.h.3.mlp.c_fc" in ran and "lm_head" not in ran


# --------------------------------------------------------------------------------------- nothing is left on the model


def test_modes_dtypes_and_gradients_of_the_model_stay():
    model = tiny_model("gpt2")
    model.train()
    model.transformer.h[1].mlp.dropout.eval()
    model.transformer.h[0].requires_grad_(False)
    modes = {n: m.training for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    weights = {n: p.clone() for n, p in model.named_parameters()}
    a = ff.collect(model, batches(model), window=2)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in model.named_parameters())
    assert_same_stats(a, ff.collect(model.eval(), batches(model), window=2), atol=0)  # dropout was off


def test_hooks_and_modes_are_restored_after_an_error():
    model = tiny_model("gpt2").train()

    def stream():
        yield tiny_inputs(model)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        ff.collect(model, stream(), window=2)
    with pytest.raises(ValueError, match="You have to specify"):
        ff.collect(model, [{"no_such_argument": 1}], window=2)
    assert hooks(model) == 0 and all(m.training for m in model.modules())
    ff.collect(model, batches(model), window=2)


def test_hooks_of_others_are_left_alone():
    model = tiny_model("gpt2")
    calls = []
    handle = model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: calls.append(1))
    ff.collect(model, batches(model, 2), window=2)
    assert len(calls) == 2 and hooks(model) == 1
    handle.remove()


# ------------------------------------------------------------------------------------------------------- bad features


def test_features_that_are_not_finite_name_layer_and_batch():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.weight[:, 3] = 3e38  # finite, but its products are not
    with pytest.raises(ff.FFMergeError, match=r"batch 0, decoder: features of layers \[2\] hold NaN, Inf") as error:
        ff.collect(model, batches(model), pairs=[(0, 2)])
    assert "\n" not in str(error.value) and hooks(model) == 0


def test_the_batch_with_nan_is_named_and_nan_in_padding_is_not_an_error():
    model = tiny_model("bert", layers=2)
    batch = tiny_inputs(model, batch=2, length=6)
    clean = {k: v.clone() for k, v in batch.items()}
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = 3e38  # whose variance overflows
    batch["input_ids"], clean["input_ids"] = torch.full((2, 6), 5), torch.full((2, 6), 7)
    with pytest.raises(ff.FFMergeError, match=r"batch 2, encoder: features of layers \[0, 1\]"):
        ff.collect(model, [clean, clean, batch], window=2)


def test_masked_tokens_may_hold_nan():
    ff.register_family("Lookup", ff.FFNSpec("blocks", "0", "2", activation="1"))
    model = Lookup()
    batch = {"x": torch.randn(2, 4, D_MODEL), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    batch["x"][1, 2:] = float("nan")
    stats = ff.collect(model, [batch], window=2)
    assert stats.tokens == {"decoder": 6} and stats.correlation(0, 1).isfinite().all()


class Lookup(nn.Module):
    """Blocks that keep every token to itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(D_MODEL, D_FF), nn.ReLU(), nn.Linear(D_FF, D_MODEL)) for _ in range(2)
        )

    def forward(self, x, attention_mask):
        for block in self.blocks:
            x = x + block(x)
        return x


# --------------------------------------------------------------------------------------------------------- bad input


def test_too_few_tokens():
    model = tiny_model("gpt2", layers=2)
    with pytest.raises(ff.FFMergeError, match="no calibration data: `batches` is empty"):
        ff.collect(model, [], window=2)
    one = tiny_inputs(model, batch=1, length=1)
    with pytest.raises(ff.FFMergeError, match="the decoder saw 1 tokens, wanted at least 2"):
        ff.collect(model, [one], window=2)
    nothing = tiny_inputs(model)
    nothing["attention_mask"].zero_()
    with pytest.raises(ff.FFMergeError, match="the decoder saw 0 tokens, wanted at least 2"):
        ff.collect(model, [nothing], window=2)
    with pytest.raises(ff.FFMergeError, match="max_tokens: got 1, wanted at least 2"):
        ff.collect(model, [one], window=2, max_tokens=1)


def test_fewer_tokens_than_features_are_worth_a_warning():
    model = tiny_model("gpt2", layers=2)
    with pytest.warns(UserWarning, match=f"the decoder saw {D_FF - 1} tokens for {D_FF} features"):
        ff.collect(model, batches(model, 9), window=2, max_tokens=D_FF - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ff.collect(model, batches(model, 9), window=2, max_tokens=D_FF)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "exactly one of window=, pairs= or layers="),
        (dict(window=2, layers="0-1"), "exactly one of window=, pairs= or layers="),
        (dict(pairs=[(0, 1)], layers="0-1"), "exactly one of window=, pairs= or layers="),
        (dict(window=5), "window: got 5, wanted 2 to 4"),
        (dict(layers="2-9"), "decoder layer 4 does not exist"),
        (dict(layers="0-1", anchor="best"), "anchor: got 'best'"),
        (dict(pairs=[]), "pairs: empty"),
        (dict(pairs=[(0, 7)]), "pairs: got (0, 7), wanted two layers of one stack"),
        (dict(pairs=[(0, 1, 2)]), "pairs: got (0, 1, 2), wanted two layers"),
        (dict(pairs=[("encoder.0", 1)]), "wanted two layers of one stack"),
        (dict(window=2, features="during"), "features: got 'during', wanted 'pre'"),
    ],
)
def test_bad_arguments_get_one_clear_line(wanted, message):
    model = tiny_model("gpt2")
    with pytest.raises(ff.FFMergeError) as error:
        ff.collect(model, batches(model), **wanted)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_pairs_across_stacks_are_refused():
    model = tiny_model("marian", layers=2)
    for pair in (("encoder.0", "decoder.0"), (0, 1)):
        with pytest.raises(ff.FFMergeError, match="wanted two layers of one stack"):
            ff.collect(model, batches(model), pairs=[pair])


def test_a_mask_that_does_not_fit_the_tokens_is_refused():
    ff.register_family("Lookup", ff.FFNSpec("blocks", "0", "2", activation="1"))
    batch = {"x": torch.randn(2, 4, D_MODEL), "attention_mask": torch.ones(2, 5)}
    with pytest.raises(
        ff.FFMergeError, match=r"decoder's attention_mask has shape \[2, 5\], but its FFNs saw 8 tokens"
    ):
        ff.collect(Lookup(), [batch], window=2)


def test_a_stack_that_does_not_run_is_named():
    model = tiny_model("bart", layers=2)
    batch = tiny_inputs(model)
    batch["encoder_outputs"] = model.get_encoder()(batch.pop("input_ids"))
    with pytest.raises(ff.FFMergeError, match="batch 0: the encoder did not run; give inputs for it"):
        ff.collect(model, [batch], window=2)
    assert ff.collect(model, [batch], pairs=[("decoder.0", "decoder.1")]).tokens == {"decoder": 14}


def test_other_batches_are_refused():
    with pytest.raises(ff.FFMergeError, match="batches: got a str, wanted dicts, tuples or tensors"):
        ff.collect(tiny_model("gpt2"), ["some text"], window=2)


def test_a_merged_model_is_refused():
    model = tiny_model("gpt2")
    ff.merge_(model, ff.plan(model=model, layers="1-2", method="average"))
    with pytest.raises(ff.FFMergeError, match="merged already; give the original model"):
        ff.collect(model, batches(model), window=2)


# --------------------------------------------------------------------------------------------------------- cache_dir


class Killed(Exception):
    pass


def until(data, stop):
    """The data, and then the end of the process (an exception) before batch `stop`."""
    for i, batch in enumerate(data):
        if i == stop:
            raise Killed
        yield batch


@pytest.mark.parametrize("name", ["gpt2", "marian"])
@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("backend", ["reference", None])
def test_a_killed_run_goes_on(tmp_path, monkeypatch, backend, name, stop):
    """Bit for bit, though backends gather 1,024 tokens for a product, and a batch has some 600."""
    monkeypatch.setattr(backends, "_forced", backend)
    model = tiny_model(name, layers=3)
    data = batches(model, 7, batch=40, length=16)
    wanted = dict(window=3, max_tokens=3500)
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(len(runs)))
    whole = ff.collect(model, data, **wanted)
    needed = len(runs)
    cache = tmp_path / "new" / "cache"
    with pytest.raises(Killed):
        ff.collect(model, until(data, stop), cache_dir=cache, save_seconds=0, **wanted)
    runs.clear()
    resumed = ff.collect(model, data, cache_dir=cache, **wanted)
    left_out = needed - len(runs)  # the first ones are not run; a save waits until nothing is gathered
    assert stop - 4 < left_out <= stop and (left_out == stop or not backend)
    assert resumed.tokens == whole.tokens
    assert_same_stats(whole, resumed, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "marian"])
def test_saves_change_no_bit(tmp_path, name):
    model = tiny_model(name, layers=3)
    data = batches(model, 7, batch=40, length=16)
    plain = ff.collect(model, data, window=3, max_tokens=3500)
    saved = ff.collect(model, data, window=3, max_tokens=3500, cache_dir=tmp_path, save_seconds=0)
    assert_same_stats(plain, saved, atol=0)


def test_a_finished_run_is_read_from_the_cache(tmp_path):
    model = tiny_model("gpt2")
    data = batches(model, 5)
    budget = sum(int(batch["attention_mask"].sum()) for batch in data[:2]) - 1
    for tokens, asked in ((budget, 2), (10_000, 5)):  # enough data, and not
        wanted = dict(window=2, cache_dir=tmp_path / str(tokens), max_tokens=tokens)
        first = ff.collect(model, data, **wanted)
        handle = model.register_forward_pre_hook(lambda *_: 1 / 0)
        again = ff.collect(model, until(data, asked), **wanted)
        handle.remove()
        assert_same_stats(first, again, atol=0)
        assert first.data == again.data


def test_other_data_is_never_taken_for_the_kept(tmp_path):
    model, data = tiny_model("gpt2"), batches(tiny_model("gpt2"), 4)
    wanted = dict(window=2, cache_dir=tmp_path, max_tokens=30)
    first = ff.collect(model, data, **wanted)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    one_id = [{k: v.clone() for k, v in batch.items()} for batch in data]
    one_id[1]["input_ids"][0, 0] += 1
    for other in (one_id, data[::-1], data[:1], []):
        with pytest.raises(ff.FFMergeError, match="cache_dir: .* was made with other data.*--fresh") as error:
            ff.collect(model, other, **wanted)
        assert "\n" not in str(error.value) and file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    fresh = ff.collect(model, one_id, **wanted, fresh=True)
    assert_same_stats(fresh, ff.collect(model, one_id, window=2, max_tokens=30), atol=1e-6)
    assert fresh.data != first.data
    assert_same_stats(fresh, ff.collect(model, one_id, **wanted), atol=0)


def test_more_data_than_the_kept_run_had_is_counted_too(tmp_path):
    model, data = tiny_model("gpt2"), batches(tiny_model("gpt2"), 4)
    ff.collect(model, data[:2], window=2, cache_dir=tmp_path)
    found = ff.collect(model, data, window=2, cache_dir=tmp_path)
    assert_same_stats(found, ff.collect(model, data, window=2), atol=1e-6)


def test_a_cache_of_another_run_is_refused(tmp_path):
    model = tiny_model("gpt2")
    ff.collect(model, batches(model), window=2, cache_dir=tmp_path)
    with pytest.raises(ff.FFMergeError, match="cache_dir: .* was made with other model: "):
        ff.collect(tiny_model("gpt2", seed=1), batches(model), window=2, cache_dir=tmp_path)
    other = tiny_model("gpt2")
    with torch.no_grad():
        other.get_input_embeddings().weight[3, 5] += 1e-6  # of which the fingerprint knows nothing
    with pytest.raises(ff.FFMergeError, match="cache_dir: .* was made with other weights: "):
        ff.collect(other, batches(model), window=2, cache_dir=tmp_path)
    for change, name in (
        (dict(window=3), "pairs"),
        (dict(features="post"), "features"),
        (dict(max_tokens=9), "max_tok"),
    ):
        with pytest.raises(ff.FFMergeError, match=f"cache_dir: .* was made with other {name}"):
            ff.collect(model, batches(model), **dict(window=2) | change, cache_dir=tmp_path)


def test_a_damaged_cache_gets_one_line(tmp_path):
    model = tiny_model("gpt2")
    ff.collect(model, batches(model), window=2, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ff.FFMergeError, match="is damaged"):
        ff.collect(model, batches(model), window=2, cache_dir=tmp_path)


def test_a_memory_budget_changes_no_bit():
    model = tiny_model("gpt2")
    batches = [tiny_inputs(model, seed=seed) for seed in range(2)]
    free, tight = (ff.collect(model, batches, window=3, max_memory=m) for m in (None, "5000"))
    state = tight.states["decoder"]
    assert type(state._moments.accumulators).__name__ == "SpooledAccumulators"
    for i, j in state.pairs:
        assert torch.equal(free.correlation(i, j), tight.correlation(i, j))
    with pytest.raises(ff.FFMergeError, match="max_memory: got 'much'"):
        ff.collect(model, batches, window=3, max_memory="much")
