"""The shared FFN on CUDA tensors, by Triton: float64, CUDA graphs, streams, torch.compile."""

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.shared_ffn import triton_backend as backend
from ffmerge_fast.testing import assert_close_to_float64, nan_poisoned_empty, no_recompile
from tests.helpers.shared_ffn import ACTIVATIONS, POLICIES, make, plain, plain_list, with_gradients
from tests.ops.test_shared_ffn_decode import transposed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HALF = [torch.bfloat16, torch.float16]
SIZES = [(63, 100), (768, 3072), (1280, 5120)]


@pytest.fixture(autouse=True)
def on_triton():
    if reason := ff.backends()["shared_ffn"]["triton"]:
        pytest.skip(reason)
    with ff.use_backend("triton"):
        yield


def weights_of(d, d_ff, gated=False, bias=True, dtype=torch.bfloat16, layout=dict):
    return layout({name: w.cuda() for name, w in make(d, d_ff, gated, bias, dtype).items()})


def random(tokens, width, dtype=torch.bfloat16, seed=1):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def check(ours, x, weights, **options):
    true = plain(x.double(), **{n: w.double() for n, w in weights.items()}, **options)
    assert_close_to_float64(ours, plain(x, **weights, **options), true)


@pytest.mark.parametrize("d, d_ff", SIZES)
@pytest.mark.parametrize("gated, bias", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", [dict, transposed])
def test_two_times_rule_and_equal_bits(d, d_ff, gated, bias, dtype, layout):
    weights = weights_of(d, d_ff, gated, bias, dtype, layout)
    for tokens in (0, 1, 2, 5, 16, 17, 64, 431, 2048):
        x = random(tokens, d, dtype)
        with torch.no_grad(), nan_poisoned_empty():
            first, again = (ff.ops.shared_ffn(x, **weights, activation="silu") for _ in range(2))
        check(first, x, weights, activation="silu")
        assert torch.equal(first, again)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(activation, gated):
    weights = weights_of(96, 200, gated)
    for tokens in (3, 100):
        x = random(tokens, 96) * 4
        with torch.no_grad():
            check(ff.ops.shared_ffn(x, **weights, activation=activation), x, weights, activation=activation)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("d, d_ff", SIZES[:2])
def test_gradients(policy, gated, dtype, d, d_ff):
    weights = weights_of(d, d_ff, gated, True, dtype)
    xs = [random(tokens, d, dtype, tokens) for tokens in (300, 0, 700, 9000)]
    with nan_poisoned_empty():
        ours, again = (with_gradients_on_gpu(ff.ops.shared_ffn, xs, weights, recompute=policy) for _ in range(2))
    same, true = (with_gradients_on_gpu(plain_list, xs, weights, kind) for kind in (dtype, torch.float64))
    for kernel, repeated, torch_same, float64 in zip(ours, again, same, true, strict=True):
        assert torch.equal(kernel, repeated)
        assert_close_to_float64(kernel, torch_same, float64)


def with_gradients_on_gpu(function, xs, weights, dtype=None, **options):
    """`with_gradients`, whose noise is made on the CPU."""

    def moved(inputs, **others):
        return [y.cpu() for y in function(inputs, **others)]

    return with_gradients(moved, xs, weights, dtype, **options)


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("gated", [False, True])
def test_cuda_graph_sees_changed_weights_and_inputs(tokens, gated):
    weights, x = weights_of(768, 3072, gated), random(tokens, 768)

    @torch.no_grad()
    def layers():
        y = x
        for _ in range(6):
            y = torch.nn.functional.layer_norm(y + ff.ops.shared_ffn(y, **weights), (768,))
        return y

    layers()  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers()
    for seed in range(3):
        for name, w in weights.items():
            w.copy_(make(768, 3072, gated, True, torch.bfloat16, seed)[name])
        x.copy_(random(tokens, 768, seed=seed))
        eager = layers()
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            for _ in range(50):
                graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, eager)


def test_decode_on_several_streams_at_once():
    weights = weights_of(768, 3072)
    xs = [random(4, 768, seed=seed) for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in xs]
    with torch.no_grad():
        expected = [ff.ops.shared_ffn(x, **weights) for x in xs]
        torch.cuda.synchronize()
        found = [[] for _ in xs]
        for _ in range(200):
            for x, stream, results in zip(xs, streams, found, strict=True):
                with torch.cuda.stream(stream):
                    results.append(ff.ops.shared_ffn(x, **weights))
        torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for results, wanted in zip(found, expected, strict=True) for y in results)


def test_decode_without_spare_counters_in_a_graph(monkeypatch):
    from ffmerge_fast.ops.shared_ffn import counters

    weights, x = weights_of(63, 100), random(2, 63)
    with torch.no_grad():
        eager = ff.ops.shared_ffn(x, **weights)
        monkeypatch.setattr(counters, "_spare", {})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ff.ops.shared_ffn(x, **weights)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, eager)


@pytest.mark.parametrize("recompute", POLICIES)
def test_compiles_whole_and_not_again_for_other_token_counts(recompute):
    weights = {name: w.requires_grad_() for name, w in weights_of(96, 200, True).items()}
    call = lambda x: ff.ops.shared_ffn(x, **weights, activation="silu", recompute=recompute)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True)

    def gradients(function, tokens):
        x = random(tokens, 96).requires_grad_()
        y = function(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *weights.values()])]

    gradients(compiled, 40)
    with no_recompile():
        for tokens in (31, 640):
            for ours, eager in zip(gradients(compiled, tokens), gradients(call, tokens), strict=True):
                torch.testing.assert_close(ours, eager)


def test_decode_in_the_cuda_graphs_of_torch_compile():
    weights = weights_of(768, 3072)
    compiled = torch.compile(lambda x: ff.ops.shared_ffn(x, **weights) + x, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(6):  # warms up, records, replays
            x = random(2, 768, seed=seed)
            torch.testing.assert_close(compiled(x), ff.ops.shared_ffn(x, **weights) + x)


def test_weights_too_large_for_the_epilogue_or_one_launch():
    d = backend._WIDEST + 8
    weights = weights_of(d, 2 * d, True)
    for tokens in (2, 40):
        x = random(tokens, d)
        with torch.no_grad():
            check(ff.ops.shared_ffn(x, **weights), x, weights)


def test_float32_stays_float32_where_tf32_is_allowed():
    weights, x = weights_of(300, 500, dtype=torch.float32), random(50, 300, torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.no_grad():
            ours = ff.ops.shared_ffn(x, **weights)
    finally:
        torch.set_float32_matmul_precision(before)
    check(ours, x, weights)
