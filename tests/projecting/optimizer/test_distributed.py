"""Two ranks with different data train as one process with all of it; each owns its units, and states fit both."""

import pytest
import torch
from safetensors.torch import load_file

import ffmerge_fast as ff
from ffmerge_fast.projecting.optimizer import ownership
from ffmerge_fast.projecting.optimizer.adamw import MIN_8BIT
from ffmerge_fast.projecting.optimizer.ownership import Ownership
from tests.helpers import projecting_worker
from tests.helpers.projecting import equal, projector, scores, weights
from tests.helpers.ranks import run_two_ranks
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(scope="module", autouse=True)
def small():
    """Settings of the workers, also here."""
    before = MIN_8BIT, ownership._BUCKET_BYTES
    projecting_worker.set_up()
    yield
    projecting_worker.adamw.MIN_8BIT, ownership._BUCKET_BYTES = before


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, small):
    """Folder with what both ranks ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    proj, optimizer = projecting_worker.train("8bit", accumulate=2)
    torch.save(optimizer.state_dict(), folder / "state-of-one")
    torch.save({name: weights(proj.student)[name] for name in proj.plain}, folder / "plain-of-one")
    run_two_ranks("tests.helpers.projecting_worker", folder, timeout=300)
    return folder


@pytest.mark.dist
@pytest.mark.parametrize("name", projecting_worker.RUNS)
def test_two_ranks_train_as_one_process_on_all_the_data(ranks, name):
    """dW_C is what is exchanged: the owners then make the step of one process with both batches."""
    alone = weights(projecting_worker.train(name, accumulate=2)[0].student)
    start = weights(projecting_worker.make(name)[1].student)
    found = [load_file(ranks / f"{name}-{rank}.safetensors") for rank in range(2)]
    assert equal(*found)
    # codes of moments may differ by one where a gradient differs in its last bit; bfloat16 by one rounding
    tolerance = {"8bit": 2e-3, "bfloat16": 2e-2}.get(name, 1e-5)
    for parameter, value in alone.items():
        torch.testing.assert_close(found[0][parameter], value, atol=tolerance, rtol=tolerance)
    assert max((alone[n] - start[n]).abs().max() for n in alone) > (1e-3 if "clipped" in name else 1e-2)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["plain", "8bit", "fsdp2"])
def test_resume_is_exact(ranks, name):
    wanted = load_file(ranks / f"whole {name}-0.safetensors")
    for rank in range(2):
        assert equal(load_file(ranks / f"resumed {name}-{rank}.safetensors"), wanted)
    folded = type(tiny_model("gpt2")).from_pretrained(ranks / f"folded {name}")
    assert type(folded).__name__ == "GPT2LMHeadModel" and equal(weights(folded), wanted)


@pytest.mark.dist
def test_the_same_whoever_owns(ranks):
    """Who updates a unit, and where its base weights lie, changes nothing."""
    wanted = load_file(ranks / "plain-0.safetensors")
    for name in ("not distributed", "from disk"):
        assert equal(load_file(ranks / f"{name}-0.safetensors"), wanted), name


@pytest.mark.dist
def test_states_fit_any_number_of_ranks(ranks):
    two = torch.load(ranks / "state-of-two")
    _, proj, make_optimizer = projecting_worker.make("8bit")
    trained = load_file(ranks / "8bit-0.safetensors")
    proj.student.load_state_dict({name: trained[name] for name in proj.plain}, strict=False)
    optimizer = make_optimizer()
    optimizer.load_state_dict(two)
    assert equal(weights(proj.student), trained)
    again = optimizer.state_dict()
    assert again["param_groups"] == two["param_groups"] and again["projector"] == two["projector"]
    for index, entries in two["state"].items():
        assert equal(entries, again["state"][index])
    one = weights(projecting_worker.train("8bit", accumulate=2)[0].student)
    for rank in range(2):
        assert equal(load_file(ranks / f"loaded-{rank}.safetensors"), one)


@pytest.mark.dist
def test_a_rank_holds_its_own_state_only(ranks):
    whole = projecting_worker.nbytes(projecting_worker.make("8bit")[2]())
    parts = [int((ranks / f"bytes-{rank}").read_text()) for rank in range(2)]
    assert sum(parts) == whole and max(parts) < 0.6 * whole
    for rank in range(2):
        refused = (ranks / f"refused-{rank}").read_text()
        assert refused.startswith("state_dict: 2 ranks own the state; call consolidate_state_dict() on every rank")


def test_units_are_dealt_out_evenly():
    _, proj = projector("llama", layers=4)
    sizes = {unit: unit.numel(True) for unit in proj.units}
    owner = ownership._dealt(sizes, 3)
    loads = [sum(size for unit, size in sizes.items() if owner[unit] == rank) for rank in range(3)]
    assert sum(loads) == sum(sizes.values()) and max(loads) <= min(loads) + max(sizes.values())
    alone = Ownership(sizes)
    assert alone.mine == list(sizes) and [u for r in alone.rounds for u in r.mine] == list(sizes)


@pytest.mark.dist
def test_importance_of_two_ranks(ranks):
    model = tiny_model("gpt2", layers=1)
    alone = ff.importance(model, projecting_worker.data(model))
    for rank in range(2):
        found = load_file(ranks / f"scores-{rank}.safetensors")
        assert found.keys() == alone.scores.keys() == scores(model).scores.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, alone.scores[name], rtol=1e-6, atol=1e-9)
