"""Tokens made in pieces are those of the whole text; no more is tokenised than is used; BOS begins every block."""

import math

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver.tasks import kinds, tokens
from ffmerge_fast.driver.tasks.load import load_task
from ffmerge_fast.driver.tasks.text import load_text
from ffmerge_fast.driver.tasks.tokens import TokenStream
from tests.helpers.tiny_models import tiny_model
from tests.helpers.training import byte_model, tiny_tokenizer

TEXT = "The old  man\n\n\nsaw 1234 ships.\n  def f(x):\n\treturn x\n\nnaïve “words” 漢字かな。\r\n" * 40


def trained(pre_tokenizer):
    """A small BPE tokenizer; whatever it divides texts into, no token was learnt across words."""
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    metaspace = isinstance(pre_tokenizer, pre_tokenizers.Metaspace)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizer
    texts = [TEXT.replace("\n", " ") if metaspace else TEXT]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_bos(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<pad>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    return tokenizer


PRE_TOKENIZERS = {
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefixed": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "metaspace": pre_tokenizers.Metaspace(split=False),  # a text is one word, its first letter another than inside
    "words": pre_tokenizers.Whitespace(),
    "llama": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@pytest.mark.parametrize("piece", [100, 333])
def test_pieces_give_the_tokens_of_the_whole(name, piece, monkeypatch):
    monkeypatch.setattr(tokens, "_PIECE", piece)
    monkeypatch.setattr(tokens, "_CONTEXT", 24)
    tokenizer = wrapped(trained(PRE_TOKENIZERS[name]))
    for text in (TEXT, " ".join(TEXT.split()), "a b " * 500):
        assert TokenStream(load_text([text]), tokenizer).first().tolist() == tokenizer(text)["input_ids"]


@pytest.mark.real
@pytest.mark.parametrize("model", ["gpt2-pystdlib", "marian-en-de"])
def test_pieces_of_real_texts(shared, model):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    for path in (shared / "data/wt2_valid.txt", shared / "models/gpt2-pystdlib/eval.txt"):
        assert TokenStream(load_text(path), tokenizer).first().tolist() == tokenizer(path.read_text())["input_ids"]


def test_a_word_without_end_is_bounded(monkeypatch):
    monkeypatch.setattr(tokens, "_PIECE", 200)
    longest = []
    tokenizer = wrapped(trained(PRE_TOKENIZERS["bytes"]))
    call = tokens._ids
    monkeypatch.setattr(tokens, "_ids", lambda t, texts: longest.append(max(map(len, texts))) or call(t, texts))
    ids = TokenStream(load_text(["abcdefgh" * 200]), tokenizer).first()
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "abcdefgh" * 200
    assert max(longest) <= 200 + tokens._CONTEXT


@pytest.fixture
def long_texts(tmp_path, monkeypatch):
    """A file that counts as long: 2,000 numbered lines of 10 bytes, and how much of it has been tokenised."""
    tiny_tokenizer(tmp_path)
    for module, name, value in ((tokens, "WHOLE", 5000), (tokens, "_PIECE", 200), (kinds, "_PART", 1000)):
        monkeypatch.setattr(module, name, value)
    (tmp_path / "long.txt").write_text("".join(f"{i:09d}\n" for i in range(2000)))
    used = []
    call = tokens._ids
    monkeypatch.setattr(tokens, "_ids", lambda t, texts: used.append(sum(map(len, texts))) or call(t, texts))
    return tmp_path, used


def test_of_a_long_text_only_what_is_used_is_tokenised(long_texts):
    folder, used = long_texts
    model = byte_model("gpt2")
    task = load_task(model, folder, folder / "long.txt", block=10)
    batches = task.batches("train", 5, shuffle=True)
    first = torch.cat([next(batches)["input_ids"] for _ in range(20)])
    assert sum(used) < 0.4 * 20_000
    lines = sorted(AutoTokenizer.from_pretrained(folder).batch_decode(first))
    assert lines == [f"{i:09d}\n" for i in range(100)]  # one part, whole
    assert task.evaluate(model, limit=3)["tokens"] == 27 and sum(used) < 0.6 * 20_000
    assert task.size("train") == 1801 and task.size("validation") == 199  # the last tenth, from the end of its line
    batches = list(task.batches("train", 5, shuffle=True))
    assert len({tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}) == 1800
    later = list(task.batches("train", 5, shuffle=True, start=50, rank=1, world=3))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(later, batches[151::3], strict=True))


def test_bos_begins_every_block_and_window(tmp_path):
    tokenizer = with_bos(tiny_tokenizer(tmp_path))
    model, text = byte_model("gpt2"), "abcdefghijklmnopqrstu" * 3
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    task = load_task(model, tokenizer, test=[text, "xy"], block=8)
    blocks = torch.cat([batch["input_ids"] for batch in task.batches("test")])
    assert blocks[:, 0].tolist() == [0] * 9
    assert blocks[:, 1:].flatten().tolist() == plain
    for stride in (None, 3):
        losses = _scores(model, [*plain, 1, 0, *tokenizer("xy", add_special_tokens=False)["input_ids"]], stride or 7)
        result = task.evaluate(model, "test", stride=stride)
        assert result["tokens"] == len(losses) == 67
        assert result["loss"] == pytest.approx(math.fsum(losses) / 67, rel=1e-5)
    without = load_task(model, tokenizer, test=[text], block=8, bos=False)
    ids = next(without.batches("test"))["input_ids"]
    assert ids.flatten().tolist() == [0, *plain][: ids.numel()]


def _scores(model, ids, stride, room=7):
    """Loss of each token in the first window of BOS and `room` tokens that holds it."""
    losses = []
    for t in range(len(ids)):
        start = 0
        while t >= start + room:
            start += stride
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[0, *ids[start:t]]])).logits[0, -1]
        losses.append(-float(torch.log_softmax(logits, -1)[ids[t]]))
    return losses


def test_masked_models_find_masked_tokens(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("<pad>", 0), ("</s>", 1)]
    )
    model = tiny_model("bert")
    model.resize_token_embeddings(258)
    with pytest.raises(FFMergeError, match="no mask token"):
        load_task(model, tokenizer, test=["abc" * 100], block=20)
    tokenizer.add_special_tokens({"mask_token": "~"})
    task = load_task(model, tokenizer, test=["abcdefghi" * 400], block=20)
    (batch,) = task.batches("test", 200)
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids[:, 0].tolist() == [0] * 200 and ids[:, -1].tolist() == [1] * 200
    hidden = labels != -100
    assert not hidden[:, 0].any() and not hidden[:, -1].any() and 0.12 < hidden[:, 1:-1].float().mean() < 0.18
    masked = ids == tokenizer.mask_token_id
    assert not (masked & ~hidden).any() and 0.7 < masked.sum() / hidden.sum() < 0.9
    text = torch.tensor(tokenizer("abcdefghi" * 400, add_special_tokens=False)["input_ids"]).view(200, 18)
    assert torch.equal(torch.where(hidden, labels, ids)[:, 1:-1], text)
    assert torch.equal(next(task.batches("test", 7))["input_ids"], ids[:7])
    assert task.evaluate(model, "test", limit=50)["loss"] == pytest.approx(
        float(model(input_ids=ids[:50], labels=labels[:50]).loss.detach()), rel=1e-5
    )


def test_no_model_is_scored_as_another_kind():
    with pytest.raises(FFMergeError, match="BertForMaskedLM is no model for that; give --task masked"):
        load_task(tiny_model("bert"), None, test=["abc"], kind="lm")
