"""What `import ffmerge_fast` brings, what it leaves for later, and what it says of modules that have moved."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ffmerge_fast as ff
from ffmerge_fast.support import moved

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "numpy", "scipy", "safetensors", "transformers")


def fresh(code: str, **environment: str) -> str:
    """What a new interpreter prints."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def stub_names() -> dict[str, str]:
    """{public name: module} as the stub says."""
    tree = ast.parse((ROOT / "ffmerge_fast" / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in imports for alias in node.names)  # else checkers call it private
    return {alias.name: node.module or alias.name for node in imports for alias in node.names}


def test_import_is_light_and_still_registers():
    code = (
        "import sys, ffmerge_fast; from ffmerge_fast import FFMergeError; "
        f"print([m for m in {HEAVY} if m in sys.modules], type(sys.meta_path[0]).__name__)"
    )
    assert fresh(code) == "[] _AfterImport"


def test_every_public_name_is_there():
    names = stub_names()
    assert sorted(ff.__all__) == sorted(names) == sorted(dir(ff))
    for name, module in names.items():
        found = importlib.import_module(f"ffmerge_fast.{module}")
        assert getattr(ff, name) is (found if name in ("nn", "ops") else getattr(found, name)), name
    starred: dict = {}
    exec("from ffmerge_fast import *", starred)
    assert names.keys() <= starred.keys()
    assert ff.__version__ and callable(ff.merge_) and callable(ff.ops.assign) and isinstance(ff.nn.SharedFFN, type)
    with pytest.raises(AttributeError):
        ff.nonsense  # noqa: B018


def test_all_at_once_where_that_is_wanted():
    assert fresh("import ffmerge_fast as ff; print(set(ff.__all__) <= vars(ff).keys())", EAGER_IMPORT="1") == "True"


def test_packages_do_not_hide_functions():
    import ffmerge_fast.merging as merging
    import ffmerge_fast.projecting as projecting

    assert merging.__name__ == "ffmerge_fast.merging" and projecting.__name__ == "ffmerge_fast.projecting"
    assert ff.merge.__name__ == "merge" and ff.project.__name__ == "project"


@pytest.mark.parametrize(
    ("statement", "old", "new"),
    [
        ("import ffmerge_fast.merge.collect", "merge.collect", "merging.collect"),
        ("from ffmerge_fast.merge.align import plan", "merge.align", "merging.plan"),
        ("import ffmerge_fast.merge", "merge", "merging"),
        ("import ffmerge_fast.project.layout", "project.layout", "projecting.axes"),
        ("from ffmerge_fast._errors import FFMergeError", "_errors", "support.errors"),
        ("from ffmerge_fast import _errors", "_errors", "support.errors"),
        ("from ffmerge_fast.models import find_ffns", "models.find_ffns", "models.sublayers.find_ffns"),
        ("from ffmerge_fast.driver.data import load_task", "driver.data", "driver.tasks"),
    ],
)
def test_old_paths_name_the_new_ones(statement, old, new):
    with pytest.raises(ImportError) as error:
        exec(statement)
    assert str(error.value) == f"ffmerge_fast.{old} is now ffmerge_fast.{new}"
    assert callable(ff.merge) and callable(ff.project)


def test_what_never_was_is_not_found():
    for name in ("nothing", "models.nothing", "_nothing"):
        with pytest.raises(ModuleNotFoundError, match=f"No module named 'ffmerge_fast.{name}'"):
            importlib.import_module(f"ffmerge_fast.{name}")


def test_every_new_home_exists():
    for old, new in moved.MOVED.items():
        module, _, name = f"ffmerge_fast.{new}".rpartition(".")
        try:
            importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), name), (old, new)
