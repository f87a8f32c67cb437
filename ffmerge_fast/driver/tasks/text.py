"""Text data: documents for language models, pairs of sentences for translation."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...support.errors import FFMergeError
from .documents import Document, existing
from .records import holds_records, load_records, visible_files

IGNORED = -100  # label of a position that is not scored (transformers' convention)


def load_text(source: Any, split: str = "train", column: str | None = None) -> list[Document]:
    """Documents that are not blank.

    Args:
        source: a list of strings; or the path of a text file (one document), of a file or folder of records (see
            `records`), of a folder of text files (each in it, recursively, sorted; binary and hidden files are passed
            over); or a list of such paths, as `pathlib.Path`.
        split: which part of a folder of records with several.
        column: of records, that holds the texts.

    Raises:
        FFMergeError: a path does not exist or is no text, a column for what has none, or there is no text.
    """
    if isinstance(source, (str, os.PathLike)):
        return _not_empty(_documents(existing(source, "text data"), split, column), str(source))
    sources = list(source)
    if sources and all(isinstance(path, os.PathLike) for path in sources):
        paths = [existing(path, "text data") for path in sources]
        return [document for path in paths for document in load_text(path, split, column)]
    if any(not isinstance(text, str) for text in sources):
        raise FFMergeError(
            "text data: wanted a path, a list of strings or of paths, got a list with other things in it"
        )
    if sources and _names_file(sources[0]):
        raise FFMergeError(
            f"text data: {sources[0]} is the name of a file, not a text; give the files as a list of pathlib.Path"
        )
    _no_column(column, "the list of texts")
    return _not_empty([Document(text) for text in sources], "the list of texts")


def load_parallel(source: str | os.PathLike, target: str | os.PathLike) -> list[tuple[str, str]]:
    """Sentence pairs of two files, one sentence a line; line i of `target` translates line i of `source`.

    Raises:
        FFMergeError: a file is missing, is not UTF-8, has no lines, or the two have different numbers of lines.
    """
    lines = [_lines(existing(path, "parallel data")) for path in (source, target)]
    if len(lines[0]) != len(lines[1]):
        raise FFMergeError(
            f"parallel data: {source} has {len(lines[0])} lines, {target} has {len(lines[1])}; wanted equal numbers"
        )
    if not lines[0]:
        raise FFMergeError(f"parallel data: {source} and {target} are empty")
    return list(zip(*lines, strict=True))


class PairEncoder:
    """Turns sentences into padded batches for an encoder-decoder model.

    Source and target both end with the end-of-sentence token; it is appended where the tokenizer does not do so itself.

    Args:
        tokenizer: of transformers; its pad token fills the source (the end token if it has none), -100 the labels.
        max_length: tokens per sentence, the end token included; longer sentences are cut.
        prefix: put before every source sentence (T5's "translate English to German: ").
        languages: codes of source and target; wanted where the tokenizer is of many languages (NLLB, M2M-100, mBART).

    Attributes:
        generation: what `generate` needs beside the source.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int = 128,
        prefix: str = "",
        languages: tuple[str | None, str | None] = (None, None),
    ):
        if max_length < 2:
            raise FFMergeError(f"max_length: got {max_length}, wanted at least 2 tokens")
        self.generation = _set_languages(tokenizer, languages)
        self.tokenizer, self.max_length, self.prefix = tokenizer, max_length, prefix
        self.end = tokenizer.eos_token_id
        self.appends_end = self.end is None or self.end in tokenizer("a")["input_ids"]
        self.pad = next((i for i in (tokenizer.pad_token_id, self.end) if i is not None), 0)

    def __call__(self, sources: Sequence[str], targets: Sequence[str] | None = None) -> dict[str, Tensor]:
        """input_ids and attention_mask [n, longest source]; with `targets` also labels [n, longest target]."""
        batch = self.pad_sources(self.source_ids(sources))
        if targets is not None:
            batch["labels"] = _padded(self._ids(text_target=list(targets)), IGNORED)
        return batch

    def source_ids(self, sources: Sequence[str]) -> list[list[int]]:
        """Token ids of each source sentence, prefix and end token included."""
        return self._ids(text=[self.prefix + source for source in sources])

    def pad_sources(self, ids: list[list[int]]) -> dict[str, Tensor]:
        """input_ids and attention_mask [n, longest]."""
        lengths = torch.tensor([len(sentence) for sentence in ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return {"input_ids": _padded(ids, self.pad), "attention_mask": mask.long()}

    def _ids(self, **text: list[str]) -> list[list[int]]:
        room = self.max_length - (not self.appends_end)
        ids = self.tokenizer(**text, truncation=True, max_length=room, verbose=False)["input_ids"]
        return ids if self.appends_end else [[*sentence, self.end] for sentence in ids]


def _set_languages(tokenizer: Any, languages: tuple[str | None, str | None]) -> dict[str, int]:
    """Tell a tokenizer of many languages which two it is between; the options of `generate` that follow."""
    flags = "--source-lang and --target-lang (languages=)"
    if not hasattr(tokenizer, "src_lang"):
        if any(languages):
            raise FFMergeError(f"{flags}: {type(tokenizer).__name__} knows no languages; leave them out")
        return {}
    if not all(languages):
        example = next((token for token in tokenizer.all_special_tokens if _code(token)), "eng_Latn")
        raise FFMergeError(f"{flags}: {type(tokenizer).__name__} needs both; give codes such as {_code(example)}")
    ids = [_language_id(tokenizer, language) for language in languages]
    tokenizer.src_lang, tokenizer.tgt_lang = languages
    return {"forced_bos_token_id": ids[1]}


def _language_id(tokenizer: Any, language: str) -> int:
    for token in (language, f"__{language}__"):  # M2M-100 writes its languages so
        number = tokenizer.convert_tokens_to_ids(token)
        if number is not None and number != tokenizer.unk_token_id:
            return number
    known = sorted(filter(None, map(_code, tokenizer.all_special_tokens)))
    shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    raise FFMergeError(f"language: {type(tokenizer).__name__} does not know {language!r}; it knows {shown or 'none'}")


def _code(token: str) -> str | None:
    """The language's code of a special token: "eng_Latn", "en_XX", "__en__"; None of others."""
    found = re.fullmatch(r"_*([a-z]{2,3}(?:_[A-Z][A-Za-z]+)?)_*", token)
    return found and found[1]


def _padded(sentences: list[list[int]], value: int) -> Tensor:
    longest = max(len(sentence) for sentence in sentences)
    return torch.tensor([sentence + [value] * (longest - len(sentence)) for sentence in sentences])


def _documents(path: Path, split: str, column: str | None) -> list[Document]:
    if holds_records(path):
        return [Document(text) for text in load_records(path, split, column)]
    _no_column(column, str(path))
    if path.is_file():
        return [Document(path)]
    return [document for document in map(Document, visible_files(path)) if document.is_text()]


def _not_empty(documents: list[Document], where: str) -> list[Document]:
    documents = [document for document in documents if not document.blank]
    if not documents:
        raise FFMergeError(f"text data: no text in {where}; give a file with text in it")
    return documents


def _no_column(column: str | None, where: str) -> None:
    if column is not None:
        raise FFMergeError(f"--text-column (text_column=): {where} has no columns; leave it out")


def _names_file(text: str) -> bool:
    try:
        return len(text) < 1000 and Path(text).is_file()
    except (OSError, ValueError):
        return False


def _lines(path: Path) -> list[str]:
    if not path.is_file() or holds_records(path):
        raise FFMergeError(f"parallel data: {path} is no text file; wanted one sentence a line")
    lines = Document(path).text().split("\n")  # not splitlines(): it also splits at form feeds and Unicode separators
    return lines[:-1] if lines[-1] == "" else lines
