"""Two processes with different data train a tied model as one process does on all the data."""

import pytest
import torch
from safetensors.torch import load_file

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver.training.finetune import finetune
from ffmerge_fast.integrations.fsdp2 import block_paths, shard_, shared_paths
from tests.helpers.finetune_worker import MODELS, SETTINGS, STEPS, gpt2_batches, marian_batches
from tests.helpers.ranks import run_two_ranks
from tests.helpers.training import assert_equal, delta_gpt2, parameters, tied_gpt2, tied_marian

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with the weights that both ranks ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks("tests.helpers.finetune_worker", folder, timeout=150)
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_process_on_all_the_data(results, parallel, name):
    model = MODELS[name]()
    if name == "marian":
        finetune(model, marian_batches(model), STEPS, accumulate=2, **SETTINGS)
    else:
        finetune(model, gpt2_batches(), STEPS, accumulate=4, **SETTINGS)
    for rank in range(2):
        got = load_file(results / f"{parallel}-{name}-{rank}.safetensors")
        assert_equal(got, parameters(model), 1e-6)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_resume_is_exact(results, parallel):
    wanted = load_file(results / f"{parallel}-whole-0.safetensors")
    for rank in range(2):
        assert_equal(load_file(results / f"{parallel}-resumed-{rank}.safetensors"), wanted)
    run = results / f"{parallel}-run"
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-5"]
    assert {key.split("/")[0] for key in load_file(run / "checkpoint-5/rng.safetensors")} == {"rank0", "rank1"}


def test_shared_modules_are_units_of_their_own():
    model = tied_gpt2()
    blocks = block_paths(model)
    assert blocks == [f"transformer.h.{i}" for i in range(4)]
    assert shared_paths(model, blocks) == ["transformer.h.1.mlp"]
    assert shared_paths(delta_gpt2(), blocks) == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]
    model = tied_marian()
    stacks = [f"model.{stack}.layers" for stack in ("encoder", "decoder")]
    wanted = [f"{stack}.1.{fc}" for stack in stacks for fc in ("fc1", "fc2")]
    assert shared_paths(model, block_paths(model)) == wanted  # and not the embedding, whose weight the head shares


def test_sharding_needs_a_process_group_and_blocks():
    with pytest.raises(FFMergeError, match="no process group"):
        shard_(torch.nn.Linear(2, 2))
