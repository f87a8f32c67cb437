"""NaN and Inf are refused by name; kernels get no tensor without memory; inference mode is as no_grad."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import ffmerge_fast as ff
from ffmerge_fast import ops
from ffmerge_fast.support.files import json_text
from ffmerge_fast.support.tensors import check_finite, has_memory
from tests.helpers.tiny_models import tiny_inputs, tiny_model

MODEL = "transformer.h.3.mlp.c_fc.weight"


def wrapper(*shape) -> TwoTensor:
    """Claims to be floating, and has no memory of its own, like DTensors and torchao's tensors."""
    x = torch.randn(*shape)
    return TwoTensor(x, x.clone())


def batches(model, count=3):
    return [tiny_inputs(model, batch=8, seed=i) for i in range(count)]


# ------------------------------------------------------------------------------------------------------- NaN and Inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_value_is_looked_at_and_large_ones_are_finite(dtype):
    large = torch.full((1000, 7), torch.finfo(dtype).max, dtype=dtype)  # whose sum overflows
    check_finite("x", [("large", large), ("ids", torch.arange(3)), ("empty", large[:0])], "")
    for value in (torch.nan, torch.inf, -torch.inf):
        for position in (0, 3456, 6999):
            wrong = large.clone()
            wrong.view(-1)[position] = value
            with pytest.raises(ff.FFMergeError, match=r"^x: got NaN or Inf in b \(1 of 7,000 values\), .*; do that$"):
                check_finite("x", [("a", large), ("b", wrong)], "do that")


@pytest.mark.parametrize("name", [MODEL, "transformer.wte.weight", "transformer.ln_f.bias"])
def test_a_weight_that_is_not_finite_is_named_by_everything_that_uses_the_model(name, tmp_path):
    model = tiny_model("gpt2")
    plan = ff.plan(model=model, layers="1-2", method="average")
    data, scores = batches(model), ff.importance(model, method="random")
    for value in (torch.nan, torch.inf):
        broken = tiny_model("gpt2")
        with torch.no_grad():
            broken.get_parameter(name).view(-1)[5] = value
        for use in (
            lambda m: ff.merge_(m, plan),
            lambda m: ff.merge(m, plan),
            lambda m: ff.plan(model=m, layers="1-2", method="weights"),
            lambda m: ff.collect(m, data, window=2),
            lambda m: ff.importance(m, data),
            lambda m: ff.project(m, keep=0.5, importance=scores),
            lambda m: ff.hard_prune(m, keep=0.5, importance=scores),
            lambda m: ff.save_pretrained(m, tmp_path / "out"),
            lambda m: ff.finetune(m, data, 1),
        ):
            with pytest.raises(ff.FFMergeError, match=rf"^model: got NaN or Inf in {name} \(1 of"):
                use(broken)
    assert not list(tmp_path.iterdir())


def test_scores_that_are_not_finite_are_named(tmp_path):
    model = tiny_model("gpt2")
    scores = ff.importance(model, method="magnitude")
    scores.scores["d_ff/decoder.1"][3] = torch.nan
    scores.save(tmp_path / "s")
    for given in (scores, ff.Importance.load(tmp_path / "s")):
        with pytest.raises(ff.FFMergeError, match="^importance: got NaN or Inf in d_ff/decoder.1"):
            ff.project(model, keep=0.5, importance=given)


def test_a_metric_that_is_not_finite_is_said_and_never_best(tmp_path):
    model = tiny_model("gpt2")
    for higher in (False, True):
        metrics = iter([torch.nan, torch.inf, -torch.inf, 2.0])
        out = tmp_path / str(higher)
        with pytest.warns(UserWarning, match="evaluate: the metric at step") as told:
            result = ff.finetune(
                model,
                batches(model),
                4,
                evaluate=lambda m, metrics=metrics: next(metrics),
                eval_every=1,
                higher_is_better=higher,
                output_dir=out,
            )
        assert (result.best_metric, result.best_step) == (2.0, 4)
        wanted = [
            f"evaluate: the metric at step {i} is {v}: it is not chosen"
            for i, v in enumerate(("nan", "inf", "-inf"), 1)
        ]
        assert [str(w.message) for w in told] == wanted
        rows = [strict(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [row["metric"] for row in rows if "metric" in row] == [None, None, None, 2.0]


def test_a_window_without_a_score_is_said_and_resumed(tmp_path):
    model = tiny_model("gpt2")
    stats = ff.collect(model, batches(model, 8), window=2)
    scores = iter([torch.nan, 3.0, torch.inf])
    with pytest.warns(UserWarning, match="search: the score of layers") as told:
        found = ff.search(model, stats, 2, lambda m: next(scores), higher_is_better=True, resume=tmp_path / "r")
    assert found.layers == "1-2" and len(told) == 2 and "layers 0-1 is nan" in str(told[0].message)
    strict((tmp_path / "r").read_text())
    with pytest.warns(UserWarning):
        again = ff.search(model, stats, 2, lambda m: 1 / 0, higher_is_better=True, resume=tmp_path / "r")
    assert again.layers == "1-2" and again.search[0][1] != again.search[0][1]
    assert json_text(again.to_dict()) == json_text(found.to_dict())


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_has_no_nan():
    value = {"a": [1, float("nan"), ("x", float("-inf"))], "b": {"c": 0.5, 3: float("inf")}}
    assert strict(json_text(value)) == {"a": [1, None, ["x", None]], "b": {"c": 0.5, "3": None}}


# ----------------------------------------------------------------------------------------------- tensors without memory


def test_what_has_memory():
    assert all(
        map(has_memory, (torch.ones(2), nn.Parameter(torch.ones(2)), torch.ones(0), torch.ones(2, device="meta")))
    )
    assert has_memory(torch.ones(2).as_subclass(type("Named", (torch.Tensor,), {})))
    assert not has_memory(wrapper(2)) and not has_memory(nn.Parameter(wrapper(2)))


def test_ops_refuse_tensors_without_memory():
    state = ff.CorrelationState({0: 16}, [(0, 0)])
    x, up, down, w = (torch.randn(shape) for shape in ((10, 16), (32, 16), (16, 32), (8, 8)))
    calls = {
        "features of layer 0": lambda: state.push(0, wrapper(10, 16)),
        "mask": lambda: state.push(0, x, wrapper(10)),
        "scores": lambda: ops.assign(wrapper(4, 4)),
        "x": lambda: ops.shared_ffn(wrapper(10, 16), up, down),
        "weights": lambda: ops.shared_ffn(x, nn.Parameter(wrapper(32, 16)), down),
        "weight": lambda: ops.project_weight(wrapper(8, 8), w),
        "p_in": lambda: ops.project_weight(w, p_in=wrapper(8, 4)),
        "residual": lambda: ops.project_weight(w, w, residual=wrapper(8, 8)),
    }
    for grad in (True, False):
        for name, call in calls.items():
            with torch.set_grad_enabled(grad), pytest.raises(ff.FFMergeError, match=f"^{name}: got a TwoTensor, which"):
                call()
    state.push(0, x)  # nothing was added before
    state.end_batch()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_models_with_such_weights(family):
    """Quantised in fact, though they say that they are floating."""
    from tests.helpers.tiny_models import accelerate_, logits

    model = tiny_model(family)
    inputs, ffns = tiny_inputs(model), ff.find_ffns(model)
    expected = logits(model, inputs)

    def wrap_(ffn):
        module = model.get_submodule(ffn.down_path)
        module.weight = nn.Parameter(TwoTensor(module.weight.data, module.weight.data.clone()), requires_grad=False)

    wrap_(ffns[1])
    for use in (ff.find_ffns, lambda m: ff.collect(m, batches(m), window=2), lambda m: ff.project(m, keep=0.5)):
        with pytest.raises(ff.FFMergeError, match=rf"^{ffns[1].down_path} is quantised \(TwoTensor\)"):
            use(model)
    with pytest.warns(UserWarning, match=r"stay as they are: decoder.1: its weights are quantised or sharded"):
        accelerate_(model)
    torch.testing.assert_close(as_plain(logits(model, inputs)), expected)
    ff.restore_(model)
    for ffn in (ffns[0], *ffns[2:]):
        wrap_(ffn)
    with pytest.raises(ff.FFMergeError, match="no FFN of this .* can run on shared_ffn .*TwoTensor"):
        accelerate_(model)


def as_plain(x):
    return x.a if isinstance(x, TwoTensor) else x


# ---------------------------------------------------------------------------------------------------- inference mode


def test_inference_mode_is_as_no_grad():
    """Statistics, plans and weights that are made inside can be used, changed and trained outside."""
    make = lambda: tiny_model("gpt2")  # noqa: E731
    data = batches(make(), 6)
    with torch.inference_mode():
        inside = ff.collect(make(), data, window=3)
        plan = ff.plan(inside, layers="1-3")
        model = ff.merge_(make_trainable := tiny_outside(), plan)
        ff.refit_(model, tiny_outside(), data)
        found = ff.search(tiny_outside(), inside, 3, lambda m: m(**data[0]).loss.item())
        small = ff.project(tiny_outside(), keep=0.5, importance=ff.importance(tiny_outside(), data))
    assert make_trainable is model
    outside = ff.collect(make(), data, window=3)
    assert torch.equal(outside.correlation(0, 1), inside.correlation(0, 1))
    inside.merge(outside)
    assert ff.plan(inside, window=3).layers and found.layers
    wanted = ff.merge_(make(), ff.plan(outside, layers="1-3"))
    ff.refit_(wanted, make(), data)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    with torch.inference_mode():
        given = [{name: value.clone() for name, value in batch.items()} for batch in data]
    before = model.transformer.wte.weight.clone()
    ff.finetune(model, given, 2)
    assert not torch.equal(before, model.transformer.wte.weight)
    optimizer = small.optimizer(lr=1e-3)
    small.student(**data[0]).loss.backward()
    optimizer.step()


def tiny_outside():
    with torch.inference_mode(False):
        return tiny_model("gpt2")


def test_training_where_there_are_no_gradients_is_refused():
    model = tiny_model("gpt2")
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pytest.raises(ff.FFMergeError, match="^finetune: no gradients here"):
            ff.finetune(model, batches(model), 1)
    with torch.inference_mode():
        model = tiny_model("gpt2")
    with pytest.raises(ff.FFMergeError, match="^finetune: no gradients here"):
        ff.finetune(model, batches(tiny_model("gpt2")), 1)


def test_images_made_in_inference_mode_are_trained_on():
    model = tiny_model("vit")
    with torch.inference_mode():
        data = batches(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ff.finetune(model, data, 2).steps == 2


def test_a_folder_loaded_in_inference_mode_can_be_trained(tmp_path):
    model = tiny_model("gpt2")
    ff.save_pretrained(model, tmp_path / "m")
    with torch.inference_mode():
        loaded = ff.from_pretrained(tmp_path / "m")
    assert ff.finetune(loaded, batches(model), 1).steps == 1
