"""The clone loss: a student's matrices held to what the base's give, in training."""

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.driver.project_run import project_and_train
from ffmerge_fast.driver.training.settings import TrainingSettings
from ffmerge_fast.projecting.axes import ModelAxes
from tests.helpers.projecting import batches, equal, projector, tied_layers, weights
from tests.helpers.tiny_models import tiny_inputs, tiny_model


def loss_of(clone, student, model, batch):
    with clone.recording(student):
        student(**batch)
        with torch.no_grad():
            model(**batch)
    return clone.loss(batch)


@pytest.mark.parametrize("name", ("gpt2", "llama", "phi3", "bert", "t5", "marian", "vit"))
def test_is_zero_for_what_gives_the_same(name):
    """A student that only lacks neurons gives at first what the base gives, as far as it has the rows."""
    model, proj = projector(name, d_model=16, d_ff=20)
    model.eval(), proj.student.eval()
    batch = tiny_inputs(model, batch=4, padded=True)
    clone = proj.clone_loss()
    value = loss_of(clone, proj.student, model, batch)
    assert 0 < value < 2
    up = ff.find_ffns(model)[0].up_path
    only = {path: kept for path, kept in clone._kept.items() if path == up}
    clone._kept = only  # the first FFN reads what no missing neuron has touched
    assert loss_of(clone, proj.student, model, batch) < 1e-10


def test_equals_its_definition():
    model, proj = projector("gpt2", d_model=8, d_ff=12, layers=1, init="svd")
    batch = tiny_inputs(model, batch=3, padded=True)
    outputs = {}
    for which, of in (("student", proj.student), ("base", model)):
        for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            module = of.get_submodule(f"transformer.h.0.{path}")
            module.register_forward_hook(
                lambda _, a, y, key=(which, path): outputs.__setitem__(key, y.detach().double())
            )
    value = loss_of(proj.clone_loss(), proj.student.eval(), model, batch)
    _, layout, selection, basis = proj._origin("")
    mask, terms = batch["attention_mask"].bool(), []
    for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        y, t = outputs["student", path][mask], outputs["base", path][mask]
        axis = ModelAxes.of(model).axes[f"transformer.h.0.{path}.weight"][1]
        t = t @ basis.T if path.endswith("c_proj") else t[:, selection.choice(axis).index]
        terms.append((y - t).square().sum() / t.square().sum())
    torch.testing.assert_close(value.double(), torch.stack(terms).mean(), rtol=1e-5, atol=0)


def test_training_with_it_brings_matrices_nearer():
    model = tied_layers(tiny_model("gpt2", layers=3))
    found = []
    for weight in (0.0, 10.0):
        _, proj = projector(model=model, init="svd")
        clone = proj.clone_loss()
        ff.finetune(
            proj.student, batches(model, 4), 30, 3e-3, optimizer=proj.optimizer(lr=3e-3), teacher=model, clone=clone,
            clone_weight=weight,
        )  # fmt: skip
        found.append(loss_of(clone, proj.student.eval(), model, tiny_inputs(model, batch=4, seed=9)).item())
    assert found[1] < 0.9 * found[0]
    assert not any(m._forward_hooks for m in (*model.modules(), *proj.student.modules()))


def test_a_run_with_it_goes_on(tmp_path):
    model = tiny_model("gpt2", layers=1)
    of = dict(options=dict(d_model=8, d_ff=12), calibration=2, teacher=model, clone=True)
    results = []
    for folder, steps in (("once", (4,)), ("twice", (2, 4))):
        for count in steps:
            settings = TrainingSettings(lr=1e-2, batch_size=2, save_every=1, schedule="constant")
            proj, _ = project_and_train(model, _Data(model), tmp_path / folder, count, settings, **of)
        results.append(weights(proj.student))
    assert equal(*results)
    with pytest.raises(ff.FFMergeError, match="other clone"):
        project_and_train(model, _Data(model), tmp_path / "once", 4, settings, **of | dict(clone=False))


class _Data:
    """As much of a Task as a run asks for."""

    splits = ()

    def __init__(self, model):
        self.model = model

    def batches(self, split, batch_size=None, shuffle=False, seed=0, rank=0, world=1, start=0, **_):
        return (tiny_inputs(self.model, batch=2, seed=seed + i) for i in range(start, 1000))

    def signature(self):
        return {"data": "tiny"}


def test_bad_input():
    model, proj = projector("gpt2")
    clone, data = proj.clone_loss(), batches(model, 2)
    with pytest.raises(ff.FFMergeError, match="clone: got one without a teacher"):
        ff.finetune(proj.student, data, 1, clone=clone)
    with pytest.raises(ff.FFMergeError, match="clone_weight: got -1"):
        ff.finetune(proj.student, data, 1, clone=clone, teacher=model, clone_weight=-1.0)
    other = tiny_model("gpt2", layers=2, seed=1)
    with pytest.raises(ff.FFMergeError, match=r"clone: \S+ ran 1 times in the student and 0 times in the teacher"):
        ff.finetune(proj.student, data, 1, clone=clone, teacher=other)
