"""What the tests of projected compression share."""

import torch

import ffmerge_fast as ff
from ffmerge_fast.projecting.axes import ModelAxes
from tests.helpers.tiny_models import tiny_inputs, tiny_model

FAMILIES = (
    "gpt2 opt gpt_neox llama mistral qwen2 qwen3 olmo olmo2 gemma2 phi3 bert roberta vit deit marian bart t5 t5-gated"
).split()


def scores(model, seed=0):
    """Random importances, so that what is kept is not a prefix."""
    return ff.importance(model, method="random", seed=seed)


def projector(name="gpt2", layers=2, d_model=8, d_ff=12, model=None, **options):
    """(base model, its projector)."""
    model = tiny_model(name, layers=layers) if model is None else model
    return model, ff.project(model, d_model=d_model, d_ff=d_ff, importance=scores(model), **options)


def batches(model, count, batch=2):
    return [tiny_inputs(model, batch=batch, seed=seed) for seed in range(count)]


def train(student, optimizer, data, accumulate=1):
    """Plain steps, `accumulate` batches each; returns the losses."""
    losses = []
    for i in range(0, len(data), accumulate):
        optimizer.zero_grad()
        for inputs in data[i : i + accumulate]:
            loss = student(**inputs).loss / accumulate
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def tied_layers(model, layers=((1, 2),)):
    """The same model with FFNs of these layers merged."""
    text = ",".join("+".join(map(str, group)) for group in layers)
    stats = ff.collect(model, [tiny_inputs(model, batch=8)], layers=text)
    return ff.merge(model, ff.plan(stats, layers=text))


def layout(model):
    return ModelAxes.of(model)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
