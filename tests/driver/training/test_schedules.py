"""Learning rates against their closed forms and against transformers' schedulers."""

import math

import pytest
import torch

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver.training.schedules import learning_rate
from ffmerge_fast.driver.training.settings import TrainingSettings


def _rates(steps, **options):
    return [learning_rate(step, TrainingSettings(**options)) for step in range(steps)]


@pytest.mark.parametrize("warmup, timescale", [(0, None), (5, None), (5, 50), (0, 20)])
def test_inverse_sqrt_is_that_of_transformers(warmup, timescale):
    from transformers import get_inverse_sqrt_schedule

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = get_inverse_sqrt_schedule(optimizer, warmup, timescale)
    wanted = []
    for _ in range(40):
        wanted.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    got = _rates(40, schedule="inverse_sqrt", lr=0.1, warmup=warmup, timescale=timescale)
    assert got == pytest.approx(wanted, rel=1e-12)


def test_linear_goes_to_the_floor_and_stays():
    got = _rates(25_000, schedule="linear", lr=5e-5, lr_end=1e-6, decay_steps=20_000)  # the paper's ViT
    assert got[0] == 5e-5
    assert got[10_000] == pytest.approx((5e-5 + 1e-6) / 2)
    assert got[20_000:] == [pytest.approx(1e-6)] * 5_000


def test_cosine_with_warmup():
    got = _rates(40, schedule="cosine", lr=1.0, lr_end=0.1, warmup=10, decay_steps=30)
    assert got[:11] == pytest.approx([i / 10 for i in range(11)])
    assert got[15] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert got[20] == pytest.approx(0.55)
    assert got[30:] == pytest.approx([0.1] * 10)


def test_constant():
    assert _rates(5, schedule="constant", lr=0.3, warmup=2) == pytest.approx([0, 0.15, 0.3, 0.3, 0.3])


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(schedule="linea", lr=1, warmup=0, lr_end=0, decay_steps=1), "linea.*inverse_sqrt"),
        (dict(schedule="constant", lr=0, warmup=0, lr_end=0, decay_steps=1), "lr: got 0"),
        (dict(schedule="constant", lr=math.nan, warmup=0, lr_end=0, decay_steps=1), "lr: got nan"),
        (dict(schedule="constant", lr=1, warmup=-1, lr_end=0, decay_steps=1), "warmup"),
        (dict(schedule="linear", lr=1, warmup=5, lr_end=0, decay_steps=5), "decay_steps > warmup"),
        (dict(schedule="cosine", lr=1, warmup=0, lr_end=2, decay_steps=5), "lr_end"),
    ],
)
def test_bad_schedules(values, words):
    with pytest.raises(FFMergeError, match=words):
        TrainingSettings(**values).of_run(steps=1, world_size=1)
