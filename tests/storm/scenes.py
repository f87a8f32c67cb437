"""What the storms damage, kill and hinder: a command, the files it finds, and what it promises.

A scene is a folder that commands of ours have filled, and one line that reads what they wrote.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import ffmerge_fast as ff
from ffmerge_fast.cli.main import main
from tests.cli.test_cli import _tokenizer
from tests.helpers.tiny_models import tiny_inputs, tiny_model

BATCH = "--batch-size 4"
DATA = f"--data {{here}}/text --max-length 8 {BATCH}"
COLLECT = f"collect {{here}}/model {{here}}/{{}} --window 3 {DATA} --tokens 60"
TRAINING = f"{DATA} --eval-limit 4 --schedule constant --eval-every 1 --save-every 1"
FINETUNE = f"finetune {{here}}/merged {{here}}/{{}} {TRAINING} --work-dir {{here}}/work --steps {{}}"
PROJECT = f"project {{here}}/model {{here}}/{{}} {TRAINING} --d-model 8 --d-ff 16 --attention head_dim --steps {{}}"
SEARCH = f"search {{here}}/model --window 2 --statistics {{here}}/statistics {DATA.replace(BATCH, '')} --eval-limit 4"


@dataclass(frozen=True)
class Scene:
    """`line` promises `out`, or what it prints; `damaged` are the files and folders of ours that it reads."""

    line: str
    damaged: tuple[str, ...]


SCENES = {
    "collect from a cache": Scene(COLLECT.replace("{}", "out") + " --cache-dir {here}/cache", ("cache",)),
    "plan": Scene("plan {here}/statistics --layers 0-1 --out {here}/out", ("statistics",)),
    "merge by a plan": Scene("merge {here}/model {here}/out --plan {here}/plan", ("plan",)),
    "search, resumed": Scene(f"{SEARCH} --resume {{here}}/scores --out {{here}}/out", ("scores", "statistics")),
    "export": Scene("export {here}/merged {here}/out --expand", ("merged",)),
    "verify deltas": Scene("verify {here}/deltas", ("deltas",)),
    "finetune, resumed": Scene(FINETUNE.format("out", 3, here="{here}"), ("work",)),
    "finetune a merged folder": Scene(FINETUNE.format("out", 1, here="{here}").replace("/work", "/other"), ("merged",)),
    "project, resumed": Scene(PROJECT.format("out", 2, here="{here}") + " --work-dir {here}/pwork", ("pwork",)),
    "project by importances": Scene(
        PROJECT.format("out", 1, here="{here}") + " --importance {here}/importance", ("importance",)
    ),
    "fold": Scene("fold {here}/model {here}/pwork {here}/out", ("pwork",)),
    "verify projected": Scene("verify {here}/small", ("small",)),
}

KILLED = {  # every command that writes, from nothing and going on
    "collect": COLLECT.replace("{}", "out") + " --max-memory 1GiB",
    "collect with a cache": COLLECT.replace("{}", "out") + " --cache-dir {here}/other-cache",
    "plan": SCENES["plan"].line,
    "search": f"{SEARCH} --resume {{here}}/other-scores --out {{here}}/out",
    "merge": SCENES["merge by a plan"].line,
    "merge over a model": SCENES["merge by a plan"].line + " --overwrite",
    "finetune": SCENES["finetune a merged folder"].line.replace("--steps 1", "--steps 2"),
    "finetune, resumed": SCENES["finetune, resumed"].line,
    "project": SCENES["project, resumed"].line.replace("/pwork", "/other"),
    "project, resumed": SCENES["project, resumed"].line,
    "fold": SCENES["fold"].line,
    "export": SCENES["export"].line,
}


def fill(here: Path, seed: int = 0) -> None:
    """Everything the scenes read, as our commands write it; another seed gives another model on other data."""
    here.mkdir()
    model = tiny_model("gpt2", layers=3, seed=seed)
    model.save_pretrained(here / "model")
    _tokenizer().save_pretrained(here / "model")
    ids = torch.randint(0, 60, (40 * 8,), generator=torch.Generator().manual_seed(seed))
    (here / "text").write_text(" ".join(f"w{i}" for i in ids.tolist()))
    for line in (
        COLLECT.replace("{}", "statistics"),
        COLLECT.replace("{}", "again") + " --cache-dir {here}/cache",
        "plan {here}/statistics --layers 0-1 --out {here}/plan",
        f"{SEARCH} --resume {{here}}/scores",
        "merge {here}/model {here}/merged --plan {here}/plan",
        FINETUNE.format("tuned", 2, here="{here}"),
        PROJECT.format("small", 1, here="{here}") + " --work-dir {here}/pwork",
    ):
        assert main([*line.format(here=here).split(), "-q"]) == 0
    ff.importance(model, [tiny_inputs(model)]).save(here / "importance")
    merged = ff.merge(model, ff.plan(layers="0-1", method="average", model=model))
    ff.local_distill_(merged, model, [tiny_inputs(model, batch=8)], steps=2, delta_rank=2)
    ff.save_pretrained(merged, here / "deltas")


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file below a folder, or the file itself; None for folders."""
    found = [root, *sorted(root.rglob("*"))]
    return {str(f.relative_to(root)): f.read_bytes() if f.is_file() else None for f in found if f.exists()}


def anew(pristine: Path, here: Path) -> None:
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(pristine, here)


def run(scene: Scene, here: Path, capfd) -> tuple[int, object, str]:
    """Status, the promised result, and what was said on stderr without warnings."""
    words = [*scene.line.format(here=here).split(), "--json"]
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    printed, said = capfd.readouterr()
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
    return status, contents(here / "out") or printed, "\n".join(lines)


def check_refusal(scene: Scene, here: Path, before: dict, said: str, what: str) -> None:
    """One line of ours, and nothing written or left."""
    assert len(said.splitlines()) == 1 and said.startswith("error: "), (what, said)
    assert not said.startswith("error: this is a bug"), (what, said)
    after = contents(here)
    assert {name for name in after if not name.startswith("other")} == before.keys(), (
        what,
        after.keys() ^ before.keys(),
    )
    assert all(after[name] == content for name, content in before.items()), what
    assert not os.listdir(tempfile.gettempdir()), what
