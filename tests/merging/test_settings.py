"""The choices of merging's options: named without torch, and those that the code knows."""

import ast
from pathlib import Path

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.merging import settings
from ffmerge_fast.merging.groups import anchor_of
from ffmerge_fast.merging.methods import MATCHES
from tests.helpers.tiny_models import D_FF, tiny_model


def test_the_names_are_those_of_the_tables_and_need_no_import():
    assert tuple(MATCHES) == settings.METHODS
    assert [anchor_of((4, 5, 6, 7), name) for name in settings.ANCHORS] == [4, 6, 7]
    tree = ast.parse(Path(settings.__file__).read_text())
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))


@pytest.mark.parametrize("anchor", settings.ANCHORS)
def test_random_permutations_are_one_sequence_over_groups_and_layers(anchor):
    made = ff.plan(model=tiny_model("gpt2", layers=6), layers="0-2,3-5", method="random", anchor=anchor, seed=5)
    generator = torch.Generator().manual_seed(5)
    for group in made.groups:
        for layer in (i for i in group.layers if i != group.anchor):
            assert torch.equal(group.permutations[layer], torch.randperm(D_FF, generator=generator))
        assert torch.equal(group.permutations[group.anchor], torch.arange(D_FF)) and not group.scores
