"""Paper A (arXiv 2501.06126), section 3, written out anew from its formulas and compared with the package."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import ffmerge_fast as ff
from tests.helpers.tiny_models import ALL, D_FF, features_of, logits, tiny_inputs, tiny_model

CASES = [("gpt2", "1-3"), ("gpt2", "0-4"), ("llama", "0-2"), ("marian", "1-3"), ("vit", "2-4"), ("olmo", "1-4")]


def paper_features(model, data):
    """{FFN key: float64 [n, d]}: outputs of W_in (gated: of up_proj) for unpadded inputs."""
    with features_of(model) as seen:
        for batch in data:
            logits(model, batch)
    return {key: torch.cat([x.reshape(-1, D_FF) for x in xs]).double().numpy() for key, xs in seen.up.items()}


def paper_correlation(x, y):
    """Eq. 1, by E[xy] - E[x]E[y] as in the authors' code."""
    covariance = x.T @ y / len(x) - np.outer(x.mean(0), y.mean(0))
    deviation = [np.sqrt((z**2).mean(0) - z.mean(0) ** 2) for z in (x, y)]
    return covariance / np.outer(*deviation)


def paper_permutation(correlation):
    """Eq. 2 and the authors' eye(d)[col_ind]: P [d, d] with P[j, col_ind[j]] = 1."""
    _, col_ind = linear_sum_assignment(correlation, maximize=True)
    return col_ind, np.eye(len(col_ind))[col_ind]


def numpy_weights(model, ffn):
    """(W_in, W_gate or None, b_in, W_out, b_out) in the paper's layout: W_in [d, d_model], W_out [d_model, d]."""

    def of(path):
        module = model.get_submodule(path)
        weight = module.weight.detach().double().numpy()
        bias = None if module.bias is None else module.bias.detach().double().numpy()
        return (weight.T if type(module).__name__ == "Conv1D" else weight), bias

    (w_in, b_in), (w_out, b_out) = of(ffn.up_path), of(ffn.down_path)
    return w_in, of(ffn.gate_path)[0] if ffn.gate_path else None, b_in, w_out, b_out


def paper_merge(model, members, permutations):
    """Eqs. 3 to 6 with dense permutation matrices."""
    total = None
    for ffn, p in zip(members, permutations, strict=True):
        w_in, gate, b_in, w_out, b_out = numpy_weights(model, ffn)
        aligned = [p @ w_in, None if gate is None else p @ gate, None if b_in is None else p @ b_in, w_out @ p.T, b_out]
        total = (
            aligned if total is None else [None if t is None else t + a for t, a in zip(total, aligned, strict=True)]
        )
    return [None if t is None else t / len(members) for t in total]


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_the_papers_own_formulas_give_the_same_model(name, layers):
    model = tiny_model(name, layers=5)
    data = [tiny_inputs(model, batch=16, length=9, seed=i) for i in range(4)]
    made = ff.plan(ff.collect(model, data, layers=layers, max_tokens=10**6), layers=layers)
    x, small = paper_features(model, data), ff.merge(model, made)
    first, last = map(int, layers.split("-"))
    for stack, group in zip(ALL[name].stacks, made.groups, strict=True):
        members = [f for f in ff.find_ffns(model) if f.stack == stack and first <= f.index <= last]
        permutations = [np.eye(D_FF)]
        for ffn in members[1:]:
            scores = paper_correlation(x[members[0].key], x[ffn.key])
            col_ind, p = paper_permutation(scores)
            assert group.permutations[ffn.index].tolist() == col_ind.tolist()
            assert group.scores[ffn.index][0] == pytest.approx(scores[np.arange(D_FF), col_ind].mean(), abs=1e-6)
            permutations.append(p)
        expected = paper_merge(model, members, permutations)
        for ffn in members:  # all layers point at the one averaged set, b_out included
            for got, truth in zip(numpy_weights(small, ffn), expected, strict=True):
                assert (got is None) == (truth is None)
                assert got is None or np.abs(got - truth).max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gather_is_the_product_with_the_permutation_matrix_bit_for_bit(dtype):  # acceptance fact 1
    """Two layers, the second one's weights 0: the average is half the permuted first one, exactly."""
    model = tiny_model("llama", layers=2).to(dtype)
    stats = ff.collect(model.float(), [tiny_inputs(model, batch=16, length=9)], window=2)
    made = ff.plan(stats, "0-1", anchor="last")
    model.to(dtype)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in zeroed.model.layers[1].mlp.parameters():
            parameter.zero_()
    made.model = type(made.model).of(zeroed)
    merged = ff.merge(zeroed, made).model.layers[0].mlp
    p = torch.eye(D_FF, dtype=dtype)[made.groups[0].permutations[0]]
    assert not torch.equal(p, torch.eye(D_FF, dtype=dtype))
    original = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj"):
        assert torch.equal(2 * getattr(merged, name).weight, p @ getattr(original, name).weight)
    assert torch.equal(2 * merged.down_proj.weight, original.down_proj.weight @ p.T)


def test_the_vanilla_baseline_is_the_plain_average():
    model = tiny_model("gpt2", layers=4)
    small = ff.merge(model, ff.plan(model=model, layers="1-3", method="average"))
    for ffn in ff.find_ffns(model)[1:]:
        members = ff.find_ffns(model)[1:]
        expected = paper_merge(model, members, [np.eye(D_FF)] * 3)
        for got, truth in zip(numpy_weights(small, ffn), expected, strict=True):
            assert got is None or np.abs(got - truth).max() <= 1e-7
