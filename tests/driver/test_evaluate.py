"""Metrics against plain computations."""

import math

import pytest
import torch

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver import evaluate
from tests.helpers.tiny_models import tiny_inputs, tiny_model
from tests.helpers.training import byte_model, lm_batches, tiny_tokenizer


def _token_by_token(model, ids, window, stride):
    """Every token once, in the first window that holds it, one forward pass per token."""
    scores = []
    for t in range(1, len(ids)):
        start = 0
        while t >= start + window:
            start += stride
        if t > start:
            logits = model(input_ids=ids[None, start:t]).logits[0, -1].double()
            scores.append(-float(torch.log_softmax(logits, -1)[ids[t]]))
    return scores


@pytest.mark.parametrize(
    "tokens, window, stride",
    [
        (37, 8, 4),
        (37, 8, 8),
        (37, 8, 7),
        (37, 8, 1),
        (36, 8, 4),
        (33, 8, 8),
        (5, 8, 4),
        (2, 8, 2),
        (9, 2, 1),
        (8, 8, 3),
    ],
)
def test_perplexity_is_that_of_token_by_token(tokens, window, stride):
    model = tiny_model("gpt2").double()
    ids = torch.randint(4, 64, (tokens,), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        wanted = _token_by_token(model, ids, window, stride)
    loss, count = evaluate.nll(model, ids, window, stride, batch_size=3)
    assert count == len(wanted)
    assert loss == pytest.approx(sum(wanted) / count, rel=1e-6)
    assert evaluate.perplexity(model, ids, window, stride) == pytest.approx(math.exp(loss), rel=1e-6)


def test_perplexity_default_stride_is_half_the_window():
    model, ids = tiny_model("gpt2"), torch.arange(4, 40)
    assert evaluate.perplexity(model, ids, 8) == evaluate.perplexity(model, ids, 8, 4)


@pytest.mark.parametrize(
    "ids, window, stride, words",
    [
        (torch.arange(1), 8, 4, "at least 2 tokens"),
        (torch.zeros(2, 8), 8, 4, r"shape \[2, 8\]"),
        (torch.arange(20), 8, 9, "stride 9"),
        (torch.arange(20), 1, 1, "window 1"),
        (torch.arange(60), 50, 4, "context is 40"),
    ],
)
def test_bad_windows(ids, window, stride, words):
    with pytest.raises(FFMergeError, match=words):
        evaluate.perplexity(tiny_model("gpt2"), ids, window, stride)


def test_loss_weighs_by_labels():
    model = tiny_model("gpt2")
    batches = lm_batches(4, padded=True)
    summed = count = 0
    with torch.no_grad():
        for batch in batches:
            logits, labels = model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
            summed += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    assert evaluate.loss(model, batches) == pytest.approx(summed / count, rel=1e-6)
    with pytest.raises(FFMergeError, match="no labels"):
        evaluate.loss(model, [])


def test_accuracy():
    model = tiny_model("vit")
    batches = [tiny_inputs(model, batch=3, seed=seed) for seed in range(3)]
    with torch.no_grad():
        right = [model(pixel_values=b["pixel_values"]).logits.argmax(-1) == b["labels"] for b in batches]
    assert evaluate.accuracy(model, batches) == pytest.approx(float(torch.cat(right).float().mean()))
    with pytest.raises(FFMergeError, match="no examples"):
        evaluate.accuracy(model, [])


def test_translations_do_not_depend_on_the_batch(tmp_path):
    model, tokenizer = byte_model("marian"), tiny_tokenizer(tmp_path)
    sources = ["a longer one", "b", "middle", "b"]
    one = evaluate.translate(model, tokenizer, sources, max_new_tokens=6, batch_size=1)
    assert one == evaluate.translate(model, tokenizer, sources, max_new_tokens=6, batch_size=3)
    assert one[1] == one[3] and evaluate.translate(model, tokenizer, []) == []
    assert evaluate.bleu(model, tokenizer, list(zip(sources, one, strict=True)), max_new_tokens=6) in (
        0,
        pytest.approx(100),
    )
    with pytest.raises(FFMergeError, match="no sentence pairs"):
        evaluate.bleu(model, tokenizer, [])


def test_bleu_is_sacrebleus(monkeypatch):
    import sacrebleu

    hypotheses = ["the cat sat on the mat", "a dog barks loudly today"]
    references = ["the cat sat on a mat", "the dog barks loudly today"]
    monkeypatch.setattr(evaluate, "translate", lambda *a: hypotheses)
    got = evaluate.bleu(None, None, list(zip("ab", references, strict=True)))
    assert got == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score)
    assert 20 < got < 90


def test_translation_length_follows_the_longest_source():
    model = tiny_model("marian")  # 40 positions
    assert evaluate._translation_length(model, None, 20) == 30
    assert evaluate._translation_length(model, None, 2) == 16
    assert evaluate._translation_length(model, None, 35) == 39
    assert evaluate._translation_length(model, 7, 35) == 7


@pytest.mark.parametrize("training", [True, False])
def test_mode_gradients_and_cache_are_left_alone(training):
    model = tiny_model("gpt2").train(training)
    model.transformer.h[0].train(not training)
    evaluate.loss(model, lm_batches(1))
    evaluate.perplexity(model, torch.arange(4, 30), 8)
    assert model.training is training and model.transformer.h[0].training is not training
    assert model.config.use_cache and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_bf16_model_takes_float_pixels():
    model = tiny_model("vit").to(torch.bfloat16)
    assert 0 <= evaluate.accuracy(model, [tiny_inputs(model)]) <= 1
