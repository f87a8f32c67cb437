"""FFNs that a layer computes in its own forward: its code runs as it is, with the op in the place of the parts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ffmerge_fast as ff
from ffmerge_fast.runtime.accelerate.accelerate import AcceleratedFFN
from ffmerge_fast.runtime.accelerate.forms import FFNInside
from ffmerge_fast.testing import no_recompile
from tests.helpers.tiny_models import ALL, accelerate_, features_of, logits, tiny_inputs, tiny_model
from tests.runtime.accelerate.test_accelerate import calls, gradients  # noqa: F401

pytest.importorskip("transformers")
INSIDE = ["opt", "bert", "roberta", "marian", "bart", "whisper"]


class Block(nn.Module):
    """x + FFN(x), as a layer of somebody's own."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return x + 2 * self.down(self.act(self.up(x)))


def with_forward(forward):
    return type("Other", (Block,), {"forward": forward})()


class Stack(nn.Sequential):
    pass


@pytest.fixture(autouse=True)
def known():
    ff.register_family("Stack", ff.FFNSpec("", "up", "down", activation="act"))


def test_a_layer_of_ones_own(calls):  # noqa: F811
    model, x = Stack(Block(), Block()), torch.randn(2, 3, 8)
    expected = model(x)
    accelerate_(model)
    calls.clear()
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2 and all(isinstance(block._ffmerge, FFNInside) for block in model)
    assert [type(block).__name__ for block in model] == ["Block"] * 2 and isinstance(model[0], Block)
    assert model[0].up(x).shape == (2, 3, 16) and model[0].act is not model[1].act  # the parts are what they were


@pytest.mark.parametrize(
    "forward, reason",
    [
        (lambda s, x: s.down(s.act(s.up(x)) + s.act(s.up(x))), "does not call each projection once"),
        (lambda s, x: x + s.down(F.gelu(s.up(x))), "its activation is not a module that its layer's forward calls"),
        (lambda s, x: s.down(s.act(s.up(x)) + 1), "does more than the activation between the projections"),
        (lambda s, x: s.down(s.norm(s.act(s.up(x)))), "does more than the activation between the projections"),
        (lambda s, x: s.down(s.act(s.up(x))) + s.up.weight.sum(), r"needs more of the projections .*AttributeError"),
        (lambda s, x: (lambda h: s.down(s.act(h)) + h.sum())(s.up(x)), "does more than an FFN with the projections"),
        (lambda s, x: x.nowhere, r"does not run on random hidden states \(AttributeError"),
    ],
)
def test_layers_that_do_something_else_are_left_alone_and_named(forward, reason):
    with pytest.raises(ff.FFMergeError, match=reason):
        accelerate_(Stack(with_forward(forward)))
    model = Stack(Block(), with_forward(forward))
    with pytest.warns(UserWarning, match=f"decoder.1: .*{reason}"):
        accelerate_(model)
    assert [isinstance(block, AcceleratedFFN) for block in model] == [True, False]


def test_parts_that_are_something_else_are_named():
    with pytest.raises(ff.FFMergeError, match="activation 'Tanh'"):
        model = Stack(Block())
        model[0].act = nn.Tanh()
        accelerate_(model)
    with pytest.raises(ff.FFMergeError, match="a projection is a Wrapped"):
        model = Stack(Block())
        model[0].up.__class__ = type("Wrapped", (nn.Linear,), {})
        accelerate_(model)
    with pytest.raises(ff.FFMergeError, match="its forward was replaced"):
        model = Stack(Block())
        model[0].forward = model[0].forward
        accelerate_(model)
    with pytest.raises(ff.FFMergeError, match="on the meta device"):
        accelerate_(Stack(Block()).to("meta"))
    with pytest.raises(ff.FFMergeError, match="its activation is not a module"):
        accelerate_(tiny_model("transformer_encoder"))


def test_dropout_between_is_the_layers_own_while_it_is_active(calls):  # noqa: F811
    model = tiny_model("marian").train()
    accelerate_(model)
    layers = [*model.model.encoder.layers, *model.model.decoder.layers]
    assert all(layer._ffmerge.dropouts == (("", "activation_dropout"),) for layer in layers)
    inputs, plain = tiny_inputs(model), ff.restore_(accelerate_(tiny_model("marian").train()))
    for probability, runs in ((0.3, 0), (0.0, 8)):
        for layer in [*layers, *plain.model.encoder.layers, *plain.model.decoder.layers]:
            layer.activation_dropout = probability  # the other dropouts stay active
        calls.clear()
        ours, expected = gradients(model, inputs), gradients(plain, inputs)
        assert len(calls) == runs
        for n, g in ours.items():
            torch.testing.assert_close(g, expected[n], rtol=1e-3, atol=1e-4 * expected[n].abs().max().item() + 1e-6)


def test_random_things_that_no_attribute_tells_of_are_left_alone_in_training(calls):  # noqa: F811
    for residual in (0, 1):  # an FFN, and a layer with one
        forward = lambda s, x, r=residual: r * x + s.down(F.dropout(s.act(s.up(x)), 0.5, s.training))  # noqa: E731
        model = accelerate_(Stack(with_forward(forward)))
        calls.clear()
        model.train()(torch.randn(2, 8))
        assert not calls
        model.eval()(torch.randn(2, 8))
        assert len(calls) == 1


@pytest.mark.parametrize("name", INSIDE)
def test_hooks_on_the_parts_are_called_and_their_removal_brings_the_op_back(name, calls):  # noqa: F811
    model = tiny_model(name)
    inputs = tiny_inputs(model)
    expected = logits(model, inputs)
    with features_of(model) as plain:
        logits(model, inputs)
    accelerate_(model)
    calls.clear()
    with features_of(model) as ours:
        assert torch.equal(logits(model, inputs), expected) and not calls
    for key, features in plain.down.items():
        assert torch.equal(features[0], ours.down[key][0]) and torch.equal(plain.up[key][0], ours.up[key][0])
    logits(model, inputs)
    assert len(calls) == len(ff.find_ffns(model))


def test_hooks_on_the_modules_around_the_parts(calls):  # noqa: F811
    model = accelerate_(tiny_model("bert"))
    layer, inputs, seen = model.bert.encoder.layer[1], tiny_inputs(model), []
    for module in (layer.intermediate, layer.output):
        handle = module.register_forward_hook(lambda m, i, o: seen.append((i[0].shape[-1], o.shape[-1])))
        calls.clear()
        logits(model, inputs)
        handle.remove()
        assert len(calls) == 3
    layer.output.dropout.register_forward_pre_hook(lambda m, i: seen.append(i[0].shape[-1]))  # after down: no matter
    calls.clear()
    logits(model, inputs)
    assert seen == [(16, 32), (32, 16), 16] and len(calls) == 4


def test_parts_replaced_at_any_level(calls):  # noqa: F811
    class Wrapper(nn.Module):
        def __init__(self, inner, scale):
            super().__init__()
            self.inner, self.scale = inner, scale

        def forward(self, *args):
            return self.scale * self.inner(*args)

    plain = tiny_model("bert")
    model, inputs = accelerate_(tiny_model("bert")), tiny_inputs(plain)
    changes = (("intermediate", "dense"), ("output", "dense"), ("intermediate", "intermediate_act_fn"), ("output",))
    for i, path in enumerate(changes):
        for m in (model, plain):
            holder = m.bert.encoder.layer[i]
            for name in path[:-1]:
                holder = getattr(holder, name)
            setattr(holder, path[-1], Wrapper(getattr(holder, path[-1]), 3.0))
    calls.clear()
    assert torch.equal(logits(model, inputs), logits(plain, inputs)) and not calls


@pytest.mark.parametrize("name, path", [("opt", "model.decoder.layers"), ("marian", "model.decoder.layers"),
                                        ("bert", "bert.encoder.layer")])  # fmt: skip
def test_a_layer_compiles_whole_and_not_again_for_other_token_counts(name, path):
    layer = accelerate_(tiny_model(name)).get_submodule(path)[1]
    compiled = torch.compile(lambda x: first(layer(x)), backend="aot_eager", fullgraph=True, dynamic=True)

    def steps(function, tokens):
        x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(tokens), requires_grad=True)
        y = function(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.get_submodule(layer._ffmerge.up).parameters()])]

    steps(compiled, 5)
    with no_recompile():
        for tokens in (7, 33):
            for ours, expected in zip(steps(compiled, tokens), steps(lambda x: first(layer(x)), tokens), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    graphs = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda x: first(layer(x)), backend=lambda graph, _: graphs.append(graph) or graph)(
            torch.randn(2, 5, 16)
        )
    assert len(graphs) == 1 and "_shared_ffn_forward" in graphs[0].code


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", [name for name in ("marian", "bart", "opt") if name in ALL])
def test_generation_token_by_token_is_the_same(name, calls):  # noqa: F811
    model = tiny_model(name)
    ids = tiny_inputs(model)["input_ids"]
    options = dict(max_new_tokens=9, min_new_tokens=9, do_sample=False)
    expected = model.generate(ids, **options)
    assert torch.equal(accelerate_(model).generate(ids, **options), expected)
    calls.clear()
    assert torch.equal(model.generate(ids, **options, num_beams=1), expected) and len(calls) >= 9 * 4


def test_merged_after_acceleration_and_reloaded(tmp_path):
    model = accelerate_(tiny_model("marian"))
    inputs = tiny_inputs(model)
    merged = ff.tie_without_average(model, "encoder:1-2,decoder:0-1")
    plain = ff.tie_without_average(tiny_model("marian"), "encoder:1-2,decoder:0-1")
    expected = logits(plain, inputs)
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-4)
    assert list(merged.state_dict()) == list(plain.state_dict()) and ff.is_merged(merged)
    ff.save_pretrained(merged, tmp_path)
    again = accelerate_(ff.from_pretrained(tmp_path))
    torch.testing.assert_close(logits(again, inputs), expected, rtol=1e-4, atol=1e-4)
    ours, wanted = gradients(again, inputs), gradients(plain, inputs)
    assert ours.keys() == wanted.keys()
    for n, g in ours.items():
        torch.testing.assert_close(g, wanted[n], rtol=1e-3, atol=1e-4 * wanted[n].abs().max().item() + 1e-6)
