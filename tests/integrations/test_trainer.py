"""transformers.Trainer on merged models: trains the shared weights once, saves them once, resumes exactly."""

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def merged_model(name: str) -> torch.nn.Module:
    model = tiny_model(name)
    return ff.merge_(model, ff.plan(layers="1-3", method="random", model=model))


def examples(model, count: int = 24) -> list[dict]:
    batch = tiny_inputs(model, batch=count, seed=3)
    return [{key: values[i] for key, values in batch.items()} for i in range(count)]


def trainer(model, folder, **options) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=100, seed=5,
        per_device_train_batch_size=4, **{"learning_rate": 1e-2, "max_steps": 6, "save_steps": 3, **options},
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=examples(model), eval_dataset=examples(model, 8)
    )


def ffn(model, layer: int):
    """The module that holds (one part of) the FFN of a layer."""
    return model.get_submodule(ff.find_ffns(model)[layer].shared[0])


def assert_tied(model) -> None:
    assert ffn(model, 1) is ffn(model, 2) is ffn(model, 3)
    assert ffn(model, 0) is not ffn(model, 1)


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_training_saves_tied_checkpoints_and_resumes_exactly(name, tmp_path):
    whole = merged_model(name)
    before = {key: p.clone() for key, p in whole.named_parameters()}
    trainer(whole, tmp_path / "whole").train()
    assert_tied(whole)
    assert all(not torch.equal(p, before[key]) for key, p in whole.named_parameters() if ".mlp." in key)

    stopped = trainer(merged_model(name), tmp_path / "stopped", max_steps=6)
    stopped.add_callback(StopAfter(3))
    stopped.train()
    resumed = merged_model(name)
    trainer(resumed, tmp_path / "stopped").train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    assert_tied(resumed)
    for (key, expected), (_, found) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(found, expected), key

    inputs = tiny_inputs(whole)
    for loaded in (
        ff.from_pretrained(tmp_path / "whole" / "checkpoint-6"),
        type(whole).from_pretrained(tmp_path / "stopped" / "checkpoint-6"),
    ):
        assert_tied(loaded)
        assert torch.equal(logits(loaded.eval(), inputs), logits(whole.eval(), inputs))
    assert (tmp_path / "whole" / "checkpoint-6" / "modeling_ffmerge.py").exists()


class StopAfter(transformers.TrainerCallback):
    """Ends a run early, as a killed one would, with the schedule of the whole run."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_shared_weights_have_one_optimizer_state(tmp_path):
    model = merged_model("gpt2")
    run = trainer(model, tmp_path, max_steps=1)
    run.train()
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in trained}) == len(trained) == len(list(model.parameters()))
    assert len(run.optimizer.state) == len(trained)
    assert len(torch.load(tmp_path / "checkpoint-1" / "optimizer.pt")["state"]) == len(trained)


def test_trainer_without_the_package_s_functions_writes_a_small_model(tmp_path):
    model = merged_model("gpt2")
    run = trainer(model, tmp_path / "run", max_steps=1, save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "final"))
    ff.save_pretrained(model, tmp_path / "ours")
    sizes = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("final", "ours")]
    assert sizes[0] == sizes[1]
    assert_tied(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final"))


def test_best_model_is_loaded_into_the_tied_one(tmp_path):
    model = merged_model("gpt2")
    run = trainer(
        model, tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, learning_rate=1.0,
        metric_for_best_model="eval_loss",
    )  # fmt: skip
    run.train()
    assert_tied(model)
    best = ff.from_pretrained(run.state.best_model_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), best.parameters(), strict=True))
