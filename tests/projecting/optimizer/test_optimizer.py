"""The optimiser against autograd through P and torch's AdamW, and what every training loop asks of an optimiser."""

import copy

import pytest
import torch
from torch.func import functional_call

import ffmerge_fast as ff
from ffmerge_fast.ops.projection import chain
from ffmerge_fast.projecting.optimizer import optimizer as optimizers
from tests.helpers.projecting import batches, equal, projector, tied_layers, train, weights
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model
from tests.projecting.test_matrices import dense

# Biases of keys have gradients of exactly zero, so rounding noise; a larger eps keeps AdamW from blowing it up.
EPS = 1e-5


class Naive:
    """Paper B as written: W_C computed from P and R inside the autograd graph, torch.optim.AdamW on P and R."""

    def __init__(self, proj, lr, weight_decay=0.0, on_projections=0.0, max_grad_norm=None):
        self.student, self.units, self.max_grad_norm = copy.deepcopy(proj.student), proj.units, max_grad_norm
        self.matrices = [m for unit in proj.units for m in unit.matrices]
        self.deltas = {p: torch.zeros(p.shape, requires_grad=True) for unit in proj.units for p in unit.projections}
        self.residuals = {m: torch.zeros_like(m.parameter, requires_grad=True) for m in self.matrices if proj.residual}
        plain = [p for n, p in self.student.named_parameters() if n in proj.plain]
        big = [r for r in self.residuals.values() if r.ndim > 1] + [p for p in plain if p.ndim > 1]
        small = [r for r in self.residuals.values() if r.ndim == 1] + [p for p in plain if p.ndim == 1]
        groups = [(big, weight_decay), (list(self.deltas.values()), on_projections), (small, 0.0)]
        self.optimizer = torch.optim.AdamW(
            [{"params": of, "weight_decay": decay} for of, decay in groups if of], lr=lr, eps=EPS, foreach=False
        )

    def weights(self):
        values = {}
        for m in self.matrices:
            value = m.as_matrix(m.weight)
            if m.rows is not None:
                value = dense(m.rows, self.deltas[m.rows], len(value)) @ value
            if m.columns is not None:
                value = value @ dense(m.columns, self.deltas[m.columns], value.shape[1]).T
            if m in self.residuals:
                value = value + m.as_matrix(self.residuals[m])
            values[m.name] = _stored(value, m)
        return values

    def step(self, data):
        self.optimizer.zero_grad()
        for inputs in data:  # projected once per micro-batch
            loss = functional_call(self.student, self.weights(), kwargs=inputs).loss / len(data)
            loss.backward()
        if self.max_grad_norm:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
        self.optimizer.step()


def _stored(value, m):
    """[out, in] in the layout of the parameter."""
    probe = m.as_matrix(torch.arange(m.parameter.numel()).view(m.parameter.shape)).reshape(-1)
    flat = torch.zeros(m.parameter.numel(), dtype=value.dtype).index_copy(0, probe, value.reshape(-1))
    return flat.view(m.parameter.shape)


CASES = {
    "gpt2": ("gpt2", {}, {}),
    "narrower heads": ("gpt2", dict(attention="head_dim"), {}),
    "no residual": ("llama", dict(residual=False), {}),
    "qkv": ("qwen2", dict(share="qkv"), {}),
    "one residual stream": ("bert", dict(share="residual_stream"), {}),
    "tied embeddings": ("gpt2", dict(untie_embeddings=False), {}),
    "images": ("vit", {}, {}),
    "two stacks": ("marian", {}, {}),
    "fused gate": ("phi3", {}, {}),
    "decay": ("llama", {}, dict(weight_decay=0.1, weight_decay_on_projections=0.05)),
    "clipped": ("gpt2", {}, dict(max_grad_norm=0.05)),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_against_naive_autograd(case):
    family, options, settings = CASES[case]
    model, proj = projector(family, layers=1, **options)
    renamed = {k.removeprefix("weight_decay_"): v for k, v in settings.items()}
    naive = Naive(proj, lr=1e-3, **renamed)
    optimizer = proj.optimizer(lr=1e-3, eps=EPS, **settings)
    start = weights(proj.student)
    for inputs in batches(model, 20):
        naive.step([inputs])
        train(proj.student, optimizer, [inputs])
    wanted = weights(naive.student) | {n: w.detach() for n, w in naive.weights().items()}
    found = weights(proj.student)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert max((found[n] - start[n]).abs().max() for n in found) > 1e-3


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_accumulation(max_grad_norm):
    """Acceptance fact 15: micro-batches are one batch, and the matrices are projected once per step."""
    model, proj = projector("llama", layers=1)
    _, other = projector(model=model)
    data = batches(model, 8, batch=1)
    whole = [{k: torch.cat([b[k] for b in data[i : i + 4]]) for k in data[0]} for i in (0, 4)]
    optimizer = proj.optimizer(lr=1e-3, max_grad_norm=max_grad_norm)
    projected = []
    original = optimizer._project_
    optimizer._project_ = lambda units: (projected.extend(units), original(units))
    train(proj.student, optimizer, data, accumulate=4)
    train(other.student, other.optimizer(lr=1e-3, max_grad_norm=max_grad_norm), whole)
    assert len([unit for unit in projected if unit.matrices]) == 2 * len(proj.units)
    for name, value in weights(other.student).items():
        torch.testing.assert_close(weights(proj.student)[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [None, "residual_stream"])
def test_resume_is_bit_exact(tmp_path, dtype, share):
    model = tiny_model("gpt2", layers=1).to(dtype)
    _, proj = projector(model=model, share=share)
    data = batches(model, 6)
    optimizer = proj.optimizer(lr=1e-3, max_grad_norm=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)

    def steps(proj, optimizer, schedule, some):
        for inputs in some:
            train(proj.student, optimizer, [inputs])
            schedule.step()

    steps(proj, optimizer, schedule, data[:3])
    middle = weights(proj.student)
    plain = {name: middle[name] for name in proj.plain}
    parts = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "plain": plain}
    torch.save(parts, tmp_path / "state.pt")
    steps(proj, optimizer, schedule, data[3:])
    _, again = projector(model=model, share=share)  # a new process
    optimizer = again.optimizer(lr=7.0, max_grad_norm=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    again.student.load_state_dict(saved["plain"], strict=False)
    assert equal(weights(again.student), middle)  # the rest follows from P and R
    steps(again, optimizer, schedule, data[3:])
    assert equal(weights(again.student), weights(proj.student))


@pytest.mark.parametrize("family, options", [("llama", {}), ("gpt2", dict(share="qkv")), ("bert", {})])
@pytest.mark.parametrize("settings", [{}, dict(offload_base="disk", max_grad_norm=0.05)])
def test_matrices_at_once_are_as_one_at_a_time(family, options, settings, monkeypatch):
    """What a GPU gets in one launch; the CPU's products of a list are those of its members."""
    found, calls = [], []
    real = chain.project_
    monkeypatch.setattr(
        chain, "project_", lambda problems, *rest: (calls.append(len(problems)), real(problems, *rest))[1]
    )
    for most in (0, 2000):
        monkeypatch.setitem(optimizers._AT_ONCE, "cpu", most)
        model, proj = projector(family, **options)
        calls.clear()
        train(proj.student, proj.optimizer(lr=1e-2, **settings), batches(model, 3))
        found.append(weights(proj.student))
        assert max(calls) == 1 if most == 0 else max(calls) >= 4
    assert equal(*found)


def test_loading_copies():
    model, proj = projector("gpt2", layers=1)
    optimizer = proj.optimizer(lr=1e-2)
    saved = copy.deepcopy(optimizer.state_dict())
    state = optimizer.state_dict()
    other = projector(model=model)[1]
    loaded = other.optimizer(lr=1e-2)
    loaded.load_state_dict(state)
    train(other.student, loaded, batches(model, 2))
    for index, entries in saved["state"].items():
        assert all(torch.equal(value, state["state"][index][name]) for name, value in entries.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(d_ff=16), "projector.d_ff was {'decoder': 12} and is {'decoder': 16} now"),
        (dict(residual=False), "projector.residual was True and is False now"),
        (dict(share="qkv"), "projector.share was None and is 'qkv' now"),
        (dict(model=None, seed=1), "projector.base was 'gpt2 .*' and is 'gpt2 .*' now"),
    ],
)
def test_resume_with_changed_settings(changed, message):
    model, proj = projector("gpt2", layers=1)
    state = proj.optimizer().state_dict()
    if "seed" in changed:
        changed = dict(model=tiny_model("gpt2", layers=1, seed=1))
    other = projector(**(dict(model=model) | changed))[1]
    with pytest.raises(ff.FFMergeError, match=message):
        other.optimizer().load_state_dict(state)
    with pytest.raises(ff.FFMergeError, match="no state of a projection optimizer"):
        other.optimizer().load_state_dict(torch.optim.AdamW(other.student.parameters()).state_dict())


def test_a_gradient_that_is_not_finite_changes_nothing():
    model, proj = projector("gpt2", layers=1)
    optimizer = proj.optimizer(lr=1e-2)
    train(proj.student, optimizer, batches(model, 1))
    before, state = weights(proj.student), copy.deepcopy(optimizer.state_dict())
    proj.student(**tiny_inputs(model)).loss.backward()
    proj.student.transformer.h[0].mlp.c_fc.weight.grad[0, 0] = torch.nan
    with pytest.raises(ff.FFMergeError, match="gradient of transformer.h.0.mlp.c_fc.weight is not finite"):
        optimizer.step()
    assert equal(weights(proj.student), before)
    for index, entries in state["state"].items():
        assert all(torch.equal(v, optimizer.state_dict()["state"][index][k]) for k, v in entries.items())


def test_parameters_without_gradients_stay():
    model, proj = projector("llama", layers=1)
    optimizer = proj.optimizer(lr=1e-2, weight_decay=0.1)
    proj.student.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = weights(proj.student)
    train(proj.student, optimizer, batches(model, 2))
    same = [n for n, w in weights(proj.student).items() if torch.equal(w, before[n])]
    assert same == ["model.layers.0.mlp.up_proj.weight"]


def test_grad_scaler_skips_and_scales():
    model, proj = projector("gpt2", layers=1)
    _, other = projector(model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, plain = proj.optimizer(lr=1e-3), other.optimizer(lr=1e-3)
    for inputs in batches(model, 3):
        scaled.zero_grad()
        scaler.scale(proj.student(**inputs).loss).backward()
        scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        train(other.student, plain, [inputs])
    for name, value in weights(other.student).items():
        torch.testing.assert_close(weights(proj.student)[name], value, atol=1e-6, rtol=1e-4)
    before = weights(proj.student)
    scaler.scale(proj.student(**tiny_inputs(model)).loss * torch.inf).backward()
    scaler.step(scaled)
    scaler.update()
    assert equal(weights(proj.student), before) and scaler.get_scale() == 2.0**9


def test_a_closure_and_gradient_checkpointing():
    model, proj = projector("llama", layers=2)
    _, other = projector(model=model)
    proj.student.gradient_checkpointing_enable()
    inputs, a, b = tiny_inputs(model), proj.optimizer(lr=1e-2), other.optimizer(lr=1e-2)

    def closure():
        loss = proj.student.train()(**inputs).loss
        loss.backward()
        return loss

    loss = a.step(closure)
    assert loss.item() == pytest.approx(train(other.student.train(), b, [inputs])[0])
    for name, value in weights(other.student).items():
        torch.testing.assert_close(weights(proj.student)[name], value)


def test_the_base_is_only_read():
    model = tied_layers(tiny_model("gpt2", layers=4))
    before = weights(model)
    _, proj = projector(model=model)
    train(proj.student, proj.optimizer(lr=1e-1), batches(model, 3))
    assert equal(weights(model), before) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lr=-1.0), "lr: got -1.0"),
        (dict(betas=(0.9, 1.0)), r"betas: got \(0.9, 1.0\)"),
        (dict(max_grad_norm=0.0), "max_grad_norm: got 0.0"),
        (dict(weight_decay_on_projections=float("nan")), "weight_decay_on_projections: got nan"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ff.FFMergeError, match=message):
        projector("llama", layers=1)[1].optimizer(**settings)


def test_generate_between_steps():
    model, proj = projector("gpt2", layers=1)
    optimizer = proj.optimizer(lr=1e-1)
    ids = tiny_inputs(model)["input_ids"][:1]
    before = logits(proj.student, {"input_ids": ids})
    train(proj.student, optimizer, batches(model, 3))
    assert not torch.equal(logits(proj.student, {"input_ids": ids}), before)
    assert proj.student.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
