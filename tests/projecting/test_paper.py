"""Paper B (arXiv 2506.22255): its layer written out from the formula in float64; its start, its end and its sizes.

A projected layer computes x W_Cᵀ with W_C = P_out · W · P_in + R; W is frozen, P_out [r_out, out], P_in [in, r_in] and
R [r_out, r_in] are trained. Llama is the paper's architecture: every matrix has P of its own, norms are gathered.
"""

import pytest
import torch
from torch.func import functional_call

import ffmerge_fast as ff
from tests.helpers.projecting import batches, projector, scores, train, weights
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model

SIDES = {  # what the (rows, columns) of a matrix [out, in] run over: the residual stream, neurons, or neither
    "embed_tokens": ("", "d"), "lm_head": ("", "d"), "q_proj": ("", "d"), "k_proj": ("", "d"), "v_proj": ("", "d"),
    "o_proj": ("d", ""), "gate_proj": ("f", "d"), "up_proj": ("f", "d"), "down_proj": ("d", "f"),
}  # fmt: skip
KEPT = {"d": 8, "f": 12}


def llama(**options):
    model = tiny_model("llama", layers=2).double()
    return projector(model=model, **options)


def selection(found, name, side):
    """S [kept, all] of one side of a matrix, from the importances."""
    layer = name.split("layers.")[-1][0]
    values = found.scores["d_model" if side == "d" else f"d_ff/decoder.{layer}"]
    return torch.eye(len(values), dtype=torch.float64)[values.topk(KEPT[side]).indices.sort().values]


def paper_parts(model, proj, optimizer):
    """{matrix: {"P_out": …, "P_in": …, "R": …}} as the paper has them, from the optimiser's state."""
    found, parts = scores(model), {}
    for name, parameter in proj.student.named_parameters():
        if parameter.ndim == 2:
            state, (rows, columns) = optimizer.state[parameter], SIDES[name.split(".")[-2]]
            of = parts[name] = {"R": state["residual"].clone()}
            if rows:
                of["P_out"] = selection(found, name, rows) + state["p_out"][0]
            if columns:
                of["P_in"] = (selection(found, name, columns) + state["p_in"][0]).T
    return parts


def paper_weights(model, parts):
    base = dict(model.named_parameters())
    eye = lambda n: torch.eye(n, dtype=torch.float64)  # noqa: E731
    return {
        name: of.get("P_out", eye(len(base[name]))) @ base[name] @ of.get("P_in", eye(base[name].shape[1])) + of["R"]
        for name, of in parts.items()
    }


def test_step_0_is_hard_pruning():  # acceptance fact 12
    """P is the 0/1 selection and R is zero: as products of whole matrices, bit for bit."""
    model, proj = llama()
    optimizer = proj.optimizer()
    pruned, inputs = ff.hard_prune(model, d_model=8, d_ff=12, importance=scores(model)), tiny_inputs(model)
    start = paper_weights(model, paper_parts(model, proj, optimizer))
    assert start.keys() == {name for name, p in pruned.named_parameters() if p.ndim == 2}
    for name, value in start.items():
        assert torch.equal(pruned.get_parameter(name), value), name
    assert torch.equal(logits(proj.student, inputs), logits(pruned, inputs))


def test_the_folded_model_is_the_projected_one():  # acceptance fact 13
    model, proj = llama()
    optimizer, inputs = proj.optimizer(lr=1e-2), tiny_inputs(model)
    train(proj.student, optimizer, batches(model, 4))
    projected = paper_weights(model, paper_parts(model, proj, optimizer))
    with torch.no_grad():
        wanted = functional_call(proj.student.eval(), projected, kwargs=inputs).logits
    folded = proj.fold()
    torch.testing.assert_close(logits(folded, inputs), wanted, rtol=1e-10, atol=1e-10)
    assert (logits(folded, inputs) - logits(ff.hard_prune(model, d_model=8, d_ff=12), inputs)).abs().max() > 0.1
    assert [tuple(p.shape) for p in folded.parameters()] == [tuple(p.shape) for p in proj.student.parameters()]


def test_gradients_are_autograds_of_the_formula():  # acceptance fact 14
    """Through the whole model, at P and R that have moved; with beta_1 = 0 a step leaves its gradient in exp_avg."""
    model, proj = llama()
    before = weights(model)
    optimizer = proj.optimizer(lr=1e-2, betas=(0.0, 0.999))
    data = batches(model, 4)
    train(proj.student, optimizer, data[:3])
    parts = paper_parts(model, proj, optimizer)
    for of in parts.values():
        for tensor in of.values():
            tensor.requires_grad_()
    functional_call(proj.student, paper_weights(model, parts), kwargs=data[3]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.ndim == 2)  # that of the formula: W is a leaf there
    model.zero_grad()
    train(proj.student, optimizer, data[3:])
    for name, of in parts.items():
        state = optimizer.state[proj.student.get_parameter(name)]
        close = lambda found, wanted, n=name: torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=n)  # noqa: E731
        close(state["residual_exp_avg"], of["R"].grad)
        if "P_out" in of:
            close(state["p_out_exp_avg"][0], of["P_out"].grad)
        if "P_in" in of:
            close(state["p_in_exp_avg"][0].T, of["P_in"].grad)
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_both_product_orders_agree():  # acceptance fact 14
    g = torch.Generator().manual_seed(0)
    for out, in_, r_out, r_in in ((30, 70, 9, 60), (70, 30, 60, 9)):  # either order is the cheaper one
        p_out, w, p_in, r = (
            torch.randn(shape, generator=g, dtype=torch.float64)
            for shape in ((r_out, out), (out, in_), (in_, r_in), (r_out, r_in))
        )
        found = ff.ops.project_weight(w, p_out, p_in, r)
        for wanted in ((p_out @ w) @ p_in + r, p_out @ (w @ p_in) + r):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_changes_nothing(accumulate):  # acceptance fact 15; once per step: test_optimizer
    model, proj = llama()
    _, other = projector(model=model)
    data = batches(model, 16, batch=1)
    whole = [
        {k: torch.cat([b[k] for b in data[i : i + accumulate]]) for k in data[0]} for i in range(0, 16, accumulate)
    ]
    train(proj.student, proj.optimizer(lr=1e-3), data, accumulate=accumulate)
    train(other.student, other.optimizer(lr=1e-3), whole)
    for name, value in weights(other.student).items():
        torch.testing.assert_close(weights(proj.student)[name], value, rtol=1e-8, atol=1e-10)


def paper_counts(d, f, d_small, f_small, layers, vocabulary, queries, keys):
    """(values of all P, of all R): a table of matrices with what each side is projected to."""
    ffn = [(f, d, f_small, d_small)] * 2 + [(d, f, d_small, f_small)]
    attention = [(queries, d, None, d_small)] + [(keys, d, None, d_small)] * 2 + [(d, queries, d_small, None)]
    matrices = (ffn + attention) * layers + [(vocabulary, d, None, d_small)] * 2
    projections = sum(out * (r_out or 0) + in_ * (r_in or 0) for out, in_, r_out, r_in in matrices)
    return projections, sum((r_out or out) * (r_in or in_) for out, in_, r_out, r_in in matrices)


def test_parameter_counts():  # acceptance fact 16
    """The rule gives the paper's models their sizes (Llama-3.2-1B to 10 and 50 %), and a projector follows the rule."""
    of_llama_1b = [(2048, 8192, d, f, 16, 128_256, 2048, 512) for d, f in ((448, 1728), (1344, 5376))]
    millions = [tuple(round(n / 1e6) for n in paper_counts(*sizes)) for sizes in of_llama_1b]
    assert millions == [(784, 189), (2428, 802)]
    for residual in (True, False):
        model, proj = llama(residual=residual)
        keys = model.model.layers[0].self_attn.k_proj.out_features
        projections, residuals = paper_counts(16, 32, 8, 12, 2, 64, 16, keys)
        counts = proj.parameters()
        assert counts["projections"] == projections and counts["residuals"] == residual * residuals
        norms = 5 * 8
        assert counts["plain"] == norms and counts["student"] == residuals + norms
        trained = sum(t.numel() for s in proj.optimizer().state.values() for k, t in s.items()
                      if k in ("p_out", "p_in", "residual"))  # fmt: skip
        assert trained == counts["projections"] + counts["residuals"]


def test_parameter_counts_of_gpt2():  # acceptance fact 16
    """Blocks of heads, biases whose b_C = P_out · b + r needs no P of its own, and tables that were tied."""
    model, proj = projector("gpt2", layers=1)
    d, r, f, k = 16, 8, 32, 12
    embeddings = 3 * r * d  # tokens, positions, head
    attention = (r * d + 3 * 8 * 8) + (8 * 8 + r * d)  # c_attn, c_proj; one head of 8, in blocks
    ffn = (r * d + k * f) + (k * f + r * d)
    counts = proj.parameters()
    assert counts["projections"] == embeddings + attention + ffn
    assert counts["plain"] == 6 * r and counts["residuals"] == counts["student"] - counts["plain"]
    assert ff.project(model, d_model=8, d_ff=12, residual=False).parameters()["residuals"] == 0
