"""Base weights on the host and on disk: the same training bit for bit, one copy, and files that go away."""

import copy
import os
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffmerge_fast as ff
from ffmerge_fast.support.tensor_files import WeightEntry
from tests.helpers.projecting import batches, equal, projector, scores, tied_layers, train, weights
from tests.helpers.tiny_models import tiny_model

OPTIONS = dict(lr=1e-2, max_grad_norm=0.1)  # clipping: the base is read twice a step


def trained(model, steps=3, share=None, **options):
    proj = ff.project(model, d_model=8, d_ff=12, importance=scores(model), share=share)
    optimizer = proj.optimizer(**OPTIONS | options)
    train(proj.student, optimizer, batches(model, steps))
    return proj, optimizer


def base_tensors(proj):
    return [m.weight for unit in proj.units for m in unit.matrices]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_the_same_wherever_the_base_lies(family, dtype):
    model = tiny_model(family, layers=1).to(dtype)
    wanted = weights(trained(model)[0].student)
    for place in ("cpu", "disk"):
        assert equal(weights(trained(model, offload_base=place)[0].student), wanted), place


def test_the_same_at_any_address():
    """Weights that were loaded from a file are not aligned; products round by that."""
    model = tiny_model("gpt2", layers=1)
    wanted = weights(trained(model)[0].student)
    for parameter in model.parameters():
        room = torch.empty(parameter.numel() + 1)
        parameter.data = room[1:].view(parameter.shape).copy_(parameter.data)
        assert parameter.data_ptr() % 64
    for place in (None, "cpu"):
        assert equal(weights(trained(model, offload_base=place)[0].student), wanted), place


@pytest.mark.parametrize("share", ["qkv", "residual_stream"])
def test_with_shared_projections(share):
    model = tiny_model("llama", layers=2)
    wanted = weights(trained(model, share=share)[0].student)
    assert equal(weights(trained(model, share=share, offload_base="disk")[0].student), wanted)


def test_resume_from_disk(tmp_path):
    """A state saved with the base in memory goes on with the base on disk."""
    model = tiny_model("gpt2", layers=1)
    data = batches(model, 4)
    _, whole = projector(model=model)
    optimizer = whole.optimizer(**OPTIONS)
    train(whole.student, optimizer, data[:2])
    state = optimizer.state_dict()
    plain = {name: weights(whole.student)[name] for name in whole.plain}
    torch.save(state, tmp_path / "state")
    train(whole.student, optimizer, data[2:])
    _, again = projector(model=model)
    again.student.load_state_dict(plain, strict=False)
    optimizer = again.optimizer(**OPTIONS, offload_base="disk", offload_dir=tmp_path)
    optimizer.load_state_dict(torch.load(tmp_path / "state"))
    train(again.student, optimizer, data[2:])
    assert equal(weights(again.student), weights(whole.student))


# ------------------------------------------------------------------------------------------------------------- memory


def test_host_memory_is_the_base_models_own():
    model = tiny_model("llama", layers=1)
    held = {p.data_ptr() for p in model.parameters()}
    proj, _ = trained(model, offload_base="cpu")
    assert {w.data_ptr() for w in base_tensors(proj)} <= held


def test_from_disk_the_base_can_be_let_go_of():
    model = tiny_model("gpt2", layers=1)
    alive = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    data = batches(model, 2)
    proj = ff.project(model, d_model=8, d_ff=12, importance=scores(model))
    optimizer = proj.optimizer(**OPTIONS, offload_base="disk")
    assert all(w.is_meta for w in base_tensors(proj))
    del model
    assert not any(ref() for ref in alive)
    before = weights(proj.student)
    train(proj.student, optimizer, data)
    assert not equal(before, weights(proj.student))
    with pytest.raises(ff.FFMergeError, match="another one of this projector has offloaded"):
        proj.optimizer()
    assert proj.fold() is not None


def test_one_unit_ahead(monkeypatch):
    """Of the base no more is in memory than a unit and the next."""
    model = tiny_model("llama", layers=2)
    proj = ff.project(model, d_model=8, d_ff=12, importance=scores(model))
    optimizer = proj.optimizer(**OPTIONS, offload_base="disk")
    alive, most = weakref.WeakSet(), []
    read = WeightEntry.read

    def counted(entry, pin=False):
        tensor = read(entry, pin)
        alive.add(tensor)
        most.append(sum(t.nbytes for t in alive))
        return tensor

    monkeypatch.setattr(WeightEntry, "read", counted)
    train(proj.student, optimizer, batches(model, 2))
    largest = max(sum(m.weight.nbytes for m in unit.matrices) for unit in proj.units)
    assert len(most) == 2 * 2 * len(base_tensors(proj)) and max(most) <= 2 * largest


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit"])
def test_the_models_own_folder_is_read_in_place(family, tmp_path):
    """Also names without the base model's prefix and tied tables; what is not there is written."""
    tiny_model(family, layers=1).save_pretrained(tmp_path / "base")
    model = ff.from_pretrained(tmp_path / "base")
    wanted = weights(trained(copy.deepcopy(model))[0].student)  # a copy: MKL rounds by where in memory a matrix begins
    proj, optimizer = trained(model, offload_base="disk", offload_dir=tmp_path / "work")
    assert equal(weights(proj.student), wanted)
    if family != "vit":  # whose files have names of transformers 4
        assert not (tmp_path / "work").exists()
        files = {entry.file.path for entry in optimizer._base._entries.values()}
        assert files == {tmp_path / "base" / "model.safetensors"}


def test_names_without_the_prefix(tmp_path):
    model = tiny_model("gpt2", layers=1)
    bare = {n.removeprefix("transformer."): p.detach() for n, p in model.named_parameters()}
    save_file(bare, tmp_path / "model.safetensors")
    model.name_or_path = str(tmp_path)
    wanted = weights(trained(model)[0].student)
    proj, _ = trained(model, offload_base="disk", offload_dir=tmp_path / "work")
    assert equal(weights(proj.student), wanted) and not (tmp_path / "work").exists()


def test_a_folder_of_other_values_is_not_used(tmp_path):
    tiny_model("llama", layers=1).save_pretrained(tmp_path / "base")
    model = ff.from_pretrained(tmp_path / "base")
    (tmp_path / "base" / "damaged.safetensors").write_bytes(b"x" * 20)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    wanted = weights(trained(model)[0].student)
    proj, _ = trained(model, offload_base="disk", offload_dir=tmp_path / "work")
    assert equal(weights(proj.student), wanted)
    (file,) = (tmp_path / "work").iterdir()
    assert load_file(file).keys() == {"model.layers.0.mlp.up_proj.weight"}
    trained(model, offload_base="disk", offload_dir=tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == [file]  # used again


def test_a_temporary_folder_is_removed():
    _, optimizer = trained(tiny_model("gpt2", layers=1), offload_base="disk")
    (file,) = {entry.file.path for entry in optimizer._base._entries.values()}
    assert file.exists()
    del optimizer
    assert not file.parent.exists()


@pytest.mark.parametrize("how", ["removed", "cut short", "overwritten", "replaced"])
@pytest.mark.parametrize("when", ["between steps", "in a step"])
def test_a_file_that_goes_away(tmp_path, how, when, monkeypatch):
    model = tiny_model("llama", layers=1)
    proj, optimizer = trained(model, offload_base="disk", offload_dir=tmp_path)
    before, (file,) = weights(proj.student), tmp_path.iterdir()

    def damage():
        if how == "removed":
            file.unlink()
        elif how == "cut short":
            os.truncate(file, 200)
        elif how == "overwritten":
            with open(file, "r+b") as raw:
                raw.seek(-64, os.SEEK_END)
                raw.write(b"\xff" * 64)
            os.utime(file)
        else:
            save_file({name: t * 2 for name, t in load_file(file).items()}, file.with_name("other"))
            file.with_name("other").replace(file)

    if when == "between steps":
        damage()
    else:
        monkeypatch.setattr(optimizer, "_clip_factor", damage)
    with pytest.raises(ff.FFMergeError, match=f"offload_base: {file}, which holds weights of the base, ") as error:
        train(proj.student, optimizer, batches(model, 1))
    assert "\n" not in str(error.value)
    after = weights(proj.student)
    assert all(w.isfinite().all() for w in after.values()) and (when == "in a step" or equal(after, before))


def test_bad_places(tmp_path):
    _, proj = projector("llama", layers=1)
    with pytest.raises(ff.FFMergeError, match="offload_base: got 'nvme', wanted None, 'cpu' or 'disk'"):
        proj.optimizer(offload_base="nvme")
    (tmp_path / "file").write_text("")
    with pytest.raises(ff.FFMergeError, match="file/base-.* cannot be written .* give another offload_dir"):
        proj.optimizer(offload_base="disk", offload_dir=tmp_path / "file")
    proj.optimizer(offload_base="disk")  # nothing was let go of


def test_a_merged_base(tmp_path):
    """A shared FFN lies in its file once."""
    merged = tied_layers(tiny_model("gpt2", layers=4))
    wanted = weights(trained(merged)[0].student)
    proj, _ = trained(merged, offload_base="disk", offload_dir=tmp_path)
    assert equal(weights(proj.student), wanted)
    (file,) = tmp_path.iterdir()
    assert not any("h.2.mlp" in name for name in load_file(file))
