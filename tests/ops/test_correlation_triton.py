"""The Triton backend of the correlation op without a GPU: in the interpreter, and compiled for sm_90."""

import json
import sys

import pytest
import torch

from ffmerge_fast.ops.common import triton_launch, tuning
from ffmerge_fast.ops.common.triton_launch import no_tf32
from ffmerge_fast.ops.correlation import triton_backend
from ffmerge_fast.ops.correlation.moments import LayerSums
from ffmerge_fast.ops.correlation.packing import Packed, Product
from tests.helpers.triton_tools import SHARED_BYTES, compile_for_hopper, needs_triton, run_in_the_interpreter

PAIRS, PAIRS_NARROW = "correlation_accumulate_pairs", "correlation_accumulate_pairs_narrow"
CONFIGS = [
    pytest.param(config, id=f"{path.stem}-{kernel}")
    for path in sorted(tuning.CONFIGS.glob("*.json"))
    for kernel, config in json.loads(path.read_text(encoding="utf-8")).items()
    if kernel.startswith("correlation")
]


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    run_in_the_interpreter("interpreted_correlation.py")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("split, high", [(False, 1), (True, 1), (True, 0)], ids=["bf16", "bf16x3", "low halves"])
@pytest.mark.parametrize("vector", [1, 4])
@pytest.mark.parametrize("config", CONFIGS)
def test_products_compile_for_hopper(config, split, high, vector):
    from ffmerge_fast.ops.correlation import triton_kernels as kernels

    config = dict(config)
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
    sides = {"a": ("*bf16",) * kernels.PAIRS, "b": ("*bf16",) * kernels.PAIRS, "c": ("*fp32",) * kernels.PAIRS}
    arguments = sides | {"problems": "*i32", "tiles": "*i32", "pairs": "i32", "tokens": "i32"}
    constants = {"SPLIT": split, "HIGH": high, "VECTOR": vector, "INTERPRETED": False, **config}
    kernel = kernels._correlation_accumulate_pairs_kernel
    shared, ptx, registers, stack = compile_for_hopper(kernel, arguments, constants, **options)
    print(f"shared {shared}, registers {registers}, stack {stack}")
    assert shared <= SHARED_BYTES and stack == 0 and registers <= 255
    assert f"wgmma.mma_async.sync.aligned.m64n{config['BLOCK_N']}k16.f32.bf16.bf16" in ptx
    assert "cp.async.bulk.tensor" in ptx and "atom" not in ptx and "red.global" not in ptx
    assert ("ld.global.v4" in ptx) == (vector == 4)


@needs_triton
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(
    "dtype, out, split", [("bf16", "bf16", True), ("fp32", "bf16", False), ("fp16", "fp32", False)]
)
def test_layer_kernel_compiles_for_hopper(activation, dtype, out, split):
    from ffmerge_fast.ops.correlation import triton_kernels as kernels

    arguments = {"x": f"*{dtype}", "mask": "*u8", "pivot": "*fp32", "out": f"*{out}"}
    arguments |= {"flags": "*bf16"} if split else {}
    arguments |= {"sums": "*fp64", "counts": "*i64"}
    arguments |= dict.fromkeys(["tokens", "rows", "chunk", "width", "stride_t"], "i32")
    constants = {} if split else {"flags": None}
    constants |= {"stride_d": 1, "ACTIVATION": activation, "SPLIT": split, "INTERPRETED": False}
    constants |= {"BLOCK_T": 8, "BLOCK_D": 128}
    arguments |= {"pitch": "i32"}
    names = kernels._correlation_accumulate_layer_kernel.arg_names
    both = arguments | dict.fromkeys(constants, "constexpr")
    ordered = {name: both[name] for name in names}
    shared, _, registers, stack = compile_for_hopper(
        kernels._correlation_accumulate_layer_kernel, ordered, constants, num_warps=4
    )
    print(f"shared {shared}, registers {registers}, stack {stack}")
    assert shared <= SHARED_BYTES and stack == 0 and registers <= 128


@needs_triton
def test_sums_kernel_compiles_for_hopper():
    from ffmerge_fast.ops.correlation import triton_kernels as kernels

    kinds = ["*fp64", "*i64", "*i64", "*fp64", "*fp64", "i32", "i32"]
    arguments = dict(zip(["sums", "counts", "count", "total", "squares", "chunks", "width"], kinds, strict=True))
    kernel = kernels._correlation_layer_sums_kernel
    shared, _, registers, stack = compile_for_hopper(kernel, arguments, {"BLOCK_D": 128}, num_warps=4)
    assert shared <= SHARED_BYTES and stack == 0 and registers <= 128


@needs_triton
@pytest.mark.parametrize("dtype, activation", [("bf16", "none"), ("fp32", "gelu"), ("fp16", "silu")])
@pytest.mark.parametrize("chosen", [False, True])
def test_ring_kernel_compiles_for_hopper(dtype, activation, chosen):
    from ffmerge_fast.ops.correlation import triton_kernels as kernels

    kernel = kernels._correlation_accumulate_ring_kernel
    kinds = {"x": f"*{dtype}", "at": "*i64", "signs": "*fp32", "pivot": "*fp32", "ring": "*fp32", "sums": "*fp64"}
    kinds |= dict.fromkeys(["tokens", "offset", "chunk", "width", "stride_t"], "i32")
    constants = {"stride_d": 1, "ACTIVATION": activation, "BLOCK_T": 8, "BLOCK_D": 128}
    constants |= {} if chosen else {"at": None}
    both = kinds | dict.fromkeys(constants, "constexpr")
    arguments = {name: both[name] for name in kernel.arg_names}
    shared, ptx, registers, stack = compile_for_hopper(kernel, arguments, constants, num_warps=4)
    print(f"shared {shared}, registers {registers}, stack {stack}")
    assert shared <= SHARED_BYTES and stack == 0 and registers <= 128
    assert "atom" not in ptx and "red.global" not in ptx


@needs_triton
@pytest.mark.parametrize("compute", ["bf16", "auto"])
def test_launches_bind_and_other_token_counts_compile_nothing(compute, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Hopper:  # what a launch asks of a driver up to the compiled kernel
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    compiled = set()

    def compile_only(kernel, grid, device, *arguments, describes=False, **options):
        compiled.add(id(kernel.warmup(*arguments, grid=grid, **options)))

    monkeypatch.setattr(triton_backend, "launch", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())  # set_active has no way back on a machine without a driver
    variants = []
    for tokens in (2100, 4096, 1, 2049):
        packing = triton_backend.TensorCorePacking({0: 300}, [(0, 0)], torch.device("cpu"), compute, "gelu")
        packed, sums = Packed(), LayerSums.empty(300, torch.float32, torch.device("cpu"))
        for mask in (None, torch.ones(tokens, dtype=torch.bool)):
            packing.pack_(0, torch.randn(tokens, 300), mask, sums, packed)
        packing.multiply_([Product((0, 0), packing.zeros((0, 0)), packed, packed)])
        variants.append(len(compiled))
    assert variants == variants[:1] * 4


@pytest.mark.parametrize("shared", [48, 64, 99, 163, 227])  # KiB: the least, AMD, Ada, Ampere, Hopper
@pytest.mark.parametrize("wide", [False, True])
def test_closed_form_fits(shared, wide):
    config = triton_backend.closed_form(shared * 1024, wide)
    stage = 2 * (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"]
    assert 2 * stage <= config["num_stages"] * stage <= shared * 1024
    assert (config["BLOCK_N"] == 256) == (wide and shared == 227)


def test_shipped_configs_are_complete():
    assert tuning.file_name("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3.json"
    files = sorted(tuning.CONFIGS.glob("*.json"))
    assert {"NVIDIA_H200.json", "NVIDIA_H100_80GB_HBM3.json"} <= {path.name for path in files}
    for path in files:
        shipped = json.loads(path.read_text(encoding="utf-8"))
        for key in (PAIRS, PAIRS_NARROW):
            assert shipped[key].keys() == triton_backend.closed_form(64 * 1024).keys()


def test_reasons_why_it_cannot_run(monkeypatch):
    assert "want a GPU" in triton_backend.can_run(torch.empty(0))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.language", None)
    triton_launch._why_no_triton.cache_clear()
    try:
        assert "pip install 'ffmerge_fast[gpu]'" in triton_backend.can_run()
    finally:
        triton_launch._why_no_triton.cache_clear()


@pytest.mark.parametrize("switch", ["legacy", "new"])
def test_float32_products_never_use_tf32(switch):
    matmul = torch.backends.cuda.matmul
    if switch == "new" and not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the legacy switch only")
    read = (lambda: matmul.fp32_precision) if switch == "new" else torch.get_float32_matmul_precision
    try:
        if switch == "new":
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        before = read()
        with no_tf32():
            assert not matmul.allow_tf32
        assert read() == before
    finally:
        if switch == "new":
            matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
