"""Training settings: one list, its checks, and the help when a name is wrong."""

import dataclasses
import inspect

import pytest

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver.training import loop, settings
from ffmerge_fast.driver.training.finetune import finetune
from ffmerge_fast.driver.training.settings import TrainingSettings
from ffmerge_fast.support.settings import changed, options
from tests.helpers.training import assert_equal, lm_batches, parameters, tied_gpt2


def test_every_setting_has_a_type_a_default_and_help():
    found = {o.name: o for o in options(TrainingSettings)}
    assert list(found) == [f.name for f in dataclasses.fields(TrainingSettings)]
    assert found["decay_steps"].type is int and found["decay_steps"].default is None
    assert found["schedule"].choices == settings.SCHEDULES and found["lr"].choices == ()
    for o in found.values():
        assert o.help and "\n" not in o.help
        assert f"{o.name}: {o.help}" in inspect.getdoc(TrainingSettings)
        assert not o.choices or o.default is None or o.default in o.choices


def test_choices_are_those_of_the_code_that_takes_them():
    assert tuple(loop.DTYPES) == settings.AUTOCAST


def test_settings_and_overrides_are_one_thing():
    chosen = TrainingSettings(lr=1e-2, schedule="constant", weight_decay=0.1)
    runs = (
        dict(lr=1e-2, schedule="constant", weight_decay=0.1),
        dict(settings=chosen),
        dict(settings=dataclasses.replace(chosen, lr=1.0, schedule="linear"), lr=1e-2, schedule="constant"),
    )
    results = []
    for options_ in runs:
        model = tied_gpt2()
        finetune(model, lm_batches(2), 2, **options_)
        results.append(parameters(model))
    for other in results[1:]:
        assert_equal(results[0], other)


@pytest.mark.parametrize(
    "name, nearest",
    [("leraning_rate", "lr"), ("warmup_steps", "warmup"), ("save_steps", "save_every"), ("optimiser", "optimizer")],
)
def test_an_unknown_setting_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(FFMergeError, match=f"unknown setting '{name}': did you mean '{nearest}'?"):
        finetune(tied_gpt2(), lm_batches(1), 1, **{name: 1})


def test_a_setting_like_none_is_answered_with_all():
    with pytest.raises(FFMergeError, match="unknown setting 'xyz': wanted one of lr, schedule, .*log_every$"):
        changed(TrainingSettings(), {"xyz": 1})


def test_what_a_resumed_run_must_agree_on():
    """The names that checkpoints of earlier versions hold."""
    signature = (
        TrainingSettings(betas=[0.9, 0.99]).of_run(3, world_size=1).signature(distils=False, clones=False, world_size=1)
    )
    assert set(signature) == {
        "lr", "schedule", "warmup", "lr_end", "decay_steps", "timescale", "weight_decay", "betas", "eps", "accumulate",
        "max_grad_norm", "autocast", "batch_size", "seed", "clone", "distillation", "parallel", "world_size",
    }  # fmt: skip
    assert (signature["parallel"], signature["decay_steps"], signature["distillation"]) == (None, 0, None)
    taught = (
        TrainingSettings(schedule="linear").of_run(3, world_size=2).signature(distils=True, clones=False, world_size=2)
    )
    assert (taught["parallel"], taught["decay_steps"], taught["distillation"]) == ("ddp", 3, (0.5, 1.0))
