"""Tasks: splits, order of batches, metrics, and what is refused."""

import types

import pytest
import torch

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver import evaluate
from ffmerge_fast.driver.tasks.kinds import TextTask
from ffmerge_fast.driver.tasks.load import load_task, task_kind
from ffmerge_fast.driver.training.finetune import finetune
from tests.driver.tasks.test_images import folder as image_folder  # noqa: F401 a fixture
from tests.driver.tasks.test_images import picture, write_npz
from tests.helpers.tiny_models import tiny_model
from tests.helpers.training import byte_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny_tokenizer(path)
    return path


@pytest.fixture
def processor():
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 16, "width": 16})


def _numbers(count=10, block=4):
    return TextTask({"train": torch.arange(count * block)}, block, None)


def _first(batches):
    return [(batch["input_ids"][:, 0] // 4).tolist() for batch in batches]


def test_order_in_a_row():
    assert _first(_numbers().batches("train", 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert _first(_numbers().batches("train", 4, limit=5)) == [[0, 1, 2, 3], [4]]
    assert _first(_numbers().batches("train", 20)) == [list(range(10))]


def test_shuffled_order_depends_on_seed_and_epoch_only():
    task = _numbers()
    several = _first(task.batches("train", 3, shuffle=True, seed=5, epochs=2))
    assert several == _first(task.batches("train", 3, shuffle=True, seed=5, epochs=2))
    assert several != _first(task.batches("train", 3, shuffle=True, seed=6, epochs=2))
    assert several[:3] != several[3:]
    for epoch in (several[:3], several[3:]):  # whole batches only, nothing twice
        assert len(set(sum(epoch, []))) == 9


def test_a_late_start_and_ranks_give_the_same_batches():
    task = _numbers()
    everything = _first(task.batches("train", 3, shuffle=True, epochs=4))
    assert _first(task.batches("train", 3, shuffle=True, epochs=4, start=5)) == everything[5:]
    assert _first(task.batches("train", 3, shuffle=True, epochs=4, rank=1, world=2)) == everything[1::2]
    assert _first(task.batches("train", 3, shuffle=True, epochs=4, rank=1, world=2, start=2)) == everything[1::2][2:]


def test_fewer_examples_than_a_batch_still_train():
    endless = _numbers(2).batches("train", 8, shuffle=True, epochs=None)
    assert all(sorted(_first([next(endless)])[0]) == [0, 1] for _ in range(3))


def test_language_model(folder):
    model = byte_model("gpt2")
    task = load_task(model, folder, ["abcdefgh" * 50], block=8)
    assert (task.kind, task.metric, task.higher_is_better) == ("lm", "perplexity", False)
    assert task.splits == ("train", "validation") and task.size("train") == 45 and task.size("validation") == 5
    result = task.evaluate(model)
    batches = list(task.batches("validation", 2))
    assert result["loss"] == pytest.approx(evaluate.loss(model, batches), rel=1e-6)
    assert result["perplexity"] == pytest.approx(task.score(model)) == pytest.approx(2.718281828 ** result["loss"])
    assert result["tokens"] == 5 * 7
    assert task.evaluate(model, stride=4)["tokens"] == 39


def test_finetune_takes_a_task_and_its_metric(folder, tmp_path):
    model = byte_model("gpt2")
    task = load_task(model, folder, ["abcdefgh" * 50], block=8)
    before = task.score(model)
    result = finetune(model, task, 20, lr=1e-2, eval_every=10, output_dir=tmp_path, restore_best=True)
    assert result.best_metric == pytest.approx(task.score(model))
    assert result.best_metric < 0.5 * before


def test_images(image_folder, processor):  # noqa: F811
    model = tiny_model("vit")
    task = load_task(model, processor, test=image_folder)
    (batch,) = task.batches("test", 5)
    assert batch["pixel_values"].shape == (3, 3, 16, 16) and batch["labels"].tolist() == [0, 1, 1]
    result = task.evaluate(model, "test")
    right = (model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float().mean()
    assert result == {"accuracy": pytest.approx(float(right)), "images": 3}
    by_loss = load_task(model, processor, test=image_folder, metric="loss")
    assert by_loss.score(model, "test") == pytest.approx(float(model(**batch).loss.detach()), rel=1e-6)
    assert not by_loss.higher_is_better and task.higher_is_better


def test_images_by_split(tmp_path, processor):
    path = write_npz(tmp_path / "x.npz", values=(0, 50))
    task = load_task(tiny_model("vit"), processor, path, test=path)
    assert task.size("train") == task.size("test") == 2


def test_images_of_more_classes_than_the_model(tmp_path, processor):
    path = write_npz(tmp_path / "x.npz")
    with pytest.raises(FFMergeError, match="has the label 2, but the model has 2 classes"):
        load_task(tiny_model("vit"), processor, path)


def test_held_out_images_are_every_nth(tmp_path, processor):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(10):
            picture(i).save(tmp_path / name / f"{i}.png")
    task = load_task(tiny_model("vit"), processor, tmp_path, holdout=0.2)
    assert task.size("train") == 16 and task.size("validation") == 4
    assert torch.cat([b["labels"] for b in task.batches("validation", 2)]).tolist() == [0, 0, 1, 1]


def test_translation(folder, tmp_path):
    model = byte_model("marian")
    (tmp_path / "en").write_text("a b\nc\n" * 5)
    (tmp_path / "de").write_text("x y z\nw\n" * 5)
    task = load_task(model, folder, (tmp_path / "en", str(tmp_path / "de")), max_length=16, holdout=0.2)
    assert (task.kind, task.metric, task.higher_is_better) == ("translation", "bleu", True)
    assert task.size("train") == 8 and task.size("validation") == 2
    result = task.evaluate(model)
    assert 0 <= result["bleu"] <= 100 and result["pairs"] == 2
    batches = list(task.batches("validation", 1))
    tokens = torch.tensor([float((b["labels"] != -100).sum()) for b in batches])
    losses = torch.stack([model(**b).loss.detach() for b in batches])
    assert result["loss"] == pytest.approx(float((losses * tokens).sum() / tokens.sum()), rel=1e-5)
    by_loss = load_task(model, folder, validation=[("a", "b")], max_length=16, metric="loss")
    assert set(by_loss.evaluate(model)) == {"loss", "pairs"}


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("gpt2", dict(), "data: got none"),
        ("gpt2", dict(train=["abc"], block=100), "block: got 100 tokens, but the model's context is 40"),
        ("gpt2", dict(train=["abc"], block=8), "3 tokens do not fill one block of 8"),
        ("gpt2", dict(train="no/such/file"), "no/such/file does not exist here.*FFMERGE_ONLINE"),
        ("gpt2", dict(train=["abcdefgh"], block=2, metric="bleu"), "wanted perplexity or loss"),
        ("gpt2", dict(train=["abc"], holdout=1.0), "holdout: got 1.0"),
        ("gpt2", dict(train=["abc"], kind="speech"), "kind: got 'speech'"),
        ("bert", dict(train=["abc"], kind="lm"), "BertForMaskedLM is no model for that; give --task masked .kind='mas"),
        ("gpt2", dict(train=["abc"], kind="masked"), "GPT2LMHeadModel is no model for that; give --task lm"),
        ("whisper", dict(train=["abc"]), "cannot tell that of WhisperForConditionalGeneration"),
        ("gpt2", dict(train=["abc"], languages=("a", None)), "--source-lang.* is for translation, .*this task is lm"),
        ("marian", dict(train=[("a", "b")], bos=False), "--no-bos.* is for causal language models"),
        ("marian", dict(train=[("a", "b")], languages=("a", "b"), max_length=8), "knows no languages; leave them out"),
        ("marian", dict(train=[("a", "b")], max_length=100), "max_length: got 100"),
        ("marian", dict(train=["a", "b", "c"], max_length=8), "wanted .source file, target file. or a list"),
        ("marian", dict(train=[], max_length=8), "wanted .source file, target file. or a list"),
    ],
)
def test_bad_data(folder, name, options, words, monkeypatch):
    monkeypatch.delenv("FFMERGE_ONLINE", raising=False)
    with pytest.raises(FFMergeError, match=words) as caught:
        load_task(tiny_model(name), folder, **options)
    assert "\n" not in str(caught.value)


def test_missing_split_and_processor(folder, tmp_path):
    task = load_task(tiny_model("gpt2"), folder, test=["abcdefgh"], block=2)
    with pytest.raises(FFMergeError, match="no train data, only test; give train="):
        next(task.batches("train"))
    with pytest.raises(FFMergeError, match="no tokenizer there"):
        load_task(tiny_model("gpt2"), tmp_path, ["abc"])
    with pytest.raises(FFMergeError, match="no image processor there"):
        load_task(tiny_model("vit"), folder, tmp_path)
    with pytest.raises(FFMergeError, match="got one path"):
        load_task(tiny_model("marian"), folder, tmp_path, max_length=8)


def test_kinds_by_model():
    kinds = {name: task_kind(tiny_model(name)) for name in ("gpt2", "llama", "vit", "deit", "marian", "t5", "bert")}
    assert set(kinds.values()) == {"lm", "masked", "images", "translation"}
    assert (
        kinds["bert"] == "masked"
        and kinds["deit"] == "images"
        and kinds["t5"] == "translation"
        and kinds["llama"] == "lm"
    )
    for name in ("whisper", "sequential"):
        with pytest.raises(FFMergeError, match="task: cannot tell"):
            task_kind(tiny_model(name))


def test_hub_names_when_online(folder, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, configuration, split):
        asked.append((path, configuration, split))
        if path == "gone":
            raise RuntimeError("Dataset 'gone' not found\nmore")
        columns = {"text": ["abcdefgh", "ijkl"]}
        if path == "pairs":
            columns = {"translation": [{"en": "a", "de": "b"}]}
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setenv("FFMERGE_ONLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(tiny_model("gpt2"), folder, "some/text:raw", validation="some/text:raw", block=4)
    assert asked == [("some/text", "raw", "train"), ("some/text", "raw", "validation")]
    assert task.size("train") == 3
    task = load_task(byte_model("marian"), folder, test="pairs", max_length=8)
    assert next(task.batches("test"))["labels"].shape == (1, 2)
    with pytest.raises(
        FFMergeError, match="gone .split train. cannot be loaded from the hub: Dataset 'gone' not found$"
    ):
        load_task(tiny_model("gpt2"), folder, "gone")
    with pytest.raises(FFMergeError, match="has the columns text; wanted label or labels"):
        load_task(tiny_model("vit"), types.SimpleNamespace(), "some/text")
