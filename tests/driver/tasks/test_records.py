"""Files of records, and the ways in which text is written."""

import csv
import gzip
import json

import pytest

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver.tasks.text import load_parallel, load_text

TEXTS = ["one [1]\n", "NA", 'two, "2"']


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("records")
    rows = [{"number": i, "text": text, "meta": {"lang": "en"}} for i, text in enumerate(TEXTS)]
    lines = "\n".join(map(json.dumps, rows))
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.json").write_text(json.dumps(rows))
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    with open(folder / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([("number", "text"), *enumerate(TEXTS)])
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.to_parquet(folder / "a.parquet")
    table.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(folder / "splits")
    (folder / "hub").mkdir()
    table.to_parquet(folder / "hub/train-00000-of-00001.parquet")
    table.select([2]).to_parquet(folder / "hub/test-00000-of-00001.parquet")
    (folder / "hub/README.md").write_text("---\nlicense: mit\n---\n# About")
    return folder


def texts(source, *options):
    return [document.text() for document in load_text(source, *options)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "saved", "splits", "hub"])
def test_records_are_their_texts(files, name):
    assert texts(files / name) == TEXTS


def test_splits_of_a_folder(files):
    assert texts(files / "hub", "validation") == [TEXTS[2]]  # test stands in
    assert texts(files / "splits", "test") == [TEXTS[1]]


def test_column(files, tmp_path):
    (tmp_path / "two.jsonl").write_text('{"title": "t", "body": "b", "n": 1}\n{"title": "u", "body": null, "n": 2}')
    assert texts(tmp_path / "two.jsonl", "train", "title") == ["t", "u"]
    assert texts(tmp_path / "two.jsonl", "train", "body") == ["b"]
    (tmp_path / "text.txt").write_text("plain")
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n")
    (tmp_path / "broken.json").write_text('{"text": ')
    for name, column, words in (
        ("two.jsonl", None, r"several columns with text \(title, body\); name one by --text-column"),
        ("two.jsonl", "n", "no text in a column 'n'; it has columns with text: title, body"),
        ("text.txt", "text", "text.txt has no columns; leave it out"),
        ("numbers.csv", None, "no text in a column 'text'; it has only a, b"),
        ("broken.json", None, "broken.json cannot be read as records: "),
        ("", None, "holds records .broken.json. and texts .text.txt.; give the files you want"),
    ):
        with pytest.raises(FFMergeError, match=words) as caught:
            load_text(tmp_path / name, "train", column)
        assert "\n" not in str(caught.value)


def test_encodings_and_line_ends(tmp_path):
    text = "naïve\nline\rof “two”\n"
    for name, data in (
        ("utf8", text.encode()),
        ("bom", text.encode("utf-8-sig")),
        ("utf16", text.encode("utf-16")),
        ("crlf", text.replace("\n", "\r\n").encode()),
        ("packed.gz", gzip.compress(text.encode())),
    ):
        (tmp_path / name).write_bytes(data)
        assert texts(tmp_path / name) == [text], name
    (tmp_path / "other").write_text("a\nb\n")
    for name in ("utf8", "bom", "crlf"):
        assert load_parallel(tmp_path / name, tmp_path / "other") == [("naïve", "a"), ("line\rof “two”", "b")]
    (tmp_path / "x.jsonl").write_text('{"a": "b"}\n' * 2)
    with pytest.raises(FFMergeError, match="x.jsonl is no text file"):
        load_parallel(tmp_path / "x.jsonl", tmp_path / "other")


def test_line_ends_at_the_border_of_two_reads(tmp_path, monkeypatch):
    from ffmerge_fast.driver.tasks import documents

    (tmp_path / "a").write_bytes(("é\r\n" * 7 + "x\r").encode())
    for size in (1, 2, 3, 5):
        monkeypatch.setattr(documents, "_BYTES", size)
        assert texts(tmp_path / "a") == ["é\n" * 7 + "x\r"]


def test_several_files_are_documents(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in (("1.txt", "one"), ("2.txt", "two"), ("b/3.txt", "three")):
        (tmp_path / name).write_text(text)
    assert texts([tmp_path / "2.txt", tmp_path / "b", tmp_path / "1.txt"]) == ["two", "three", "one"]


def test_a_document_is_divided_at_a_line_or_word(tmp_path):
    (tmp_path / "a").write_text("naïve line\nother words here")
    (document,) = load_text(tmp_path / "a")
    for at, before in ((3, "naïve line\n"), (11, "naïve line\nother "), (24, "naïve line\nother words h")):
        first, second = document.divide(at)
        assert first.text() == before and first.text() + second.text() == document.text()
        assert (first.length, second.length) == (len(before), document.length - len(before))
