"""init="svd": P of the residual stream begins as one orthonormal basis, and everything else follows from it."""

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.projecting.bases import stream_basis
from tests.helpers.projecting import FAMILIES, batches, equal, layout, projector, scores, train, weights
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model
from tests.projecting.optimizer.test_optimizer import EPS, Naive


def basis(model, count=8):
    kept = scores(model).scores["d_model"].topk(count).indices.sort().values
    return stream_basis(model, layout(model), kept), kept


def close(found, wanted):
    torch.testing.assert_close(found, wanted.to(found.dtype), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def spread_out_(model, small, q):
    """Fill `model` (wider) so that it computes what `small` does, its stream turned by q [8, 16]: x -> qᵀ x."""
    wide = dict(model.named_parameters())
    for name, p in small.named_parameters():
        if p.ndim == 1 and "norm" in name:
            p.fill_(1.3)
            wide[name].fill_(1.3 * (8 / 16) ** 0.5)  # RMS of 16 entries of which 8 directions are empty
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            wide[name].copy_(q.T @ p)
        elif p.ndim == 2:
            wide[name].copy_(p @ q)
        else:
            wide[name].copy_(p)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_stream_of_few_directions_loses_nothing(family):
    """A base whose stream has 8 directions in 16 coordinates: the SVD finds them, a selection cannot."""
    model = tiny_model(family, layers=2)
    small = ff.from_scratch(model, d_model=8, seed=3)
    with torch.no_grad():
        for p in small.parameters():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    q = torch.linalg.qr(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))[0].T
    spread_out_(model, small, q)
    inputs = tiny_inputs(model)
    wanted = logits(model, inputs)
    torch.testing.assert_close(logits(small, inputs), wanted, atol=1e-4, rtol=1e-4)
    turned, pruned = (ff.project(model, d_model=8, init=init).student for init in ("svd", "selection"))
    torch.testing.assert_close(logits(turned, inputs), wanted, atol=1e-4, rtol=1e-4)
    assert (logits(pruned, inputs) - wanted).abs().max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "vit", "bert", "marian", "t5-gated"])
def test_the_basis_spans_the_leading_singular_vectors(family):
    """Against numpy's SVD of the stacked matrices; of the bases of that space none is nearer to the selection."""
    model = tiny_model(family, layers=1)
    axes, stacked = layout(model).axes, []
    for name, p in model.named_parameters():
        for dim, axis in enumerate(axes[name]):
            if axis is not None and axis.role == "model" and p.ndim >= 2:
                matrix = p.detach().double().movedim(dim, -1).reshape(-1, 16)
                stacked.append(matrix / matrix.norm())
    q, kept = basis(model)
    torch.testing.assert_close(q @ q.T, torch.eye(8, dtype=q.dtype))
    vectors = torch.linalg.svd(torch.cat(stacked)).Vh[:8]
    torch.testing.assert_close(q.T @ q, vectors.T @ vectors)
    selection = torch.eye(16, dtype=q.dtype)[kept]
    for seed in range(20):
        turn = torch.linalg.qr(torch.randn(8, 8, dtype=q.dtype, generator=torch.Generator().manual_seed(seed)))[0]
        assert (q - selection).norm() < (turn @ q - selection).norm()


def test_every_part_of_a_gpt2():
    model = tiny_model("gpt2", layers=1)
    with torch.no_grad():
        model.transformer.h[0].ln_2.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    base, (q, _) = weights(model), basis(model)
    _, proj = projector(model=model, init="svd")
    found, q = weights(proj.student), q.float()
    neurons = scores(model).scores["d_ff/decoder.0"].topk(12).indices.sort().values
    head = int(scores(model).scores["attention/transformer.h.0.attn"].view(2, 8).sum(1).argmax())
    channels = torch.arange(8) + 8 * head
    block = "transformer.h.0."
    close(found["transformer.wte.weight"], base["transformer.wte.weight"] @ q.T)
    close(found["lm_head.weight"], base["transformer.wte.weight"] @ q.T)
    close(found[block + "mlp.c_fc.weight"], q @ base[block + "mlp.c_fc.weight"][:, neurons])
    close(found[block + "mlp.c_fc.bias"], base[block + "mlp.c_fc.bias"][neurons])
    close(found[block + "mlp.c_proj.weight"], base[block + "mlp.c_proj.weight"][neurons] @ q.T)
    close(found[block + "mlp.c_proj.bias"], q @ base[block + "mlp.c_proj.bias"])
    close(found[block + "attn.c_proj.weight"], base[block + "attn.c_proj.weight"][channels] @ q.T)
    close(found[block + "ln_2.weight"], 2**0.5 * (q @ base[block + "ln_2.weight"].diag() @ q.T).diag())
    close(found[block + "ln_2.bias"], q @ base[block + "ln_2.bias"])


def test_the_class_token_of_a_vit():
    model = tiny_model("vit", layers=1)
    q = basis(model)[0].float()
    found = weights(projector(model=model, init="svd")[1].student)
    for name in ("cls_token", "position_embeddings"):
        close(found[f"vit.embeddings.{name}"], weights(model)[f"vit.embeddings.{name}"] @ q.T)
    patches = "vit.embeddings.patch_embeddings.projection.weight"
    close(found[patches], torch.einsum("rd,dcij->rcij", q, weights(model)[patches]))


def test_gains_of_one_plus_the_weight():
    """Gemma stores gain - 1: gains of 1 become sqrt(2), stored as sqrt(2) - 1."""
    model = tiny_model("gemma2", layers=1)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    student = projector(model=model, init="svd")[1].student
    close(student.model.norm.weight.detach(), torch.full((8,), 2**0.5 - 1))


@pytest.mark.parametrize(
    ("family", "options"), [("gpt2", {}), ("llama", dict(share="residual_stream")), ("vit", dict(residual=False))]
)
def test_it_trains_like_the_formula_from_there(family, options):
    model, proj = projector(family, layers=1, init="svd", **options)
    naive = Naive(proj, lr=1e-3)
    for projection, delta in proj.starts.items():
        naive.deltas[projection].data.copy_(delta)
    for name, value in naive.weights().items():
        close(weights(proj.student)[name], value.detach())
    optimizer = proj.optimizer(lr=1e-3, eps=EPS)
    for inputs in batches(model, 5):
        naive.step([inputs])
        train(proj.student, optimizer, [inputs])
    for name, value in naive.weights().items():
        torch.testing.assert_close(weights(proj.student)[name], value.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_from_a_turned_stream_and_learns(family):
    """What is not of the stream is selected as ever; everything of it has moved; a step changes that no more."""
    model, proj = projector(family, layers=1, init="svd")
    pruned, found = weights(projector(model=model)[1].student), weights(proj.student)
    axes = layout(model).axes
    for name, value in found.items():
        turned = proj.student.get_parameter(name).requires_grad and any(a and a.role == "model" for a in axes[name])
        assert torch.equal(value, pruned[name]) != (turned and value.any().item()), name
    optimizer = proj.optimizer(lr=0.0)
    train(proj.student, optimizer, batches(model, 1))
    assert equal(weights(proj.student), found)
    losses = train(proj.student, proj.optimizer(lr=1e-2), batches(model, 1) * 6)
    assert losses[-1] < losses[0]


def test_the_optimizer_begins_where_the_student_does():
    """With nothing to learn, a step projects the same weights again, and so does a resumed run."""
    model, proj = projector("gpt2", layers=1, init="svd")
    before, optimizer = weights(proj.student), proj.optimizer(lr=0.0)
    train(proj.student, optimizer, batches(model, 1))
    assert equal(weights(proj.student), before)
    again = projector(model=model, init="svd")[1]
    again.optimizer().load_state_dict(optimizer.state_dict())
    assert equal(weights(again.student), before)
    with pytest.raises(ff.FFMergeError, match="projector.init was 'svd' and is 'selection' now"):
        projector(model=model)[1].optimizer().load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(d_model=8, init="pca"), "init: got 'pca', wanted"), (dict(d_ff=8, init="svd"), "init: 'svd' is of the")],
)
def test_bad_input(options, message):
    with pytest.raises(ff.FFMergeError, match=message) as error:
        ff.project(tiny_model("llama", layers=1), **options)
    assert "\n" not in str(error.value)


def test_directions_are_turned_towards_what_the_small_class_makes():
    """Marian's positions are constants of the smaller size: Q brings the base's near to them."""
    model, proj = projector("marian", init="svd")
    _, layout, selection, basis = proj._origin("")
    plain = stream_basis(model, layout, selection.d_model)
    theirs, own = (m.model.encoder.embed_positions.weight.double() for m in (model, proj.student))
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64))
    torch.testing.assert_close(basis.T @ basis, plain.T @ plain)  # the same directions
    assert (theirs @ basis.T - own).norm() < 0.8 * (theirs @ plain.T - own).norm()
