"""What the package promises before it is imported: its metadata, README's commands, and the files in a wheel."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from ffmerge_fast.driver import environment

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def required(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9_.-]+(\[\w+\])?", requirement)[0] for requirement in requirements}


def test_build_needs_setuptools_and_pybind11_only(pyproject):
    assert required(pyproject["build-system"]["requires"]) == {"setuptools", "pybind11"}


def test_base_dependencies_are_few(pyproject):
    few = {"torch", "numpy", "scipy", "safetensors", "lazy_loader", "filelock"}  # the last comes with torch
    assert required(pyproject["project"]["dependencies"]) == few


def test_env_report_knows_the_extras(pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    declared = {extra: {n for n in required(extras[extra]) if not n.startswith("ffmerge_fast[")} for extra in extras}
    assert declared.pop("all") == set()
    assert declared == {extra: set(packages) for extra, packages in environment._EXTRAS.items()}


def test_version_is_declared_once(pyproject):
    version = pyproject["project"]["version"]
    found = [path for path in (ROOT / "ffmerge_fast").rglob("*.py") if f'"{version}"' in path.read_text("utf-8")]
    assert found == []
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_installed_command_starts():
    try:
        scripts = importlib.metadata.distribution("ffmerge_fast").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is imported from a folder, not installed")
    (script,) = (s for s in scripts if s.group == "console_scripts")
    assert script.name == "ffmerge"
    assert callable(script.load())


def test_readme_has_its_two_commands_in_one_line_each():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all("-c constraints.txt" in command for command in commands)
    assert commands[0].endswith("ffmerge demo") and commands[1].endswith("-m pytest")


def test_ci_runs_the_readme_command():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -m1 -E '([^']+)' README\.md", ci)[1]
    (command,) = re.findall(pattern, README, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(PY)", ".venv/bin/python")
    for part in command.replace("$(VENV)", ".venv").split(" && ")[1:]:
        assert part in makefile.replace("$(VENV)", ".venv")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What README's examples are about: a tiny random GPT-2 and batches for it, in a folder of their own."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=8, n_embd=16, n_head=2, vocab_size=32, n_positions=32)
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (2, 4, 32))]
    monkeypatch.chdir(tmp_path)
    return {"model": transformers.GPT2LMHeadModel(config).eval(), "batches": batches, "tokenizer": None}


def example(section):
    """The first Python block of a section, as it stands."""
    return compile(
        re.search(rf"^## {section}\n.*?```python\n(.*?)```", README, flags=re.DOTALL | re.M)[1], section, "exec"
    )


def test_readme_example_runs(names):
    exec(example("Use"), names)
    ff, model, inputs = names["ff"], names["model"], names["batches"][0]
    loaded = ff.from_pretrained("smaller")
    assert ff.is_merged(model) and ff.is_merged(loaded)
    assert loaded.transformer.h[3].mlp is loaded.transformer.h[7].mlp
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)


def test_readme_projection_runs(names):
    exec("import ffmerge_fast as ff", names)
    exec(example("Project"), names)
    small, inputs = type(names["model"]).from_pretrained("small").eval(), names["batches"][0]
    assert type(small).__name__ == "GPT2LMHeadModel" and "ffmerge" not in Path("small/config.json").read_text("utf-8")
    assert abs(small.num_parameters() / names["model"].num_parameters() - 0.5) < 0.25
    pruned = names["ff"].hard_prune(names["model"], keep=0.5, importance=names["scores"])
    with torch.no_grad():
        assert torch.equal(small(**inputs).logits, names["proj"].fold()(**inputs).logits)
        assert small(**inputs).loss < pruned(**inputs).loss - 0.1


def test_readme_command_lines_parse():
    from ffmerge_fast.cli.parser import parser

    lines = [line.partition("  #")[0] for line in README.splitlines() if line.startswith("ffmerge ")]
    commands = [shlex.split(line)[1:] for line in lines]
    assert [command[0] for command in commands] == ["search", "merge", "finetune", "eval", "project"]
    for command in commands:
        assert callable(parser().parse_args(command).run)


def test_lint_is_the_same_everywhere():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.search(r"^ruff==(\S+)", constraints, flags=re.MULTILINE)[1] == re.search(r"rev: v(\S+)", hooks)[1]


def test_readme_lists_every_command():
    cli = subprocess.run([sys.executable, "-m", "ffmerge_fast.cli", "--help"], capture_output=True, text=True)
    commands = re.findall(r"^    (\w+)", cli.stdout, flags=re.MULTILINE)
    assert "demo" in commands and "env" in commands
    for command in commands:
        assert re.search(rf"^ffmerge {command}\b|`(ffmerge )?{command}\b", README, flags=re.MULTILINE), command


def test_readme_is_short_and_names_only_what_exists():
    import ffmerge_fast as ff

    assert len(README.split()) <= 1000
    for name in re.findall(r"\bff\.([a-zA-Z_.]*\w)", README):
        assert callable(attrgetter(name)(ff)), name
    for target in re.findall(r"(?:\]\(|src=\")([^)#\"]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_wheel_without_a_compiler_has_every_module_and_no_leftovers(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is older than the build needs; .ci/run builds in isolation")
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("ffmerge_fast", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    tag = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for folder in ("lib", tag):
        leftover = source / "build" / folder / "ffmerge_fast" / "leftover.py"
        leftover.parent.mkdir(parents=True)
        leftover.touch()
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    subprocess.run(
        [sys.executable, "-c", build, tmp_path], cwd=source, env=environment, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("ffmerge_fast-*.whl")
    check = [sys.executable, ROOT / ".ci" / "check_wheel.py", "--without-extension", wheel]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
