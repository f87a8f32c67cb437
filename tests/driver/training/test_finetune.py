"""The training loop: ties, gradients, accumulation, distillation, errors."""

import copy
import math

import pytest
import torch
from torch import nn

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver.training.finetune import finetune
from ffmerge_fast.driver.training.state import optimizer_tensors
from tests.helpers.tiny_models import tiny_inputs, tiny_model
from tests.helpers.training import assert_equal, joined, lm_batches, parameters, tied_gpt2, tied_marian, untied


def test_tie_survives_and_gradients_of_the_sharers_are_summed(monkeypatch):
    model, seen = tied_gpt2(), {}
    copies = untied(model)

    def keep_gradients(optimizer, *args):
        seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    batch = lm_batches(1)[0]
    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (keep_gradients(self), original(self, *a))[1])
    finetune(model, [batch], steps=1, max_grad_norm=None)

    copies.train()(**batch).loss.backward()
    assert model.transformer.h[1].mlp is model.transformer.h[2].mlp
    for name, gradient in {n: p.grad for n, p in copies.transformer.h[1].mlp.named_parameters()}.items():
        other = copies.transformer.h[2].mlp.get_parameter(name).grad
        assert other.abs().max() > 0
        torch.testing.assert_close(seen[f"transformer.h.1.mlp.{name}"], gradient + other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("make", [tied_gpt2, tied_marian])
def test_one_optimiser_state_per_shared_weight(make, monkeypatch):
    model, made = make(), []
    original = torch.optim.AdamW.__init__
    monkeypatch.setattr(
        torch.optim.AdamW, "__init__", lambda self, *a, **k: (original(self, *a, **k), made.append(self))[0]
    )
    finetune(model, [tiny_inputs(model)], steps=2)
    (optimizer,) = made
    unique = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(optimizer.state) == len(unique) == sum(len(group["params"]) for group in optimizer.param_groups)
    names = [name for name in optimizer_tensors(model, optimizer) if name.startswith("exp_avg/")]
    assert len(names) == len(unique)


def test_same_as_a_loop_by_hand():
    model, batches = tied_gpt2(), lm_batches(3)
    by_hand = copy.deepcopy(model).train()
    finetune(model, batches, steps=5, lr=1e-2, schedule="constant", max_grad_norm=0.5)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(5):
        by_hand(**batches[step % 3]).loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(parameters(model), parameters(by_hand), 1e-6)


def test_accumulation_equals_one_large_batch():
    """Also where the micro-batches have different numbers of labels."""
    small = lm_batches(8, size=2, padded=True)
    large = [joined(small[:4]), joined(small[4:])]
    a, b = tied_gpt2(), tied_gpt2()
    first = finetune(a, small, steps=2, lr=1e-3, accumulate=4, eps=1e-2, log_every=1)
    second = finetune(b, large, steps=2, lr=1e-3, eps=1e-2, log_every=1)
    assert_equal(parameters(a), parameters(b), 1e-6)
    for row, other in zip(first.history, second.history, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_micro_batch_without_labels_counts_nothing():
    batches = lm_batches(2)
    empty = {"input_ids": batches[1]["input_ids"], "labels": torch.full_like(batches[1]["labels"], -100)}
    a, b = tied_gpt2(), tied_gpt2()
    finetune(a, [batches[0], empty], steps=1, accumulate=2)
    finetune(b, [batches[0]], steps=1)
    assert_equal(parameters(a), parameters(b))
    with pytest.raises(FFMergeError, match="step 1: the batches hold no labels"):
        finetune(a, [empty], steps=1)


def test_weight_decay_spares_norms_and_biases():
    model = tied_gpt2()
    before = parameters(model)
    batch = lm_batches(1)[0]
    finetune(model, [batch], steps=1, lr=1e-3, weight_decay=0.5, schedule="constant")
    plain = tied_gpt2()
    finetune(plain, [batch], steps=1, lr=1e-3, schedule="constant")
    for name, p in plain.named_parameters():
        decayed = model.get_parameter(name)
        wanted = p - 1e-3 * 0.5 * before[name] if p.ndim >= 2 else p
        torch.testing.assert_close(decayed, wanted, rtol=0, atol=1e-7)


def test_frozen_parameters_stay():
    model = tied_gpt2()
    model.transformer.wte.requires_grad_(False)
    before = parameters(model)
    finetune(model, lm_batches(1), steps=2)
    after = parameters(model)
    assert torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])
    assert not torch.equal(after["transformer.h.1.mlp.c_fc.weight"], before["transformer.h.1.mlp.c_fc.weight"])
    with pytest.raises(FFMergeError, match="no parameter requires a gradient"):
        finetune(model.requires_grad_(False), lm_batches(1), steps=1)


def test_distillation_from_itself_is_free():
    model = tied_gpt2()
    batches = lm_batches(2, padded=True)
    result = finetune(model, batches, steps=1, teacher=copy.deepcopy(model), alpha=1.0, temperature=2.0, log_every=1)
    assert result.history[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert result.history[0]["grad_norm"] == pytest.approx(0, abs=1e-5)


def test_distillation_loss_is_the_formula():
    model, teacher = tied_gpt2(), tiny_model("gpt2", seed=1)
    batch = lm_batches(1, padded=True)[0]
    with torch.no_grad():
        student = model(**batch)
        wanted = batch["labels"][:, 1:] != -100
        p, q = (torch.softmax(m(**batch).logits[:, :-1][wanted] / 2, -1) for m in (teacher, model))
        kl = (p * (p / q).log()).sum(-1).mean() * 4
    result = finetune(model, [batch], steps=1, teacher=teacher, alpha=0.3, temperature=2.0, log_every=1)
    assert result.history[0]["loss"] == pytest.approx(float(0.7 * student.loss + 0.3 * kl), rel=1e-5)
    assert not teacher.training


@pytest.mark.parametrize("name", ["vit", "marian", "llama"])
def test_learns_on_other_families(name):
    model = tiny_model(name)
    result = finetune(model, [tiny_inputs(model)], steps=15, lr=1e-2, schedule="constant", log_every=1)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < losses[0] - 0.2
    assert not model.training


def test_any_model_with_a_loss_function():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    batches = [(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), torch.ones(16, 1))]
    result = finetune(
        model, batches, 30, lr=1e-2, loss_fn=lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), log_every=1
    )
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    with pytest.raises(FFMergeError, match="wanted a dict; or give loss_fn"):
        finetune(model, batches, 1)


def test_bf16_autocast_stays_near_fp32():
    a, b = tied_gpt2(), tied_gpt2()
    rows = [
        finetune(m, lm_batches(2), 3, lr=1e-3, autocast=autocast, log_every=1).history
        for m, autocast in ((a, None), (b, "bf16"))
    ]
    for plain, half in zip(*rows, strict=True):
        assert plain["loss"] == pytest.approx(half["loss"], rel=2e-2)
        assert plain["loss"] != half["loss"]
    assert all(p.dtype == torch.float32 for p in b.parameters())


def test_nan_loss_stops_with_the_step_and_keeps_the_state(tmp_path):
    model, good = tied_gpt2(), lm_batches(1)[0]
    batches = [good] * 4 + [{**good, "labels": good["labels"]}]

    def loss_fn(m, batch, calls=[]):  # noqa: B006 the default counts the calls
        calls.append(1)
        return m(**batch).loss * (math.nan if len(calls) == 5 else 1.0)

    with pytest.raises(FFMergeError, match=r"step 5: the loss is nan; the last good state is .*checkpoint-4"):
        finetune(model, batches, steps=8, loss_fn=loss_fn, output_dir=tmp_path, save_every=2)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_non_finite_gradient_stops():
    model = tied_gpt2()

    def loss_fn(m, batch):
        loss = m(**batch).loss
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    before = parameters(model)
    with pytest.raises(FFMergeError, match="step 1: the gradient norm is"):
        finetune(model, lm_batches(1), steps=1, loss_fn=loss_fn)
    assert_equal(parameters(model), before)


def test_best_weights_come_back_from_memory_and_from_disk(tmp_path):
    metrics = [3.0, 1.0, math.nan, 2.0]
    for output_dir in (None, tmp_path):
        model, kept, scores = tied_gpt2(), [], iter(metrics)

        def evaluate(m, kept=kept, scores=scores):
            kept.append(parameters(m))
            assert not m.training
            return next(scores)

        result = finetune(
            model, lm_batches(2), 4, evaluate=evaluate, eval_every=1, restore_best=True, output_dir=output_dir
        )
        assert (result.best_metric, result.best_step) == (1.0, 2)
        assert_equal(parameters(model), kept[1])
        assert model.transformer.h[1].mlp is model.transformer.h[2].mlp


def test_kinds_of_training_data_are_equal():
    batches = lm_batches(3)
    kinds = [
        batches,
        (b for b in batches * 2),
        lambda start: iter((batches * 2)[start:]),
        dict(enumerate(batches)).values(),
    ]
    results = []
    for train in kinds:
        model = tied_gpt2()
        finetune(model, train, 5)
        results.append(parameters(model))
    for other in results[1:]:
        assert_equal(results[0], other)
    with pytest.raises(FFMergeError, match="no batches left at step 4"):
        finetune(tied_gpt2(), iter(batches), 5)
    for empty in ([], {}.values()):
        with pytest.raises(FFMergeError, match="got no batches"):
            finetune(tied_gpt2(), empty, 1)


def test_modes_and_cache_setting_are_put_back():
    model = tied_gpt2().eval()
    model.transformer.h[0].train()
    finetune(model, lm_batches(1), 1)
    assert not model.training and model.transformer.h[0].training and model.config.use_cache


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(steps=0), "steps: got 0"),
        (dict(steps=1, accumulate=0), "accumulate: got 0"),
        (dict(steps=1, autocast="fp8"), "autocast: got 'fp8'"),
        (dict(steps=1, autocast="fp16"), "fp16 needs a CUDA device"),
        (dict(steps=1, schedule="poly"), "schedule: got 'poly'"),
        (dict(steps=1, eval_every=1), "neither evaluate= nor a Task"),
        (dict(steps=1, parallel="tp"), "parallel: got 'tp'"),
        (dict(steps=1, log_every=0), "log_every: got 0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(FFMergeError, match=words) as caught:
        finetune(tied_gpt2(), lm_batches(1), **options)
    assert "\n" not in str(caught.value)


def test_model_without_a_loss_is_refused():
    batch = {"input_ids": lm_batches(1)[0]["input_ids"]}
    with pytest.raises(FFMergeError, match="without a scalar .loss"):
        finetune(tied_gpt2(), [batch], 1)
