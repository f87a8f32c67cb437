"""Tokens of documents, made in bounded pieces when they are asked for."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...support.errors import FFMergeError
from ...support.progress import progress
from .documents import Document

WHOLE = 4 << 20  # characters; a text no longer is held out from by its tokens and shuffled as one
_PIECE = 1 << 16  # characters tokenised as one text
_TOGETHER = 4  # pieces of one call
_CONTEXT = 64  # characters before a piece that the tokenizer sees with it
# Where a text is divided, best first: between two lines, before a word, where letters begin or end.
_BORDERS = [re.compile(pattern) for pattern in (r"(?<=\S\n)(?=\S)", r"(?<=\S)(?= \S)", r"\b")]


class TokenStream:
    """All documents as one row of tokens, with the tokenizer's end-of-text token between them if it has one.

    Each document stands between the special tokens that the tokenizer adds, but for a beginning-of-text token at the
    very front with `bare`. A long document is tokenised in pieces, which gives the tokens of the whole.

    Args:
        documents: one at least.
        tokenizer: of transformers.
        bare: "front" leaves out what the tokenizer adds before the first document, "all" everything it adds.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Any, bare: str | None = None):
        self._documents, self._tokenizer, self._bare = documents, tokenizer, bare
        self._ids = torch.empty(0, dtype=torch.int32)
        self._source: Iterator[list[int]] = self._generate()

    @staticmethod
    def of(ids: Tensor) -> TokenStream:
        """Tokens that there are already [tokens]."""
        stream = TokenStream([], None)
        stream._ids = ids
        return stream

    def first(self, count: int | None = None) -> Tensor:
        """The first `count` tokens (default: all), or as many as there are."""
        made, have = [self._ids], len(self._ids)
        with progress(total=count, desc="tokens", unit="token") as bar:
            while count is None or have < count:
                ids = next(self._source, None)
                if ids is None:
                    break
                made.append(torch.tensor(ids, dtype=torch.int32))
                have += len(ids)
                bar.update(len(ids))
        self._ids = torch.cat(made) if len(made) > 1 else self._ids
        return self._ids[:count]

    def identity(self) -> Any:
        """What `content_hash` takes: all tokens; of a long text the first of them, and a hash of its characters."""
        if not self.long:
            return self.first()
        digest = hashlib.blake2b(digest_size=8)
        for part in itertools.chain.from_iterable(self._documents):
            digest.update(part.encode("utf-8", "surrogatepass"))
        return [self.first(_PIECE), digest.hexdigest()]

    @property
    def long(self) -> bool:
        """Whether the text is too long to tokenise all of it before any is used."""
        return self._characters > WHOLE

    @property
    def _characters(self) -> int:
        return sum(document.length for document in self._documents)

    def hold_out(self, share: float, block: int) -> tuple[TokenStream, TokenStream | None]:
        """All but the last `share` of the blocks, and those; of a long text, of its characters."""
        if not share:
            return self, None
        if self.long:
            return self._divided(round(self._characters * (1 - share)))
        ids = self.first()
        blocks = len(ids) // block
        held = round(blocks * share)
        if not held or held == blocks:
            return self, None
        return TokenStream.of(ids[: (blocks - held) * block]), TokenStream.of(ids[(blocks - held) * block :])

    def _divided(self, at: int) -> tuple[TokenStream, TokenStream]:
        ends = list(itertools.accumulate(document.length for document in self._documents))
        index = next(i for i, end in enumerate(ends) if end >= at)
        document = self._documents[index]
        before, after = document.divide(at - ends[index] + document.length)
        parts = ([*self._documents[:index], before], [after, *self._documents[index + 1 :]])
        kept, held = (TokenStream([d for d in part if d.length], self._tokenizer, self._bare) for part in parts)
        return kept, held

    def _generate(self) -> Iterator[list[int]]:
        if not self._documents:
            return
        before, after = special_tokens(self._tokenizer) if self._bare != "all" else ([], [])
        end, last = self._tokenizer.eos_token_id, None
        for i, document in enumerate(self._documents):
            joint = [end] if last is not None and end is not None and last != end else []
            opening = before if i or self._bare != "front" else []
            for ids in itertools.chain([joint + opening], _tokenised(document, self._tokenizer), [after]):
                if ids:
                    last = ids[-1]
                    yield ids


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer adds before and after a text."""
    bare, whole = _ids(tokenizer, ["a"])[0], tokenizer("a", verbose=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise FFMergeError(
        "tokenizer: a text with its special tokens does not hold the text's tokens; use another tokenizer"
    )


def _tokenised(document: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    pieces = _pieces(document, tokenizer)
    while some := list(itertools.islice(pieces, _TOGETHER)):
        known = _ids(tokenizer, [context for context, _ in some])
        both = _ids(tokenizer, [context + piece for context, piece in some])
        for (context, _), before, ids in zip(some, known, both, strict=True):
            yield ids[len(before) :] if context else ids


def _pieces(document: Iterable[str], tokenizer: Any) -> Iterator[tuple[str, str]]:
    """(the characters before a piece, the piece)"""
    context = waiting = ""
    for part in document:
        waiting += part
        start = 0
        while len(waiting) - start > _PIECE + _CONTEXT:
            cut = start + _border(waiting[start : start + _PIECE + _CONTEXT], tokenizer)
            yield context, waiting[start:cut]
            context, start = waiting[cut - _CONTEXT : cut], cut
        waiting = waiting[start:]
    if waiting:
        yield context, waiting


def _border(text: str, tokenizer: Any) -> int:
    """Where to divide so that the tokens before do not depend on what follows; anywhere in a word without end."""
    for pattern in _BORDERS:
        found = [match.start() for match in pattern.finditer(text, _PIECE // 2, _PIECE)]
        for cut in found[:-9:-1]:
            before, both = _ids(tokenizer, [text[cut - _CONTEXT : cut], text[cut - _CONTEXT : cut + _CONTEXT]])
            if both[: len(before)] == before:
                return cut
    return _PIECE


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
