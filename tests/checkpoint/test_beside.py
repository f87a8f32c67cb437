"""What belongs to a model beside its weights goes along; a model is saved whatever its class takes as input."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest

import ffmerge_fast as ff
from ffmerge_fast.checkpoint import beside
from ffmerge_fast.cli.main import main
from tests.helpers.tiny_models import tiny_model

GOES = {
    "vocab.txt": "a\nb", "chat_template.jinja": "{{ x }}", "preprocessor_config.json": "{}", "LICENSE": "mine",
    "README.md": "---\nlicense: mit\n---", "source.spm": "x", "special_tokens_map.json": "{}",
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}, {"path": "../other"}]),
    "1_Pooling/config.json": "{}", "1_Pooling/deep/weights.safetensors": "x",
}  # fmt: skip
STAYS = {
    ".gitattributes": "x", ".git/HEAD": "x", "_ffmerge/plan.json": "{}", "ffmerge.json": "of another",
    "modeling_ffmerge.py": "x", "checkpoint-5/trainer_state.json": "{}", "trainer_state.json": "{}",
    "training_args.bin": "x", "eval_results.json": "{}", "model.safetensors.index.json": "{}",
    "pytorch_model.bin": "x",
}  # fmt: skip
NAMED = {
    "modeling_mine.py": "x", "adapter_config.json": "{}", "adapter_model.safetensors": "x", "tf_model.h5": "x",
    "onnx/model.onnx": "x", "eval.txt": "x", "1_Pooling/code.py": "x",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    tiny_model("gpt2", layers=3).save_pretrained(folder)
    return folder


def fill(folder: Path, *files: dict[str, str]) -> None:
    for name, text in {k: v for some in files for k, v in some.items()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_what_goes_along_and_what_is_named(plain, tmp_path):
    model, source, out = ff.from_pretrained(plain), tmp_path / "source", tmp_path / "out"
    shutil.copytree(plain, source)
    fill(source, GOES, STAYS, NAMED)
    (source / "2_Normalize").mkdir()
    os.mkfifo(source / "pipe.json")
    with pytest.warns(UserWarning, match="not copied from") as caught:
        ff.save_pretrained(model, out, source=source)
    for name, text in GOES.items():
        assert (out / name).read_text() == text
    assert (out / "2_Normalize").is_dir() and not (tmp_path / "other").exists()
    assert ff.verify(out)["logit_difference"] == 0.0
    others = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - GOES.keys()
    assert others == {"config.json", "generation_config.json", "model.safetensors", "ffmerge.json"}
    (message,) = [str(warning.message) for warning in caught]
    named = message.partition(": ")[2].partition(";")[0].split(", ")
    assert sorted(named) == sorted({"onnx/", "pipe.json"} | NAMED.keys() - {"onnx/model.onnx"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # everything of ours goes along, nothing is named
        ff.save_pretrained(model, tmp_path / "again", source=out)
        ff.save_pretrained(model, tmp_path / "again", source=out, overwrite=True)  # all its files are known
    with pytest.warns(UserWarning):
        ff.save_pretrained(model, tmp_path / "code", source=source, trust_remote_code=True)
    assert (tmp_path / "code" / "modeling_mine.py").exists() and (tmp_path / "code/1_Pooling/code.py").exists()


def test_what_the_tokenizer_writes_stands(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "source")
    fill(tmp_path / "source", {"tokenizer.json": "[]", "vocab.json": "[]"})
    tokenizer = type("T", (), {"save_pretrained": lambda self, folder: fill(folder, {"tokenizer.json": "{}"})})()
    ff.save_pretrained(ff.from_pretrained(plain), tmp_path / "out", tokenizer, source=tmp_path / "source")
    assert [(tmp_path / "out" / name).read_text() for name in ("tokenizer.json", "vocab.json")] == ["{}", "[]"]


def test_a_file_too_large_or_that_cannot_be_read(plain, tmp_path, monkeypatch):
    shutil.copytree(plain, tmp_path / "source")
    fill(tmp_path / "source", {"vocab.json": "12345", "merges.txt": "1234"})
    monkeypatch.setattr(beside, "_LARGEST", 4)
    model = ff.from_pretrained(plain)
    with pytest.warns(UserWarning, match="not copied from .*source: vocab.json; "):
        ff.save_pretrained(model, tmp_path / "out", source=tmp_path / "source")
    assert (tmp_path / "out" / "merges.txt").exists()
    monkeypatch.setattr(shutil, "copyfile", lambda *files: open("/proc/self/mem/x"))
    with pytest.raises(ff.FFMergeError, match="source/merges.txt cannot be copied"):
        ff.save_pretrained(model, tmp_path / "other", source=tmp_path / "source")
    assert not (tmp_path / "other").exists()


def test_the_models_own_folder_is_not_replaced(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "a" / "source")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "source")
    before = sorted(tmp_path.rglob("*"))
    for target in ("a/source", "a", "link", "a/source/../../link"):
        with pytest.raises(ff.FFMergeError, match="is or holds the model's own folder"):
            ff.save_pretrained(ff.from_pretrained(plain), tmp_path / target, overwrite=True, source=tmp_path / "link")
    assert sorted(tmp_path.rglob("*")) == before


def test_every_command_takes_them_along(plain, tmp_path, capsys):
    shutil.copytree(plain, tmp_path / "source")
    fill(tmp_path / "source", {"chat_template.jinja": "{{ x }}", "LICENSE": "mine", "notes.doc": "x"})
    for command in (("merge", "--layers", "0-1", "--method", "average"), ("export",)):
        out = tmp_path / command[0]
        assert main([command[0], str(tmp_path / "source"), str(out), *command[1:]]) == 0
        assert {"chat_template.jinja", "LICENSE"} <= set(os.listdir(out))
    told = [line for line in capsys.readouterr().err.splitlines() if "not copied" in line]
    assert re.fullmatch(r"warning: not copied from .*: notes.doc; copy .*", "\n".join(told))  # once


# ------------------------------------------------------------------------------------------------- reference logits


_TEXT = dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
_SEQ2SEQ = dict(
    vocab_size=64, d_model=16, encoder_layers=3, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40,
)  # fmt: skip


@pytest.mark.parametrize("name, config, values, layers", [
    ("BartForSequenceClassification", "BartConfig", _SEQ2SEQ, "encoder:0-1,decoder:0-1"),
    ("BertForMultipleChoice", "BertConfig", _TEXT | {"max_position_embeddings": 40}, "0-1"),
])  # fmt: skip
def test_a_class_that_takes_another_input_is_saved(name, config, values, layers, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, name)(getattr(transformers, config)(**values)).eval()
    ff.merge_(model, ff.plan(None, layers=layers, method="average", model=model))
    with pytest.warns(UserWarning, match=f"{name} is saved without reference logits"):
        ff.save_pretrained(model, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "ffmerge.json").read_text())
    assert "reference" not in manifest and manifest["no_reference"]
    assert ff.verify(tmp_path / "out")["logit_difference"] is None
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "no reference logits were saved" in capsys.readouterr().out
    found = ff.from_pretrained(tmp_path / "out")
    assert type(found).__name__ == f"FFMerged{name}" and ff.find_ffns(found)


def test_logits_that_overflow_are_said_at_saving(tmp_path):
    model = tiny_model("gpt2", layers=3)
    model.transformer.ln_f.weight.data.fill_(3e38)
    with pytest.warns(UserWarning, match="without reference logits.*: its logits are not finite"):
        ff.save_pretrained(model, tmp_path / "out")
    assert ff.verify(tmp_path / "out")["logit_difference"] is None
