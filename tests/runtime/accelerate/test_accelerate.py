"""accelerate_ and restore_: same results, same parameters, and out of the way of everything else that hooks in."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import ffmerge_fast as ff
from ffmerge_fast.ops.shared_ffn.op import apply_ffn
from ffmerge_fast.runtime.accelerate.accelerate import AcceleratedFFN
from ffmerge_fast.runtime.accelerate.trial import host_path
from ffmerge_fast.testing import no_recompile
from tests.helpers.tiny_models import ALL, accelerate_, features_of, logits, tiny_inputs, tiny_model

pytest.importorskip("transformers")
FAMILIES = [name for name in ALL if name != "transformer_encoder"]


def ffns(model):
    return list({id(m): m for m in model.modules() if isinstance(m, AcceleratedFFN)}.values())


@pytest.fixture
def calls(monkeypatch):
    """How often the op ran."""
    seen = []
    monkeypatch.setattr(
        "ffmerge_fast.runtime.accelerate.forms.apply_ffn", lambda *a, **k: seen.append(1) or apply_ffn(*a, **k)
    )
    return seen


def gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    output = model(**inputs)
    loss = output.loss if hasattr(output, "loss") else output.square().mean()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("merged", [False, True])
def test_same_results_and_names_for_every_family(name, merged, calls):
    model = tiny_model(name)
    if merged:
        model = ff.tie_without_average(model, "1-2")
    inputs = tiny_inputs(model)
    names, modules = list(model.state_dict()), [type(m) for m in model.modules()]
    before, expected = logits(model, inputs), gradients(model, inputs)
    groups = ff.shared_groups(model)
    assert accelerate_(model) is model
    calls.clear()  # those of the trial
    after = logits(model, inputs)
    assert len(calls) == len(ff.find_ffns(model)) > 0
    assert len(ffns(model)) == len({id(model.get_submodule(host_path(f))) for f in ff.find_ffns(model)})
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == names and ff.shared_groups(model) == groups
    for n, g in gradients(model, inputs).items():
        torch.testing.assert_close(g, expected[n], rtol=1e-3, atol=1e-4 * expected[n].abs().max().item() + 1e-6)
    assert ff.restore_(model) is model and not ffns(model)
    assert [type(m) for m in model.modules()] == modules and not any(hasattr(m, "_ffmerge") for m in model.modules())
    assert torch.equal(logits(model, inputs), before)


def test_policies_and_errors():
    model = tiny_model("gpt2")
    with pytest.raises(ff.FFMergeError, match="recompute: got 'half'"):
        accelerate_(model, recompute="half")
    accelerate_(model)
    accelerate_(model, recompute="full")  # again: only the policy changes
    assert {m._ffmerge.recompute for m in ffns(model)} == {"full"} and len(ffns(model)) == 4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_layers_with_deltas_compute_by_their_own_code(name, calls):
    teacher = tiny_model(name)
    model = ff.merge(teacher, ff.plan(layers="0-2", method="average", model=teacher))
    batches = [tiny_inputs(model, batch=4, seed=seed) for seed in range(3)]
    accelerated = accelerate_(copy.deepcopy(model))
    for one in (model, accelerated):
        ff.local_distill_(one, teacher, batches, steps=5, delta_rank=2)
    expected = logits(model, batches[0])
    calls.clear()
    torch.testing.assert_close(logits(accelerated, batches[0]), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1  # of the layer that is not merged
    with pytest.warns(
        UserWarning, match="decoder.0: its layer has low-rank deltas or neurons of its own; decoder.1: .*; decoder.2: "
    ):
        accelerate_(model)
    calls.clear()
    torch.testing.assert_close(logits(model, batches[0]), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1 and len(ffns(model)) == 1
    torch.testing.assert_close(logits(ff.restore_(accelerated), batches[0]), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # of zero they change nothing, and still the layer has them
        for n, p in model.named_parameters():
            if "delta" in n:
                p.zero_()
    with pytest.warns(UserWarning, match="decoder.0: its layer has low-rank deltas or neurons of its own"):
        accelerate_(ff.restore_(model))


def test_dropout_at_the_end_keeps_its_random_numbers(calls):
    model = tiny_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    inputs = tiny_inputs(model)
    expected = gradients(model, inputs)
    accelerate_(model)
    calls.clear()
    for n, g in gradients(model, inputs).items():
        torch.testing.assert_close(g, expected[n], rtol=1e-3, atol=1e-5)
    assert len(calls) == 4


def test_dropout_inside_is_computed_by_the_module_itself(calls):
    model = tiny_model("t5").train()
    inputs = tiny_inputs(model)
    expected = gradients(model, inputs)
    accelerate_(model)
    calls.clear()
    assert all(torch.equal(g, expected[n]) for n, g in gradients(model, inputs).items()) and not calls
    model.eval()
    logits(model, inputs)
    assert len(calls) == 8


def test_hooks_on_the_parts_are_called():
    model = tiny_model("llama")
    inputs = tiny_inputs(model)
    with features_of(model) as plain:
        logits(model, inputs)
    accelerate_(model)
    with features_of(model) as ours:
        logits(model, inputs)
    for key, features in plain.down.items():
        assert torch.equal(features[0], ours.down[key][0]) and torch.equal(plain.up[key][0], ours.up[key][0])
    batches = [tiny_inputs(model, seed=i) for i in range(3)]
    ff.collect(model, batches, pairs=[(0, 1)])  # so statistics of an accelerated model are those of the model


class LoraLinear(nn.Module):
    """What adapter libraries put in a Linear's place."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


def test_a_replaced_projection_is_used_and_its_return_brings_the_op_back(calls):
    model = tiny_model("llama")
    inputs = tiny_inputs(model)
    accelerate_(model)
    before = logits(model, inputs)
    mlp = model.model.layers[1].mlp
    original = mlp.up_proj
    torch.manual_seed(0)
    mlp.up_proj = LoraLinear(original)
    calls.clear()
    adapted = logits(model, inputs)
    assert not torch.allclose(adapted, before) and len(calls) == 3
    gradients(model, inputs)
    assert mlp.up_proj.a.weight.grad.abs().max() > 0
    mlp.up_proj = original
    assert torch.equal(logits(model, inputs), before)


def test_autocast_and_mixed_dtypes():
    model = tiny_model("llama")
    inputs = tiny_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, inputs)
        ours = logits(accelerate_(model), inputs)
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    mlp = ff.restore_(model).model.layers[0].mlp
    accelerate_(model)
    mlp.down_proj.to(torch.float64)
    with pytest.raises(RuntimeError, match="dtype"):  # as the module itself would
        mlp(torch.zeros(1, 16))
    model.to(torch.bfloat16)
    assert logits(model, inputs).dtype == torch.bfloat16


def test_copies_pickles_and_folders(tmp_path):
    model = accelerate_(tiny_model("gpt2"))
    inputs = tiny_inputs(model)
    expected = logits(model, inputs)
    clone = copy.deepcopy(model)
    assert len(ffns(clone)) == 4 and torch.equal(logits(clone, inputs), expected)
    clone.transformer.h[0].mlp.c_fc.weight.data.zero_()
    assert torch.equal(logits(model, inputs), expected)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert len(ffns(loaded)) == 4 and torch.equal(logits(loaded, inputs), expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not ffns(again)
    torch.testing.assert_close(logits(again, inputs), expected, rtol=1e-4, atol=1e-4)
    fresh = accelerate_(tiny_model("gpt2", seed=5))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, inputs), expected)


def test_merged_before_or_after_is_one_module_and_one_storage(tmp_path):
    results = []
    for order in ("merge first", "accelerate first"):
        model = tiny_model("gpt2")
        steps = [accelerate_, lambda m: ff.tie_without_average(m, "1-2")]
        for step in steps if order == "accelerate first" else steps[::-1]:
            model = step(model)
        assert model.transformer.h[1].mlp is model.transformer.h[2].mlp
        assert ff.shared_groups(model) == [("decoder", (1, 2))] and len(ffns(model)) == 3
        results.append(logits(model, tiny_inputs(model)))
        ff.save_pretrained(model, tmp_path / order)
        loaded = ff.from_pretrained(tmp_path / order)
        torch.testing.assert_close(logits(loaded, tiny_inputs(model)), results[-1], rtol=1e-4, atol=1e-4)
        ff.expand_(model)
        assert not ff.is_merged(model) and len(ffns(model)) == 4
    assert torch.equal(*results)


def test_compiles_whole_and_not_again_for_other_token_counts():
    mlp = tiny_model("llama").model.layers[0].mlp
    block = nn.Sequential(nn.LayerNorm(16), mlp)
    model = tiny_model("llama")
    model.model.layers[0].mlp = mlp
    accelerate_(model)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(compiled(x), block(x))
    with no_recompile():
        for tokens in (7, 33):
            x = torch.randn(2, tokens, 16)
            torch.testing.assert_close(compiled(x), block(x))


def test_training_steps_stay_those_of_the_plain_model():
    models = [ff.tie_without_average(tiny_model("gpt2"), "1-2") for _ in range(2)]
    accelerate_(models[0], recompute="full")
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(4):
            optimizer.zero_grad()
            model(**tiny_inputs(model, seed=step)).loss.backward()
            optimizer.step()
    for (name, ours), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, expected, msg=name, rtol=1e-4, atol=1e-5)


def test_generation_token_by_token_is_the_same():
    model = tiny_model("llama")
    ids = tiny_inputs(model)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)
        ours = accelerate_(model).generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "numbers, tokens, dtype, grad, runs",
    [
        (2**17, 2, torch.float32, False, True),
        (2**17 - 256, 2, torch.float32, False, False),
        (2**17, 1, torch.float32, False, False),
        (2**17, 1, torch.bfloat16, False, True),
        (2**17, 1, torch.float32, True, True),
        (2**21, 1, torch.float32, False, True),
    ],
)
def test_too_little_work_is_left_to_torch(numbers, tokens, dtype, grad, runs, calls):

    class Stack(nn.Sequential):
        pass

    ff.register_family("Stack", ff.FFNSpec("", "0", "2", module="", activation="gelu"))
    block = nn.Sequential(nn.Linear(256, numbers // 256), nn.GELU(), nn.Linear(numbers // 256, 256))
    model = ff.accelerate_(Stack(block).to(dtype))
    x = torch.randn(tokens, 256).to(dtype)
    calls.clear()
    with torch.set_grad_enabled(grad):
        model(x)
        assert len(calls) == runs
        ff.accelerate_(model, least=1)(x)  # the caller's own threshold
        assert len(calls) == runs + 1
