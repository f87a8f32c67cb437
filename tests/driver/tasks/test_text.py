"""Text files, packing, sentence pairs, and their tokens."""

import pytest
import torch

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver.tasks.text import PairEncoder, load_parallel, load_text
from ffmerge_fast.driver.tasks.tokens import TokenStream
from tests.helpers.training import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ending_tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), appends_end=True)


def test_folder_is_read_recursively_and_sorted_without_binary_and_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b/x.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / ".git/config").write_text("hidden")
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "zeros").write_bytes(b"a\0b")
    assert _texts(tmp_path) == ["first", "second"]
    assert _texts(tmp_path / "a.md") == ["first"]
    assert _texts(["one", "two"]) == ["one", "two"]


def test_documents_are_joined_by_the_end_token(tokenizer, ending_tokenizer):
    one, two = (tokenizer(text)["input_ids"] for text in ("ab", "c"))
    texts = load_text(["ab", "c"])
    assert TokenStream(texts, tokenizer).first().tolist() == [*one, 1, *two]
    assert TokenStream(texts, ending_tokenizer).first().tolist() == [*one, 1, *two, 1]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda d: d / "none.txt", "none.txt does not exist"),
        (lambda d: _file(d, b""), "no text in .*file; give"),
        (lambda d: _file(d, b"a\xff\xfe"), "file is no text: not UTF-8"),
        (lambda d: _file(d, b"a\0b"), "file is no text: there are NUL"),
        (lambda d: _file(d, b"\x1f\x8bno gzip"), "file cannot be read: "),
        (lambda d: d, "no text in"),
        (lambda d: [], "no text in the list"),
        (lambda d: ["a", 1], "list of strings"),
        (lambda d: [str(_file(d, b"text"))], "file is the name of a file, not a text"),
        (lambda d: [_file(d, b"text"), d / "none"], "none does not exist"),
        (lambda d: [_file(d, b"text"), "text"], "list with other things"),
    ],
)
def test_bad_text(tmp_path, make, words):
    with pytest.raises(FFMergeError, match=words) as caught:
        load_text(make(tmp_path))
    assert "\n" not in str(caught.value)


def _texts(source) -> list[str]:
    return [document.text() for document in load_text(source)]


def _file(folder, content):
    (folder / "file").write_bytes(content)
    return folder / "file"


def test_parallel_files(tmp_path):
    (tmp_path / "en").write_text("one\ntwo\x0cpages\n")
    (tmp_path / "de").write_text("eins\nzwei\u2028Zeilen", encoding="utf-8")
    assert load_parallel(tmp_path / "en", tmp_path / "de") == [("one", "eins"), ("two\x0cpages", "zwei\u2028Zeilen")]


@pytest.mark.parametrize(
    "en, de, words",
    [("a\nb\n", "c\n", "has 2 lines, .*has 1"), ("", "", "are empty"), ("a", None, "de does not exist")],
)
def test_bad_parallel_files(tmp_path, en, de, words):
    (tmp_path / "en").write_text(en)
    if de is not None:
        (tmp_path / "de").write_text(de)
    with pytest.raises(FFMergeError, match=words):
        load_parallel(tmp_path / "en", tmp_path / "de")


def test_pairs_end_once_are_cut_and_masked(tokenizer, ending_tokenizer):
    for tok in (tokenizer, ending_tokenizer):
        encoder = PairEncoder(tok, max_length=5)
        assert encoder.appends_end is (tok is ending_tokenizer)
        batch = encoder(["ab", "abcdefgh"], ["xyz", "x"])
        a, b, c, d, x, y, z = (tokenizer(letter)["input_ids"][0] for letter in "abcdxyz")
        assert batch["input_ids"].tolist() == [[a, b, 1, 0, 0], [a, b, c, d, 1]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
        assert batch["labels"].tolist() == [[x, y, z, 1], [x, 1, -100, -100]]


def test_prefix(tokenizer):
    batch = PairEncoder(tokenizer, prefix="to de: ")(["a"])
    assert tokenizer.decode(batch["input_ids"][0]) == "to de: a</s>"
    assert torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"]))


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    """A tokenizer of many languages: NLLB's."""
    from transformers import NllbTokenizer

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefgh"]
    tokenizer = NllbTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": ["eng_Latn", "deu_Latn"]})
    return tokenizer


def test_languages_are_set_for_labels_and_translations(multilingual):
    from ffmerge_fast.driver.evaluate import translate

    encoder = PairEncoder(multilingual, languages=("eng_Latn", "deu_Latn"))
    batch = encoder(["a"], ["b"])
    english, german = multilingual.convert_tokens_to_ids(["eng_Latn", "deu_Latn"])
    assert batch["input_ids"][0, 0] == english and batch["labels"][0, 0] == german
    seen = {}

    class Model(torch.nn.Linear):
        def generate(self, input_ids, **options):
            seen.update(options)
            return input_ids

    translate(Model(1, 1), encoder, ["a b"])
    assert seen["forced_bos_token_id"] == german


@pytest.mark.parametrize(
    "languages, words",
    [
        ((None, None), "needs both"),
        (("eng_Latn", None), "needs both"),
        (("eng_Latn", "xyz_Latn"), "not know 'xyz_Latn'"),
    ],
)
def test_languages_that_are_missing_or_unknown(multilingual, languages, words):
    with pytest.raises(FFMergeError, match=words):
        PairEncoder(multilingual, languages=languages)
