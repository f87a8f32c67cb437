"""Text data: documents packed into blocks for language models, pairs of sentences for translation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...support.errors import FFMergeError

TextSource = str | os.PathLike | Sequence[str]
IGNORED = -100  # label of a position that is not scored (transformers' convention)


def load_text(source: TextSource) -> list[str]:
    """Documents of a text file (one), of a folder (each text file in it, recursively, sorted), or a list of strings.

    Binary and hidden files of a folder are passed over. A file keeps its line endings as Python's text mode reads them.

    Raises:
        FFMergeError: the path does not exist, is not UTF-8 text, or there is no text in it.
    """
    if not isinstance(source, (str, os.PathLike)):
        documents = list(source)
        if any(not isinstance(document, str) for document in documents):
            raise FFMergeError("text data: wanted a path or a list of strings, got a list with other things in it")
        return _not_empty(documents, "the list of texts")
    path = existing(source, "text data")
    if path.is_file():
        return _not_empty([_read(path)], str(path))
    documents = [_read_or_none(file) for file in sorted(path.rglob("*")) if _is_visible_file(file, path)]
    return _not_empty([document for document in documents if document is not None], str(path))


def token_ids(documents: Sequence[str], tokenizer: Any) -> Tensor:
    """All documents as one LongTensor [tokens], with the tokenizer's end-of-text token between them if it has one."""
    ids: list[int] = []
    end = tokenizer.eos_token_id
    for document in documents:
        if ids and end is not None and ids[-1] != end:
            ids.append(end)
        ids.extend(tokenizer(document, verbose=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.long)


def text_blocks(source: TextSource, tokenizer: Any, block: int) -> Tensor:
    """Pack text into a LongTensor [n, block]; the tokens after the last whole block are dropped.

    Raises:
        FFMergeError: as `load_text`, or the text has fewer than `block` tokens.
    """
    return pack(token_ids(load_text(source), tokenizer), block)


def pack(ids: Tensor, block: int) -> Tensor:
    """[tokens] -> [tokens // block, block]; see `text_blocks`."""
    if block < 2:
        raise FFMergeError(f"block: got {block}, wanted at least 2 tokens")
    if len(ids) < block:
        raise FFMergeError(f"text data: {len(ids)} tokens do not fill one block of {block}; give more text")
    return ids[: len(ids) // block * block].view(-1, block)


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
    """

    def __init__(self, tokenizer: Any, max_length: int = 128, prefix: str = ""):
        if max_length < 2:
            raise FFMergeError(f"max_length: got {max_length}, wanted at least 2 tokens")
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


def existing(path: str | os.PathLike, what: str) -> Path:
    """`path` as a Path, or FFMergeError if there is nothing."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FFMergeError(f"{what}: {path} does not exist; give an existing file or folder")
    return path


def _padded(sentences: list[list[int]], value: int) -> Tensor:
    longest = max(len(sentence) for sentence in sentences)
    return torch.tensor([sentence + [value] * (longest - len(sentence)) for sentence in sentences])


def _not_empty(documents: list[str], where: str) -> list[str]:
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise FFMergeError(f"text data: no text in {where}; give a file with text in it")
    return documents


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise FFMergeError(f"text data: {path} cannot be read: {reason}") from error


def _read_or_none(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _is_visible_file(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _lines(path: Path) -> list[str]:
    lines = _read(path).split("\n")  # not splitlines(): it also splits at form feeds and Unicode separators
    return lines[:-1] if lines[-1] == "" else lines
