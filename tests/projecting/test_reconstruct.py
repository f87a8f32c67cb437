"""`reconstruct_`: every matrix fitted to the base on the student's own inputs, block by block."""

import copy
import gc
import warnings

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.calibration.walk import Kept
from ffmerge_fast.models.projections import matrix
from ffmerge_fast.models.streamed import HANDLE
from ffmerge_fast.projecting import fits, reconstruction
from ffmerge_fast.projecting.axes import ModelAxes
from ffmerge_fast.projecting.reconstruct import Reconstruction
from ffmerge_fast.projecting.selection import Sizes, select
from ffmerge_fast.projecting.settings import Reconstructing
from tests.helpers.projecting import FAMILIES, equal, projector, scores, tied_layers, weights
from tests.helpers.ranks import run_two_ranks
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:reconstruct. .*tokens of the")
REFUSED = ("olmo2", "gemma2")  # a norm inside the residual branch
FITTED = [name for name in FAMILIES if name not in REFUSED]
POST_NORM = ("bert", "roberta", "marian", "bart")


def data(model, count=6, padded=True, batch=8):
    return [tiny_inputs(model, batch=batch, seed=seed, padded=padded) for seed in range(count)]


def made(name="gpt2", model=None, layers=2, **options):
    options = dict(d_model=8, d_ff=16, init="svd") | options
    if options["d_model"] == 16:
        options["init"] = "selection"
    return projector(name, model=model, layers=layers, **options)


def error(student, model, batches):
    return sum((logits(student, b) - logits(model, b)).square().mean().item() for b in batches)


# ------------------------------------------------------------------------------------------------------------ families


@pytest.mark.parametrize("name", FITTED)
def test_starts_far_nearer_to_the_base(name):
    model, proj = made(name)
    batches = data(model)
    before, of_base = error(proj.student, model, batches), weights(model)
    report = proj.reconstruct_(batches, local_steps=0)
    assert error(proj.student, model, batches) < 0.7 * before
    assert all(after <= start + 1e-6 for start, after in report.missed.values())
    layers = sum(len(f) for f in ff.find_ffns(model).by_stack().values())
    assert len(report.missed) >= 2 * layers and f"{report.tokens:,} tokens" in str(report)
    assert equal(weights(model), of_base) and not any(m._forward_hooks for m in model.modules())
    assert all("forward" not in vars(m) for m in (*model.modules(), *proj.student.modules()))


@pytest.mark.parametrize("name", ("gpt2", "llama", "bert", "marian", "t5", "vit"))
def test_neurons_alone(name):
    """The stream stays as wide as it is: drift is still corrected."""
    model, proj = made(name, d_model=16, d_ff=12)
    batches = data(model)
    before = error(proj.student, model, batches)
    proj.reconstruct_(batches)
    assert error(proj.student, model, batches) < 0.6 * before


@pytest.mark.parametrize("name", REFUSED)
def test_blocks_without_targets_are_refused(name):
    model, proj = made(name)
    with pytest.raises(ff.FFMergeError, match=r"block model.layers.0 .* no target.*--no-reconstruct"):
        proj.reconstruct_(data(model))


@pytest.mark.parametrize("name", ("gpt2", "t5"))
def test_merged_models_keep_sharing(name):
    """The shared FFN is fitted once, on pooled moments of its layers."""
    model = tied_layers(tiny_model(name, layers=4), ((0, 1, 2),))
    _, proj = made(model=model)
    batches = data(model)
    shared = ff.find_ffns(proj.student)[0].down_path
    start, before = error(proj.student, model, batches), proj.student.get_submodule(shared).weight.detach().clone()
    proj.reconstruct_(batches)
    assert error(proj.student, model, batches) < 0.7 * start
    downs = [proj.student.get_submodule(f.down_path).weight for f in ff.find_ffns(proj.student)[:3]]
    assert all(w is downs[0] for w in downs) and not torch.equal(downs[0], before)


@pytest.mark.parametrize("name", POST_NORM)
def test_post_norm_blocks_are_trained_a_little(name):
    model, proj = made(name, layers=1)
    report = proj.reconstruct_(data(model), local_steps=50, local_lr=1e-2)
    assert report.trained and all(after <= before for before, after in report.trained.values())
    assert any(after < before for before, after in report.trained.values())
    assert not any(p.grad is not None for p in proj.student.parameters())
    assert sum(p.requires_grad for p in proj.student.parameters()) > 8


# ------------------------------------------------------------------------------------------------------ the solutions


def whole(model, batches, **how):
    """A reconstruction of a student as wide as the model: a copy of it."""
    layout = ModelAxes.of(model)
    sizes = Sizes(layout.d_model, layout.stacks(), "heads", False)
    student = copy.deepcopy(model)
    eye = torch.eye(layout.d_model, dtype=torch.float64)
    walk = Reconstruction(
        model, student, layout, select(model, layout, sizes, scores(model)), eye, batches, Reconstructing(**how)
    )
    with torch.no_grad():
        walk.run()
    return student


@pytest.mark.parametrize("name", FITTED)
def test_as_wide_as_the_base_nothing_changes(name):
    model = tiny_model(name, layers=2)
    found = weights(whole(model, data(model)))
    for key, value in weights(model).items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ("gpt2", "llama", "bert", "marian", "t5"))
def test_the_error_of_every_matrix_falls(name, monkeypatch):
    """By the raw inputs and targets of each fit; weights are those of the least-squares solution."""
    seen, fitted = [], []

    def pushed(self, x, t, mask, what, push=fits.Regression.push):
        keep = slice(None) if mask is None else mask.cpu()
        seen.append((self, x.flatten(0, -2)[keep].double(), t.flatten(0, -2)[keep].double()))
        push(self, x, t, mask, what)

    def missed(module, x, t):
        y = x @ matrix(module).double().T
        return (y + (0 if module.bias is None else module.bias.detach().double()) - t).square().sum().item()

    def readers(self, paths, moments, fit=fits.Fits.readers):
        check(self, paths, moments, fit, lambda path, t: _targets(self, path, t))

    def writer(self, path, moments, fit=fits.Fits.writer):
        check(self, path, moments, fit, lambda _, t: t)

    def check(self, paths, moments, fit, targets):
        x, t = (torch.cat(parts) for parts in list(zip(*(s for s in seen if s[0] is moments), strict=True))[1:])
        modules = {p: self._student.get_submodule(p) for p in ([paths] if isinstance(paths, str) else paths)}
        before = {p: missed(m, x, targets(p, t)) for p, m in modules.items()}
        fit(self, paths, moments)
        for path, module in modules.items():
            after = missed(module, x, targets(path, t))
            assert after <= before[path] * (1 + 1e-5) + 1e-8, path
            fitted.append(path)

    def _targets(self, path, t):
        original = self._teacher.get_submodule(path)
        y = t @ matrix(original).double().T + (0 if original.bias is None else original.bias.double())
        return self._rows(path, y.T).T

    monkeypatch.setattr(fits.Regression, "push", pushed)
    monkeypatch.setattr(fits.Fits, "readers", readers)
    monkeypatch.setattr(fits.Fits, "writer", writer)
    model, proj = made(name)
    proj.reconstruct_(data(model), local_steps=0)
    assert len(fitted) == len(set(fitted)) >= 8


def test_equals_the_solution_of_all_tokens_at_once():
    """Against a GPT-2 fitted in float64 by hand: all activations in memory, plain normal equations. Covariances are
    read as float32, which a ridge of 1e-2 lets grow a hundredfold."""
    model = tiny_model("gpt2", layers=2).double()
    _, proj = made(model=model)
    ids = torch.randint(4, 64, (24, 8), generator=torch.Generator().manual_seed(0))
    basis = proj._origin("")[3]
    start = copy.deepcopy(proj.student)
    proj.reconstruct_([{"input_ids": part} for part in ids.split(8)], ridge=1e-2)
    by_hand = _fitted_gpt2(model, start, basis, proj._origin("")[2], ids, 1e-2)
    for name, value in weights(by_hand).items():
        torch.testing.assert_close(
            weights(proj.student)[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def _fitted_gpt2(model, student, basis, selection, ids, ridge):
    """`student` in float64, fitted to `model`."""
    seen = {}
    layout = ModelAxes.of(model)

    def keep(name, what):
        return lambda _, args, out: seen.__setitem__(name, (args[0] if what == "in" else out).flatten(0, 1).clone())

    body, small = model.transformer, student.transformer
    for i, block in enumerate(body.h):
        block.ln_1.register_forward_hook(keep(("n1", i), "out"))
        block.ln_2.register_forward_hook(keep(("n2", i), "out"))
        block.ln_2.register_forward_hook(keep(("mid", i), "in"), prepend=True)
        block.register_forward_hook(keep(("out", i), "out"))
    body.ln_f.register_forward_hook(keep("nf", "out"))
    model(input_ids=ids)

    def solve(x, t, module, bias=True):
        weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
        mx, mt = (x.mean(0), t.mean(0)) if bias else (0, 0)
        x, t, n = x - mx, t - mt, len(x)
        gram = x.T @ x / n
        shift = ridge * gram.diagonal().mean()
        found = torch.linalg.solve(gram + shift * torch.eye(len(gram), dtype=gram.dtype), x.T @ t / n + shift * weight)
        weight.copy_(found)
        if bias:
            module.bias.copy_(mt - mx @ found)

    def plain(norm, *modules):
        for module in modules:
            weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
            weight.mul_(norm.weight[:, None])
        norm.weight.fill_(1), norm.bias.zero_()

    def rows(name):
        axis = layout.axes[f"{name}.weight"][1]
        return selection.choice(axis).index

    hidden = small.wte(ids) + small.wpe(torch.arange(ids.shape[1]))
    shape = hidden.shape
    for i, (block, theirs) in enumerate(zip(small.h, body.h, strict=True)):
        x = hidden.flatten(0, 1)
        plain(block.ln_1, block.attn.c_attn)
        n = block.ln_1(x)
        t = theirs.attn.c_attn(seen["n1", i])[:, rows(f"transformer.h.{i}.attn.c_attn")]
        solve(n, t, block.attn.c_attn)
        got = {}
        handle = block.attn.c_proj.register_forward_pre_hook(lambda _, args, got=got: got.update(a=args[0]))
        block(hidden)
        handle.remove()
        solve(got["a"].flatten(0, 1), seen["mid", i] @ basis.T - x, block.attn.c_proj)
        x = x + block.attn.c_proj(got["a"]).flatten(0, 1)
        plain(block.ln_2, block.mlp.c_fc)
        n = block.ln_2(x)
        solve(n, theirs.mlp.c_fc(seen["n2", i])[:, rows(f"transformer.h.{i}.mlp.c_fc")], block.mlp.c_fc)
        h = block.mlp.act(block.mlp.c_fc(n))
        solve(h, seen["out", i] @ basis.T - x, block.mlp.c_proj)
        hidden = (x + block.mlp.c_proj(h)).view(shape)
    plain(small.ln_f, student.lm_head)
    solve(small.ln_f(hidden).flatten(0, 1), seen["nf"] @ model.lm_head.weight.T, student.lm_head, bias=False)
    return student


# ---------------------------------------------------------------------------------------------- splits, padding, ranks


@pytest.mark.parametrize("name", ("gpt2", "llama", "marian", "vit"))
def test_independent_of_the_split_into_batches(name):
    model = tiny_model(name, layers=2).double()
    found = []
    for size in (1, 3, 12):
        _, proj = made(model=model)
        batch = _double(tiny_inputs(model, batch=12))
        proj.reconstruct_(_split(batch, size), local_steps=0)
        found.append(weights(proj.student))
    for other in found[1:]:
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-6, atol=1e-6)


def _double(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def _split(batch, size):
    return [
        dict(zip(batch, parts, strict=True)) for parts in zip(*(v.split(size) for v in batch.values()), strict=True)
    ]


@pytest.mark.parametrize("name", ("gpt2", "bert", "marian", "t5"))
def test_padding_does_not_count(name):
    """However long it is. Weights of tokens beyond the mask would differ at once."""
    model = tiny_model(name, layers=1).double()
    found = []
    for more in (0, 5):
        _, proj = made(model=model)
        batch = tiny_inputs(model, batch=12, padded=True)
        fill = {"input_ids": 1, "attention_mask": 0, "labels": -100}
        batch = {k: torch.nn.functional.pad(v, (0, more), value=fill[k]) for k, v in batch.items()}
        proj.reconstruct_([batch], local_steps=0)
        found.append(weights(proj.student))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-6, atol=1e-6)


def test_two_ranks_give_what_one_gives(tmp_path):
    run_two_ranks("tests.helpers.reconstruct_worker", tmp_path, timeout=200)
    from tests.helpers import reconstruct_worker

    for name in reconstruct_worker.NAMES:
        alone = weights(reconstruct_worker.fitted(name, 0, 1))
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        assert equal(*ranks)
        for key, value in alone.items():
            torch.testing.assert_close(ranks[0][key], value, rtol=1e-6, atol=1e-6)


def test_streams_on_disk_change_nothing(tmp_path):
    found = []
    for folder in (None, tmp_path):
        model, proj = made("t5")
        proj.reconstruct_(data(model), spool_dir=folder)
        found.append(weights(proj.student))
    assert equal(*found) and not [*tmp_path.iterdir()]


def test_bfloat16():
    model = tiny_model("llama", layers=2).bfloat16()
    _, proj = made(model=model)
    batches = data(model)
    before = error(proj.student, model, batches)
    report = proj.reconstruct_(batches, local_steps=3)
    assert error(proj.student, model, batches) < 0.7 * before
    assert report.trained and {p.dtype for p in proj.student.parameters()} == {torch.bfloat16}


# --------------------------------------------------------------------------------------------------- training, resume


@pytest.mark.parametrize("options", [dict(), dict(share="residual_stream"), dict(d_model=16)])
def test_the_residual_takes_what_projections_do_not_give(options):
    """W_C = P W P + R holds at once: an update of nothing leaves the student as it is, and what is loaded."""
    model, proj = made(**options)
    batches = data(model)
    proj.reconstruct_(batches)
    fitted = weights(proj.student)
    optimizer = proj.optimizer(lr=0.0)
    assert equal(weights(proj.student), fitted)
    proj.student(**batches[0]).loss.backward()
    optimizer.step()
    for key, value in fitted.items():
        torch.testing.assert_close(weights(proj.student)[key], value, rtol=1e-6, atol=1e-6)
    assert equal(weights(proj.fold()), weights(proj.student))
    torch.testing.assert_close(logits(proj.fold(), batches[0]), logits(proj.student, batches[0]), rtol=0, atol=0)
    model, again = made(model=model, **options)
    again.reconstruct_(batches)
    loaded = again.optimizer(lr=0.0)
    loaded.load_state_dict(optimizer.state_dict())
    for key, value in fitted.items():
        torch.testing.assert_close(weights(again.student)[key], value, rtol=1e-6, atol=1e-6)


def test_goes_on_at_the_block_it_was_at(tmp_path, monkeypatch):
    model, proj = made("marian")
    batches = data(model)
    proj.reconstruct_(batches, local_steps=3)
    wanted = weights(proj.student)

    for last in (1, 2, 3, 4):

        def killed(self, path, last=last, save=reconstruction._Fitted.save, **done):
            save(self, path, **done)
            if self.blocks == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(reconstruction._Fitted, "save", killed)
            with pytest.raises(KeyboardInterrupt):
                made(model=model)[1].reconstruct_(
                    batches, local_steps=3, cache_dir=tmp_path / str(last), save_seconds=0
                )
        _, again = made(model=model)
        report = again.reconstruct_(batches, local_steps=3, cache_dir=tmp_path / str(last), save_seconds=0)
        assert equal(weights(again.student), wanted) and len(report.trained) == 4
    _, third = made(model=model)
    monkeypatch.setattr(reconstruction, "Reconstruction", None)  # nothing is walked again
    assert third.reconstruct_(batches, local_steps=3, cache_dir=tmp_path / "1").missed == report.missed
    assert equal(weights(third.student), wanted)
    for other, words in ((dict(ridge=0.1), "other ridge"), (dict(local_steps=4), "other local_steps")):
        with pytest.raises(ff.FFMergeError, match=words):
            made(model=model)[1].reconstruct_(batches, **dict(local_steps=3) | other, cache_dir=tmp_path / "1")
    with pytest.raises(ff.FFMergeError, match="other data"):
        made(model=model)[1].reconstruct_(batches[1:], local_steps=3, cache_dir=tmp_path / "1")


# ----------------------------------------------------------------------------------------------------------- bad input


def test_bad_input():
    model, proj = made()
    start, batches = weights(proj.student), data(model)
    for options, words in (
        (dict(ridge=-1.0), "ridge: got -1"),
        (dict(ridge=float("nan")), "ridge: got nan"),
        (dict(local_steps=-1), "local_steps: got -1"),
        (dict(local_lr=0.0), "local_lr: got 0"),
    ):
        with pytest.raises(ff.FFMergeError, match=words):
            proj.reconstruct_(batches, **options)
    with pytest.raises(ff.FFMergeError, match="no calibration data"):
        proj.reconstruct_([])
    with pytest.raises(ff.FFMergeError, match="wanted an iterable"):
        proj.reconstruct_(batches[0])
    masked = [{**b, "attention_mask": torch.zeros_like(b["attention_mask"])} for b in batches]
    with pytest.raises(ff.FFMergeError, match="held no tokens"):
        proj.reconstruct_(masked)
    assert equal(weights(proj.student), start)
    _, without = made(model=model, residual=False)
    with pytest.raises(ff.FFMergeError, match="without R"):
        without.reconstruct_(batches)


def test_tensors_that_are_not_finite_are_named():
    model, proj = made("vit")
    batch = tiny_inputs(model, batch=8)
    batch["pixel_values"][3, 0, 0, 0] = torch.nan
    with pytest.raises(
        ff.FFMergeError, match=r"reconstruct: the first batch gives values in vit.layers.0 that are not finite"
    ):
        proj.reconstruct_([batch])
    with pytest.raises(ff.FFMergeError, match=r"reconstruct: vit\.layers\.0\.attention\.q_proj: features .* NaN"):
        proj.reconstruct_([tiny_inputs(model, batch=8), batch])
    model, proj = made()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.inf
    with pytest.raises(ff.FFMergeError, match=r"NaN or Inf in transformer.h.1.mlp.c_fc.weight"):
        proj.reconstruct_(data(model))


def test_few_tokens_are_warned_of_and_carried_by_the_ridge():
    model, proj = made()
    with pytest.warns(
        UserWarning, match="6 tokens of the decoder for the 16 unknowns of a row of transformer.h.0.mlp.c_proj"
    ):
        proj.reconstruct_([tiny_inputs(model, batch=1, length=6)])
    assert all(p.isfinite().all() for p in proj.student.parameters())
    _, exact = made(model=model)
    with pytest.raises(ff.FFMergeError, match=r"reconstruct: transformer\S* the normal equations are singular"):
        exact.reconstruct_([tiny_inputs(model, batch=1, length=6)], ridge=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(model=model)[1].reconstruct_([tiny_inputs(model, batch=60)])


def test_what_killed_runs_left_in_the_spool_goes_and_what_is_in_use_stays(tmp_path):
    """Kept streams are in a locked folder; one without a lock is of a process that is no more."""
    dead = tmp_path / ".walk.0123abcd.tmp"
    dead.mkdir()
    (dead / "teacher-0.safetensors").write_bytes(b"x")
    first, second = Kept(tmp_path), Kept(tmp_path)
    assert not dead.exists() and len(list(tmp_path.iterdir())) == 2
    for number, kept in enumerate((first, second)):
        kept.put("teacher", 0, torch.full((3,), float(number)))
    assert [kept.get("teacher", 0).tolist() for kept in (first, second)] == [[0.0] * 3, [1.0] * 3]
    first.close()
    assert len(list(tmp_path.iterdir())) == 1
    second.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_for_streams_that_cannot_be_used(tmp_path):
    model, proj = made()
    start = weights(proj.student)
    with pytest.raises(ff.FFMergeError, match="spool_dir: .*none cannot be written .*; give a folder with room"):
        proj.reconstruct_(data(model), spool_dir=tmp_path / "none")
    assert equal(weights(proj.student), start)


def test_the_base_must_still_be_there():
    model, proj = made()
    batches = data(model)
    del model
    gc.collect()
    with pytest.raises(ff.FFMergeError, match="base model was let go of"):
        proj.reconstruct_(batches)


def test_a_streamed_base_is_refused():
    model, proj = made()
    setattr(model, HANDLE, object())
    with pytest.raises(ff.FFMergeError, match="reconstruct_: this model is streamed.*unstream_"):
        proj.reconstruct_(data(model))


def test_a_damaged_file_is_refused(tmp_path):
    model, proj = made()
    proj.reconstruct_(data(model), cache_dir=tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(ff.FFMergeError, match="is damaged.*--fresh"):
        made(model=model)[1].reconstruct_(data(model), cache_dir=tmp_path)
    made(model=model)[1].reconstruct_(data(model), cache_dir=tmp_path, fresh=True)
