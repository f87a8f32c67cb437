"""Bits flipped at random offsets of every file that we write, files cut, prolonged and exchanged.

Allowed: the promised result bit for bit, or status 1 or 2 with one line of ours; nothing written, nothing left.
"""

from __future__ import annotations

import random
import shutil
import tempfile

import pytest

from tests.storm.scenes import SCENES, anew, check_refusal, contents, fill, run

pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("damage")
FLIPS = 5  # of each file


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(what the commands wrote, the same of another model and other data, where each try happens)."""
    root = tmp_path_factory.mktemp("storm")
    made = []
    for seed in (1, 0):
        fill(root / "here", seed)
        shutil.move(root / "here", root / f"pristine-{seed}")
        made.append(root / f"pristine-{seed}")
    return made[1], made[0], root / "here"


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


def files_of(scene, pristine):
    found = [path for name in scene.damaged for path in [pristine / name, *sorted((pristine / name).rglob("*"))]]
    return [path.relative_to(pristine) for path in found if path.is_file()]


def flips(content: bytes, choice: random.Random):
    for _ in range(FLIPS):
        damaged, at, bit = bytearray(content), choice.randrange(len(content)), choice.randrange(8)
        damaged[at] ^= 1 << bit
        yield f"bit {bit} of byte {at} flipped", bytes(damaged)


def cuts(content: bytes, choice: random.Random):
    yield "empty", b""
    yield "last byte missing", content[:-1]
    yield "cut", content[: choice.randrange(len(content))]
    yield "prolonged", content + b"\0"


def test_every_kind_of_file_is_flipped(places):
    pristine, _, _ = places
    files = {(name, file) for name, scene in SCENES.items() for file in files_of(scene, pristine)}
    assert len(files) * FLIPS >= 200
    kinds = {file.name for _, file in files}
    assert kinds >= {
        "statistics",
        "plan",
        "scores",
        "importance",
        "ffmerge.json",
        "optimizer.safetensors",
        "projection.json",
    }


@pytest.mark.parametrize("name", SCENES)
def test_flipped_and_cut(name, places, capfd):
    pristine, _, here = places
    scene, choice = SCENES[name], random.Random(name)
    anew(pristine, here)
    status, wanted, said = run(scene, here, capfd)
    assert status == 0 and not said, said
    for file in files_of(scene, pristine):
        content = (pristine / file).read_bytes()
        if not content:
            continue
        for what, damaged in [*flips(content, choice), *cuts(content, choice)]:
            try_one(scene, f"{file}: {what}", {file: damaged}, wanted, pristine, here, capfd)


@pytest.mark.parametrize("name", SCENES)
def test_of_another_run(name, places, capfd):
    """Each file as another model on other data has it, under the same name; and a file of another kind."""
    pristine, other, here = places
    scene = SCENES[name]
    anew(pristine, here)
    _, wanted, _ = run(scene, here, capfd)
    for file in files_of(scene, pristine):
        strange = {"of another run": other / file, "of another kind": pristine / "text"}
        if name == "plan":  # it asks nothing but the statistics, and plans what they are of
            del strange["of another run"]
        for what, source in strange.items():
            if not source.exists() or source.read_bytes() == (pristine / file).read_bytes():
                continue
            try_one(scene, f"{file}: {what}", {file: source.read_bytes()}, wanted, pristine, here, capfd)


def try_one(scene, what, changes, wanted, pristine, here, capfd):
    anew(pristine, here)
    for file, content in changes.items():
        (here / file).write_bytes(content)
    before = contents(here)
    status, found, said = run(scene, here, capfd)
    assert status in (0, 1, 2), what
    if status:
        check_refusal(scene, here, before, said, what)
    else:
        assert found == wanted and not said, (what, said)
