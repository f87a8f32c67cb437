"""plan: groups, alignments, scores, and what it refuses."""

import copy
import dataclasses
import json
import math
import random
import re

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.merging.plan import MergePlan
from ffmerge_fast.models import summary
from ffmerge_fast.support.files import json_text
from tests.helpers.tiny_models import ALL, D_FF, FAMILIES, plant_copies_, tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*correlations are noisy")


def collected(model, **wanted):
    return ff.collect(model, [tiny_inputs(model, batch=8, seed=i) for i in range(4)], **wanted)


@pytest.fixture(scope="module")
def gpt2():
    model = tiny_model("gpt2", layers=6)
    return model, collected(model, window=6)


# ---------------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("name", ALL)
def test_weights_find_a_planted_permutation_on_every_family(name):
    model = tiny_model(name, layers=3)
    planted = plant_copies_(model)
    made = ff.plan(model=model, layers="0-2", method="weights")
    assert [g.stack for g in made.groups] == list(ALL[name].stacks)
    for group in made.groups:
        for i in group.layers:
            assert torch.equal(group.permutations[i], planted[f"{group.stack}.{i}"])


@pytest.mark.parametrize("anchor", ["first", "middle", "last"])
def test_features_find_a_planted_permutation(anchor):
    """Residual updates of zero: every layer sees the same input, so planted neurons correlate perfectly."""
    model = tiny_model("gpt2", layers=3)
    planted = plant_copies_(model)
    with torch.no_grad():
        for block in model.transformer.h:
            for module in (block.attn.c_proj, block.mlp.c_proj):
                module.weight.zero_()
                module.bias.zero_()
    made = ff.plan(collected(model, layers="0-2", anchor=anchor), layers="0-2", anchor=anchor)
    (group,) = made.groups
    assert group.anchor == {"first": 0, "middle": 1, "last": 2}[anchor]
    of_anchor = planted[f"decoder.{group.anchor}"]
    for i in range(3):
        expected = planted[f"decoder.{i}"][of_anchor.argsort()]
        assert torch.equal(group.permutations[i], expected)
    assert group.anchor not in group.scores and torch.equal(group.permutations[group.anchor], torch.arange(D_FF))
    for matched, unmatched in group.scores.values():
        assert matched == pytest.approx(1, abs=1e-5) and unmatched < 0.5
    assert made.mean_correlation == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("anchor", ["first", "middle", "last"])
def test_the_permutation_is_the_best_assignment_of_the_correlation(gpt2, anchor):
    from scipy.optimize import linear_sum_assignment

    _, stats = gpt2
    (group,) = ff.plan(stats, layers="1-4", anchor=anchor).groups
    assert group.anchor == {"first": 1, "middle": 3, "last": 4}[anchor]
    for i in {1, 2, 3, 4} - {group.anchor}:
        scores = stats.correlation(group.anchor, i).double().numpy()
        rows, columns = linear_sum_assignment(scores, maximize=True)
        assert group.permutations[i].tolist() == columns.tolist()
        assert group.scores[i] == pytest.approx((scores[rows, columns].mean(), scores.diagonal().mean()), abs=1e-7)


def test_average_and_random_and_their_seed(gpt2):
    model, stats = gpt2
    for made in (ff.plan(stats, "1-3", method="average"), ff.plan(model=model, layers="1-3", method="average")):
        assert all(torch.equal(p, torch.arange(D_FF)) for p in made.groups[0].permutations.values())
        assert math.isnan(made.mean_correlation)
    a, b, c = (ff.plan(stats, "1-3", method="random", seed=s).groups[0].permutations for s in (0, 0, 1))
    assert all(torch.equal(a[i], b[i]) for i in (1, 2, 3)) and torch.equal(a[1], torch.arange(D_FF))
    assert not torch.equal(a[2], c[2]) and not torch.equal(a[2], a[3])
    assert torch.equal(a[2].sort().values, torch.arange(D_FF))


# ------------------------------------------------------------------------------------------------- groups and windows


def test_disjoint_and_non_adjacent_groups(gpt2):
    _, stats = gpt2
    made = ff.plan(stats, layers="0+2+5,3-4")
    assert [(g.layers, g.anchor) for g in made.groups] == [((0, 2, 5), 0), ((3, 4), 3)]
    assert made.layers == "0+2+5,3-4" and ff.plan(stats, layers=made.layers).to_dict() == made.to_dict()


def test_without_layers_the_window_that_matches_best_is_taken(gpt2):
    _, stats = gpt2
    made = ff.plan(stats, window=3)
    assert [layers for layers, _ in made.search] == ["0-2", "1-3", "2-4", "3-5"]
    for layers, score in made.search:
        assert score == ff.plan(stats, layers=layers).mean_correlation
    assert made.layers == max(made.search, key=lambda entry: entry[1])[0]


def test_two_stacks_are_planned_in_step():
    model = tiny_model("marian", layers=4)
    stats = collected(model, window=3)
    made = ff.plan(stats, window=3)
    assert [layers for layers, _ in made.search] == ["encoder:0-2,decoder:0-2", "encoder:1-3,decoder:1-3"]
    assert [(g.stack, len(g.layers)) for g in made.groups] == [("encoder", 3), ("decoder", 3)]
    for group in made.groups:
        found = stats.alignment(group.anchor, group.layers[1], group.stack)
        assert torch.equal(group.permutations[group.layers[1]], found.permutation)


def test_sweep_covers_every_window_of_every_size(gpt2):
    model, stats = gpt2
    rows = ff.sweep(stats, [2, 3, 6])
    assert [(r["window"], r["layers"]) for r in rows][4:7] == [(2, "4-5"), (3, "0-2"), (3, "1-3")] and len(rows) == 10
    total, one = sum(p.numel() for p in model.parameters()), FAMILIES["gpt2"].parameters
    for row in rows:
        removed = (row["window"] - 1) * one
        assert (row["parameters"], row["nbytes"]) == (total - removed, 4 * (total - removed))
        assert row["mean_correlation"] == ff.plan(stats, layers=row["layers"]).mean_correlation


# ----------------------------------------------------------------------------------------------- table, dictionaries


def test_the_table_says_what_becomes_of_what(gpt2):
    model, stats = gpt2
    made = ff.plan(stats, layers="1-3")
    lines = str(made).splitlines()
    assert [line.split()[:4] for line in lines[2:5]][0] == ["0", "decoder", "1", "anchor"]
    matched, unmatched = made.groups[0].scores[3][0], made.groups[0].scores[3][1]
    assert lines[4].split() == ["0", "decoder", "3", f"{unmatched:.3f}", f"{matched:.3f}"]
    before = sum(p.numel() for p in model.parameters())
    after = before - 2 * FAMILIES["gpt2"].parameters
    assert (made.parameters_after, made.nbytes_after) == (after, 4 * after)
    assert f"parameters {before:,} -> {after:,} ({after / before - 1:+.1%})" in lines[-1]


def test_a_plan_survives_json(gpt2):
    model, stats = gpt2
    made = ff.plan(stats, window=3, anchor="last")
    again = MergePlan.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again.to_dict() == made.to_dict() and str(again) == str(made)
    a, b = ff.merge(model, made), ff.merge(model, again)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_damaged_plan_gets_one_line(gpt2):
    _, stats = gpt2
    good = ff.plan(stats, "1-3").to_dict()
    short, twice = (json.loads(json.dumps(good)) for _ in range(2))
    short["groups"][0]["permutations"]["2"].pop()
    twice["groups"][0]["permutations"]["2"][0] = twice["groups"][0]["permutations"]["2"][1]
    missing = {k: v for k, v in good.items() if k != "groups"}
    for bad in (short, twice, missing, [], {"groups": 3}, good | {"model": {}}, good | {"groups": [{}]}, None):
        what = "permutations: layer 2" if bad in (short, twice) else "not the content of a plan file"
        with pytest.raises(ff.FFMergeError, match=f"plan: {what}.*; make it (again )?with `ffmerge plan`") as error:
            MergePlan.from_dict(bad)
        assert "\n" not in str(error.value)


def test_a_flipped_bit_of_a_plan_is_no_other_plan(gpt2):
    made = ff.plan(gpt2[1], "0-2").to_dict()
    content = json.dumps(made).encode()
    choice, refused = random.Random(0), 0
    for _ in range(300):
        bad = bytearray(content)
        bad[choice.randrange(len(bad))] ^= 1 << choice.randrange(8)
        try:
            values = json.loads(bad)
        except ValueError:
            continue
        try:
            assert MergePlan.from_dict(values).to_dict() == made  # a bit of the checksum's own name
        except ff.FFMergeError as error:
            refused += 1
            assert "plan: " in str(error) and "\n" not in str(error)
    assert refused > 100
    del made["checksum"]  # of an earlier version
    assert MergePlan.from_dict(made).layers == "0-2"


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (dict(layers="1-3", window=2), "exactly one of layers= and window="),
        ({}, "exactly one of layers= and window="),
        (dict(layers="22-"), "'22-' is not a group of layers"),
        (dict(layers="9-3"), "'9-3' runs backwards"),
        (dict(layers="a"), "'a' is not a group of layers"),
        (dict(layers="4-6"), "decoder layer 6 does not exist; it has FFNs in 0-5"),
        (dict(layers="0-2,2-4"), "layer 2 is in two groups"),
        (dict(layers="2"), "at least two different layers"),
        (dict(window=7), "window: got 7, wanted 2 to 6"),
        (dict(window=1), "window: got 1, wanted 2 to 6"),
        (dict(layers="1-3", anchor="best"), "anchor: got 'best'"),
        (dict(layers="1-3", method="magic"), "method: got 'magic', wanted one of permute"),
        (dict(layers="1-3", method="weights"), "method 'weights' compares weights; give model="),
    ],
)
def test_bad_arguments_get_one_clear_line(gpt2, wanted, message):
    _, stats = gpt2
    with pytest.raises(ff.FFMergeError) as error:
        ff.plan(stats, **wanted)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_a_plan_needs():
    model = tiny_model("gpt2")
    with pytest.raises(ff.FFMergeError, match="method 'permute' needs statistics"):
        ff.plan(model=model, layers="0-1")
    with pytest.raises(ff.FFMergeError, match="give stats= or model="):
        ff.plan(layers="0-1", method="average")
    with pytest.raises(ff.FFMergeError, match="choosing a window needs statistics"):
        ff.plan(model=model, window=2, method="average")


def test_a_pair_that_was_not_collected_is_named():
    stats = collected(tiny_model("gpt2"), window=2)
    with pytest.raises(ff.FFMergeError, match="no correlation of decoder layers 0 and 2; collect again with a larger"):
        ff.plan(stats, layers="0-2")
    with pytest.raises(ff.FFMergeError, match="no correlation of decoder layers 0 and 2"):
        ff.plan(stats, window=3)
    ff.plan(stats, layers="0-2", method="average")  # needs none


def test_statistics_of_another_model_are_refused(gpt2):
    _, stats = gpt2
    other = tiny_model("gpt2", layers=6, seed=1)
    with pytest.raises(ff.FFMergeError, match=r"stats is of another model \(gpt2 [0-9a-f]{16}; this one is gpt2"):
        ff.plan(stats, layers="0-1", method="weights", model=other)


# ------------------------------------------------------------------------------------------------- plans that are none


def edited(values, *path_and_value):
    """A copy of a plan's values with one of them changed; `...` removes it."""
    values = copy.deepcopy(values)
    *path, last, value = path_and_value
    inner = values
    for key in path:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    return values


GROUP = ("groups", 0)
NONE = [
    ((*GROUP[:1], []), "got no group"),
    ((*GROUP, "layers", [2]), "at least two different layers, got [2]"),
    ((*GROUP, "layers", [2, 2]), "at least two different layers"),
    ((*GROUP, "layers", [2, 3, 3, 4]), "at least two different layers"),
    ((*GROUP, "layers", [4, 3, 2]), "in rising order"),
    ((*GROUP, "layers", [2, 3, 99]), "layer 99 does not exist"),
    ((*GROUP, "layers", [2, 3, -1]), "layer -1 does not exist"),
    ((*GROUP, "layers", [2, 3.0, 4]), "3.0 is not a layer"),
    ((*GROUP, "layers", [2, True, 4]), "True is not a layer"),
    ((*GROUP, "layers", [2, 3, 5]), "permutations: got layers [2, 3, 4]"),
    ((*GROUP, "stack", "encoder"), "stack 'encoder' not in this model"),
    ((*GROUP, "stack", []), "not the content of a plan file"),
    (("groups", lambda groups: groups * 2), "layer 2 is in two groups"),
    ((*GROUP, "anchor", 1), "anchor: got layer 1, wanted one of group decoder 2-4"),
    ((*GROUP, "anchor", "2"), "'2' is not a layer"),
    ((*GROUP, "permutations", "3", ...), "permutations: got layers [2, 4]"),
    ((*GROUP, "permutations", "5", list(range(D_FF))), "permutations: got layers [2, 3, 4, 5]"),
    ((*GROUP, "permutations", "3", 0, lambda i: i + 1), "not a permutation of its 32 neurons"),
    ((*GROUP, "permutations", "3", lambda p: p[:-1]), "layer 3 of group decoder 2-4 has [31] numbers"),
    ((*GROUP, "permutations", "3", lambda p: [p]), "not a permutation"),
    ((*GROUP, "permutations", "3", lambda p: [i + 0.5 for i in p]), "other values than integers"),
    ((*GROUP, "permutations", "3", 0, 2**70), "not the content of a plan file"),
    ((*GROUP, "permutations", "2", lambda p: p[::-1]), "not the identity, as it is the anchor"),
    ((*GROUP, "scores", "3", [math.nan, 0.1]), "scores: got [nan, 0.1] for layer 3"),
    ((*GROUP, "scores", "3", [math.inf, 0.1]), "wanted two numbers"),
    ((*GROUP, "scores", "3", [0.1]), "wanted two numbers"),
    ((*GROUP, "scores", "3", None), "not the content of a plan file"),
    ((*GROUP, "scores", "0", [0.1, 0.1]), "for layer 0 of group"),
    (("format", 99), "plan: got format 99, this version reads 1"),
    (("format", ...), "not the content of a plan file"),
    (("method", "nope"), "method: got 'nope', wanted one of permute"),
    (("method", ["permute"]), "method: got ['permute']"),
    (("search", [["2-4", "best"]]), "not the content of a plan file"),
    (("search", [["2-4"]]), "not the content of a plan file"),
    (("model", "ffns", []), "plan: layers: stack 'decoder' not in this model"),
]


@pytest.mark.parametrize(("change", "message"), NONE, ids=lambda value: re.sub(r" at 0x\w+", "", str(value)))
def test_plans_that_are_none_are_refused_on_reading(gpt2, change, message):
    _, stats = gpt2
    values = json.loads(json.dumps(ff.plan(stats, layers="2-4").to_dict()))
    with pytest.raises(ff.FFMergeError) as error:
        MergePlan.from_dict(edited(values, *change))
    assert str(error.value).startswith("plan: ") and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        dict(layers=(2,)),
        dict(layers=(2, 2, 4)),
        dict(anchor=0),
        dict(permutations={2: torch.arange(D_FF)}),
        dict(scores={3: (math.nan, 0.0)}),
    ],
    ids=str,
)
def test_plans_that_are_none_are_refused_on_making_and_on_merging(gpt2, change):
    model, stats = gpt2
    made = ff.plan(stats, layers="2-4")
    wrong = dataclasses.replace(made.groups[0], **change)
    for groups in ([wrong], [], [made.groups[0], made.groups[0]]):
        with pytest.raises(ff.FFMergeError, match="^plan: "):
            dataclasses.replace(made, groups=groups)
    made.groups[0] = wrong  # afterwards
    before = [p.clone() for p in model.parameters()]
    for merge in (ff.merge, ff.merge_):
        with pytest.raises(ff.FFMergeError, match="^plan: "):
            merge(model, made)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_plan_whose_summary_was_edited_is_checked_against_the_model(gpt2):
    """Widths and layers that only the plan knows: the fingerprint alone does not say that they are none."""
    model, stats = gpt2
    values = json.loads(json.dumps(ff.plan(stats, layers="2-4").to_dict()))
    for ffn in values["model"]["ffns"]:
        ffn["d_ff"] = 4
    for layer in "234":
        values["groups"][0]["permutations"][layer] = list(range(4))
    del values["checksum"]  # as of an earlier version
    with pytest.raises(ff.FFMergeError, match="^plan: permutations: layer 2 .* of its 32 neurons"):
        ff.merge(model, MergePlan.from_dict(values))


def test_scores_without_a_value_are_kept_in_json(gpt2):
    model, _ = gpt2
    made = ff.plan(model=model, layers="1-3", method="average")
    made.search = [("0-2", math.nan), ("1-3", 2.0)]
    again = MergePlan.from_dict(json.loads(json_text(made.to_dict())))
    assert math.isnan(again.search[0][1]) and again.search[1] == ("1-3", 2.0) and again.layers == "1-3"


# ---------------------------------------------------------------------------------------------------- A4: the shares


_VIT = dict(num_labels=1000)
_GPT2_LARGE = dict(n_embd=1280, n_layer=36, n_head=20)
_OPUS_MT = dict(
    vocab_size=65001, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
    decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_position_embeddings=512,
    pad_token_id=65000, decoder_start_token_id=65000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "config", "values", "layers", "removed", "share"),
    [
        ("ViTForImageClassification", "ViTConfig", _VIT, "3-7", 4, 21.8),
        ("ViTForImageClassification", "ViTConfig", _VIT, "4-10", 6, 32.7),
        ("ViTForImageClassification", "ViTConfig", _VIT, "0-11", 11, 60.0),
        ("GPT2LMHeadModel", "GPT2Config", _GPT2_LARGE, "22-34", 12, 20.3),
        ("GPT2LMHeadModel", "GPT2Config", _GPT2_LARGE, "16-34", 18, 30.5),
        ("GPT2LMHeadModel", "GPT2Config", _GPT2_LARGE, "0-35", 35, 59.3),
        ("MarianMTModel", "MarianConfig", _OPUS_MT, "encoder:2-4,decoder:2-4", 4, 10.8),
        ("MarianMTModel", "MarianConfig", _OPUS_MT, "0-3", 6, 16.2),
        ("MarianMTModel", "MarianConfig", _OPUS_MT, "0-5", 10, 26.9),
    ],
)
def test_shares_removed_from_the_papers_models(monkeypatch, model, config, values, layers, removed, share):
    """Acceptance facts 10 and 16, on models of the real sizes without their weights."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, model)(getattr(transformers, config)(**values))
    monkeypatch.setattr(summary, "fingerprint", lambda model, ffns: "no weights")
    made = ff.plan(model=model, layers=layers, method="average")
    assert sum(len(g.layers) - 1 for g in made.groups) == removed
    assert round(100 * (1 - made.parameters_after / made.model.parameters), 1) == share
    one = made.model.ffns[0].parameters
    assert made.model.parameters - made.parameters_after == removed * one
