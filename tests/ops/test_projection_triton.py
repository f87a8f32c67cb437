"""The Triton backend of the projection op without a GPU: in the interpreter, and compiled for sm_90."""

import re

import pytest
import torch

from ffmerge_fast.ops.projection import triton_backend
from tests.helpers.triton_tools import SHARED_BYTES, compile_for_hopper, needs_triton, run_in_the_interpreter

PROJECT, ADJOINT, GRADIENT = "project", "adjoint", "gradient"


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    run_in_the_interpreter("interpreted_projection.py")


def arguments_of(work, group, half):
    """(types, constants) of the kernel as a step of a large model launches it."""
    a, out = {PROJECT: ("fp32", "fp32"), ADJOINT: ("fp32", half), GRADIENT: (half, "fp32")}[work]
    select, residual = work != GRADIENT, work == PROJECT
    kinds = {"a": a, "b": half, "out": out, "index": "i64", "kept": half if work == ADJOINT else "fp32"}
    kinds |= {"residual": "fp32"}
    if not select:
        kinds |= {"index": out, "kept": out}
    types = {name: (f"*{kind}",) * group for name, kind in kinds.items()}
    types |= dict.fromkeys(("blocks", "M", "N", "K"), "i32")
    # What is contiguous: W and inner in rows or (turned) in columns, Δ in rows, the gradient of inner in columns.
    ones = dict.fromkeys(("stride_ak", "stride_bn", "stride_on", "stride_kn", "stride_rn"))
    if work == ADJOINT:
        ones = dict.fromkeys(("stride_am", "stride_bk", "stride_om", "stride_km"))
    elif work == GRADIENT:
        ones = dict.fromkeys(("stride_ak", "stride_bk", "stride_on"))
    strides = [f"stride_{name}" for name in "ab am ak bb bk bn ob om on km kn rb rm rn".split()]
    types |= {name: "i32" for name in strides if name not in ones}
    constants = dict.fromkeys(ones, 1) | {"SELECT": select, "RESIDUAL": residual, "INTERPRETED": False}
    return types, constants


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("size", ["wide", "narrow"])
@pytest.mark.parametrize("work", [PROJECT, ADJOINT, GRADIENT])
def test_compiles_for_hopper(work, size, group, half):
    from ffmerge_fast.ops.projection import triton_kernels as kernels

    config = triton_backend.closed_form(SHARED_BYTES)
    config = dict(config if size == "wide" else triton_backend.narrow(config))
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
    types, constants = arguments_of(work, group, half)
    constants |= config
    kernel = kernels._project_rows_kernel
    types = {name: types[name] for name in kernel.arg_names if name in types}
    both = types | dict.fromkeys(constants, "constexpr")
    ordered = {name: both[name] for name in kernel.arg_names}
    strides = [name for name in types if name.startswith("stride")] + ["M", "N", "K"]
    shared, ptx, registers, stack = compile_for_hopper(kernel, ordered, constants, aligned=strides, **options)
    print(f"{work} {size} {group}: shared {shared}, registers {registers}, stack {stack}")
    assert shared <= SHARED_BYTES and stack == 0 and registers <= 255
    assert f"wgmma.mma_async.sync.aligned.m64n{config['BLOCK_N']}k16.f32" in ptx
    assert "cp.async.cg" in ptx and not re.search(r"\b(atom|red)\.", ptx)


@pytest.mark.parametrize("shared", [48, 64, 99, 163, 227])  # KiB: the least, AMD, Ada, Ampere, Hopper
def test_closed_form_fits(shared):
    config = triton_backend.closed_form(shared * 1024)
    stage = (4 * config["BLOCK_M"] + 2 * config["BLOCK_N"]) * config["BLOCK_K"]
    assert stage <= config["num_stages"] * stage <= shared * 1024
    assert (config["BLOCK_N"] == 128) == (shared >= 163)
    small = triton_backend.narrow(config)
    assert small["BLOCK_M"] == small["BLOCK_N"] == 64 and small["num_stages"] == config["num_stages"]


def test_the_inverse_of_a_selection():
    inverse = triton_backend._inverse(torch.tensor([4, 0, 3]), 6)
    assert inverse.tolist() == [1, -1, -1, 2, 0, -1]


def test_half_precision_stays_and_the_rest_is_torch():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert triton_backend.operand_dtype(dtype) == dtype
    assert "want a GPU" in triton_backend.can_run(torch.empty(0))
