"""One optimiser step of a projected FFN, from micro-batches to new weights: ours and what one would do instead.

All sides hold the same frozen W and start from the same selection with zero residuals; all use torch's fused AdamW.
The published code has two ways (paper B's repository), written again here: W_C inside the graph of every micro-batch,
input side first ("published simple"); and a small target model whose gradients are taken through the projections once
per step ("published mem_eff"), block by block, here: one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffmerge_fast.projecting import projector as projectors
from ffmerge_fast.projecting.matrices import ProjectedMatrix, Projection, grouped
from ffmerge_fast.projecting.selection import Choice

OPTIONS = {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-4}  # a large eps: updates are smooth in the gradient


@dataclass(frozen=True)
class Setting:
    """A frozen FFN, what is kept of it, and the micro-batches of one step."""

    up: Tensor  # [f, d]
    down: Tensor  # [d, f]
    kept_model: Tensor  # int64 [d'], ascending
    kept_ffn: Tensor  # int64 [f']
    inputs: list[Tensor]  # [T, d'] each
    output_grads: list[Tensor]  # [T, d'] each

    @staticmethod
    def random(
        d: int, f: int, kept: tuple[int, int], batches: int, tokens: int, dtype: torch.dtype, device: str = "cpu"
    ) -> Setting:
        generator = torch.Generator().manual_seed(0)
        up, down = (torch.randn(shape, generator=generator).mul(0.02).to(dtype) for shape in ((f, d), (d, f)))
        chosen = [torch.randperm(n, generator=generator)[:r].sort().values for n, r in zip((d, f), kept, strict=True)]
        data = torch.randn(2 * batches, tokens, kept[0], generator=generator).to(dtype)
        up, down, *chosen = (t.to(device) for t in (up, down, *chosen))
        data = data.to(device)
        return Setting(up, down, *chosen, list(data[:batches]), list(data[batches:] / tokens))

    def to(self, dtype: torch.dtype) -> Setting:
        tensors = [t.to(dtype) for t in (self.up, self.down)]
        lists = [[t.to(dtype) for t in of] for of in (self.inputs, self.output_grads)]
        return Setting(*tensors, self.kept_model, self.kept_ffn, *lists)

    def sides(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(W, kept rows, kept columns) of up and down."""
        return [(self.up, self.kept_ffn, self.kept_model), (self.down, self.kept_model, self.kept_ffn)]

    def pruned(self) -> list[Tensor]:
        return [w[rows][:, columns] for w, rows, columns in self.sides()]


class FFN(nn.Module):
    """The plain small model."""

    def __init__(self, up: Tensor, down: Tensor):
        super().__init__()
        self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())

    def forward(self, x: Tensor) -> Tensor:
        return ffn(x, self.up, self.down)


def ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.gelu(x @ up.T, approximate="tanh") @ down.T


class Plain:
    """The small model alone: the least that a step can cost."""

    def __init__(self, setting: Setting):
        self.setting, self.model = setting, FFN(*setting.pruned())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **OPTIONS)

    def step(self) -> Plain:
        for x, g in zip(self.setting.inputs, self.setting.output_grads, strict=True):
            self.model(x).backward(g)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self

    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]

    def persistent(self) -> int:
        """Bytes that the method itself must hold between steps, W and data apart: trained values and moments."""
        return 3 * sum(p.nbytes for p in self.model.parameters())


class Ours(Plain):
    """proj.student trained by proj.optimizer."""

    def __init__(self, setting: Setting):
        self.setting, self.model = setting, FFN(*setting.pruned())
        self.model.config = _Config()
        matrices = [
            ProjectedMatrix(name, parameter, weight, _as_it_is,
                            _projection(name, "p_out", rows, weight.shape[0]),
                            _projection(name, "p_in", columns, weight.shape[1]))
            for (name, parameter), (weight, rows, columns)
            in zip(self.model.named_parameters(), setting.sides(), strict=True)
        ]  # fmt: skip
        shape = projectors._shape_settings(self.model.config)
        projector = projectors.Projector(self.model, {}, grouped(matrices), {}, True, {}, shape)
        self.optimizer = projector.optimizer(**OPTIONS)
        self._trained = sum(p.numel for m in matrices for p in m.projections) + sum(
            p.numel() for p in self.model.parameters()
        )

    def persistent(self) -> int:
        return 3 * 4 * self._trained


class Naive(Plain):
    """W_C = P_out W P_in + R in the autograd graph of every micro-batch."""

    input_first: bool | None = None  # None: the cheaper order

    def __init__(self, setting: Setting):
        self.setting = setting
        wide = torch.promote_types(setting.up.dtype, torch.float32)
        self.parts = [
            [
                nn.Parameter(torch.eye(len(w), dtype=wide, device=w.device)[rows]),
                nn.Parameter(torch.eye(w.shape[1], dtype=wide, device=w.device)[:, columns]),
                nn.Parameter(torch.zeros(len(rows), len(columns), dtype=wide, device=w.device)),
            ]
            for w, rows, columns in setting.sides()
        ]
        trained = [p for part in self.parts for p in part]
        self.optimizer = torch.optim.AdamW(trained, fused=True, **OPTIONS)

    def projected(self, i: int) -> Tensor:
        w = self.setting.sides()[i][0]
        p_out, p_in, residual = (p.to(w.dtype) for p in self.parts[i])
        first = self.input_first
        if first is None:
            (r_out, o), (n, r_in) = p_out.shape, p_in.shape
            first = o * r_in * (n + r_out) <= r_out * n * (o + r_in)
        return (p_out @ (w @ p_in) if first else (p_out @ w) @ p_in) + residual

    def step(self) -> Naive:
        for x, g in zip(self.setting.inputs, self.setting.output_grads, strict=True):
            ffn(x, self.projected(0), self.projected(1)).backward(g)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self

    @torch.no_grad()
    def weights(self) -> list[Tensor]:
        return [self.projected(i) for i in range(2)]

    def persistent(self) -> int:
        return 3 * sum(p.nbytes for part in self.parts for p in part)


class PublishedSimple(Naive):
    """The published ProjectedLinear: W · P_in first, whatever it costs."""

    input_first = True


class PublishedMemEff(PublishedSimple):
    """The published mem_eff: fill a target model, run all micro-batches on it, then the graph through P once."""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.target = FFN(*setting.pruned())

    def step(self) -> PublishedMemEff:
        with torch.no_grad():
            for i, parameter in enumerate(self.target.parameters()):
                parameter.copy_(self.projected(i))
        for x, g in zip(self.setting.inputs, self.setting.output_grads, strict=True):
            self.target(x).backward(g)
        for i, parameter in enumerate(self.target.parameters()):
            self.projected(i).backward(parameter.grad)
            parameter.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self


PLAIN = "plain small model"
SIDES: dict[str, Callable[[Setting], Plain]] = {
    "ffmerge": Ours,
    "autograd": Naive,
    "published simple": PublishedSimple,
    "published mem_eff": PublishedMemEff,
    PLAIN: Plain,
}


class Gate:
    """Error of the first step's change of the weights, relative to that in float64."""

    def __init__(self, setting: Setting):
        exact = setting.to(torch.float64)
        self.start = exact.pruned()
        self.changes = {kind: self._changes(kind(exact).step().weights()) for kind in (Naive, Plain)}

    def __call__(self, side: Plain) -> float:
        wanted = self.changes[Plain if type(side) is Plain else Naive]
        found = self._changes(side.weights())
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))

    def _changes(self, weights: list[Tensor]) -> list[Tensor]:
        return [w.double() - start for w, start in zip(weights, self.start, strict=True)]


def candidates(setting: Setting) -> dict[str, Callable[[], Plain]]:
    """A step of each side; sides keep their state from call to call."""
    return {name: make(setting).step for name, make in SIDES.items()}


def extra_memory(setting: Setting) -> dict[str, int]:
    """Peak bytes that torch holds in a step of each side, above W, the data, the trained values and their moments."""
    return {name: _peak(partial(make, setting)) for name, make in SIDES.items()}


def _peak(make: Callable[[], Plain]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        side = make()
        side.step()
        with torch.profiler.record_function("second step"):
            side.step()
    events = profile.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in events if e.name() == "second step")
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, held)
    return peak - side.persistent()


class _Config:
    """What a projector wants to know of a student's config."""

    def to_json_string(self, use_diff: bool = True) -> str:
        return "{}"


def _projection(name: str, entry: str, kept: Tensor, width: int) -> Projection:
    return Projection(name, entry, Choice(torch.zeros(1, dtype=torch.int64), kept[None].cpu(), width))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
