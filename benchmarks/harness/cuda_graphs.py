"""Candidates on GPUs as models run them when they decode: many calls in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def calls(run: Callable[[], Any], count: int, device: str) -> Callable[[], Any]:
    """`run` called `count` times, on CUDA as one graph, so that nothing waits for Python; the last call's result."""
    if device != "cuda":
        return lambda: [run() for _ in range(count)][-1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, allocates
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            result = run()

    def replay() -> Any:
        graph.replay()
        return result

    replay.captured = run  # a graph knows addresses only: what `run` reads must live as long
    return replay


def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`torch.compile`, which on CUDA tries every GEMM it has; graphs are left to `calls`."""
    mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
    return torch.compile(function, mode=mode, dynamic=False)
