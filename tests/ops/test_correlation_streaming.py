"""Features that wait, features on disk, threads, and accuracy, on every backend; tiles against AMX's definition."""

import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.correlation import products
from ffmerge_fast.ops.correlation.spool import Spool
from ffmerge_fast.support import machine
from ffmerge_fast.support.sizes import parse_bytes
from tests.helpers.correlation import correlate, features, state_of, tolerance, truth

pytestmark = pytest.mark.usefixtures("correlation_backend")
BATCHES = [[2048], [1, 31, 33, 255, 256, 257, 1024], [1023, 1, 1], [0, 1025, 0, 900], [100] * 13]


def products_around_zero(state):
    """Every pair's products in float64, around zero instead of the pivots."""
    found = {}
    for a, b in state.pairs:
        (la, lb), p = (state._moments.layers[key] for key in (a, b)), state.state_dict()[f"pair/{a}|{b}"].double()
        pa, pb, n = la.pivot.double(), lb.pivot.double(), la.count
        found[a, b] = p + torch.outer(pa, lb.sum) + torch.outer(la.sum, pb) + n * torch.outer(pa, pb)
    return found


@pytest.mark.parametrize("batches", BATCHES, ids=str)
@pytest.mark.parametrize("widths", [(1, 63), (100, 431), (32, 64)])
def test_any_batch_sizes_give_the_same_products(batches, widths):
    total = sum(batches)
    x = {key: features(total, width, key).mul(2).round().bfloat16() for key, width in enumerate(widths)}
    splits = torch.tensor(batches).cumsum(0)[:-1].tolist()
    state = correlate(x, splits=splits, pairs=[(0, 1), (1, 1)])
    assert state.count(0) == total
    for (a, b), found in products_around_zero(state).items():
        expected = x[a].double().T @ x[b].double()
        norms = x[a].double().square().sum(0).max() * x[b].double().square().sum(0).max()
        assert (found - expected).abs().max() <= 2e-5 * norms.sqrt()  # MKL adds up a single column one by one


def test_masks_while_features_wait(correlation_backend):
    x = {0: features(1500, 40, 1, 5.0), 1: features(1500, 31, 2, 5.0)}
    mask = torch.rand(1500, generator=torch.Generator().manual_seed(0)) < 0.7
    kept = {key: value[mask] for key, value in x.items()}
    for value in x.values():
        value[~mask] = torch.nan
    state = correlate(x, splits=(500, 501, 1000), mask=mask)
    assert state.count(1) == int(mask.sum())
    error = (state.correlation(0, 1) - truth(kept[0], kept[1])).abs().max()
    assert error <= tolerance(correlation_backend, torch.float32, 1000)


def test_layers_of_their_own_token_counts():
    """Layers that share no pair may wait for different numbers of tokens (the stacks of a translation model)."""
    state = ff.CorrelationState({"e0": 8, "e1": 9, "d0": 10, "d1": 11}, [("e0", "e1"), ("d0", "d1")])
    x = {key: features(1800 if key[0] == "e" else 700, width, i) for i, (key, width) in enumerate(state.widths.items())}
    for part in range(2):
        for key, value in x.items():
            state.push(key, value.chunk(2)[part])
        state.end_batch()
    for a, b in state.pairs:
        assert (state.correlation(a, b) - truth(x[a], x[b])).abs().max() <= 2e-6


def test_reading_does_not_disturb_the_stream(correlation_backend):
    x = {0: features(1400, 20, 1), 1: features(1400, 30, 2)}
    read = state_of(x, pairs=[(0, 1), (1, 1)])
    for start in range(0, 1400, 200):
        ff.ops.correlation_accumulate_(read, {key: value[start : start + 200] for key, value in x.items()})
        part = truth(x[0][: start + 200], x[1][: start + 200])
        assert (read.correlation(0, 1) - part).abs().max() <= tolerance(correlation_backend, torch.float32, 200)
        read.state_dict()
    other = correlate(x, splits=(300,), pairs=[(0, 1), (1, 1)])
    assert other._moments.accumulators.held() in (0, 2)
    read.merge_(other)
    assert read.count(0) == 2800
    assert (read.correlation(0, 1) - truth(x[0], x[1])).abs().max() <= 2e-6
    assert (read.correlation(1, 1) - truth(x[1], x[1])).abs().max() <= 5e-6
    torch.testing.assert_close(read.correlation(1, 1), read.correlation(1, 1).T, rtol=0, atol=1e-6)


def test_an_incomplete_batch_leaves_a_working_stream():
    x = {0: features(50, 4, 1), 1: features(50, 6, 2)}
    state = correlate(x)
    state.push(0, x[0])
    with pytest.raises(ff.FFMergeError, match="were not pushed"):
        state.end_batch()
    ff.ops.correlation_accumulate_(state, x)
    assert state.correlation(0, 1).isfinite().all()


def test_equal_bits_for_equal_features_and_threads(correlation_backend):
    """Our own products for any number of threads; MKL, which multiplies rows, may split small ones otherwise."""
    x = {0: features(1300, 290, 1).bfloat16(), 1: features(1300, 530, 2).bfloat16()}
    results = {}
    try:
        for threads in (1, 2, 1, 3, 2):
            torch.set_num_threads(threads)
            state = correlate(x, splits=(400,), pairs=[(0, 1), (0, 0)], activation="gelu")
            alike = "any" if "amx" in correlation_backend else threads
            found = {name: tensor.clone() for name, tensor in state.state_dict().items()}
            wanted = results.setdefault(alike, found)
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("ratio", [0, 1, 10, 100])
@pytest.mark.parametrize(
    "dtype, compute", [(torch.bfloat16, "auto"), (torch.float32, "auto"), (torch.float32, "bf16x3")]
)
def test_accuracy_table(dtype, compute, ratio):
    """At most 1e-6 from float64 at any |mean| / std up to 100, on as many tokens as one would not go below."""
    x = {key: features(2048, 96, key, float(ratio)).to(dtype) for key in range(2)}
    state = correlate(x, splits=(512, 1024), compute=compute)
    assert (state.correlation(0, 1) - truth(x[0], x[1])).abs().max() <= 1e-6


def test_bf16_is_good_to_one_in_a_thousand():
    x = {key: features(2048, 96, key, 100.0) for key in range(2)}
    error = (correlate(x, splits=(512,), compute="bf16").correlation(0, 1) - truth(x[0], x[1])).abs().max()
    assert 1e-6 < error <= 1e-3


# ------------------------------------------------------------------------------------------------ memory


def spooled(x, **options):
    made = state_of(x, max_memory=40_000, **options)
    assert isinstance(made._moments.accumulators, products.SpooledAccumulators)
    return made


@pytest.mark.parametrize("to_host", [False, True])
def test_spooled_features_give_the_same_bits(tmp_path, monkeypatch, to_host):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if to_host:  # as those of a GPU
        made = Spool.__init__
        monkeypatch.setattr(
            Spool, "__init__", lambda self, device: made(self, device) or setattr(self, "_to_host", True)
        )
        monkeypatch.setattr(Spool, "load", lambda self, stored: stored.clone())
    x = {0: features(2700, 70, 1), 1: features(2700, 80, 2), 2: features(2700, 60, 3)}
    pairs = [(0, 1), (1, 2), (2, 2)]
    states = state_of(x, pairs), spooled(x, pairs=pairs)
    for start, stop in zip([0, 1100, 1500, 2600], [1100, 1500, 2600, 2700], strict=True):
        for each in states:
            ff.ops.correlation_accumulate_(each, {key: value[start:stop] for key, value in x.items()})
    for a, b in pairs:
        assert torch.equal(states[0].correlation(a, b), states[1].correlation(a, b))
        assert torch.equal(states[1].correlation(a, b), states[1].correlation(a, b))
    first, second = (each.state_dict() for each in states)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for each in states:
        ff.ops.correlation_accumulate_(each, x)  # on top of products that were written
    assert (states[0].correlation(0, 1) - states[1].correlation(0, 1)).abs().max() <= 1e-6
    states[1].merge_(states[0])
    assert states[1].count(0) == 4 * 2700
    assert (states[0].correlation(0, 1) - states[1].correlation(0, 1)).abs().max() <= 1e-6
    copy = spooled(x, pairs=pairs).load_state_dict_(states[1].state_dict())
    assert torch.equal(copy.correlation(1, 2), states[1].correlation(1, 2))
    assert os.listdir(tmp_path) == []


def test_a_large_budget_changes_nothing():
    x = {0: features(100, 7, 1), 1: features(100, 8, 2)}
    assert isinstance(state_of(x, max_memory="1GiB")._moments.accumulators, products.StreamingAccumulators)


@pytest.mark.parametrize(
    "value, message",
    [
        ("lots", "max_memory: got 'lots', want a number of bytes or text such as '8GiB'"),
        (0, "max_memory: got 0, want"),
        (True, "max_memory: got True, want"),
        (-5, "max_memory: got -5, want"),
        ("1KiB", "max_memory: 1.0 kB, but the products of one pair take"),
    ],
)
def test_bad_budgets(value, message):
    with pytest.raises(ff.FFMergeError, match=message) as error:
        ff.CorrelationState({0: 64, 1: 64}, [(0, 1)], max_memory=value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, nbytes", [("8GiB", 8 * 2**30), ("500 MB", 500 * 10**6), ("1.5kib", 1536), (7, 7)])
def test_parse_bytes(text, nbytes):
    assert parse_bytes(text, "max_memory") == nbytes


def test_too_little_memory_names_bytes_and_the_way_out(monkeypatch):
    monkeypatch.setattr(products, "free_memory", lambda device: 10**6)
    with pytest.raises(ff.FFMergeError, match=r"products of 1 pairs need .*4194304 bytes.*max_memory='") as error:
        ff.CorrelationState({0: 1024, 1: 1024}, [(0, 1)])
    assert "\n" not in str(error.value)

    def refuse(*args):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4194304 bytes.")

    monkeypatch.setattr(products, "free_memory", lambda device: None)
    monkeypatch.setattr(products, "StreamingAccumulators", refuse)
    with pytest.raises(ff.FFMergeError, match="max_memory="):
        ff.CorrelationState({0: 1024, 1: 1024}, [(0, 1)])


def test_a_full_disk_is_an_error_and_not_a_crash(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    x = {0: features(1100, 70, 1), 1: features(1100, 80, 2), 2: features(1100, 80, 3)}
    with pytest.raises(ff.FFMergeError, match="No space left on device.*set TMPDIR"):
        ff.ops.correlation_accumulate_(spooled(x, pairs=[(0, 1), (0, 2)]), x)


# ------------------------------------------------------------------------------------------------ instruction sets


def test_an_instruction_set_that_the_cpu_lacks(monkeypatch):
    if reason := machine.why_no_extension():
        pytest.skip(reason)
    for isa in {"amx", "sse9"} - set(machine.extension().cpu_isas()):
        monkeypatch.setenv("FFMERGE_CPU_ISA", isa)
        monkeypatch.setenv("FFMERGE_BACKEND", "cpp")
        with pytest.raises(ff.FFMergeError, match=f"FFMERGE_CPU_ISA='{isa}' .*: use one of portable"):
            ff.CorrelationState({0: 4}, [])


def test_the_hardware_schedule_is_compiled():
    """Where no CPU with AMX is at hand, at least its instruction is: tdpbf16ps tmm0, tmm4, tmm6."""
    if (reason := machine.why_no_extension()) or platform.machine() != "x86_64":
        pytest.skip(reason or "not x86-64")
    assert bytes.fromhex("c4e24a5cc4") in Path(machine.extension().__file__).read_bytes()


def tile_product(a, b):
    """aᵀ b as AMX adds it up: steps of 32 tokens, even and odd tokens apart, chunks of 256 tokens from zero."""
    total = np.zeros((a.shape[1], b.shape[1]), np.float32)
    for chunk in range(0, len(a), 256):
        sums = np.zeros_like(total)
        for step in range(chunk, min(chunk + 256, len(a)), 32):
            halves = []
            for parity in (0, 1):
                half = np.zeros_like(total)
                for token in range(step + parity, min(step + 32, len(a)), 2):
                    half += np.outer(a[token], b[token])
                halves.append(half)
            sums += halves[0] + halves[1]
        total += sums
    return total


@pytest.mark.parametrize("tokens, widths", [(1, (1, 1)), (600, (33, 70)), (1290, (64, 31))])
def test_tiles_are_amx_bit_for_bit(correlation_backend, tokens, widths):
    if "amx" not in correlation_backend:
        pytest.skip("rows, not tiles")
    x = {
        key: torch.randn(tokens, width, generator=torch.Generator().manual_seed(key)).bfloat16()
        for key, width in enumerate(widths)
    }
    state = state_of(x, pairs=[(0, 1), (1, 1)])
    for layer in state._moments.layers.values():
        layer.tokens = 1000  # the pivot stays 0, features stay exact
    ff.ops.correlation_accumulate_(state, x)
    a, b = (x[key].float().numpy() for key in range(2))
    found = state.state_dict()
    assert np.array_equal(found["pair/0|1"].numpy(), tile_product(a, b))
    upper = np.triu(tile_product(b, b))
    assert np.array_equal(found["pair/1|1"].numpy(), upper + np.triu(upper, 1).T)


def test_low_parts_are_used_where_they_are_not_zero(correlation_backend):
    """One feature of many that is no bfloat16: only its step and strip has low parts, and they count."""
    if "amx" not in correlation_backend:
        pytest.skip("rows, not tiles")
    x = {0: torch.ones(300, 70), 1: torch.ones(300, 40)}
    x[0][170, 50], x[1][290, 3] = 1 + 2**-12, 1 - 2**-13
    state = state_of(x)
    for layer in state._moments.layers.values():
        layer.tokens = 1000
    ff.ops.correlation_accumulate_(state, x)
    expected = x[0].double().T @ x[1].double()
    assert torch.equal(state.state_dict()["pair/0|1"].double(), expected.float().double())
    assert expected[50, 3] != 300 and expected[50, 0] != expected[49, 0]
