"""The Triton backend of the shared FFN without a GPU: in the interpreter, and compiled for sm_90."""

import re

import pytest
import torch

from ffmerge_fast.ops.shared_ffn import triton_backend
from ffmerge_fast.ops.shared_ffn.counters import counters
from tests.helpers.shared_ffn import ACTIVATIONS
from tests.helpers.triton_tools import SHARED_BYTES, compile_for_hopper, needs_triton, run_in_the_interpreter


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    run_in_the_interpreter("interpreted_shared_ffn.py")


def compiled(kernel, pointers, ones, constants, config):
    """`compile_for_hopper` of a kernel for a model's sizes: every size and stride is a multiple of 16, but `ones`.

    pointers: name -> type, None where nothing is given.
    """
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    constants = {**{n: v for n, v in config.items() if n not in options}, **constants, "INTERPRETED": False}
    constants |= {name: None for name, kind in pointers.items() if kind is None} | dict.fromkeys(ones, 1)
    kinds = {name: f"*{kind}" for name, kind in pointers.items()}
    both = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names}
    sizes = [name for name, kind in both.items() if kind == "i32" and name != "M"]
    shared, ptx, registers, stack = compile_for_hopper(kernel, both, constants, aligned=sizes, **options)
    print(f"shared {shared}, registers {registers}, stack {stack}")
    assert shared <= SHARED_BYTES and stack == 0 and registers <= 255
    assert not re.search(r"\b(atom|red)\.[\w.]*(f16|bf16|f32|f64)", ptx)
    return shared, ptx


def pointers_of(names, half, given):
    return {name: half if name in given else None for name in names.split()}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("halves", [1, 2], ids=["plain", "gated"])
@pytest.mark.parametrize("size, stored", [("wide", "rows"), ("wide", "columns"), ("wide", ""), ("narrow", "")])
@pytest.mark.parametrize("keep, half", [(False, "bf16"), (True, "fp16")])
def test_hidden_features_compile_for_hopper(stored, halves, size, keep, half):
    from ffmerge_fast.ops.shared_ffn import triton_kernels as kernels

    config = triton_backend.closed_form(SHARED_BYTES, halves)
    config = config if size == "wide" else triton_backend.narrow(config, halves)
    given = ["x", "up", "up_bias", "hidden"] + ["gate", "gate_bias"] * (halves - 1)
    given += (["kept_up"] + ["kept_gate"] * (halves - 1)) * keep
    pointers = pointers_of("x up gate up_bias gate_bias hidden kept_up kept_gate", half, given)
    ones = ["stride_xk", *(["stride_un", "stride_gn"] if stored == "columns" else ["stride_uk", "stride_gk"])]
    constants = {"ACTIVATION": "silu" if halves == 2 else "gelu", "TMA": stored}
    _, ptx = compiled(kernels._shared_ffn_hidden_kernel, pointers, ones, constants, config)
    assert f"wgmma.mma_async.sync.aligned.m64n{config['BLOCK_N']}k16.f32.{half.replace('fp', 'f')}" in ptx
    assert ("cp.async.bulk.tensor" in ptx) == bool(stored) and ("cp.async.cg" in ptx) == (not stored)
    assert ptx.count("wgmma.mma_async") % halves == 0 and not re.search(r"\b(atom|red)\.", ptx)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("halves", [1, 2], ids=["plain", "gated"])
@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_decode_compiles_for_hopper(stored, halves, half):
    from ffmerge_fast.ops.shared_ffn.triton_decode_kernel import _shared_ffn_decode_kernel as kernel

    config = triton_backend.decode_closed_form(SHARED_BYTES, halves)
    given = ["x", "up", "down", "up_bias", "down_bias", "hidden", "y"] + ["gate", "gate_bias"] * (halves - 1)
    pointers = pointers_of("x up gate down up_bias gate_bias down_bias hidden y", half, given) | {"counters": "i32"}
    units = ["stride_uf", "stride_gf", "stride_dn"] if stored == "columns" else ["stride_ud", "stride_gd", "stride_df"]
    constants = {"ACTIVATION": "silu", "PREFETCH": stored, "WARPS": config["num_warps"]}
    shared, ptx = compiled(kernel, pointers, ["stride_xd", *units], constants, config)
    assert 2 * shared <= SHARED_BYTES  # readers and writers find room on one multiprocessor
    assert f"mma.sync.aligned.m16n8k16.row.col.f32.{half.replace('fp', 'f')}" in ptx and "cp.async.cg" in ptx
    assert "prefetch.global.L2" in ptx
    counted = re.findall(r"\b(?:atom|red)\.global\.gpu\.([\w.]+)", ptx)
    assert sorted(counted) == ["acq_rel.add.u32", "release.add.u32"]  # a reader that leaves, a slice that is ready
    waits = ptx.index("ld.global.gpu.acquire.b32")
    assert ptx.index("prefetch.global.L2") < waits < ptx.index("acq_rel.add.u32")
    ready = ptx.index("release.add.u32")
    assert "bar.sync" in ptx[ptx.rindex("st.global", 0, ready) : ready]  # all threads have stored their part


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("halves", [1, 2], ids=["plain", "gated"])
@pytest.mark.parametrize("work", ["forward", "backward", "backward with sums"])
def test_activations_compile_for_hopper(work, halves, activation):
    from ffmerge_fast.ops.shared_ffn import triton_kernels as kernels

    given = ["up", "hidden"] + ["gate"] * (halves - 1)
    given += (["d_hidden", "d_up"] + ["d_gate"] * (halves - 1)) * (work != "forward")
    pointers = pointers_of("up gate d_hidden hidden d_up d_gate", "bf16", given)
    sums = ["up_sums", "gate_sums"][: halves * work.endswith("sums")]
    pointers |= pointers_of("up_sums gate_sums", "fp32", sums)
    config = {"num_warps": 4, "num_stages": 3, "CHUNK": 64, "BLOCK_M": 8, "BLOCK_N": 128}
    _, ptx = compiled(kernels._shared_ffn_activate_kernel, pointers, [], {"ACTIVATION": activation}, config)
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx and not re.search(r"\b(atom|red)\.", ptx)


@pytest.mark.parametrize("shared", [48, 64, 99, 163, 227])  # KiB: the least, AMD, Ada, Ampere, Hopper
@pytest.mark.parametrize("halves", [1, 2])
def test_closed_forms_fit(shared, halves):
    config = triton_backend.closed_form(shared * 1024, halves)
    columns = halves * config["BLOCK_N"]
    stage = 2 * config["BLOCK_K"] * (config["BLOCK_M"] + columns)
    assert 2 * stage <= config["num_stages"] * stage <= shared * 1024
    assert (columns == 256) == (shared == 227) and config["BLOCK_N"] // config["PARTS"] <= 64
    small = triton_backend.narrow(config, halves)
    assert small["BLOCK_M"] == halves * small["BLOCK_N"] == 64 and small["num_stages"] == config["num_stages"]
    few = triton_backend.decode_closed_form(shared * 1024, halves)
    stages = [few["BLOCK_D"] * (16 + halves * few["BLOCK_F"]), few["BLOCK_K"] * (16 + few["BLOCK_N"])]
    assert few["num_stages"] > 1 and 2 * max(stages) * (few["num_stages"] - 1) <= shared * 1024
    assert few["BLOCK_D"] // few["num_warps"] >= 16  # a warp's share of a step is a multiple-add of tensor cores


def test_counters_are_aligned_zeros():
    first, second = (counters(torch.device("cpu")) for _ in range(2))
    assert not first.any() and first.dtype == torch.int32 and first.data_ptr() % 16 == 0
    assert first.data_ptr() != second.data_ptr()  # no stream orders launches on CPUs


def test_only_gpu_tensors_without_the_interpreter():
    assert "want a GPU" in triton_backend.can_run(torch.empty(0))
