"""Accelerated models in the hands of tools that copy, trace, quantise, offload, checkpoint and convert models."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ffmerge_fast as ff
from ffmerge_fast.runtime.accelerate.trial import host_path
from tests.helpers.tiny_models import accelerate_, logits, tiny_inputs, tiny_model
from tests.runtime.accelerate.test_accelerate import calls, ffns, gradients  # noqa: F401

pytest.importorskip("transformers")
MODELS = ["gpt2", "llama", "marian", "bert"]  # Conv1D, gated; inside layers, and in two modules of a layer


def close(ours, expected, tolerance=1e-4):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name, reentrant, calls):  # noqa: F811
    results = []
    for accelerate in (False, True):
        model = ff.tie_without_average(tiny_model(name), "1-2" if name != "marian" else "encoder:1-2,decoder:1-2")
        for module in model.modules():
            for attribute in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
        if accelerate:
            accelerate_(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        calls.clear()
        results.append(gradients(model.train(), tiny_inputs(model)))
    ours, expected = results[1], results[0]
    assert len(calls) == 2 * len(ff.find_ffns(model)) and ours.keys() == expected.keys()
    for n, g in ours.items():
        torch.testing.assert_close(g, expected[n], rtol=0, atol=1e-4 * expected[n].abs().max().item() + 1e-7, msg=n)


@pytest.mark.parametrize("name", MODELS)
def test_another_dtype_and_autocast_and_inference_mode(name, calls):  # noqa: F811
    plain, model = tiny_model(name), accelerate_(tiny_model(name))
    inputs = tiny_inputs(model)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 0.05), (torch.float32, 1e-2)):
        plain.to(dtype), model.to(dtype)
        calls.clear()
        with torch.inference_mode():
            ours = model(**inputs).logits
        assert ours.dtype == dtype and ours.is_inference() and len(calls) == len(ff.find_ffns(model))
        close(ours.double(), logits(plain, inputs).double(), tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        expected, ours = logits(plain, inputs), logits(model, inputs)
    assert ours.dtype == expected.dtype
    close(ours.float(), expected.float(), 0.05)


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_are_accelerated_and_independent(name):
    model = accelerate_(tiny_model(name))
    inputs = tiny_inputs(model)
    expected, stream = logits(model, inputs), io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for clone in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert len(ffns(clone)) == len(ffns(model)) and torch.equal(logits(clone, inputs), expected)
        clone.get_submodule(ff.find_ffns(clone)[0].up_path).weight.data.zero_()
        assert not torch.equal(logits(clone, inputs), expected)
        ff.restore_(clone)
    assert torch.equal(logits(model, inputs), expected) and ffns(model)


@pytest.mark.parametrize("name", MODELS)
def test_dynamic_quantisation(name, calls):  # noqa: F811
    def quantised(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)

    plain, model = tiny_model(name), accelerate_(tiny_model(name))
    inputs = tiny_inputs(model)
    small = quantised(model)
    calls.clear()
    found, wanted = logits(small, inputs), logits(quantised(plain), inputs)
    if name == "gpt2":  # Conv1D is not quantised: those FFNs are ours, which round otherwise than torch on some CPUs
        assert len(calls) == 4
        torch.testing.assert_close(found, wanted)
    else:
        assert not calls and torch.equal(found, wanted)
    logits(model, inputs)
    assert calls


@pytest.mark.parametrize("name", MODELS)
def test_modules_whose_forward_an_offloader_replaced(name, calls):  # noqa: F811
    hooks = pytest.importorskip("accelerate").hooks
    model = accelerate_(tiny_model(name))
    inputs, first = tiny_inputs(model), ff.find_ffns(model)[0]
    expected, count = logits(model, inputs), len(ff.find_ffns(model))
    weights = {n: w.detach().clone() for n, w in model.get_submodule(first.up_path).named_parameters()}
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    hooks.add_hook_to_module(model.get_submodule(first.up_path), hook)
    assert model.get_submodule(first.up_path).weight.is_meta
    calls.clear()
    close(logits(model, inputs), expected)
    assert len(calls) == count - 1
    hooks.remove_hook_from_module(model.get_submodule(first.up_path))
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("name", MODELS)
def test_transformations_and_exports_see_the_models_own_operations(name):
    model = accelerate_(tiny_model(name))
    ffn = ff.find_ffns(model)[-1]
    host = model.get_submodule(host_path(ffn))
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))

    def run(x):
        y = host(x)
        return y if isinstance(y, torch.Tensor) else y[0]

    expected = run(x)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward gradients
        y, tangent = torch.func.jvp(run, (x,), (torch.ones_like(x),))
    close(y, expected)
    jacobian = torch.func.jacrev(run)(x)
    close(jacobian.sum((-1, -2, -3)), tangent, 1e-3)
    close(torch.func.vmap(run, randomness="error")(x[None]), expected[None])

    class Runs(nn.Module):
        def __init__(self):
            super().__init__()
            self.host = host

        def forward(self, x):
            return run(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Runs(), x, check_trace=False)
    assert "Shared" not in str(traced.inlined_graph) and "ffmerge" not in str(traced.inlined_graph)
    close(traced(x + 1), run(x + 1))
    exported = torch.export.export(Runs(), (x,))
    assert "ffmerge" not in exported.graph_module.code
    close(exported.module()(x + 1), run(x + 1))


def test_a_replaced_activation_is_used(calls):  # noqa: F811
    for name, attribute in (("llama", "act_fn"), ("gpt2", "act"), ("marian", "activation_fn")):
        plain, model = tiny_model(name), accelerate_(tiny_model(name))
        inputs = tiny_inputs(model)
        for m in (plain, model):
            setattr(m.get_submodule(host_path(ff.find_ffns(m)[0])), attribute, nn.Tanh())
        calls.clear()
        close(logits(model, inputs), logits(plain, inputs))
        assert len(calls) == len(ff.find_ffns(model)) - 1


@pytest.mark.parametrize("name, runs", [("gpt2", 4), ("t5", 0)])
def test_dropout_that_is_switched_on_later(name, runs, calls):  # noqa: F811
    plain, model = tiny_model(name).train(), tiny_model(name).train()
    for m in (plain, model):
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    accelerate_(model)
    for m in (plain, model):
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.4
    calls.clear()
    ours, expected = (gradients(m, tiny_inputs(m)) for m in (model, plain))
    assert len(calls) == runs
    for n, g in ours.items():
        torch.testing.assert_close(g, expected[n], rtol=1e-3, atol=1e-4 * expected[n].abs().max().item() + 1e-6)


def test_a_merged_accelerated_model_saved_by_transformers_itself(tmp_path):
    for name, layers in (("gpt2", "1-2"), ("marian", "encoder:1-2,decoder:1-2"), ("bert", "0-1")):
        model = accelerate_(ff.tie_without_average(tiny_model(name), layers))
        expected = logits(model, tiny_inputs(model))
        model.save_pretrained(tmp_path / name)
        loaded = ff.from_pretrained(tmp_path / name)
        assert ff.is_merged(loaded) and not ffns(loaded)
        close(logits(loaded, tiny_inputs(model)), expected)
