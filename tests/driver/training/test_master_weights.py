"""Models in half precision are trained as float32 and stay what they were."""

import copy

import pytest
import torch

from ffmerge_fast.driver.training.finetune import finetune
from tests.helpers.tiny_models import tiny_inputs, tiny_model
from tests.helpers.training import assert_equal, lm_batches, parameters, tied_gpt2

HALF = [torch.bfloat16, torch.float16]
SETTINGS = dict(schedule="constant", log_every=1)


@torch.no_grad()
def loss(model):
    return sum(float(copy.deepcopy(model).float().eval()(**batch).loss) for batch in lm_batches(4))


@pytest.mark.parametrize("dtype", HALF)
def test_small_steps_add_up(dtype):
    """At a rate at which no bfloat16 weight would move, and with eps = 0 in float16, training gains as in float32."""
    wide = tied_gpt2().to(dtype).float()
    half = copy.deepcopy(wide).to(dtype)
    before = loss(half)
    finetune(wide, lm_batches(4), 30, 3e-4, **SETTINGS)
    result = finetune(half, lm_batches(4), 30, 3e-4, **SETTINGS)
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert half.transformer.h[1].mlp is half.transformer.h[2].mlp
    assert before - loss(half) == pytest.approx(before - loss(wide), rel=0.1)
    assert all(row["loss"] == row["loss"] for row in result.history)


def test_the_weights_are_those_of_float32_training_rounded():
    wide = tied_gpt2().half().float()
    half = copy.deepcopy(wide).half()
    finetune(wide, lm_batches(4), 3, 1e-2, **SETTINGS)
    finetune(half, lm_batches(4), 3, 1e-2, **SETTINGS)
    assert_equal(parameters(half), {name: p.half() for name, p in parameters(wide).items()})


@pytest.mark.parametrize("dtype", HALF)
def test_frozen_weights_and_buffers_keep_theirs(dtype):
    model = tiny_model("vit").to(dtype)
    model.vit.embeddings.requires_grad_(False)
    frozen = {name: p.clone() for name, p in model.vit.embeddings.named_parameters()}
    finetune(model, [tiny_inputs(model)], 2, 1e-3, **SETTINGS)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_equal(dict(model.vit.embeddings.named_parameters()), frozen)


@pytest.mark.parametrize("dtype", HALF)
def test_a_run_goes_on_bit_for_bit(dtype, tmp_path):
    def trained(folder, *stops, restore_best=False):
        model = tied_gpt2().to(dtype)
        scores = iter([3.0, 1.0, 2.0, 4.0, 5.0])
        best = dict(restore_best=True, eval_every=2, evaluate=lambda m: next(scores)) if restore_best else {}
        for steps in stops:
            finetune(model, lm_batches(4), steps, 1e-3, output_dir=folder, **SETTINGS, **best)
        return parameters(model)

    assert_equal(trained(tmp_path / "parts", 2, 5), trained(tmp_path / "whole", 5))
    trained(tmp_path / "best", 4, 6, restore_best=True)


def test_an_interrupted_run_leaves_the_dtypes(monkeypatch):
    model = tied_gpt2().to(torch.bfloat16)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("ffmerge_fast.driver.training.loop.TrainingRun.train", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, lm_batches(4), 3, **SETTINGS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
