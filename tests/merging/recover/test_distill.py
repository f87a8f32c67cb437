"""local_distill_: the right gradients on the right tokens, the best weights kept, nothing else changed."""

import copy

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.tiny_models import ALL, logits, tiny_inputs, tiny_model
from tests.merging.search.test_proxy import apply, flows

FAMILIES = ["gpt2", "llama", "phi3", "bert", "vit", "marian", "t5", "t5-gated", "sequential", "transformer_encoder"]


def pair(name, layers="0-2", dtype=torch.float64, count=4):
    """(merged model, teacher, batches)."""
    teacher = tiny_model(name, layers=4).to(dtype)
    model = ff.merge(teacher, ff.plan(layers=layers, method="average", model=teacher))
    return model, teacher, batches_for(teacher, range(count), dtype)


def batches_for(model, seeds, dtype=torch.float64):
    found = [tiny_inputs(model, batch=4, length=12, seed=seed, padded=True) for seed in seeds]
    return [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in found]


def by_error_(*args, **options):
    """FFNs alone are trained, and the best step is that of the smallest local error."""
    return ff.local_distill_(*args, **dict(norms=False, judge="error") | options)


def members(model, stack, layers):
    return [f for f in ff.find_ffns(model) if f.stack == stack and f.index in layers]


def weights_of(model, ffn):
    paths = [p for p in (ffn.up_path, ffn.gate_path, ffn.down_path) if p]
    return [p for path in paths for p in model.get_submodule(path).parameters()]


def reference_(model, teacher, of_ranks, steps, lr):
    """Full-batch training by autograd through the model's own modules; {stack: shares missed before and after}.

    `of_ranks`: each process's batches, the last tenth of whose tokens (rounded up) is held out.
    """
    shares = {}
    for stack, layers in ff.shared_groups(model):
        train, held = [], []
        for ffn in members(model, stack, layers):
            parts = [flows(teacher, batches, ffn) for batches in of_ranks]
            cuts = [len(x) - -(-len(x) // 10) for x, _, _ in parts]
            w = 1 / torch.cat([out for _, _, out in parts]).var(0, correction=0).mean()
            for found, cut in ((train, slice(None)), (held, slice(None, None, -1))):
                pick = [slice(0, c) if cut.step is None else slice(c, None) for c in cuts]
                found.append((w, *(torch.cat([p[i][s] for p, s in zip(parts, pick, strict=True)]) for i in (0, 1))))
        mean = sum(w for w, _, _ in train) / len(train)
        first = members(model, stack, layers)[0]

        def error(data, first=first, mean=mean):
            return sum(w / mean * (apply(model, first, x) - y).square().sum() for w, x, y in data)

        total = sum(w / mean * (y - y.mean(0)).square().sum() for w, _, y in held)
        optimizer = torch.optim.AdamW(weights_of(model, first), weight_decay=0.0)
        before = (error(held) / total).item()
        for step in range(1, steps + 1):
            rate = min(step / max(1, 0.05 * steps), 1, (steps - step + 1) / (0.95 * steps))
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.zero_grad()
            (error(train) / train[0][1].numel()).backward()
            optimizer.step()
        shares[stack] = (before, (error(held) / total).item())
    return shares


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_adam_on_the_errors_of_every_layers_own_input(name):
    model, teacher, batches = pair(name)
    expected = copy.deepcopy(model)
    shares = reference_(expected, teacher, [batches], steps=30, lr=3e-3)
    report = by_error_(model, teacher, batches, steps=30, lr=3e-3, batch_tokens=10_000)
    assert [(g.stack, g.layers) for g in report.groups] == [(s, (0, 1, 2)) for s in ALL[name].stacks]
    for group in report.groups:
        assert group.best == 30 and group.history[0] == (0, group.before) and group.history[-1] == (30, group.after)
        assert (group.before, group.after) == pytest.approx(shares[group.stack], rel=1e-6)
        assert group.after < 0.97 * group.before
    for (key, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_minibatches_reach_the_ffn_that_all_layers_had():
    teacher = tiny_model("gpt2", layers=4)
    ffns = ff.find_ffns(teacher)
    for ffn in ffns[1:3]:
        teacher.get_submodule(ffn.shared[0]).load_state_dict(teacher.get_submodule(ffns[0].shared[0]).state_dict())
    model = ff.merge(teacher, ff.plan(layers="0-2", method="average", model=teacher))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in weights_of(model, ffns[0]):
            parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    batches = batches_for(teacher, range(40), torch.float32)
    distance = (logits(model, batches[0]) - logits(teacher, batches[0])).norm()
    group = by_error_(model, teacher, batches, steps=400, lr=5e-3, batch_tokens=128).groups[0]
    assert group.before > 0.01 and group.after < 0.02 * group.before
    assert (logits(model, batches[0]) - logits(teacher, batches[0])).norm() < 0.2 * distance


def test_refit_is_a_start_that_is_built_upon():
    model, teacher, _ = pair("vit", dtype=torch.float32)
    batches = batches_for(teacher, range(30), torch.float32)
    plain = by_error_(copy.deepcopy(model), teacher, batches, steps=60).groups[0]
    ff.refit_(model, teacher, batches)
    found = by_error_(model, teacher, batches, steps=60).groups[0]
    assert found.before < 0.9 * plain.before and found.after < found.before
    assert found.after < plain.after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_shared_ffn_changes_and_everything_stays_as_it_was(dtype):
    model, teacher, batches = pair("marian", dtype=dtype)
    model.train()
    before, original = copy.deepcopy(model), copy.deepcopy(teacher)
    groups, generator = ff.shared_groups(model), torch.get_rng_state()
    by_error_(model, teacher, batches, steps=20)
    assert ff.shared_groups(model) == groups and all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None and p.requires_grad for p in model.parameters() if p.ndim == 2 and p.requires_grad)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *teacher.modules()])
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved == {f"model.{s}.layers.0.fc{i}.{w}" for s, _ in groups for i in (1, 2) for w in ("weight", "bias")}
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), original.parameters(), strict=True))


def test_a_seed_gives_one_result():
    def trained(seed):
        model, teacher, batches = pair("gpt2", dtype=torch.float32)
        with torch.no_grad():  # of a caller: no hindrance
            by_error_(model, teacher, batches, steps=10, batch_tokens=16, seed=seed)
        return model.transformer.h[0].mlp.c_fc.weight

    assert torch.equal(trained(1), trained(1)) and not torch.equal(trained(1), trained(2))


def test_worse_weights_on_held_out_tokens_are_not_kept():
    model, teacher, batches = pair("gpt2")
    before = copy.deepcopy(model)
    group = by_error_(model, teacher, batches, steps=20, lr=10.0).groups[0]
    assert group.best == 0 and group.after == group.before < min(share for _, share in group.history[1:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_the_best_step_need_not_be_the_last():
    """A few tokens to learn by heart: the held-out error falls, then rises again."""
    model, teacher, batches = pair("gpt2", count=2)
    group = by_error_(model, teacher, batches, steps=600, lr=3e-3, batch_tokens=64).groups[0]
    assert 0 < group.best < 400 and group.after == min(share for _, share in group.history) < group.history[-1][1]


def test_exactly_max_tokens_are_used():
    model, teacher, _ = pair("sequential")
    other = copy.deepcopy(model)
    whole = batches_for(teacher, range(3))
    by_error_(model, teacher, whole, steps=5, max_tokens=60)
    by_error_(other, teacher, [whole[0], {k: v[:1] for k, v in whole[1].items()}], steps=5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "steps: got 0, wanted at least 1"),
        (dict(lr=0.0), "lr: got 0.0, wanted a positive number"),
        (dict(lr=float("nan")), "lr: got nan"),
        (dict(batch_tokens=0), "batch_tokens: got 0, wanted at least 1"),
        (dict(max_tokens=19), "max_tokens: got 19, wanted at least 20"),
        (dict(batches=[]), "distill: no calibration data"),
        (dict(batches=[{"input_ids": torch.tensor([[5, 6, 7]])}]), "saw 3 tokens, wanted at least 20"),
        (dict(lr=1e300), "decoder 0-2 is "),
        (dict(model=tiny_model("gpt2")), "distill: this model has no merged FFNs; merge first, then distill"),
        (dict(teacher=tiny_model("gpt2", layers=5)), "distill: the teacher is another model"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(changes, message):
    model, teacher, batches = pair("gpt2")
    before = copy.deepcopy(model)
    with pytest.raises(ff.FFMergeError) as error:
        by_error_(**dict(model=model, teacher=teacher, batches=batches, steps=10) | changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_data_that_is_not_finite_is_named():
    model, teacher, batches = pair("vit")
    batches[-1]["pixel_values"][:] = float("nan")
    with pytest.raises(ff.FFMergeError, match="the error of encoder 0-2 is nan at step 0: its inputs or outputs"):
        by_error_(model, teacher, batches, steps=5)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_report_prints_as_a_table():
    model, teacher, batches = pair("marian")
    report = by_error_(model, teacher, batches, steps=5)
    lines = str(report).splitlines()
    assert lines[0].split()[:2] == ["stack", "layers"] and [line.split()[0] for line in lines[2:]] == [
        "encoder",
        "decoder",
    ]
    assert report.to_dict()["groups"][1]["after"] == report.groups[1].after


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_each_layers_own_norm_is_trained_along(name):
    model, teacher, batches = pair(name, count=6)
    without = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = ff.local_distill_(model, teacher, batches, steps=80, lr=1e-2, judge="error").groups
    alone = by_error_(without, teacher, batches, steps=80, lr=1e-2).groups
    assert all(a.after < b.after for a, b in zip(found, alone, strict=True))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    of_ffns = {
        n for n, p in model.named_parameters() if any(p is q for f in ff.find_ffns(model) for q in weights_of(model, f))
    }
    norms = moved - of_ffns
    merged = sum(len(layers) for _, layers in ff.shared_groups(model))
    assert all("norm" in n or "ln_2" in n for n in norms) and len(norms) == (2 if name == "gpt2" else 1) * merged
    assert model.num_parameters() == without.num_parameters()


@pytest.mark.parametrize("name", ["bert", "marian", "gemma2", "gpt_neox", "vit"])
def test_norms_that_others_read_stay(name):
    """The stream's (post-norm), and where norms stand in the branch; in GPT-NeoX each sublayer has one of its own."""
    model, teacher, batches = pair(name, dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ff.local_distill_(model, teacher, batches, steps=10)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n]) and "norm" in n.lower()}
    assert bool(moved) == (name in ("gpt_neox", "vit"))


@pytest.mark.parametrize("options", [dict(), dict(delta_rank=2)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "marian", "phi3"])
def test_the_best_step_is_that_of_the_models_loss(name, options):
    """Scored with the weights in place, as the model has them in the end; the held-out batch is not trained on."""
    teacher = tiny_model(name, layers=4)
    model = ff.merge(teacher, ff.plan(layers="0-2", method="average", model=teacher))
    batches = batches_for(teacher, range(6), torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = ff.local_distill_(model, teacher, batches, steps=40, lr=3e-3, **options)
    for group in report.groups:
        assert dict(group.losses)[group.best] == min(loss for _, loss in group.losses)
        assert [step for step, _ in group.losses] == [step for step, _ in group.history]
    model.eval()
    with torch.no_grad():
        assert model(**batches[1]).loss.item() == pytest.approx(
            dict(report.groups[-1].losses)[report.groups[-1].best], rel=1e-5
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *teacher.modules()])
    if not options:
        other = ff.merge(teacher, ff.plan(layers="0-2", method="average", model=teacher))
        assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())
        noise = dict(batches[1], input_ids=batches[1]["input_ids"].flip(0)) if "input_ids" in batches[1] else batches[1]
        again = ff.local_distill_(other, teacher, [batches[0], noise, *batches[2:]], steps=40, lr=3e-3)
        assert [g.history for g in again.groups] == [g.history for g in report.groups]


def test_without_labels_the_error_decides():
    model, teacher, batches = pair("gpt2", dtype=torch.float32)
    plain = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    group = ff.local_distill_(model, teacher, plain, steps=10).groups[0]
    assert group.losses == [] and group.after == min(share for _, share in group.history)
    with pytest.raises(ff.FFMergeError, match="judge: got 'metric', wanted one of loss, error"):
        ff.local_distill_(model, teacher, batches, judge="metric")
    with pytest.raises(ff.FFMergeError, match="labels"):
        ff.local_distill_(model, teacher, plain, steps=10, judge="loss")
