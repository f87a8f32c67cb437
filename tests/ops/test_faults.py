"""What once ended the process, wrote outside of its memory or passed in silence, in the ops' kernels."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.projection.registered import project_rows_, project_rows_adjoint_
from ffmerge_fast.support import machine

needs_extension = pytest.mark.skipif(machine.why_no_extension() is not None, reason=str(machine.why_no_extension()))


# --------------------------------------------------------------------------------------------------------- empty sizes


@pytest.mark.parametrize("d, d_ff, d_out", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [0, 2, 100])
def test_ffns_without_width(d, d_ff, d_out, gated, transposed, tokens):
    def weight(rows, columns):
        return torch.randn(columns, rows).T if transposed else torch.randn(rows, columns)

    x, up, down = torch.randn(tokens, d), weight(d_ff, d), weight(d_out, d_ff)
    gate = weight(d_ff, d) if gated else None
    biases = {"up_bias": torch.randn(d_ff), "down_bias": torch.randn(d_out)}
    biases |= {"gate_bias": torch.randn(d_ff)} if gated else {}
    pre = x @ up.T + biases["up_bias"]
    hidden = torch.relu(x @ gate.T + biases["gate_bias"]) * pre if gated else torch.relu(pre)
    wanted = hidden @ down.T + biases["down_bias"]
    with torch.no_grad():
        got = ff.ops.shared_ffn(x, up, down, gate=gate, activation="relu", **biases)
    torch.testing.assert_close(got, wanted)
    x.requires_grad_()
    trained = ff.ops.shared_ffn(x, up, down, gate=gate, activation="relu", **biases)
    torch.testing.assert_close(trained, wanted)
    assert torch.autograd.grad(trained.sum(), x)[0].shape == x.shape


# -------------------------------------------------------------------------------------------------------------- indices


def project(index, height=5):
    out = torch.zeros(len(index), 4)
    project_rows_(
        [out], [torch.randn(height, 4)], [torch.zeros(1, len(index), height)], [index], [torch.ones(5, 4)], []
    )
    return out


def scatter(index, height=5):
    out = torch.zeros(height, 4)
    ys = [torch.ones(len(index), 4)]
    project_rows_adjoint_([out], ys, [torch.zeros(1, len(index), height)], [index])
    return out


@pytest.mark.parametrize("function", [project, scatter])
@pytest.mark.parametrize("values", [[0, 5], [0, -1], [2**40, 1]])
def test_indices_out_of_range(function, values):
    with pytest.raises(IndexError):
        function(torch.tensor(values))


@pytest.mark.parametrize(
    "index", [torch.tensor([0, 1], dtype=torch.int32), torch.arange(4)[::2], torch.tensor([[0, 1]])], ids=str
)
def test_indices_of_another_kind(index):
    with pytest.raises(ff.FFMergeError, match="indices: got"):
        project_rows_([torch.zeros(2, 4)], [torch.ones(5, 4)], [torch.zeros(1, 2, 5)], [index], [torch.ones(5, 4)], [])


def test_indices_too_few():
    with pytest.raises(ff.FFMergeError, match=r"indices: got torch.int64 \[1\], wanted contiguous torch.int64 \[2\]"):
        project_rows_adjoint_(
            [torch.zeros(5, 4)], [torch.ones(2, 4)], [torch.zeros(1, 2, 5)], [torch.zeros(1, dtype=torch.int64)]
        )


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("value", [1e301, -1e308])
def test_scores_whose_sums_overflow(value):
    with pytest.raises(ff.FFMergeError, match="wanted at most 1e300: scale them down"):
        ff.ops.assign(torch.eye(3, dtype=torch.float64) * value)
    largest = ff.ops.assign(torch.eye(3, dtype=torch.float64) * 1e299)
    assert largest.permutation.tolist() == [0, 1, 2] and largest.objective == pytest.approx(3e299)


@needs_extension
def test_numbers_that_name_nothing():
    c = machine.extension()
    isa = c.cpu_isa()
    for call in (
        lambda: c.shared_ffn_activate(7, 0, 0, 0, 0, 0, "portable", 1),
        lambda: c.shared_ffn_activate(0, 3, 0, 0, 0, 0, "portable", 1),
        lambda: c.shared_ffn_activate(-1, 0, 0, 0, 0, 0, "portable", 1),
        lambda: c.shared_ffn_activate(0, 0, 0, 0, 0, 0, "sse9", 1),
        lambda: c.shared_ffn_decode(*[(0, 0, 0, 1, 1, False)] * 3, 0, 1, 0, 1, 1, 0, "portable", 0, 1),
        lambda: c.assignment_f32(0, 1, 2**31, 0, 0, False, False, "portable", 1, 0, 0, 0),
        lambda: c.correlation_multiply_tiles([], [(0, 0, 0)], True, 1),
    ):
        with pytest.raises(ValueError):
            call()
    assert isa


# -------------------------------------------------------------------------------------------------------------- threads


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers reserve terabytes of addresses")
def test_threads_that_cannot_start():
    """With no room for the stacks of 64 threads the work is done by those that are there, or is a MemoryError."""
    script = """
        import resource, torch, ffmerge_fast as ff
        scores = torch.randn(64, 160, 160)
        wanted = ff.ops.assign(scores).permutation
        torch.set_num_threads(64)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + 32 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            got = ff.ops.assign(scores).permutation
        except MemoryError:
            print("refused")
        else:
            print("done" if got.tolist() == wanted.tolist() else "wrong")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() in ("done", "refused"), done.stderr[-2000:]
