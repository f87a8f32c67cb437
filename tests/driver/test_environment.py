"""`ffmerge env`: what it reports, and how a forced instruction set is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver import environment
from ffmerge_fast.support import machine

LEVELS = ["portable", "avx2", "avx512", "amx"]


@pytest.fixture
def no_extension(monkeypatch):
    """`import ffmerge_fast._C` fails, as after an installation without a compiler."""
    monkeypatch.setitem(sys.modules, "ffmerge_fast._C", None)
    forget()
    yield
    forget()


def forget():
    """Ask the machine anew."""
    for answer in (machine.load_extension, machine.cpu_isas, machine._choose_isa):
        answer.cache_clear()


@pytest.fixture(autouse=True)
def no_forced_isa(monkeypatch):
    monkeypatch.delenv("FFMERGE_CPU_ISA", raising=False)


def test_report_is_json_and_names_what_runs():
    report = json.loads(json.dumps(environment.report()))
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu"]["torch_threads"] == torch.get_num_threads()
    assert set(report["backends"]) >= {"correlation", "assignment", "shared_ffn", "projection"}
    text = environment.format_report(report)
    for fact in (torch.__version__, report["cpu"]["name"], "C++ extension", "extra driver", "correlation"):
        assert fact in text


def test_without_extension_the_report_says_why_and_what_to_do(no_extension):
    report = environment.report()
    assert report["extension"]["loaded"] is False
    assert "pip install" in report["extension"]["reason"]
    assert report["cpu"]["isa"] == "none" and report["cpu"]["isas"] == []
    assert f"not loaded: {report['extension']['reason']}" in environment.format_report(report)


def test_broken_extension_is_reported_in_one_line(monkeypatch):
    import_module = machine.importlib.import_module

    def broken(name, *args):
        if name == "ffmerge_fast._C":
            raise ImportError("undefined symbol: x\nmore detail")
        return import_module(name, *args)

    forget()
    monkeypatch.setattr(machine.importlib, "import_module", broken)
    assert environment.report()["extension"]["reason"] == "undefined symbol: x"
    forget()


def test_levels_are_ordered_and_the_best_is_the_default():
    extension = pytest.importorskip("ffmerge_fast._C", reason="the C++ extension is not built", exc_type=ImportError)
    levels = extension.cpu_isas()
    assert levels == LEVELS[: len(levels)] and levels[-1] == extension.cpu_isa() == machine.cpu_isa()


def test_levels_agree_with_the_operating_system():
    extension = pytest.importorskip("ffmerge_fast._C", reason="the C++ extension is not built", exc_type=ImportError)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((set(line.split()) for line in file if line.startswith("flags")), None)
    except OSError:
        flags = None
    if not flags:
        pytest.skip("no x86 flags in /proc/cpuinfo")
    assert ("avx2" in extension.cpu_isas()) == ({"avx2", "fma", "f16c"} <= flags)
    avx512 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    assert ("avx512" in extension.cpu_isas()) == avx512
    if "amx" in extension.cpu_isas():  # the converse needs the kernel's permission
        assert avx512 and {"amx_tile", "amx_bf16"} <= flags


@pytest.mark.parametrize("level", LEVELS)
def test_forced_level_is_taken_or_refused_in_one_line(monkeypatch, level):
    extension = pytest.importorskip("ffmerge_fast._C", reason="the C++ extension is not built", exc_type=ImportError)
    monkeypatch.setenv("FFMERGE_CPU_ISA", level)
    if level in extension.cpu_isas():
        assert environment.report()["cpu"]["isa"] == level
        return
    with pytest.raises(FFMergeError, match=f"FFMERGE_CPU_ISA='{level}' cannot run on this CPU: use one of") as error:
        environment.report()
    assert "\n" not in str(error.value)


def test_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("FFMERGE_CPU_ISA", "sse9")
    with pytest.raises(FFMergeError, match="'sse9' is not an instruction set: use one of portable, avx2, avx512, amx"):
        machine.cpu_isa()


def test_forced_level_needs_the_extension(monkeypatch, no_extension):
    monkeypatch.setenv("FFMERGE_CPU_ISA", "portable")
    with pytest.raises(FFMergeError, match="needs the C\\+\\+ extension, which is not loaded"):
        machine.cpu_isa()


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setattr(environment, "_version", lambda name: None if name == "sacrebleu" else "1.0")
    report = environment.report()
    assert report["extras"]["driver"] == {"missing": ["sacrebleu"], "install": "pip install 'ffmerge_fast[driver]'"}
    assert report["extras"]["hf"]["missing"] == []
    assert "missing sacrebleu: pip install 'ffmerge_fast[driver]'" in environment.format_report(report)


def test_variables_are_reported(monkeypatch):
    monkeypatch.setenv("FFMERGE_BACKEND", "reference")
    report = environment.report()
    assert report["variables"]["FFMERGE_BACKEND"] == "reference"
    assert "FFMERGE_BACKEND" in environment.format_report(report)


def test_command_line_prints_it_and_refuses_a_bad_level():
    command = [sys.executable, "-m", "ffmerge_fast.cli", "env"]
    good = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert good.returncode == 0 and torch.__version__ in good.stdout
    environment = {**os.environ, "FFMERGE_CPU_ISA": "sse9"}
    bad = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert bad.returncode == 1 and bad.stderr.startswith("error: FFMERGE_CPU_ISA='sse9'")
    assert "Traceback" not in bad.stderr
