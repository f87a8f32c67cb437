"""Options that would do nothing beside the others are errors before any work, and only those."""

from __future__ import annotations

import pytest

from ffmerge_fast import FFMergeError
from ffmerge_fast.cli.needs import NEEDS, ONLY_OF, flag
from ffmerge_fast.cli.parser import command_names, parse
from tests.cli.test_cli import _data, folder, refuse, text  # noqa: F401  (fixtures)

IGNORED = [
    "merge m o --plan p --layers 0-1",
    "merge m o --plan p --window 2",
    "merge m o --plan p --method average",
    "merge m o --plan p --anchor last",
    "merge m o --plan p --statistics s",
    "merge m o --plan p --data d",
    "merge m o --plan p --tokens 9",
    "merge m o --plan p --cache-dir c --recover refit --data d",
    "merge m o --layers 0-1 --window 2 --data d",
    "merge m o --layers 0-1 --statistics s --data d",
    "merge m o --layers 0-1 --method average --data d",
    "merge m o --layers 0-1 --method average --max-memory 1GB",
    "merge m o --layers 0-1 --statistics s --batch-size 4",
    "merge m o --layers 0-1 --data d --eval-limit 4",
    "merge m o --layers 0-1 --data d --ridge 1",
    "merge m o --layers 0-1 --data d --recover distill --recover-rounds 1",
    "merge m o --layers 0-1 --data d --recover refit --delta-rank 0",
    "merge m o --layers 0-1 --ffn-down x",
    "collect m o --window 2 --data d --anchor last",
    "collect m o --window 2 --layers 0-1 --data d",
    "collect m o --window 2 --data d --stride 4",
    "plan s --csv c --layers 0-1",
    "plan s --sweep 2 --layers 0-1",
    "plan s --sweep 2 --out o",
    "plan s --layers 0-1 --device cpu",
    "plan s --layers 0-1 --ffn-up x",
    "search m --window 2 --data d --proxy-tokens 9",
    "search m --window 2 --data d --evaluate proxy --eval-limit 9",
    "search m --window 2 --data d --evaluate proxy --resume r",
    "search m --window 2 --data d --statistics s --tokens 9",
    "search m --window 2 --data d --statistics s --batch-size 9",
    "finetune m o --steps 1 --data d --alpha 0.1",
    "finetune m o --steps 1 --data d --lr-end 0.1",
    "finetune m o --steps 1 --data d --schedule constant --decay-steps 5",
    "project m o --steps 1 --data d --keep 0.5 --alpha 0.1",
    "project m o --steps 1 --data d --keep 0.5 --importance i --method wanda",
    "project m o --steps 1 --data d --keep 0.5 --importance i --no-reconstruct --calibration 3",
    "project m o --steps 1 --data d --keep 0.5 --no-reconstruct --ridge 1",
    "project m o --steps 1 --data d --keep 0.5 --no-residual --local-steps 3",
    "project m o --steps 1 --data d --keep 0.5 --no-residual --no-reconstruct",
    "project m o --steps 1 --data d --keep 0.5 --clone",
    "project m o --steps 1 --data d --keep 0.5 --distill --clone-weight 2",
    "project m o --steps 1 --data d --keep 0.5 --teacher t --distill",
    "eval m --data d --stream-budget 1GB",
    "inspect m --device cpu",
    "verify m --dtype float32",
    "env --device cpu",
    "demo o --device cpu",
]
TAKEN = [
    "merge m o --plan p --data d --tokens 9 --recover refit --ridge 1 --eval-data e --batch-size 4",
    "merge m o --layers 0-1 --data d --tokens 9 --cache-dir c --max-memory 1GB --batch-size 4 --anchor last",
    "merge m o --window 2 --statistics s --max-memory 1GB --method average",
    "merge m o --window 2 --data d --method average --tokens 9 --features post",
    "merge m o --layers 0-1 --data d --recover refit+distill --ridge 1 --recover-rounds 1 --delta-rank 2",
    "collect m o --layers 0-1 --data d --anchor last --task lm --prefix p",
    "plan s --sweep 2 --csv c --anchor last --max-memory 1GB",
    "plan s --layers 0-1 --method weights --model m --device cpu --dtype float32 --out o",
    "search m --window 2 --data d --tokens 9 --batch-size 4 --eval-limit 9 --resume r --metric loss",
    "search m --window 2 --data d --statistics s --evaluate proxy --batch-size 4 --proxy-tokens 9",
    "finetune m o --steps 1 --data d --teacher t --alpha 0.1 --schedule cosine --lr-end 0 --decay-steps 1",
    "project m o --steps 1 --data d --keep 0.5 --distill --alpha 0.1 --method wanda --calibration 3",
    "project m o --steps 1 --data d --keep 0.5 --importance i --calibration 3 --ridge 1 --local-steps 3 --local-lr 0.1",
    "project m o --steps 1 --data d --keep 0.5 --distill --clone --clone-weight 2",
    "eval m --data d --stream disk --stream-budget 1GB --stride 4 --metric loss",
    "inspect m --dtype float32 --ffn-up u --ffn-down d --ffn-layers l",
]


@pytest.mark.parametrize("line", IGNORED)
def test_what_would_be_ignored(line):
    with pytest.raises(FFMergeError, match="^--[a-z-]+: does nothing here, it needs .*; leave it out$"):
        parse(line.split())


@pytest.mark.parametrize("line", TAKEN)
def test_what_is_used(line):
    given = {word for word in line.split() if word.startswith("--")}
    assert {flag(name) for name in parse(line.split()).given} >= given


def test_defaults_are_not_typed():
    args = parse(["merge", "m", "o", "--plan", "p"])
    assert args.given == {"model", "out", "plan"} and (args.anchor, args.tokens, args.seed) == ("first", 10_000, 0)


def test_the_table_names_what_there_is():
    for need in NEEDS:
        for command in need.commands.split() or command_names():
            assert command in command_names()
    known = {a for line in TAKEN for a in vars(parse(line.split()))}
    assert {name for need in NEEDS for name in need.options.split()} | set(ONLY_OF) <= known


def test_options_of_another_kind_of_task(capsys, folder, text):  # noqa: F811
    line = refuse(capsys, "eval", folder, *_data(text), "--num-beams", 2)
    assert "--num-beams: does nothing here, it needs data of a task translation, got lm" in line
