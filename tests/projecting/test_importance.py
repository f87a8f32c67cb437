"""Scores against plain sums, and what saving, masking, splitting and resuming must not change."""

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.projecting import batches, layout
from tests.helpers.tiny_models import features_of, logits, tiny_inputs, tiny_model


def close(a, b):
    assert a.scores.keys() == b.scores.keys() and a.tokens == b.tokens
    for name in a.scores:
        torch.testing.assert_close(a.scores[name], b.scores[name], rtol=1e-6, atol=1e-9)


def recorded(model, modules, inputs, before):
    """What the named modules took (before) or gave, as rows of tokens."""
    seen, handles = {}, []
    for path in modules:
        module, keep = model.get_submodule(path), seen.setdefault(path, [])
        if before:
            handles.append(module.register_forward_pre_hook(lambda m, a, keep=keep: keep.append(a[0])))
        else:
            handles.append(module.register_forward_hook(lambda m, a, out, keep=keep: keep.append(out)))
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return {path: torch.cat([x.flatten(0, -2) for x in seen[path]]).double() for path in modules}


def test_activation_scores_are_sums_of_absolute_values():
    model, inputs = tiny_model("gpt2", layers=2), None
    inputs = tiny_inputs(model, batch=3)
    found = ff.importance(model, [inputs])
    norms = [f"transformer.h.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)]
    outputs = recorded(model, norms, inputs, before=False)
    torch.testing.assert_close(found.scores["d_model"], sum(x.abs().sum(0) for x in outputs.values()))
    taken = recorded(model, ["transformer.h.1.mlp.c_proj", "transformer.h.0.attn.c_proj"], inputs, before=True)
    expected = {name: x.abs().sum(0) for name, x in taken.items()}
    torch.testing.assert_close(found.scores["d_ff/decoder.1"], expected["transformer.h.1.mlp.c_proj"])
    torch.testing.assert_close(found.scores["attention/transformer.h.0.attn"], expected["transformer.h.0.attn.c_proj"])
    assert found.tokens == 24


def test_gated_ffns_by_product_or_by_up():
    model = tiny_model("llama", layers=2)
    inputs = tiny_inputs(model)
    with features_of(model) as features:
        logits(model, inputs)
    for name, seen in (("product", features.down), ("up", features.up)):
        found = ff.importance(model, [inputs], features=name).scores["d_ff/decoder.1"]
        torch.testing.assert_close(found, seen["decoder.1"][0].flatten(0, 1).double().abs().sum(0))
    assert not [name for name in ff.importance(model, [inputs]).scores if name.startswith("attention")]


def test_wanda_is_activation_norm_times_magnitude():
    model = tiny_model("opt", layers=1)
    data = batches(model, 2)
    wanda, magnitude = ff.importance(model, data, method="wanda"), ff.importance(model, method="magnitude")
    taken = [
        recorded(model, ["model.decoder.layers.0.fc2"], inputs, True)["model.decoder.layers.0.fc2"] for inputs in data
    ]
    norm = torch.cat(taken).norm(dim=0)
    torch.testing.assert_close(wanda.scores["d_ff/decoder.0"], norm * magnitude.scores["d_ff/decoder.0"])


def test_magnitude():
    model = tiny_model("llama", layers=1)
    found = ff.importance(model, method="magnitude").scores
    mlp = model.model.layers[0].mlp
    wanted = sum(w.double().norm(dim=1) for w in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T))
    torch.testing.assert_close(found["d_ff/decoder.0"], wanted.detach())
    norms = [p.double().norm(dim=1 if n.endswith(("down_proj.weight", "o_proj.weight")) else 0)
             for n, p in model.named_parameters() if p.ndim == 2]  # fmt: skip
    torch.testing.assert_close(found["d_model"], torch.stack(norms).mean(0).detach())


def test_magnitude_of_parts_stacked_inside_heads():
    model = tiny_model("gpt_neox", layers=1)
    attention = model.gpt_neox.layers[0].attention
    rows = attention.query_key_value.weight.detach().double().view(2, 3, 8, 16).norm(dim=3).sum(1).flatten()
    wanted = rows + attention.dense.weight.detach().double().norm(dim=0)
    found = ff.importance(model, method="magnitude").scores["attention/gpt_neox.layers.0.attention"]
    torch.testing.assert_close(found, wanted)


def test_random_is_random_and_seeded():
    model = tiny_model("gpt2")
    a, b, c = (ff.importance(model, method="random", seed=s).scores["d_model"] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a.argsort(), torch.arange(16))


@pytest.mark.parametrize("family", ["gpt2", "llama", "marian", "bert"])
def test_padding_does_not_count(family):
    model = tiny_model(family, layers=1)
    inputs = tiny_inputs(model, batch=3, padded=True)
    found = ff.importance(model, [inputs])
    other = dict(inputs)
    other["input_ids"] = torch.where(inputs["attention_mask"] == 0, 7, inputs["input_ids"])
    close(found, ff.importance(model, [other]))
    if family != "marian":
        assert found.tokens == int(inputs["attention_mask"].sum())


def test_batches_may_be_split_anywhere():
    model = tiny_model("vit", layers=2)
    inputs = tiny_inputs(model, batch=6)
    parts = [{k: v[s] for k, v in inputs.items()} for s in (slice(0, 1), slice(1, 6))]
    close(ff.importance(model, [inputs]), ff.importance(model, parts))


def test_save_and_load(tmp_path):
    model = tiny_model("marian", layers=1)
    found = ff.importance(model, batches(model, 2))
    found.save(tmp_path / "scores.safetensors")
    again = ff.Importance.load(tmp_path / "scores.safetensors")
    assert all(torch.equal(found.scores[n], again.scores[n]) for n in found.scores)
    assert {**vars(found), "scores": 0} == {**vars(again), "scores": 0}
    again.check(model)
    with pytest.raises(ff.FFMergeError, match="importance: is of another model"):
        again.check(tiny_model("marian", layers=1, seed=1))


def test_a_killed_run_goes_on(tmp_path):
    model = tiny_model("gpt2", layers=2)
    data, ran = batches(model, 4), []

    def killed():
        yield from data[:3]
        raise KeyboardInterrupt

    def counted():
        for inputs in data:
            ran.append(len(ran))
            yield inputs

    with pytest.raises(KeyboardInterrupt):
        ff.importance(model, killed(), cache_dir=tmp_path, save_seconds=0)
    hooked = []
    handle = model.register_forward_pre_hook(lambda m, a: hooked.append(1))
    found = ff.importance(model, counted(), cache_dir=tmp_path)
    handle.remove()
    assert len(hooked) == 1 and len(ran) == 4
    close(found, ff.importance(model, data))
    with pytest.raises(ff.FFMergeError, match="was made with other method: 'activation' there, 'wanda' now"):
        ff.importance(model, data, method="wanda", cache_dir=tmp_path)
    for other in (data[::-1], data[:2]):
        with pytest.raises(ff.FFMergeError, match="was made with other data"):
            ff.importance(model, other, cache_dir=tmp_path)
    close(ff.importance(model, data[:2], cache_dir=tmp_path, fresh=True), ff.importance(model, data[:2]))


def test_shared_ffns_are_scored_once():
    from tests.helpers.projecting import tied_layers

    merged = tied_layers(tiny_model("gpt2", layers=4))
    found = ff.importance(merged, batches(merged, 1))
    assert [n for n in found.scores if n.startswith("d_ff")] == [f"d_ff/decoder.{i}" for i in (0, 1, 3)]
    paths = ["transformer.h.1.mlp.c_proj"]
    taken = recorded(merged, paths, batches(merged, 1)[0], before=True)[paths[0]]  # the module runs in both layers
    torch.testing.assert_close(found.scores["d_ff/decoder.1"], taken.abs().sum(0))
    assert list(layout(merged).d_ff) == ["decoder.0", "decoder.1", "decoder.3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="mean"), "method: got 'mean', wanted one of activation"),
        (dict(features="gate"), "features: got 'gate'"),
        (dict(batches=None), "batches: got none"),
        (dict(batches=[]), "no calibration data"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ff.FFMergeError, match=message):
        ff.importance(tiny_model("gpt2", layers=1), **({"batches": []} | options))


def test_activations_that_are_not_finite():
    model = tiny_model("gpt2", layers=1)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, 3] = 3e38  # finite, but its products are not
    with pytest.raises(ff.FFMergeError, match="batch 0 gives activations of d_ff/decoder.0 that are not finite"):
        ff.importance(model, batches(model, 1))


def test_files_that_are_no_importances(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(ff.FFMergeError, match="is not a file"):
        ff.Importance.load(path)
    save_file({"d_model": torch.zeros(2)}, path)
    with pytest.raises(ff.FFMergeError, match="no file of importances"):
        ff.Importance.load(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ff.FFMergeError, match="is damaged"):
        ff.Importance.load(path)
