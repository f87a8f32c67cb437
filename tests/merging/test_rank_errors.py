"""An error on one of two processes: both raise at once, the other one naming it, and they are in step afterwards."""

import time
from datetime import timedelta

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.tiny_models import tiny_inputs, tiny_model

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:.*correlations are noisy")]
TIMEOUT = timedelta(seconds=180)  # of the process group: what a rank that waits for the other one would take


def batches(seeds, fails):
    """A batch per seed, then an error on the rank that fails."""
    model = tiny_model("gpt2")
    yield from (tiny_inputs(model, batch=3, seed=seed) for seed in seeds)
    if fails:
        raise OSError("the disk\nis gone")


def loss(model):
    with torch.no_grad():
        return model(**tiny_inputs(model, batch=4, seed=9)).loss.item()


def failing(call, number):
    """`call`, whose `number`-th call fails, and the list of its results."""
    results = []

    def evaluate(model):
        if len(results) == number:
            raise RuntimeError("no memory")
        results.append(call(model))
        return results[-1]

    return evaluate, results


def collect_data(rank, folder):
    ff.collect(tiny_model("gpt2", layers=4), batches([0, 1], rank == 1), window=2)


def collect_arguments(rank, folder):
    ff.collect(tiny_model("gpt2", layers=4), batches([0, 1], False), window=2, features=["pre", "past"][rank])


def search_window(rank, folder):
    """The second of the first rank's four windows fails: the other rank does not go on to its third."""
    model = tiny_model("gpt2", layers=8)
    stats = ff.collect(model, batches([rank], False), window=2)
    evaluate, results = failing(loss, 1 if rank == 0 else -1)
    try:
        ff.search(model, stats, window=2, evaluate=evaluate)
    finally:
        assert len(results) == 1 + rank and not ff.is_merged(model)


def search_resume(rank, folder):
    model = tiny_model("gpt2", layers=4)
    stats = ff.collect(model, batches([rank], False), window=2)
    (folder / "scores.json.rank1").write_text("no scores")
    ff.search(model, stats, window=2, evaluate=loss, resume=folder / "scores.json")


def refit(rank, data, **options):
    teacher = tiny_model("gpt2", layers=4)
    model = ff.merge(teacher, ff.plan(layers="0-2", method="average", model=teacher))
    ff.refit_(model, teacher, data, **options)


def refit_data(rank, folder):
    refit(rank, batches([0, 1], rank == 0))


def refit_round(rank, folder):
    evaluate, _ = failing(loss, 2 if rank == 1 else -1)
    refit(rank, batches([0, 1], False), rounds=1, evaluate=evaluate)


def search_proxy(rank, folder):
    model = tiny_model("gpt2", layers=4)
    stats = ff.collect(model, batches([rank], False), window=2)
    try:
        ff.search(model, stats, 2, "proxy", batches=batches([0, 1], rank == 1))
    finally:
        assert not ff.is_merged(model)


def distill(rank, data, **options):
    teacher = tiny_model("gpt2", layers=4)
    model = ff.merge(teacher, ff.plan(layers="0-2", method="average", model=teacher))
    before = [p.clone() for p in model.parameters()]
    try:
        ff.local_distill_(model, teacher, data, steps=4, **options)
    finally:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def distill_data(rank, folder):
    distill(rank, batches([0, 1], rank == 1))


def distill_arguments(rank, folder):
    distill(rank, batches([0, 1], False), lr=[1e-3, -1][rank])


CASES = {  # what both ranks do: (rank that fails, its error, what the other rank says)
    collect_data: (1, "OSError: the disk\nis gone", "collect: rank 1 failed: OSError: the disk is gone"),
    collect_arguments: (1, "features: got 'past'", "collect: rank 1 failed: features: got 'past'"),
    search_window: (0, "RuntimeError: no memory", "search: rank 0 failed: RuntimeError: no memory"),
    search_resume: (1, "resume: ", "search: rank 1 failed: resume: "),
    refit_data: (0, "OSError: the disk\nis gone", "refit: rank 0 failed: OSError: the disk is gone"),
    search_proxy: (1, "OSError: the disk\nis gone", "search: rank 1 failed: OSError: the disk is gone"),
    distill_data: (1, "OSError: the disk\nis gone", "distill: rank 1 failed: OSError: the disk is gone"),
    distill_arguments: (1, "lr: got -1", "distill: rank 1 failed: lr: got -1"),
    refit_round: (1, "RuntimeError: no memory", "refit: rank 1 failed: RuntimeError: no memory"),
}


def _work(rank, folder):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=TIMEOUT)
    found = {}
    for number, case in enumerate(CASES):
        started, message = time.monotonic(), "nothing was raised"
        try:
            case(rank, folder)
        except ff.FFMergeError as error:
            message = str(error)
        except (OSError, RuntimeError) as error:
            message = f"{type(error).__name__}: {error}"
        in_step = torch.tensor(number)
        torch.distributed.all_reduce(in_step)
        found[case.__name__] = (message, time.monotonic() - started, int(in_step) == 2 * number)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    torch.multiprocessing.spawn(_work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_both_ranks_raise_at_once(job, case, rank):
    failed, own, others = CASES[case]
    message, seconds, in_step = job[rank][case.__name__]
    assert message.startswith(own if rank == failed else others)
    assert seconds < TIMEOUT.total_seconds() / 3 and in_step
    assert rank == failed or "\n" not in message
