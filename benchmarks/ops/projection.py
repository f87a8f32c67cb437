"""W, P, R and the gradient of W_C to W_C and the gradients of P; and a whole optimiser step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.ops import BF16, FP32, Case, Job
from benchmarks.studies import projection_step
from ffmerge_fast.ops.projection import chain


@dataclass(frozen=True)
class ProjectionInputs:
    """W [o, i], S by index and Δ of both sides, R and the gradient of W_C; Δ and R are float32."""

    weight: torch.Tensor
    index_out: torch.Tensor
    index_in: torch.Tensor
    delta_out: torch.Tensor  # [r_out, o]
    delta_in: torch.Tensor  # [r_in, i]
    residual: torch.Tensor
    grad: torch.Tensor

    @staticmethod
    def random(shape: tuple[int, int], kept: tuple[int, int], dtype: torch.dtype, device: str) -> ProjectionInputs:
        generator = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=generator)
        indices = [torch.randperm(n, generator=generator)[:r].sort().values for n, r in zip(shape, kept, strict=True)]
        deltas = [1e-3 * normal(r, n) for n, r in zip(shape, kept, strict=True)]
        tensors = [0.02 * normal(shape), *indices, *deltas, 1e-3 * normal(kept), normal(kept)]
        stored = [dtype, torch.int64, torch.int64, torch.float32, torch.float32, torch.float32, dtype]
        return ProjectionInputs(*(t.to(device, d) for t, d in zip(tensors, stored, strict=True)))

    def projections(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """P_out [r_out, o] and P_in [i, r_in] as matrices."""
        sides = ((self.delta_out, self.index_out), (self.delta_in, self.index_in))
        p_out, p_in = (d.to(dtype).scatter_add(1, i[:, None], d.new_ones(len(d), 1, dtype=dtype)) for d, i in sides)
        return [p_out, p_in.T]


def projection_ffmerge(t: ProjectionInputs, out: torch.Tensor) -> list[torch.Tensor]:
    """What proj.optimizer does: Δ apart from the selection, the cheaper order, W_C straight into its place."""
    sides = [chain.Side(d[None], i) for d, i in ((t.delta_out, t.index_out), (t.delta_in, t.index_in))]
    problem = chain.Problem(t.weight, *sides)
    inner = chain.project_([problem], [out], [t.residual])
    rows, columns = chain.gradients([problem], [t.grad], inner)
    return [out, rows[0][0], columns[0][0].T]


def projection_autograd(t: ProjectionInputs, projections: list[torch.Tensor], input_first: bool | None) -> list:
    """Autograd through P as float32 parameters, products in the dtype of W; None: the cheaper order."""
    p_out, p_in = (p.detach().requires_grad_() for p in projections)
    left, right = p_out.to(t.weight.dtype), p_in.to(t.weight.dtype)
    if input_first is None:
        (r_out, o), (i, r_in) = p_out.shape, p_in.shape
        input_first = o * r_in * (i + r_out) <= r_out * i * (o + r_in)
    product = left @ (t.weight @ right) if input_first else (left @ t.weight) @ right
    value = product + t.residual.to(t.weight.dtype)
    return [value.detach(), *torch.autograd.grad(value, (p_out, p_in), t.grad)]


def projection_autograd_float32(t: ProjectionInputs, projections: list[torch.Tensor]) -> list:
    """The same on a float32 copy of W, made each time: the better way on CPUs without bfloat16 units."""
    value, *gradients = projection_autograd(replace(t, weight=t.weight.float(), grad=t.grad.float()), projections, None)
    return [value.to(t.weight.dtype), *gradients]


def projection_case(size: str, shape: tuple[int, int], kept: tuple[int, int], dtype: torch.dtype) -> Case:
    def build(device: str) -> Job:
        t = ProjectionInputs.random(shape, kept, dtype, device)
        parts = (t.weight, t.index_out, t.index_in, t.delta_out, t.delta_in, t.residual, t.grad)
        exact = ProjectionInputs(*(x.double() if x.is_floating_point() else x for x in parts))
        truth = projection_autograd(exact, exact.projections(torch.float64), None)
        dense = t.projections(torch.float32)
        out = torch.empty(kept, dtype=dtype, device=device)

        def error(result: list) -> float:
            return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(result, truth, strict=True))

        candidates = {
            "ffmerge": partial(projection_ffmerge, t, out),
            "autograd": partial(projection_autograd, t, dense, None),
            "autograd, input first": partial(projection_autograd, t, dense, True),
        }
        if dtype != torch.float32:
            candidates["autograd in float32"] = partial(projection_autograd_float32, t, dense)
        return Job(candidates, error, limit=1e-5 if dtype == torch.float32 else 2e-2)

    sizes = [f"{a}x{b}" for a, b in (shape, kept)]
    return Case("projection", f"{sizes[0]} to {sizes[1]} {str(dtype).removeprefix('torch.')}", size, build)


def projection_step_case(
    size: str, d: int, f: int, kept: tuple[int, int], batches: int, tokens: int, dtype: torch.dtype
) -> Case:
    """A whole step of an FFN; the error is that of the step's change of the weights."""

    def build(device: str) -> Job:
        setting = projection_step.Setting.random(d, f, kept, batches, tokens, dtype, device)
        limit = 1e-4 if dtype == torch.float32 else 0.1
        memory = partial(projection_step.extra_memory, setting)
        return Job(projection_step.candidates(setting), projection_step.Gate(setting), limit, memory)

    name = f"step FFN {d} to {kept[0]}, {batches}x{tokens} tokens {str(dtype).removeprefix('torch.')}"
    return Case("projection", name, size, build)


CASES = [
    projection_case("small", (1024, 256), (512, 128), FP32),
    projection_case("small", (256, 256), (128, 128), BF16),
    projection_step_case("small", 256, 1024, (128, 512), batches=4, tokens=256, dtype=FP32),
    projection_case("full", (4096, 1024), (2048, 512), FP32),
    projection_case("full", (1024, 4096), (512, 2048), FP32),
    projection_case("full", (1024, 1024), (512, 512), FP32),
    projection_case("full", (1024, 1024), (512, 512), BF16),
    *(projection_step_case("full", 1024, 4096, (512, 2048), n, tokens=1024, dtype=FP32) for n in (1, 4, 16)),
]
