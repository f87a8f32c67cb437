"""Code in a folder runs only where that was asked for, and nothing asks; one module reads by transformers."""

import ast
import builtins
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.checkpoint.trusted import load_processor
from ffmerge_fast.cli.main import main
from ffmerge_fast.cli.parser import command_names, parser
from ffmerge_fast.models import families
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model

from .test_contents import edit, refusal, tokenizer

transformers = pytest.importorskip("transformers")
PACKAGE = Path(ff.__file__).parent
PATHS = ["--ffn-layers", "h", "--ffn-up", "mlp.fc_in", "--ffn-down", "mlp.fc_out"]
CODE = """
import builtins
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
builtins.code_ran = True
class OwnConfig(GPT2Config):
    model_type = "own"
class OwnForCausalLM(GPT2LMHeadModel):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


@pytest.fixture(autouse=True)
def nothing_asks(monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda text="": pytest.fail(f"it asks: {text}"))
    monkeypatch.setattr(builtins, "code_ran", False, raising=False)


@pytest.fixture
def own(tmp_path):
    """A folder whose model and tokenizer have code of their own."""
    tiny_model("gpt2").save_pretrained(tmp_path / "own")
    tokenizer().save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "own.py").write_text(CODE)
    change = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": CLASSES}
    edit(tmp_path / "own" / "config.json", lambda config: config.update(change))
    change = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    edit(tmp_path / "own" / "tokenizer_config.json", lambda config: config.update(change))
    return tmp_path / "own"


@pytest.fixture
def unregister():
    """Forget families that the test registers."""
    before = dict(families._FAMILIES)
    yield lambda: (families._FAMILIES.clear(), families._FAMILIES.update(before))
    families._FAMILIES.clear()
    families._FAMILIES.update(before)


def test_code_of_a_folder_does_not_run(own, capsys):
    assert "needs code that lies in it: load it with its own code (trust_remote_code=True" in refusal(
        ff.from_pretrained, own
    )
    for command in (["inspect", str(own)], ["export", str(own), str(own.with_name("out"))]):
        assert main([*command, *PATHS]) == 1
        assert "--trust-remote-code" in capsys.readouterr().err
    assert not builtins.code_ran


def test_code_of_a_tokenizer_does_not_run(own):
    edit(own / "config.json", lambda config: config.update(model_type="gpt2", architectures=["GPT2LMHeadModel"]))
    edit(own / "config.json", lambda config: config.pop("auto_map"))
    ff.from_pretrained(own)
    try:  # a stock class that reads its files, or none
        load_processor(own)
    except ff.FFMergeError as error:
        assert "trust_remote_code=True" in str(error)
    assert not builtins.code_ran


def test_code_of_a_trusted_folder_runs(own):
    model = ff.from_pretrained(own, trust_remote_code=True).eval()
    assert builtins.code_ran and type(model).__name__ == "OwnForCausalLM"
    assert torch.equal(logits(model, tiny_inputs(model)), logits(tiny_model("gpt2"), tiny_inputs(model)))
    assert type(load_processor(own, trust_remote_code=True)).__name__ == "OwnTokenizer"
    (own / "text.txt").write_text("a b b a " * 50)
    command = ["eval", str(own), "--data", str(own / "text.txt"), "--max-length", "8", "--quiet"]
    assert main(command) == 1 and main([*command, "--trust-remote-code"]) == 0


def test_travelling_file_does_not_run(tmp_path):
    model = tiny_model("gpt2")
    ff.save_pretrained(ff.merge_(model, ff.plan(layers="1-3", method="random", model=model)), tmp_path / "m")
    with open(tmp_path / "m" / "modeling_ffmerge.py", "a") as file:
        file.write("\nimport builtins\nbuiltins.code_ran = True\n")
    for trust in (False, True):
        loaded = ff.from_pretrained(tmp_path / "m", check=False, trust_remote_code=trust)
        assert ff.is_merged(loaded) and not builtins.code_ran


def test_a_merged_folder_carries_its_layout(tmp_path, unregister, capsys):
    config = transformers.CodeGenConfig(
        vocab_size=64, n_embd=16, n_layer=4, n_head=4, n_positions=64, rotary_dim=4, bos_token_id=1, eos_token_id=2
    )
    transformers.CodeGenForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a b b a " * 100)
    folders = {name: str(tmp_path / name) for name in ("model", "merged", "tuned", "stock", "text.txt")}
    data = ["--data", folders["text.txt"], "--max-length", "16"]
    merge = ["merge", folders["model"], folders["merged"], "--layers", "0-2", "--method", "average"]
    assert main(merge) == 1 and "no FFN layout known for 'codegen'" in capsys.readouterr().err
    assert main([*merge, *PATHS]) == 0
    later = [
        ["verify", folders["merged"]],
        ["inspect", folders["merged"]],
        ["inspect", folders["merged"], *PATHS],
        ["eval", folders["merged"], *data],
        ["finetune", folders["merged"], folders["tuned"], *data, "--steps", "1"],
        ["verify", folders["tuned"]],
        ["export", folders["merged"], folders["stock"], "--expand"],
    ]
    for command in later:
        unregister()
        assert main([*command, "--json"]) == 0, command
        if command[0] == "inspect":
            found = json.loads(capsys.readouterr().out)
            assert found["shared_groups"] == [{"stack": "decoder", "layers": [0, 1, 2]}]
        capsys.readouterr()
    assert "ffmerge" not in Path(folders["stock"], "config.json").read_text()
    unregister()
    edit(Path(folders["merged"], "ffmerge.json"), lambda manifest: manifest.pop("parsed"))
    copy = shutil.copytree(folders["merged"], tmp_path / "copy")
    edit(copy / "config.json", lambda config: config["ffmerge"].update(layout=[{"layers": "h", "bottom": "x"}]))
    assert "ffmerge.layout of its config.json is none" in refusal(ff.from_pretrained, copy)


def test_known_families_have_no_layout_in_their_config():
    model = tiny_model("llama")
    ff.merge_(model, ff.plan(layers="1-3", method="random", model=model))
    assert model.config.ffmerge.keys() == {"version", "groups"}


def test_one_module_reads_by_transformers():
    """Elsewhere no Auto class, no class's from_pretrained, nothing of hub or dynamic modules."""
    allowed = {("checkpoint/trusted.py", None), ("integrations/transformers.py", "AutoConfig")}
    allowed |= {
        ("remote_code/modeling_ffmerge.py", name) for name in ("AutoModel", "get_config_dict")
    }  # nothing is read
    reads = re.compile(r"Auto[A-Z]\w+|from_config|get_config_dict|from_pretrained|hf_hub_download|dynamic_module_utils")
    found = set()
    for file in PACKAGE.rglob("*.py"):
        name = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            words = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.Name) and node.id.startswith("Auto"):
                words = [node.id]
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("transformers", "huggingface_hub")):
                words = [node.module, *(alias.name for alias in node.names)]
            found |= {(name, word) for word in words if reads.fullmatch(word.rpartition(".")[2])}
    assert ("checkpoint/trusted.py", "AutoConfig") in found  # the search finds
    assert {(n, w) for n, w in found if (n, w) not in allowed and (n, None) not in allowed} == set()


def test_every_command_that_loads_a_model_can_be_told():
    verbs = parser()._subparsers._group_actions[0].choices
    told = {n for n in command_names() if "--trust-remote-code" in verbs[n].format_help()}
    assert (
        told
        == {n for n in command_names() if "--ffn-up" in verbs[n].format_help()}
        == set(command_names())
        - {
            "demo",
            "env",
            "verify",
        }
    )
