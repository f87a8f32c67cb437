"""The evaluators give the figures that came with real trained models."""

import json

import pytest

from ffmerge_fast.driver.tasks.load import load_task

pytestmark = pytest.mark.real


def _model(folder, kind):
    import transformers

    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder), json.loads(
        (folder / "metrics.json").read_text()
    )


def test_language_model(shared):
    """Its figure is over the first 200 blocks, of which the first three files of the held-out text are more."""
    folder = shared / "models/gpt2-pystdlib"
    model, wanted = _model(folder, "CausalLM")
    text = (folder / "eval.txt").read_text(encoding="utf-8")
    files = [text[:29356], text[29358:35288], text[35290:91532]]
    got = load_task(model, folder, test=files).evaluate(model, "test", limit=200)
    assert got["loss"] == pytest.approx(wanted["nll"], abs=1e-5)
    assert got["tokens"] == 200 * 127
    assert load_task(model, folder, test=folder / "eval.txt").size("test") == 954


def test_images(shared):
    folder = shared / "models/vit-cifar10"
    model, wanted = _model(folder, "ImageClassification")
    task = load_task(model, folder, test=shared / "data/cifar10.npz")
    assert task.size("test") == 10_000
    assert task.evaluate(model, "test", limit=2_000)["accuracy"] == pytest.approx(wanted["accuracy"], abs=0.02)


@pytest.mark.slow
def test_all_images(shared):
    folder = shared / "models/vit-cifar10"
    model, wanted = _model(folder, "ImageClassification")
    task = load_task(model, folder, test=shared / "data/cifar10.npz")
    assert task.evaluate(model, "test")["accuracy"] == pytest.approx(wanted["accuracy"], abs=1e-4)


def test_translation_loss(shared):
    folder = shared / "models/marian-en-de"
    model, wanted = _model(folder, "Seq2SeqLM")
    files = tuple(shared / f"data/m30k_val.{language}" for language in ("en", "de"))
    task = load_task(model, folder, validation=files, metric="loss")
    assert task.evaluate(model)["loss"] == pytest.approx(wanted["val_nll"], abs=1e-5)


@pytest.mark.slow
def test_bleu(shared):
    folder = shared / "models/marian-en-de"
    model, wanted = _model(folder, "Seq2SeqLM")
    task = load_task(model, folder, test=tuple(shared / f"data/m30k_test.{language}" for language in ("en", "de")))
    assert task.evaluate(model, "test")["bleu"] == pytest.approx(wanted["test_bleu_greedy"], abs=0.02)
