"""8-bit moments in a whole training run: the loss, the bytes, the peak memory, saving and resuming."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffmerge_fast as ff
from ffmerge_fast.driver.training import state as training_state
from ffmerge_fast.projecting.optimizer import adamw
from tests.helpers.projecting import batches, equal, projector, scores, train, weights
from tests.helpers.tiny_models import tiny_model

VOCABULARY, D_MODEL = 64, 128


@pytest.fixture(scope="module")
def base():
    """Wide enough that most projections have 4,096 values."""
    config = copy.deepcopy(tiny_model("gpt2", layers=2).config)
    config.n_embd, config.n_inner, config.n_head = D_MODEL, 2 * D_MODEL, 4
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    torch.manual_seed(0)
    return type(tiny_model("gpt2"))(config).eval()


def sequences(count):
    """Ids that go up by a step of their own: what comes next can be learned."""
    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        first, step = torch.randint(0, VOCABULARY, (8, 1), generator=g), torch.randint(1, 4, (8, 1), generator=g)
        ids = (first + step * torch.arange(24)) % VOCABULARY
        found.append({"input_ids": ids, "labels": ids})
    return found


def run(base, state, steps=60, **options):
    torch.manual_seed(0)
    proj = ff.project(base, d_model=D_MODEL // 2, d_ff=D_MODEL, importance=scores(base))
    optimizer = proj.optimizer(lr=2e-3, state=state, **options)
    return proj, optimizer, train(proj.student.train(), optimizer, sequences(steps))


def test_the_loss_falls_alike(base):
    """Within 3 % of float32's, of a loss that fell by half."""
    wanted, found = (run(base, state)[2] for state in adamw.STATES)
    assert sum(wanted[-10:]) < 0.5 * sum(wanted[:10])
    assert sum(found[-10:]) == pytest.approx(sum(wanted[-10:]), rel=0.03)


def moments(optimizer):
    return {
        f"{entry}/{i}": value
        for i, entries in enumerate(optimizer.state.values())
        for entry, value in entries.items()
        if "exp_avg" in entry
    }


def test_the_bytes_promised(base):
    """2 bytes and two scales per block instead of 8; small tensors as they were."""
    _, whole, _ = run(base, "fp32", steps=1)
    _, small, _ = run(base, "8bit", steps=1)
    wanted = 0
    for name, value in moments(whole).items():
        big = value.numel() >= 4096 and sum(n > 1 for n in value.shape) > 1
        wanted += value.numel() + 4 * -(-value.numel() // 256) if big else value.nbytes
        stored = moments(small)[name]
        assert (stored.dtype, stored.numel()) == (torch.uint8 if big else torch.float32, value.numel())
    total, before = (sum(t.nbytes for t in moments(o).values()) for o in (small, whole))
    assert total == wanted and total < 0.3 * before


def test_no_whole_moment_in_float32(base, monkeypatch):
    """A tensor's moments are in float32 a piece at a time."""
    pieces = []
    monkeypatch.setitem(adamw._PIECE, "cpu", 1024)
    real = adamw.dequantize
    monkeypatch.setattr(adamw, "dequantize", lambda codes, *rest: (pieces.append(len(codes)), real(codes, *rest))[1])
    _, optimizer, _ = run(base, "8bit", steps=1)
    assert max(pieces) == 1024
    assert sum(pieces) == sum(t.numel() for t in moments(optimizer).values() if t.dtype == torch.uint8)


def test_resume_is_bit_exact(base, tmp_path):
    """Through the driver's files (safetensors) and through state_dict."""
    data = sequences(6)
    proj, optimizer, _ = run(base, "8bit", steps=0, weight_decay=0.1, max_grad_norm=1.0)
    train(proj.student, optimizer, data[:3])
    save_file(training_state.gathered(training_state.optimizer_tensors(proj.student, optimizer)), tmp_path / "o")
    save_file(training_state.gathered(training_state.model_tensors(proj.student)), tmp_path / "m")
    torch.save(optimizer.state_dict(), tmp_path / "state")
    train(proj.student, optimizer, data[3:])
    for how in ("files", "state_dict"):
        again, resumed, _ = run(base, "8bit", steps=0, weight_decay=0.1, max_grad_norm=1.0)
        again.student.load_state_dict(load_file(tmp_path / "m"))
        if how == "files":
            resumed.load_named_state(load_file(tmp_path / "o"))
        else:
            resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        train(again.student, resumed, data[3:])
        assert equal(weights(again.student), weights(proj.student)), how


def test_a_state_of_the_other_kind_is_refused(tmp_path):
    model, proj = projector("gpt2", layers=1)
    state = proj.optimizer(state="8bit").state_dict()
    with pytest.raises(ff.FFMergeError, match="optimizer.state was '8bit' and is 'fp32' now"):
        projector(model=model)[1].optimizer().load_state_dict(state)
    data = batches(model, 2)
    ff.finetune(proj.student, data, 1, optimizer=proj.optimizer(state="8bit"), output_dir=tmp_path, schedule="constant")
    for changed, message in (
        (dict(), "made with other optimizer.state: '8bit' there, 'fp32' now"),
        (dict(state="8bit", weight_decay_on_projections=0.5), "other optimizer.weight_decay_on_projections: 0.0 there"),
        (dict(state="8bit", betas=(0.8, 0.999)), r"other optimizer.betas: \[0.9, 0.999\] there"),
        (dict(state="8bit", max_grad_norm=1.0), "other optimizer.max_grad_norm: .*1.0 now"),
    ):
        _, other = projector(model=model)
        with pytest.raises(ff.FFMergeError, match=message):
            ff.finetune(
                other.student, data, 2, optimizer=other.optimizer(**changed), output_dir=tmp_path, schedule="constant"
            )
    with pytest.raises(ff.FFMergeError, match="state: got '4bit', wanted one of fp32, 8bit"):
        projector(model=model)[1].optimizer(state="4bit")
