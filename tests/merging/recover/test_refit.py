"""refit_: the least-squares solution, from the right tokens, and nothing else changed."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F

import ffmerge_fast as ff
from ffmerge_fast.models.projections import is_conv1d
from tests.helpers.tiny_models import ALL, logits, plant_copies_, tiny_inputs, tiny_model

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu": F.relu}
FAMILIES = ["gpt2", "llama", "phi3", "bert", "vit", "marian", "t5", "t5-gated", "sequential"]
RIDGE = 1e-2


def data_for(model, count=6, seed=0, **sizes):
    sizes = dict(batch=4, length=12, padded=True) | sizes
    return [tiny_inputs(model, seed=seed + i, **sizes) for i in range(count)]


def pair(name, layers="0-2", dtype=torch.float64, seed=0):
    """(merged model, teacher, batches)."""
    teacher = tiny_model(name, layers=4, seed=seed).to(dtype)
    model = ff.merge(teacher, ff.plan(layers=layers, method="average", model=teacher))
    return model, teacher, [in_dtype(batch, dtype) for batch in data_for(teacher)]


def in_dtype(batch, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def counted(model, batch, stack):
    """Mask of the tokens that must be counted; None: all."""
    if stack == "encoder" or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return batch.get("attention_mask")
    return batch["labels"] != -100


def recorded(model, batches, ffn, position=0):
    """Counted rows of (input of W_up, output of W_down, output of the block), by hooks of the test's own.

    `position`: of the layer among those that share its FFN, whose modules run once for each.
    """
    parts = [[], [], []]
    for batch in batches:
        mask = counted(model, batch, ffn.stack)
        for part, values in zip(parts, recorded_calls(model, batch, ffn), strict=True):
            value = values[position] if len(values) > 1 else values[0]
            value = value.reshape(-1, value.shape[-1])
            part.append(value if mask is None else value[mask.reshape(-1).bool()])
    return [torch.cat(part) for part in parts]


def recorded_calls(model, batch, ffn):
    up, down, out = [], [], []
    hooks = [
        model.get_submodule(ffn.up_path).register_forward_pre_hook(lambda _, a: up.append(a[0])),
        model.get_submodule(ffn.down_path).register_forward_hook(lambda _, a, y: down.append(y)),
        model.get_submodule(ffn.path).register_forward_hook(
            lambda _, a, y: out.append(y[0] if isinstance(y, tuple) else y)
        ),
    ]
    logits(model, batch)
    for hook in hooks:
        hook.remove()
    return up, down, out


@torch.no_grad()
def hidden(model, ffn, x):
    up, act = model.get_submodule(ffn.up_path)(x), ACTIVATIONS[ffn.activation]
    if ffn.fused:
        gate, up = up[..., : ffn.d_ff], up[..., ffn.d_ff :]
        return act(gate) * up
    return act(model.get_submodule(ffn.gate_path)(x)) * up if ffn.gate_path else act(up)


def weights_of(model, ffn):
    """(W_down [d_ff, d_model], b_down or None), copies in float64."""
    down = model.get_submodule(ffn.down_path)
    weight = down.weight.detach().double()
    return (weight if is_conv1d(down) else weight.T).clone(), None if down.bias is None else down.bias.detach().double()


def problem(model, teacher, batches, ffns, weights="stream"):
    """Weighted rows: h [n, d_ff], y [n, d_model] and the column of the intercept [n, 1], float64."""
    h, y, scale = [], [], []
    for ffn in ffns:
        x, output, out = recorded(teacher, batches, ffn)
        variance = {"stream": out, "output": output, "equal": torch.randn(9, 2)}[weights].double().var(0, correction=0)
        scale.append(1 / variance.mean() if weights != "equal" else torch.ones(()).double())
        h.append(hidden(model, ffn, x).double())
        y.append(output.double())
    mean = sum(scale) / len(scale)
    roots = [(s / mean).sqrt() for s in scale]
    ones = [torch.ones(len(a), 1, dtype=torch.float64) for a in h]
    return [torch.cat([r * part for r, part in zip(roots, parts, strict=True)]) for parts in (h, y, ones)]


def solution(h, y, one, weight, bias, ridge=RIDGE):
    """Dense float64 least squares with one more row per neuron for the ridge: (W, b)."""
    goal = y - h @ weight
    if bias is None:
        one = one[:, :0]
        centred = h
    else:
        goal = goal - one * bias
        centred = h - one * ((one * h).sum(0) / one.square().sum())
    shrink = (ridge * centred.square().sum(0).mean()).sqrt()
    a = torch.cat([torch.cat([h, one], 1), shrink * torch.eye(h.shape[1], h.shape[1] + one.shape[1]).double()])
    step = torch.linalg.lstsq(a, torch.cat([goal, torch.zeros(h.shape[1], y.shape[1]).double()])).solution
    d_ff = h.shape[1]
    return weight + step[:d_ff], None if bias is None else bias + step[d_ff]


def members(model, stack, layers):
    return [f for f in ff.find_ffns(model) if f.stack == stack and f.index in layers]


def missed(h, y, one, weight, bias):
    error = y - h @ weight - (0 if bias is None else one * bias)
    return error.square().sum().item()


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fit_is_the_dense_float64_least_squares_solution(name):
    model, teacher, batches = pair(name)
    before = copy.deepcopy(model)
    report = ff.refit_(model, teacher, batches, ridge=RIDGE)
    assert [(g.stack, g.layers) for g in report.groups] == [(s, (0, 1, 2)) for s in ALL[name].stacks]
    for group in report.groups:
        ffns = members(model, group.stack, group.layers)
        weight, bias = weights_of(before, ffns[0])
        rows = problem(before, teacher, batches, ffns)
        expected, expected_bias = solution(*rows, weight, bias)
        found, found_bias = weights_of(model, ffns[0])
        assert (found - weight).norm() > 0.1 * weight.norm()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert (found_bias is None) == (bias is None)
        if bias is not None:
            torch.testing.assert_close(found_bias, expected_bias, atol=1e-5, rtol=0)
        # what the report says, and that it never got worse
        h, y, one = rows
        mean = 0 if bias is None else (one * y).sum(0) / one.square().sum()
        total = (y - one * mean).square().sum().item()
        assert group.before == pytest.approx(missed(*rows, weight, bias) / total, rel=1e-4)
        assert group.after == pytest.approx(missed(*rows, found, found_bias) / total, rel=1e-4)
        assert group.after < group.before


@pytest.mark.parametrize("weights", ["output", "equal"])
def test_other_weights(weights):
    model, teacher, batches = pair("gpt2")
    before = copy.deepcopy(model)
    ff.refit_(model, teacher, batches, weights=weights)
    ffns = members(model, "decoder", (0, 1, 2))
    expected, _ = solution(*problem(before, teacher, batches, ffns, weights), *weights_of(before, ffns[0]))
    torch.testing.assert_close(weights_of(model, ffns[0])[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_narrow_models_are_solved_in_float64_and_rounded_once(dtype, atol):
    model, teacher, batches = pair("gpt2", dtype=dtype)
    before = copy.deepcopy(model)
    ff.refit_(model, teacher, batches)
    ffns = members(model, "decoder", (0, 1, 2))
    expected, _ = solution(*problem(before, teacher, batches, ffns), *weights_of(before, ffns[0]))
    found = weights_of(model, ffns[0])[0]
    assert model.get_submodule(ffns[0].down_path).weight.dtype == dtype
    torch.testing.assert_close(found, expected, atol=atol, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_no_ridge_makes_it_worse_on_the_calibration_data(ridge):
    model, teacher, batches = pair("vit")
    report = ff.refit_(model, teacher, batches, ridge=ridge)
    assert report.groups[0].after <= report.groups[0].before
    again = ff.refit_(model, teacher, batches, ridge=ridge)
    assert again.groups[0].before == pytest.approx(report.groups[0].after, rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "marian"])
def test_merged_copies_of_one_ffn_are_left_as_they_are(name):
    teacher = tiny_model(name).double()
    plant_copies_(teacher)
    batches = data_for(teacher)
    model = ff.merge(teacher, ff.plan(layers="0-3", method="weights", model=teacher))
    before = copy.deepcopy(model)
    report = ff.refit_(model, teacher, batches)
    assert all(g.before < 1e-5 for g in report.groups)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "marian", "t5-gated"])
def test_only_w_down_and_b_down_change_and_the_tie_stays(name):
    model, teacher, batches = pair(name, dtype=torch.float32)
    before, original = copy.deepcopy(model), copy.deepcopy(teacher)
    groups = ff.shared_groups(model)
    model.train()
    ff.refit_(model, teacher, batches, inputs="merged" if name == "gpt2" else "original")
    assert ff.shared_groups(model) == groups and model.training and not teacher.training
    downs = tuple(f.down_path for f in ff.find_ffns(model) if f.index < 3)
    for (path, a), b in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b) != path.startswith(downs), path
        assert a.requires_grad == b.requires_grad and a.grad is None
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), original.parameters(), strict=True))
    for m in (model, teacher):
        assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())


# ----------------------------------------------------------------------------------------------------------- the tokens


@pytest.mark.parametrize("name", ["gpt2", "marian"])
def test_the_split_into_batches_and_the_padding_do_not_matter(name):
    model, teacher, batches = pair(name)
    other, third = copy.deepcopy(model), copy.deepcopy(model)
    ff.refit_(model, teacher, iter(batches))
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(4)]
    ff.refit_(other, teacher, rows)
    trimmed = []
    for row in rows:
        row = dict(row)
        for key in ("input_ids", "attention_mask"):
            row[key] = row[key][:, : int(rows[len(trimmed)]["attention_mask"].sum())]
        row["labels"] = row["labels"][row["labels"] != -100][None]
        trimmed.append(row)
    ff.refit_(third, teacher, trimmed)
    for a, b, c in zip(model.parameters(), other.parameters(), third.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=0)


def test_the_token_budget_is_kept():
    model, teacher, batches = pair("gpt2")
    other = copy.deepcopy(model)
    tokens = int(batches[0]["attention_mask"].sum())
    ff.refit_(model, teacher, batches, max_tokens=tokens)
    ff.refit_(other, teacher, batches[:1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_weights_come_from_the_first_tokens_of_a_stream(monkeypatch):
    model, teacher, batches = pair("gpt2")
    other = copy.deepcopy(model)
    tokens = int(batches[0]["attention_mask"].sum()) + 3
    monkeypatch.setattr(sys.modules["ffmerge_fast.merging.recover.refit"], "_SCALE_TOKENS", tokens)
    ff.refit_(model, teacher, iter(batches))
    ff.refit_(other, teacher, [{k: v[i : i + 2] for k, v in b.items()} for b in batches for i in (0, 2)])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "marian"])
def test_groups_fitted_in_one_pass_are_as_fitted_alone(name):
    model, teacher, batches = pair(name, layers="0-1,2-3")
    ff.refit_(model, teacher, batches)
    for layers in ("0-1", "2-3"):
        alone = ff.merge(teacher, ff.plan(layers=layers, method="average", model=teacher))
        ff.refit_(alone, teacher, batches)
        for ffn in ff.find_ffns(alone):
            if str(ffn.index) in layers:
                for a, b in zip(weights_of(alone, ffn), weights_of(model, ffn), strict=True):
                    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


# ----------------------------------------------------------------------------------------------------------- the rounds


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert", "marian", "t5", "gpt_neox", "vit"])
def test_the_merged_stream_is_led_to_the_original_one(name):
    """With one merged pair, the fit on the merged stream is the dense solution for goals computed here."""
    model, teacher, batches = pair(name, layers="1-2")
    before = copy.deepcopy(model)
    ff.refit_(model, teacher, batches, inputs="merged", weights="equal")
    post_norm = name in ("bert", "marian")
    for stack in ALL[name].stacks:
        ffns = members(model, stack, (1, 2))
        h, y = [], []
        for ffn in ffns:
            x, output, out = recorded(teacher, batches, ffn)
            own = recorded(before, batches, ffn, ffns.index(ffn))
            goal, stream = (x + output, own[0]) if post_norm else (out, own[2] - own[1])
            h.append(hidden(before, ffn, own[0]).double())
            y.append((goal - stream).double())
        h, y = torch.cat(h), torch.cat(y)
        expected, _ = solution(h, y, torch.ones(len(h), 1).double(), *weights_of(before, ffns[0]))
        torch.testing.assert_close(weights_of(model, ffns[0])[0], expected, atol=2e-5, rtol=0)


def test_a_block_with_a_norm_inside_its_branch_has_no_merged_target():
    model, teacher, batches = pair("gemma2", dtype=torch.float32)
    ff.refit_(model, teacher, batches)
    with pytest.raises(ff.FFMergeError, match="neither adds its FFN's output") as error:
        ff.refit_(model, teacher, batches, rounds=1)
    assert "\n" not in str(error.value)


def test_rounds_keep_the_best_and_restore_it_exactly():
    _, teacher, batches = pair("gpt2")
    plan = ff.plan(layers="0-2", method="average", model=teacher)
    scores, kept = [5.0, 3.0, 2.0, 4.0, 6.0], []

    def evaluate(model):
        assert not model.training
        kept.append([p.detach().clone() for p in model.parameters()])
        return scores[len(kept) - 1]

    for higher, best in ((False, 2), (True, 4)):
        kept.clear()
        model = ff.merge(teacher, plan)
        report = ff.refit_(model, teacher, batches, rounds=3, evaluate=evaluate, higher_is_better=higher)
        assert report.scores == scores and report.best == best
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept[best], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(kept[2], kept[3], strict=True))
        assert "round 1" in str(report) and "(kept)" in str(report)


def test_a_refit_that_scores_worse_is_undone():
    model, teacher, batches = pair("gpt2")
    before = copy.deepcopy(model)
    scores = iter([1.0, float("nan")])
    with pytest.warns(UserWarning, match="refit: the score after 1 fits is nan"):
        assert ff.refit_(model, teacher, batches, evaluate=lambda m: next(scores)).best == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_rounds_are_judged_on_every_tenth_batch():
    model, teacher, _ = pair("gpt2")
    batches = data_for(teacher, count=11, padded=False, batch=3)
    taken = []
    report = ff.refit_(model, teacher, (taken.append(b) or b for b in batches * 9), rounds=2, max_tokens=360)
    assert len(taken) == 11  # no more than the budget needs: 10 batches fitted, 1 put aside
    assert len(report.scores) == 4 and report.scores[report.best] == min(report.scores)
    batch = batches[1]
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(report.scores[report.best], rel=1e-6)
    fitted = ff.merge(teacher, ff.plan(layers="0-2", method="average", model=teacher))
    others = [b for b in batches if b is not batch]
    first = ff.refit_(fitted, teacher, others, max_tokens=360, evaluate=lambda m: m(**batch).loss.item())
    assert first.scores == pytest.approx(report.scores[:2], rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_singular_system_says_what_to_do():
    model, teacher, batches = pair("gpt2", dtype=torch.float32)
    before = copy.deepcopy(model)
    with pytest.raises(
        ff.FFMergeError, match=r"decoder 0-2: the normal equations are singular .*raise ridge= .* or give more"
    ) as error:
        ff.refit_(model, teacher, batches[:1], ridge=0.0, max_tokens=5)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    ff.refit_(model, teacher, batches, ridge=0.0)


@pytest.mark.parametrize(
    "wanted, message",
    [
        (dict(ridge=-1.0), "ridge: got -1.0, wanted 0 or more"),
        (dict(ridge=float("nan")), "ridge: got nan"),
        (dict(ridge=float("inf")), "ridge: got inf"),
        (dict(inputs="both"), "inputs: got 'both', wanted 'original' or 'merged'"),
        (dict(weights="some"), "weights: got 'some', wanted 'stream', 'output' or 'equal'"),
        (dict(rounds=-1), "rounds: got -1"),
        (dict(max_tokens=1), "max_tokens: got 1"),
    ],
)
def test_bad_arguments_get_one_clear_line(wanted, message):
    model, teacher, batches = pair("gpt2")
    with pytest.raises(ff.FFMergeError, match=message):
        ff.refit_(model, teacher, batches, **wanted)


def test_models_that_do_not_fit_are_refused():
    model, teacher, batches = pair("gpt2")
    for arguments, message in [
        ((teacher, teacher, batches), "no merged FFNs; merge first"),
        ((model, model, batches), "teacher's FFNs are merged too"),
        ((model, tiny_model("gpt2", layers=3), batches), "teacher is another model: its FFN is nothing, where"),
        ((model, tiny_model("llama"), batches), "teacher is another model: its FFN is decoder.0"),
        ((model, teacher, []), "no calibration data"),
    ]:
        with pytest.raises(ff.FFMergeError, match=message) as error:
            ff.refit_(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ff.FFMergeError, match="got 1 batches, wanted at least 2"):
        ff.refit_(model, teacher, batches[:1], rounds=1)
    unlabelled = [{"input_ids": b["input_ids"]} for b in batches]
    with pytest.raises(ff.FFMergeError, match="no labels"):
        ff.refit_(model, teacher, unlabelled, rounds=1)


def test_features_that_are_not_finite_name_the_layer():
    model, teacher, batches = pair("gpt2")
    with torch.no_grad():
        teacher.get_submodule(ff.find_ffns(teacher)[2].down_path).bias[0] = float("nan")
    with pytest.raises(ff.FFMergeError, match=r"NaN"):
        ff.refit_(model, teacher, batches)


def test_tie_without_average_uses_the_anchors_ffn():
    for name, anchor, index in (("gpt2", "first", 1), ("marian", "last", 3), ("bert", "middle", 2)):
        teacher = tiny_model(name)
        original = copy.deepcopy(teacher)
        tied = ff.tie_without_average(teacher, "1-3", anchor=anchor)
        assert all(layers == (1, 2, 3) for _, layers in ff.shared_groups(tied)) and not ff.is_merged(teacher)
        for ffn in members(teacher, ALL[name].stacks[0], (index,)):
            for path in ffn.shared:
                pairs = zip(
                    tied.get_submodule(path).parameters(), original.get_submodule(path).parameters(), strict=True
                )
                assert all(torch.equal(a, b) for a, b in pairs)
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), original.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------------- real models


def real_task(shared, name):
    from ffmerge_fast.driver.tasks.load import load_task

    folder = str(shared / "models" / name)
    model = ff.from_pretrained(folder)
    if name == "vit-cifar10":
        images = str(shared / "data" / "cifar10.npz")
        return model, load_task(model, folder, train=images, test=images, metric="loss")
    text = (shared / "models" / name / "eval.txt").read_text()
    cut = len(text) // 2
    return model, load_task(model, folder, train=[text[:cut]], test=[text[cut:]], metric="loss")


@pytest.mark.real
@pytest.mark.parametrize("layers", ["4-7", "3-8", "0-11"])
@pytest.mark.parametrize("name, examples, batch", [("vit-cifar10", 200, 50), ("gpt2-pystdlib", 40, 10)])
def test_on_real_models_refit_is_not_worse_than_plain_averaging_on_held_out_data(shared, name, examples, batch, layers):
    teacher, task = real_task(shared, name)
    batches = list(task.batches("train", batch, limit=examples))
    model = ff.merge(teacher, ff.plan(layers=layers, method="average", model=teacher))
    averaged = task.score(model, "test", limit=examples)
    report = ff.refit_(model, teacher, batches, max_tokens=4000)
    assert task.score(model, "test", limit=examples) < averaged
    assert report.groups[0].after < 0.7 * report.groups[0].before


# ------------------------------------------------------------------------------------------------------- two processes


def _refit_on_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, teacher, batches = pair("gpt2")
    scores = iter([(0.0, 1.0), (3.0, 1.0)][rank])  # alone, the first rank would undo the refit
    report = ff.refit_(model, teacher, batches[:4] if rank == 0 else batches[4:], evaluate=lambda m: next(scores))
    torch.save((weights_of(model, ff.find_ffns(model)[0])[0], report.to_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_two_processes_fit_the_data_of_both(tmp_path):
    torch.multiprocessing.spawn(_refit_on_rank, (str(tmp_path),), nprocs=2)
    (a, first), (b, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(a, b) and first == second and (first["scores"], first["best"]) == ([1.5, 1.0], 1)
    model, teacher, batches = pair("gpt2")
    report = ff.refit_(model, teacher, batches)
    torch.testing.assert_close(a, weights_of(model, ff.find_ffns(model)[0])[0], atol=1e-5, rtol=0)
    assert first["groups"][0]["after"] == pytest.approx(report.groups[0].after, rel=1e-5)


def test_a_solution_beyond_float16_is_refused_and_nothing_moves():
    model, teacher, batches = pair("gpt2", dtype=torch.float16)
    with torch.no_grad():  # the FFNs' outputs are large, their hidden features small
        for m, scale in ((model, 1e-2), (teacher, 1e-2)):
            for block in m.transformer.h:
                block.mlp.c_fc.weight.mul_(scale)
                block.mlp.c_fc.bias.zero_()
        for block in teacher.transformer.h:
            block.mlp.c_proj.bias.fill_(1.0).add_(torch.arange(16) * 4000.0)
            block.mlp.c_proj.weight.copy_(torch.randn(32, 16).mul(6e4).clamp(-6e4, 6e4))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ff.FFMergeError, match="not finite|beyond torch.float16; load the model in float32|NaN, Inf"):
        ff.refit_(model, teacher, batches, ridge=1e-8)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
