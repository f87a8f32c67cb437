"""Streamed models: one-line errors for what cannot be, changes that are refused, and an end that leaves nothing."""

import copy
import threading

import pytest
import torch
from torch import nn

import ffmerge_fast as ff
from ffmerge_fast.support.sizes import parse_bytes
from tests.helpers.projecting import tied_layers
from tests.helpers.streaming import PLACES, equal, model_of, needs, refused, state
from tests.helpers.tiny_models import accelerate_, logits, tiny_inputs, tiny_model


def test_bad_arguments():
    model = tiny_model("gpt2")
    before, hooks = state(model), len(model.transformer.h[0]._forward_pre_hooks)
    for device in ("tpu", "meta", 3.5):
        with refused(f"device: got {device!r}, wanted 'cpu', 'cuda'"):
            ff.stream_(model, device)
    if not torch.cuda.is_available():
        with refused("device: got 'cuda', but there are 0 CUDA devices"):
            ff.stream_(model)
    with refused("weights: got 'nvme', wanted 'host' or 'disk'"):
        ff.stream_(model, "cpu", "nvme")
    for budget in ("much", -1, "3 GX", True, None):
        with refused("budget: got .*, want a number of bytes"):
            ff.stream_(model, "cpu", budget=budget)
    least, _ = needs(model)
    with refused(f"budget: got {least - 1:,} bytes, wanted at least {least:,}"):
        ff.stream_(model, "cpu", budget=least - 1)
    with refused("unstream_: this model is not streamed"):
        ff.unstream_(model)
    assert equal(model.state_dict(), before) and len(model.transformer.h[0]._forward_pre_hooks) == hooks
    assert (parse_bytes("20GiB", "x"), parse_bytes("1.5 mb", "x"), parse_bytes(7, "x")) == (20 * 2**30, 1_500_000, 7)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    model = tiny_model("gpt2")
    before = state(model)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with refused("stream_: .*weights-.* cannot be written .*No space left.*; give another TMPDIR"):
        ff.stream_(model, "cpu", "disk", needs(model)[1])
    assert equal(model.state_dict(), before) and not hasattr(model, "_weight_stream")


def test_training_is_refused():
    model = tiny_model("llama")
    inputs = tiny_inputs(model)
    with ff.stream_(model, "cpu", budget=needs(model)[1]):
        model.train()
        with refused("a streamed model does inference only; call model.eval"):
            model(**inputs)
        model.eval()
        assert not model(**inputs).loss.requires_grad  # no graph that would hold all weights
        embedded = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        with refused("a streamed model does inference only"):
            model(inputs_embeds=embedded)
    assert all(p.requires_grad for p in model.parameters())
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("place", PLACES)
def test_changes_of_a_streamed_model_are_refused(place):
    model = tiny_model("gpt2")
    inputs, before = tiny_inputs(model), state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    ff.stream_(model, "cpu", place, needs(model)[1])
    for parameter in model.parameters():
        parameter.grad = None
    for change, name in (
        (lambda: model.load_state_dict(before), "load_state_dict"),
        (lambda: model.transformer.h[1].load_state_dict({}), "load_state_dict"),
        (optimizer.step, "optimizer.step"),
        (lambda: copy.deepcopy(model), "copy"),
        (lambda: copy.deepcopy(model.transformer.h[0]), "copy"),
        (lambda: ff.stream_(model, "cpu"), "stream_"),
    ):
        with refused(f"{name}: this model is streamed, its weights are not all in memory; call ffmerge_fast.unstream_"):
            change()
    other.step()
    assert torch.isfinite(logits(model, inputs)).all()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(0)
    with refused("stream_: transformer.h.0.mlp.c_fc.weight was changed while it is streamed"):
        logits(model, inputs)
        logits(model, inputs)
    ff.unstream_(model)
    if place == "disk":
        assert equal(model.state_dict(), before)
    optimizer.step()  # nothing is left behind


def test_a_converted_model_is_refused():
    model = tiny_model("llama")
    before = state(model)
    with ff.stream_(model, "cpu", "disk", needs(model)[1]):
        for layer in model.model.layers:
            layer.half()
        with refused("was changed while it is streamed"):
            logits(model, tiny_inputs(model))
    assert equal(model.state_dict(), before)


def test_unstreaming_leaves_nothing(tmp_path):
    model = model_of("gpt2", merged=True)
    model.transformer.wpe.weight.requires_grad_(False)
    parameters = list(model.parameters())
    addresses = [p.data_ptr() for p in parameters]
    hooks = [[len(h) for h in _hooks(m)] for m in model.modules()]
    threads = threading.active_count()
    ff.stream_(model, "cpu", "host", needs(model)[1])
    logits(model, tiny_inputs(model))
    model.save_pretrained(tmp_path / "saved")  # complete while streamed
    assert ff.unstream_(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [p.data_ptr() for p in parameters] == addresses
    assert [p.requires_grad for p in parameters] == [p is not model.transformer.wpe.weight for p in parameters]
    assert [[len(h) for h in _hooks(m)] for m in model.modules()] == hooks and threading.active_count() == threads
    assert equal(ff.from_pretrained(tmp_path / "saved").state_dict(), model.state_dict())
    assert equal(copy.deepcopy(model).state_dict(), model.state_dict())


def _hooks(module):
    return (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_an_accelerated_model_can_be_streamed(family, place, merged):
    model = tied_layers(tiny_model(family, 4)) if merged and family == "t5" else model_of(family, merged, layers=4)
    inputs, plain = tiny_inputs(model), logits(model, tiny_inputs(model))
    wanted = logits(accelerate_(model), inputs)
    with ff.stream_(model, "cpu", place, needs(model)[1]):
        for _ in range(2):
            assert torch.equal(logits(model, inputs), wanted)
        ff.restore_(model)  # in the middle
        assert torch.equal(logits(model, inputs), plain)
    assert torch.equal(logits(model, inputs), plain)
    with ff.stream_(model, "cpu", place, needs(model)[1]), refused("accelerate_: this model is streamed"):
        accelerate_(model)
    assert torch.equal(logits(accelerate_(model), inputs), wanted)


def test_what_needs_all_weights_is_refused():
    """Half of them are NaN: a plan, a score or an average of such would be one too."""
    model = tiny_model("llama")
    batches = [tiny_inputs(model, batch=8)]
    stats = ff.collect(model, batches, window=2)
    of_whole = {method: ff.importance(model, batches, method) for method in ("activation", "magnitude", "wanda")}
    scores = of_whole["activation"]
    plan = ff.plan(stats, layers="1-2")
    before = state(model)
    with ff.stream_(model, "cpu", budget=needs(model)[1]):
        for action in (
            lambda: ff.merge_(model, plan),
            lambda: ff.expand_(model),
            lambda: ff.project(model, keep=0.5, importance=scores),
            lambda: ff.tie_without_average(model, "1-2"),
        ):
            with refused("this model is streamed, its weights are not all in memory; call ffmerge_fast.unstream_"):
                action()
        assert not ff.is_merged(model)
        again = ff.collect(model, batches, window=2)
        assert again.model == stats.model and torch.equal(again.correlation(0, 1), stats.correlation(0, 1))
        for method in ("activation", "magnitude", "wanda"):
            found, wanted = ff.importance(model, batches, method), of_whole[method]
            assert found.fingerprint == wanted.fingerprint
            assert all(torch.equal(found.scores[name], wanted.scores[name]) for name in wanted.scores)
    assert equal(model.state_dict(), before)


class Int8Linear(nn.Module):
    """A quantised Linear: whole numbers and a scale per row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale)

    def forward(self, x):
        return x @ (self.weight * self.scale).T


class Tagged(torch.Tensor):
    """Stands for the tensor classes of quantising and sharding libraries, whose memory is not their values."""


@pytest.mark.parametrize("place", PLACES)
def test_quantised_weights_stay_on_the_device(place):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = Int8Linear(layer.self_attn.q_proj)
        layer.self_attn.k_proj.weight = nn.Parameter(layer.self_attn.k_proj.weight.detach().as_subclass(Tagged))
    inputs, wanted = tiny_inputs(model), logits(model, tiny_inputs(model))
    kept = {name for name, p in model.named_parameters() if type(p) is Tagged or not p.is_floating_point()}
    assert len(kept) == 2 * len(model.model.layers)
    with ff.stream_(model, "cpu", place, needs(model)[1]) as stream:
        assert not kept & {name for weight in stream._weights() for name in weight.names}
        for _ in range(2):
            assert torch.equal(logits(model, inputs), wanted)
    assert torch.equal(logits(model, inputs), wanted)
    model.model.layers[0].mlp.up_proj = Int8Linear(model.model.layers[0].mlp.up_proj)
    with refused("mlp.up_proj is quantised"):
        ff.stream_(model, "cpu", place, "1GB")
