"""Projectors in `finetune` (resume, distillation) and in transformers.Trainer."""

import itertools

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.driver.project_run import project_and_train
from ffmerge_fast.driver.training.settings import TrainingSettings
from tests.helpers.projecting import batches, equal, projector, train, weights
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model

# ----------------------------------------------------------------------------------------------------------- finetune


def test_finetune_is_the_plain_loop():
    model, proj = projector("llama", layers=1)
    _, other = projector(model=model)
    data = batches(model, 3)
    ff.finetune(proj.student, data, 3, lr=1e-3, schedule="constant", max_grad_norm=None, optimizer=proj.optimizer())
    other.student.train()
    train(other.student, other.optimizer(lr=1e-3), data)
    for name, value in weights(other.student).items():
        torch.testing.assert_close(weights(proj.student)[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stopped_run_goes_on_bit_by_bit(tmp_path, dtype):
    model = tiny_model("gpt2", layers=1).to(dtype)  # with dropout
    data = batches(model, 4)

    def run(steps, **options):
        _, proj = projector(model=model)
        settings = dict(lr=1e-2, schedule="linear", warmup=1, decay_steps=4, accumulate=2) | options
        ff.finetune(proj.student, data, steps, optimizer=proj.optimizer(max_grad_norm=1.0), **settings)
        return proj

    whole = run(4)
    run(2, output_dir=tmp_path)
    resumed = run(4, output_dir=tmp_path)
    assert equal(weights(resumed.student), weights(whole.student))
    with pytest.raises(ff.FFMergeError, match="resume: .* was made with other weights"):
        _, proj = projector(model=model, d_ff=16)
        ff.finetune(
            proj.student, data, 4, lr=1e-2, schedule="linear", warmup=1, decay_steps=4, accumulate=2,
            optimizer=proj.optimizer(max_grad_norm=1.0), output_dir=tmp_path,
        )  # fmt: skip


@pytest.mark.parametrize("offload_base", [None, "cpu", "disk"])
def test_the_frozen_base_is_the_teacher(offload_base):
    """Distillation alone brings the student's outputs nearer to the base's, without a second copy of it."""
    model, proj = projector("gpt2", layers=1)
    inputs = tiny_inputs(model, batch=4)

    def distance():
        wanted, found = (torch.log_softmax(logits(m, inputs), -1) for m in (model, proj.student.eval()))
        return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean").item()

    before, base = distance(), weights(model)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    optimizer = proj.optimizer(offload_base=offload_base)
    ff.finetune(proj.student, [inputs], 15, lr=1e-2, optimizer=optimizer, teacher=model, alpha=1.0)
    assert distance() < 0.5 * before and equal(weights(model), base)
    held = [m.weight for unit in (*proj.units, *optimizer._owners.mine) for m in unit.matrices]
    assert held and {w.is_meta for w in held} == {offload_base == "disk"}
    assert {w.untyped_storage().data_ptr() for w in held if not w.is_meta} <= storages
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == storages


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path, what):
    """The last good state is kept, and the run goes on from it as if nothing had been."""
    model, whole = projector("vit", layers=1)
    data = batches(model, 3)
    options = dict(lr=1e-2, schedule="constant", save_every=1)
    ff.finetune(whole.student, data, 3, optimizer=whole.optimizer(), **options)

    def broken(m, batch):
        """Of the third batch."""
        loss = m(**batch).loss
        if batch is data[2] or torch.equal(batch["pixel_values"], data[2]["pixel_values"]):
            loss = loss * torch.nan if what == "loss" else _Broken.apply(loss)
        return loss

    for repeated in range(2):
        _, proj = projector(model=model)
        with pytest.raises(ff.FFMergeError, match="step 3: the .* nan; the last good state is .*checkpoint-2"):
            ff.finetune(
                proj.student, data, 3, optimizer=proj.optimizer(), output_dir=tmp_path, loss_fn=broken, **options
            )
        assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"], repeated
    _, proj = projector(model=model)
    ff.finetune(proj.student, data, 3, optimizer=proj.optimizer(), output_dir=tmp_path, **options)
    assert equal(weights(proj.student), weights(whole.student))


class _Endless:
    """A task of random batches."""

    def __init__(self, model):
        self.model = model

    def signature(self):
        return {"data": "random"}

    def batches(self, split, batch_size, *, shuffle, seed, rank, world, epochs=1, start=0):
        return (tiny_inputs(self.model, batch=batch_size, seed=i) for i in itertools.count(start * world + rank, world))


@pytest.mark.parametrize("taught", [False, True])
def test_an_offloaded_base_is_let_go_of(tmp_path, taught):
    """By the driver, which owns it; not where it is the teacher, whose outputs the student then comes nearer to."""
    model = tiny_model("gpt2", layers=1)
    data, base = _Endless(tiny_model("gpt2", layers=1)), weights(model)
    students = []
    for number, place in enumerate((None, "disk")):
        proj, result = project_and_train(
            model, data, tmp_path / str(number), 3, TrainingSettings(lr=1e-2, save_every=1, batch_size=2),
            options=dict(d_model=8, d_ff=12), calibration=2, optimizer=dict(offload_base=place),
            teacher=model if taught else None,
        )  # fmt: skip
        students.append(weights(proj.student))
        assert result.steps == 3
    assert equal(*students)
    assert {p.is_meta for p in model.parameters()} == {not taught}
    assert not taught or equal(weights(model), base)


class _Broken(torch.autograd.Function):
    """A gradient that is not a number."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


# ------------------------------------------------------------------------------------------------------------ trainer


def trainer(proj, folder, model, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    batch = tiny_inputs(model, batch=24, seed=3)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=100, seed=5, max_steps=4,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=2, **options,
    )  # fmt: skip
    optimizer = proj.optimizer(lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return transformers.Trainer(
        model=proj.student, args=arguments, optimizers=(optimizer, schedule),
        train_dataset=[{key: values[i] for key, values in batch.items()} for i in range(24)],
    )  # fmt: skip


def test_hugging_face_trainer(tmp_path):
    model, whole = projector("gpt2", layers=1)
    before = weights(whole.student)
    trainer(whole, tmp_path / "whole", model).train()
    assert not any(torch.equal(w, before[name]) for name, w in weights(whole.student).items() if "h.0" in name)
    _, resumed = projector(model=model)
    trainer(resumed, tmp_path / "whole", model).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert equal(weights(resumed.student), weights(whole.student))
    stock = type(model).from_pretrained(tmp_path / "whole" / "checkpoint-4").eval()
    inputs = tiny_inputs(model)
    assert torch.equal(logits(stock, inputs), logits(whole.fold(), inputs))
