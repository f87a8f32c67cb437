"""Texts with labels: read from records, matched with the model's classes, scored, trained."""

import copy
import csv
import json

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast import FFMergeError
from ffmerge_fast.cli.main import main
from ffmerge_fast.driver.tasks.labelled import LabelledTexts, load_labelled
from ffmerge_fast.driver.tasks.load import load_task, task_kind
from tests.cli.test_cli import _tokenizer
from tests.helpers.tiny_models import tiny_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
NAMES = ["good", "bad", "so so"]
ROWS = [(f"w{i} w{i + 1} w{7 * i % 40}", NAMES[i % 3]) for i in range(24)]


def classifier(names=NAMES):
    config = copy.deepcopy(tiny_model("bert").config)
    config.num_labels = 3
    if names:
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def write_csv(path, rows=ROWS, columns=("text", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_lines(path, rows=ROWS):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


@pytest.mark.parametrize("write, name", [(write_csv, "a.csv"), (write_lines, "a.jsonl")])
def test_labels_are_matched_by_name(write, name, tmp_path):
    model = classifier(["SO_SO", "good", "bad"])
    task = load_task(model, _tokenizer(), write(tmp_path / name), holdout=0, max_length=16)
    (batch,) = task.batches(batch_size=24)
    assert task_kind(model) == task.kind == "classification"
    assert batch["labels"].tolist() == [1, 2, 0] * 8
    assert "good 8" in task.described()


def test_scores_are_those_of_single_texts():
    model, tokenizer = classifier(), _tokenizer()
    task = load_task(model, tokenizer, validation=ROWS, max_length=16)
    with torch.no_grad():
        found = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text, _ in ROWS]
    right = sum(NAMES[i] == label for i, (_, label) in zip(found, ROWS, strict=True))
    assert task.score(model) == right / len(ROWS)
    by_loss = load_task(model, tokenizer, validation=ROWS, metric="loss", max_length=16)
    assert by_loss.score(model) > 0 and by_loss.signature()["metric"] == "loss"


def test_numbers_are_the_models_own(tmp_path):
    rows = [(text, i % 3) for i, (text, _) in enumerate(ROWS)]
    task = load_task(classifier(), _tokenizer(), write_lines(tmp_path / "a.jsonl", rows), holdout=0, max_length=9)
    assert next(task.batches(batch_size=6))["labels"].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "rows, names, words",
    [
        ([("w1", "good"), ("w2", "great")], NAMES, "no class 'great' of the train data, it has good, bad, so so"),
        ([("w1", "good"), ("w2", "bad")], None, "2 classes in the train data .*the model has 3 without names"),
        ([("w1", 0), ("w2", 3)], NAMES, r"has the label 3, but the model has 3 classes \(0 to 2\)"),
        ([("w1", 0), ("w2", -1)], NAMES, "example 1 has the label -1, wanted names, or whole numbers"),
        ([("w1", "good"), ("w2", None)], NAMES, "example 0 has the label 'good'.*leave out"),
        ([], NAMES, "no examples"),
    ],
)
def test_labels_that_are_not_the_models(rows, names, words):
    with pytest.raises(FFMergeError, match=words):
        load_task(classifier(names), _tokenizer(), rows, holdout=0, max_length=9)


def test_files_without_labels(tmp_path):
    with pytest.raises(FFMergeError, match="has no column 'label', only text, stars; name that of the labels by"):
        load_labelled(write_csv(tmp_path / "a.csv", columns=("text", "stars")), "train", None, None)
    found = load_labelled(tmp_path / "a.csv", "train", None, "stars")
    assert found.texts == [text for text, _ in ROWS] and found.classes == sorted(NAMES)
    (tmp_path / "a.txt").write_text("some words")
    with pytest.raises(FFMergeError, match="a.txt holds no records; give JSON lines"):
        load_labelled(tmp_path / "a.txt", "train", None, None)
    with pytest.raises(FFMergeError, match="--label-column .*is for classification of texts, and this task is lm"):
        load_task(tiny_model("gpt2"), _tokenizer(), [tmp_path / "a.txt"], label_column="stars")
    assert isinstance(load_labelled(LabelledTexts(["a"], [0]), "train", None, None), LabelledTexts)


def test_on_the_command_line(tmp_path, capsys):
    classifier().save_pretrained(tmp_path / "model")
    _tokenizer().save_pretrained(tmp_path / "model")
    data = ["--data", str(write_csv(tmp_path / "a.csv")), "--max-length", "12"]
    merged, tuned = str(tmp_path / "merged"), str(tmp_path / "tuned")
    assert main(["merge", str(tmp_path / "model"), merged, "--layers", "1-2", "--tokens", "60", *data]) == 0
    assert main(["finetune", merged, tuned, "--steps", "3", "--lr", "1e-2", "--batch-size", "4", *data]) == 0
    capsys.readouterr()
    assert main(["eval", tuned, *data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["accuracy"] <= 1 and ff.verify(tuned)
