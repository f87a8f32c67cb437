"""ffn_weights: one reading of an FFN's weights, whatever modules hold them."""

import pytest
import torch
from torch.nn import functional as F

import ffmerge_fast as ff
from ffmerge_fast.models.ffn_weights import ffn_parameters, ffn_weights
from ffmerge_fast.ops.shared_ffn.op import apply_ffn
from tests.helpers.tiny_models import ALL, logits, tiny_inputs, tiny_model


def passed(model, ffn):
    """(x, h, y) of one FFN in one forward."""
    seen = {}
    up, down = (model.get_submodule(path) for path in (ffn.up_path, ffn.down_path))
    hooks = [
        up.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        down.register_forward_hook(lambda _, args, y: seen.update(h=args[0], y=y)),
    ]
    logits(model, tiny_inputs(model))
    for hook in hooks:
        hook.remove()
    return seen["x"].detach(), seen["h"].detach(), seen["y"].detach()


@pytest.mark.parametrize("name", ALL)
def test_it_computes_what_the_modules_compute(name):
    model = tiny_model(name, layers=2)
    for ffn in ff.find_ffns(model):
        x, h, y = passed(model, ffn)
        weights = ffn_weights(model, ffn)
        assert weights.halves == 1 + ffn.gated and (weights.up_bias is not None) == ffn.bias
        assert [tuple(p.shape) for p in weights.pre_activations(x)] == [h.shape] * weights.halves
        torch.testing.assert_close(weights.hidden(x, ffn.activation), h)
        torch.testing.assert_close(F.linear(h, *weights.projection("down")), y)
        torch.testing.assert_close(apply_ffn(x, weights, ffn.activation), y)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "bert"])
def test_gradients_flow_back_and_parameters_can_be_replaced(name):
    model = tiny_model(name, layers=2).double()
    ffn = ff.find_ffns(model)[0]
    parameters = ffn_parameters(model, ffn)
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    x, h, _ = passed(model, ffn)
    for replaced, leaves in (
        (None, parameters),
        ({id(p): c for p, c in zip(parameters, copies, strict=True)}, copies),
    ):
        weights = ffn_weights(model, ffn, replaced)
        y = F.linear(weights.hidden(x, ffn.activation), *weights.projection("down"))
        torch.testing.assert_close(weights.hidden(x, ffn.activation), h)
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y.square().sum(), leaves))
        memory = {w.untyped_storage().data_ptr() for w in weights if w is not None}
        assert memory == {leaf.untyped_storage().data_ptr() for leaf in leaves}


def test_only_what_has_another_dtype_is_copied():
    model = tiny_model("llama", layers=1)
    weights = ffn_weights(model, ff.find_ffns(model)[0])
    assert weights.to(torch.float32) is weights
    mixed = weights._replace(down=weights.down.double())
    narrow = mixed.to(torch.float32)
    assert narrow.up is weights.up and narrow.gate_bias is None
    assert narrow.down.dtype == torch.float32 and torch.equal(narrow.down, weights.down)
