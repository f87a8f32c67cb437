"""The student: sizes, the kept dimensions, equality with hard pruning, merged models, bad input."""

import copy

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.projecting import FAMILIES, batches, equal, layout, projector, scores, tied_layers, train, weights
from tests.helpers.tiny_models import ENCODER_DECODER, logits, tiny_inputs, tiny_model
from tests.projecting.test_axes import codes


def depth(family):
    """Two layers, of which each keeps its own neurons; or two stacks of one."""
    return 1 if family in ENCODER_DECODER else 2


def best(values, count):
    return values.topk(count).indices.sort().values


def channels(of_output, attention):
    """Kept positions among the [heads * head_dim] channels of two heads of 8, when half of them go."""
    if attention == "heads":
        head = int(of_output.view(2, 8).sum(1).argmax())
        return torch.arange(8 * head, 8 * head + 8)
    return torch.cat([best(of_output[:8], 4), 8 + best(of_output[8:], 4)])


def sliced_by_hand(family, model, found, name, parameter, attention):
    """A parameter of the pruned model by the table of test_layout: d_model 16 -> 8, d_ff 32 -> 12."""
    for dim, code in enumerate(codes(family, name, parameter.ndim)):
        if code == "-":
            continue
        if code == "hhh":  # the rows of a head are its query's, key's and value's
            path = name.partition(".query_key_value")[0]
            head = int(found.scores[f"attention/{path}"].view(2, 8).sum(1).argmax())
            parameter = parameter.index_select(dim, torch.arange(24) + 24 * head)
            continue
        if code[0] == "d":
            index = best(found.scores["d_model"], 8)
        elif code[0] == "f":
            key = next(f.key for f in ff.find_ffns(model) if name.startswith(f.path + "."))
            index = best(found.scores[f"d_ff/{key}"], 12)
        else:
            path = next(p for p in layout(model).attention if name.startswith(p + "."))
            index = channels(found.scores[f"attention/{path}"], attention)
        width = {"d": 16, "f": 32, "a": 16}[code[0]]
        index = torch.cat([index + part * width for part in range(len(code))])
        parameter = parameter.index_select(dim, index)
    return parameter


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_starts_as_the_hard_pruned_model(family):
    """Acceptance fact 12, and that pruning is what the indices say."""
    model, proj = projector(family, layers=depth(family))
    before, found = weights(model), scores(model)
    pruned = ff.hard_prune(model, d_model=8, d_ff=12, importance=found)
    inputs = tiny_inputs(model)
    assert torch.equal(logits(proj.student, inputs), logits(pruned, inputs))
    assert equal(weights(proj.student), weights(pruned)) and equal(weights(model), before)
    assert type(pruned) is type(model)
    base = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in pruned.named_parameters():
        if parameter.requires_grad:
            wanted = sliced_by_hand(family, model, found, name, base[name].detach(), "heads")
            assert torch.equal(parameter, wanted), name


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "opt", "marian"])
def test_narrower_heads(family):
    model, proj = projector(family, layers=depth(family), attention="head_dim")
    found = scores(model)
    base = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in proj.student.named_parameters():
        if parameter.requires_grad:
            wanted = sliced_by_hand(family, model, found, name, base[name].detach(), "head_dim")
            assert torch.equal(parameter, wanted), name
    assert proj.student.config.num_attention_heads == 2
    train(proj.student, proj.optimizer(lr=1e-3), batches(model, 2))
    assert logits(proj.student, tiny_inputs(model)).isfinite().all()


@pytest.mark.parametrize("family", [*FAMILIES, "whisper"])
def test_dropping_neurons_is_silencing_them(family):
    """Independent of all slicing: a base whose dropped neurons have no outgoing weights computes the same."""
    model = tiny_model(family, layers=depth(family))
    proj = ff.project(model, d_ff=12, importance=scores(model))
    for ffn in ff.find_ffns(model):
        down = model.get_submodule(ffn.down_path)
        weight = down.weight.detach().T if type(down).__name__ == "Conv1D" else down.weight.detach()
        keep = best(scores(model).scores[f"d_ff/{ffn.key}"], 12)
        weight[:, [i for i in range(32) if i not in keep]] = 0
    inputs = tiny_inputs(model)
    torch.testing.assert_close(logits(proj.student, inputs), logits(model, inputs), atol=1e-5, rtol=1e-5)
    only_ffn = {m.name for unit in proj.units for m in unit.matrices}
    assert all(any(n.startswith(f.path + ".") for f in ff.find_ffns(model)) for n in only_ffn)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_trained_and_the_loss_falls(family):
    model, proj = projector(family, layers=1)
    before = weights(proj.student)
    losses = train(proj.student, proj.optimizer(lr=1e-2), batches(model, 1) * 6)
    assert losses[-1] < losses[0]
    after, unused = weights(proj.student), ("lm_head.bias", "predictions.bias")  # BERT uses its decoder's bias
    constants = {n for n, p in proj.student.named_parameters() if not p.requires_grad}
    for name in before:
        untouched = name in constants or name.endswith(unused) or "key.bias" in name or "k_proj.bias" in name
        assert untouched or not torch.equal(before[name], after[name]), name


def test_shared_projections_are_fewer():
    model, alone = projector("llama", layers=2)
    qkv, stream = (projector(model=model, share=share)[1] for share in ("qkv", "residual_stream"))
    counts = [p.parameters()["projections"] for p in (alone, qkv, stream)]
    assert counts[0] - counts[1] == 2 * 2 * 8 * 16 and counts[2] == 8 * 16 + 2 * 3 * 12 * 32
    assert [len(p.units) for p in (alone, qkv, stream)] == [2 + 2 * 7, 2 + 2 * 5, 1]


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_keep_is_a_share_of_the_parameters(keep):
    model = tiny_model("llama", layers=2)
    proj = ff.project(model, keep=keep)
    share = proj.parameters()["student"] / sum(p.numel() for p in model.parameters())
    assert abs(share - keep) < 0.08  # of a model as narrow as this few widths hold
    ratio = proj.student.config.hidden_size / 16
    assert abs(proj.student.config.intermediate_size / 32 - ratio) < 0.05


def test_widths_that_are_not_given_stay():
    model = tiny_model("gpt2", layers=1)
    model.config.n_inner = None  # GPT-2's way to say 4 * n_embd
    wide = type(model)(model.config).eval()
    config = ff.project(wide, d_model=8).student.config
    assert (config.n_embd, config.n_inner, config.n_head) == (8, 64, 1)
    marian = tiny_model("marian", layers=1)
    config = ff.project(marian, d_ff={"encoder": 8}).student.config
    assert (config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim) == (16, 8, 32)


def test_embeddings_are_untied_where_two_are_tied():
    gpt2, marian = tiny_model("gpt2", layers=1), tiny_model("marian", layers=1)
    untied, tied = ff.project(gpt2, d_model=8), ff.project(gpt2, d_model=8, untie_embeddings=False)
    assert untied.student.config.tie_word_embeddings is False and tied.student.config.tie_word_embeddings
    assert untied.student.lm_head.weight is not untied.student.transformer.wte.weight
    train(untied.student, untied.optimizer(1e-2), batches(gpt2, 2))
    train(tied.student, tied.optimizer(1e-2), batches(gpt2, 2))
    assert not torch.equal(untied.student.lm_head.weight, untied.student.transformer.wte.weight)
    assert tied.student.lm_head.weight is tied.student.transformer.wte.weight
    proj = ff.project(marian, d_model=8)
    assert proj.student.lm_head.weight is proj.student.model.encoder.embed_tokens.weight
    assert ff.project(gpt2, d_ff=8).student.config.tie_word_embeddings
    with pytest.raises(ff.FFMergeError, match="untie_embeddings: MarianMTModel ties 4 tables"):
        ff.project(marian, d_model=8, untie_embeddings=True)


def test_frozen_and_half_precision_bases():
    model = tiny_model("llama", layers=1).requires_grad_(False).bfloat16()
    proj = ff.project(model, d_model=8, d_ff=12)
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in proj.student.parameters())
    optimizer = proj.optimizer(lr=1e-2)
    dtypes = {k: v.dtype for p in optimizer.state for k, v in optimizer.state[p].items()}
    assert set(dtypes.values()) == {torch.float32} and "master" in dtypes
    losses = train(proj.student, optimizer, batches(model, 1) * 5)
    assert losses[-1] < losses[0] and all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit", "bert", "marian"])
def test_a_merged_model_stays_merged(family):
    """A x B: a shared FFN is one W with one P, and the folded model is merged and smaller."""
    merged = tied_layers(tiny_model(family, layers=4))
    proj = ff.project(merged, d_model=8, d_ff=12)
    assert ff.shared_groups(proj.student) == ff.shared_groups(merged) and type(proj.student) is type(merged)
    matrices = {m.name for unit in proj.units for m in unit.matrices}
    for first, second in ((f, s) for f in ff.find_ffns(merged) for s in ff.find_ffns(merged)
                          if f.stack == s.stack and (f.index, s.index) == (1, 2)):  # fmt: skip
        assert f"{first.up_path}.weight" in matrices and f"{first.down_path}.weight" in matrices
        assert not any(name.startswith((f"{second.path}.mlp", second.up_path, second.down_path)) for name in matrices)
    alone = ff.project(tiny_model(family, layers=4), d_model=8, d_ff=12)
    assert proj.parameters()["student"] < alone.parameters()["student"]
    losses = train(proj.student, proj.optimizer(lr=1e-2), batches(merged, 1) * 4)
    assert losses[-1] < losses[0] and ff.is_merged(proj.student)


def test_a_merged_model_trains_like_the_formula():
    """The gradient of a shared FFN's projections is the sum over its layers."""
    merged = tied_layers(tiny_model("gpt2", layers=4))
    expanded = ff.expand_(copy.deepcopy(merged))
    of_layers, of_groups = scores(expanded), scores(merged)
    of_layers.scores["d_ff/decoder.2"] = of_layers.scores["d_ff/decoder.1"]
    of_groups.scores = {name: of_layers.scores[name] for name in of_groups.scores}
    found = {}
    for model, chosen in ((merged, of_groups), (expanded, of_layers)):
        proj = ff.project(model, d_ff=12, importance=chosen)
        proj.student(**tiny_inputs(merged)).loss.backward()
        optimizer = proj.optimizer()
        gradients = {name: p.grad for name, p in proj.student.named_parameters()}
        found[model] = optimizer._gradients(proj.units, gradients)
    for entry in ("p_out", "residual"):
        first, second = ((f"transformer.h.{i}.mlp.c_fc.weight", entry) for i in (1, 2))
        torch.testing.assert_close(found[merged][first], found[expanded][first] + found[expanded][second])
        assert second not in found[merged]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", dict(), "give either keep="),
        ("gpt2", dict(keep=0.5, d_model=8), "give either keep="),
        ("gpt2", dict(keep=1.5), "keep: got 1.5, wanted a share"),
        ("gpt2", dict(keep=1e-9), "keep: got 1e-09, wanted at least 0."),
        ("gpt2", dict(d_model=24), "d_model: got 24, wanted an integer from 1 to the base model's 16"),
        ("llama", dict(d_ff=0), r"d_ff \(decoder\): got 0"),
        ("gpt2", dict(d_model=12), "d_model: got 12, wanted a multiple of 8 .whole heads of 8."),
        ("bert", dict(d_model=7, attention="head_dim"), "d_model: got 7, wanted a multiple of 2"),
        ("gpt2", dict(d_model=8, attention="both"), "attention: got 'both'"),
        ("gpt2", dict(d_model=8, share="all"), "share: got 'all'"),
        ("llama", dict(d_model=16), "nothing gets smaller"),
        ("llama", dict(d_ff={"decoder.0": 8}), "d_ff: got a width for decoder.0; a config of transformers has one"),
        ("whisper", dict(d_model=8), "conv2.weight follows d_model on two axes of 3: not supported; give d_ff= alone"),
        ("gpt_neox", dict(d_model=8, attention="head_dim"), "would change the rotary positions' frequencies"),
    ],
)
def test_bad_input(family, options, message):
    with pytest.raises(ff.FFMergeError, match=message) as error:
        ff.project(tiny_model(family, layers=1), **options)
    assert "\n" not in str(error.value)


def test_importance_of_another_model():
    with pytest.raises(ff.FFMergeError, match="importance: is of another model"):
        ff.project(tiny_model("gpt2"), keep=0.5, importance=scores(tiny_model("gpt2", seed=1)))


def test_ffns_tied_by_hand():
    model = tiny_model("gpt2")
    model.transformer.h[2].mlp = model.transformer.h[1].mlp
    with pytest.raises(ff.FFMergeError, match="share FFNs, which its config does not say"):
        ff.project(model, keep=0.5)


def test_a_merged_model_of_another_version():
    merged = tied_layers(tiny_model("gpt2", layers=4))
    merged.config.ffmerge["version"] = 99
    with pytest.raises(ff.FFMergeError, match="merged by another version"):
        ff.project(merged, keep=0.5)


def test_a_student_whose_config_was_edited():
    _, proj = projector("gpt2")
    proj.student.config.n_embd = 16
    for use in (proj.optimizer, proj.fold):
        with pytest.raises(ff.FFMergeError, match=r"student: its config was edited \(n_embd\)"):
            use()


def test_a_student_whose_modules_were_wrapped():
    _, proj = projector("gpt2")
    mlp = proj.student.transformer.h[0].mlp
    mlp.c_fc = torch.nn.Sequential(mlp.c_fc)
    with pytest.raises(ff.FFMergeError, match="student: it no longer has transformer.h.0.mlp.c_fc.weight"):
        proj.optimizer()


def test_parameters_made_anew_are_trained():
    """As FSDP2 does."""
    model, proj = projector("llama", layers=1)
    _, other = projector(model=model)
    for module in proj.student.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
    for student, optimizer in ((p.student, p.optimizer(lr=1e-2)) for p in (proj, other)):
        train(student, optimizer, batches(model, 2))
    assert equal(weights(proj.student), weights(other.student))
