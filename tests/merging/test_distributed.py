"""collect, search and local_distill_ in a torch.distributed job of two processes, each with data of its own."""

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.tiny_models import tiny_inputs, tiny_model
from tests.merging.recover.test_deltas import shares_at_start
from tests.merging.recover.test_distill import reference_

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:.*correlations are noisy")]

# name of the case: (family, seeds of each rank's batches, further arguments of collect)
CASES = {
    "uneven": ("gpt2", ([0, 1, 2], [3]), dict(window=3)),
    "one rank is empty": ("llama", ([0, 1], []), dict(window=2)),
    "two stacks": ("marian", ([4], [5, 6]), dict(window=2)),
    "budget": ("gpt2", ([0, 1], [2, 3]), dict(window=2, max_tokens=21)),
}
SKETCHED = ([0, 1, 2], [0, 4])  # the first batch on both: with the same signs it would count four times
PROXY = ([0, 1], [2])  # seeds of each rank's batches
DISTILLED = {"distilled": ([0, 1, 2, 3], [4]), "distilled, one rank is empty": ([0, 1], [])}


def pair():
    """(merged model, teacher)"""
    teacher = tiny_model("marian", layers=4).double()
    return ff.merge(teacher, ff.plan(layers="0-2", method="average", model=teacher)), teacher


def in_float64(data):
    return [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in data]


def batches(model, seeds):
    return [tiny_inputs(model, batch=3, seed=seed, padded=True) for seed in seeds]


def loss(model):
    with torch.no_grad():
        return model(**tiny_inputs(model, batch=4, seed=9)).loss.item()


def _work(rank, folder):
    """One of the two processes; writes what it found to <rank>.pt."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for case, (family, seeds, wanted) in CASES.items():
        model = tiny_model(family, layers=4)
        stats = ff.collect(model, batches(model, seeds[rank]), **wanted, cache_dir=f"{folder}/cache {case}")
        stats.save(f"{folder}/{case} {rank}")
        again = ff.collect(model, batches(model, seeds[rank]), **wanted, cache_dir=f"{folder}/cache {case}")
        again.save(f"{folder}/{case} {rank} resumed")
    model = tiny_model("gpt2", layers=4)
    ff.collect(model, batches(model, SKETCHED[rank]), window=3, sketch=32).save(f"{folder}/sketched {rank}")
    try:
        ff.collect(model, [], window=2)
    except ff.FFMergeError as error:
        found["no data"] = str(error)
    model = tiny_model("gpt2", layers=6)
    stats, evaluated = ff.collect(model, batches(model, [rank]), window=3), []

    def evaluate(m):
        evaluated.append(ff.shared_groups(m)[0][1][0])
        return loss(m)

    plan = ff.search(model, stats, window=3, evaluate=evaluate, resume=f"{folder}/scores.json")
    found |= {"plan": plan.to_dict(), "evaluated": evaluated, "merged": ff.is_merged(model)}
    found["resumed"] = ff.search(model, stats, 3, lambda m: 1 / 0, resume=f"{folder}/scores.json").to_dict()
    found["proxy"] = ff.search(model, stats, 3, "proxy", batches=batches(model, PROXY[rank]), max_tokens=41).to_dict()
    for case, seeds in DISTILLED.items():
        merged, teacher = pair()
        options = dict(steps=20, lr=3e-3, batch_tokens=10_000, norms=False, judge="error")
        report = ff.local_distill_(merged, teacher, in_float64(batches(teacher, seeds[rank])), **options)
        found[case] = (merged.state_dict(), report.to_dict())
        merged, teacher = pair()
        options["delta_rank"] = 3
        report = ff.local_distill_(merged, teacher, in_float64(batches(teacher, seeds[rank])), **options)
        found[f"{case}, deltas"] = (merged.state_dict(), report.to_dict())
        merged, teacher = pair()
        report = ff.refit_(merged, teacher, in_float64(batches(teacher, seeds[rank])), private=3)
        found[f"{case}, neurons"] = (merged.state_dict(), report.to_dict())
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    torch.multiprocessing.spawn(_work, (str(folder),), nprocs=2)
    return folder


def close(a, b, atol=1e-6):
    assert a.tokens == b.tokens and a.settings["pairs"] == b.settings["pairs"]
    for stack, pairs in a.settings["pairs"].items():
        for i, j in pairs:
            torch.testing.assert_close(a.correlation(i, j, stack), b.correlation(i, j, stack), atol=atol, rtol=0)


@pytest.mark.parametrize("case", ["uneven", "one rank is empty", "two stacks"])
def test_both_ranks_have_the_statistics_of_all_data(job, case):
    family, seeds, wanted = CASES[case]
    model = tiny_model(family, layers=4)
    alone = ff.collect(model, batches(model, seeds[0] + seeds[1]), **wanted)
    half = ff.collect(model, batches(model, seeds[0][:1]), **wanted)
    stack = next(iter(alone.tokens))
    assert (alone.correlation(0, 1, stack) - half.correlation(0, 1, stack)).abs().max() > 0.01
    for rank in range(2):
        for ending in ("", " resumed"):
            close(ff.CorrelationStats.load(job / f"{case} {rank}{ending}"), alone)


def test_sketches_of_ranks_add_up(job):
    model = tiny_model("gpt2", layers=4)
    exact = ff.collect(model, batches(model, SKETCHED[0] + SKETCHED[1]), window=3)
    first, second = (ff.CorrelationStats.load(job / f"sketched {rank}") for rank in range(2))
    assert first.tokens == second.tokens == exact.tokens
    ours, theirs, truth = (stats.states["decoder"] for stats in (first, second, exact))
    assert torch.equal(ours.correlation(0, 3), theirs.correlation(0, 3))
    for layer in range(4):
        torch.testing.assert_close(ours.mean(layer), truth.mean(layer), rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.variance(layer), truth.variance(layer), rtol=1e-5, atol=0)
    error = torch.stack([first.correlation(i, j) - exact.correlation(i, j) for i, j in ((0, 1), (1, 2), (1, 3))])
    assert 0.5 < error.std() / first.sketch_error < 1.3


def test_the_token_budget_is_that_of_all_ranks_together(job):
    family, seeds, _ = CASES["budget"]
    model = tiny_model(family, layers=4)
    alone, second = (
        ff.collect(model, batches(model, s), window=2, max_tokens=n) for s, n in zip(seeds, (11, 10), strict=True)
    )
    alone.merge(second)
    found = [ff.CorrelationStats.load(job / f"budget {rank}") for rank in range(2)]
    assert found[0].tokens == found[1].tokens == {"decoder": 21}
    for stats in found:
        close(stats, alone)


def test_without_any_data_every_rank_says_so(job):
    for rank in range(2):
        message = torch.load(job / f"{rank}.pt")["no data"]
        assert "saw 0 tokens, wanted at least 2" in message


def test_windows_are_shared_out_and_all_ranks_return_the_same_plan(job):
    a, b = (torch.load(job / f"{rank}.pt") for rank in range(2))
    assert (a["evaluated"], b["evaluated"]) == ([0, 2], [1, 3]) and not a["merged"] and not b["merged"]
    assert a["plan"] == b["plan"] == a["resumed"] == b["resumed"]
    model = tiny_model("gpt2", layers=6)
    alone = ff.search(model, ff.collect(model, batches(model, [0, 1]), window=3), window=3, evaluate=loss).to_dict()
    assert alone["search"] and [layers for layers, _ in a["plan"]["search"]] == ["0-2", "1-3", "2-4", "3-5"]
    for (layers, score), (expected_layers, expected) in zip(a["plan"]["search"], alone["search"], strict=True):
        assert layers == expected_layers and score == pytest.approx(expected, rel=1e-6)
    assert a["plan"]["groups"][0]["permutations"] == alone["groups"][0]["permutations"]


def test_the_proxy_is_that_of_all_ranks_tokens(job):
    found = [torch.load(job / f"{rank}.pt")["proxy"] for rank in range(2)]
    assert found[0] == found[1]
    model = tiny_model("gpt2", layers=6)
    stats = ff.collect(model, batches(model, [0, 1]), window=3)
    whole = [cut(batches(model, seeds), tokens) for seeds, tokens in zip(PROXY, (21, 20), strict=True)]
    alone = ff.search(model, stats, 3, "proxy", batches=[*whole[0], *whole[1]]).search
    for (layers, score), (expected_layers, expected) in zip(found[0]["search"], alone, strict=True):
        assert layers == expected_layers and score == pytest.approx(expected, rel=1e-4)


def cut(data, tokens):
    """Batches whose mask ends after so many tokens; what a causal model computes for those before stays the same."""
    cut_batches = []
    for batch in data:
        mask = batch["attention_mask"]
        kept = mask * (mask.reshape(-1).cumsum(0) <= tokens).view_as(mask)
        tokens -= int(kept.sum())
        cut_batches.append(batch | {"attention_mask": kept})
    return cut_batches


@pytest.mark.parametrize("case", DISTILLED)
def test_deltas_start_from_the_moments_of_all_ranks(job, case):
    (weights, report), other = (torch.load(job / f"{rank}.pt")[f"{case}, deltas"] for rank in range(2))
    assert other[1] == report and weights.keys() == other[0].keys()
    assert all(torch.equal(weights[key], other[0][key]) for key in weights)
    of_ranks = [in_float64(batches(pair()[1], s)) for s in DISTILLED[case] if s]
    expected = shares_at_start(*pair(), of_ranks, rank=3)
    for group in report["groups"]:
        assert group["history"][0][1] == pytest.approx(expected[group["stack"]], rel=1e-6)
        assert group["after"] < group["history"][0][1]


@pytest.mark.parametrize("case", DISTILLED)
def test_private_neurons_are_those_of_all_ranks_tokens(job, case):
    (weights, report), other = (torch.load(job / f"{rank}.pt")[f"{case}, neurons"] for rank in range(2))
    expected, teacher = pair()
    of_all = [in_float64(batches(teacher, s)) for s in DISTILLED[case] if s]
    wanted = ff.refit_(expected, teacher, [batch for of_rank in of_all for batch in of_rank], private=3)
    assert other[1] == report
    for group, alone in zip(report["groups"], wanted.groups, strict=True):
        assert (group["before"], group["after"]) == pytest.approx((alone.before, alone.after), rel=1e-6)
    for key, value in expected.state_dict().items():
        assert torch.equal(weights[key], other[0][key]), key
        torch.testing.assert_close(weights[key], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", DISTILLED)
def test_distillation_sums_the_gradients_of_all_ranks(job, case):
    (weights, report), other = (torch.load(job / f"{rank}.pt")[case] for rank in range(2))
    assert other[1] == report
    expected, teacher = pair()
    shares = reference_(expected, teacher, [in_float64(batches(teacher, s)) for s in DISTILLED[case] if s], 20, 3e-3)
    for group in report["groups"]:
        assert (group["before"], group["after"]) == pytest.approx(shares[group["stack"]], rel=1e-6)
        assert group["best"] == 20
    for key, wanted in expected.state_dict().items():
        assert torch.equal(weights[key], other[0][key]), key
        torch.testing.assert_close(weights[key], wanted, atol=1e-9, rtol=0)
