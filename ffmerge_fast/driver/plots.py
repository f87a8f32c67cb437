"""Pictures of what alignment does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..merging.plan import MergePlan
from ..merging.statistics import CorrelationStats
from ..support.env import require
from ..support.files import new_file

_MOST_NEURONS = 64  # shown per side: of more, the diagonal would be a hair


def plot_alignment(
    cases: Sequence[tuple[str, CorrelationStats, MergePlan]], path: str | os.PathLike, dpi: int = 150
) -> None:
    """Draw, per case, the correlation of the first aligned layer with its anchor: before and after alignment.

    Args:
        cases: (title, statistics, plan with permutations).
        path: picture to write (.png, .svg, .pdf).
        dpi: dots per inch.
    """
    require("matplotlib", extra="driver")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.8 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), 2, squeeze=False)
    for (title, stats, plan), (left, right) in zip(cases, axes, strict=True):
        group = plan.groups[0]
        layer = next(i for i in group.layers if i != group.anchor)
        correlation = stats.correlation(group.anchor, layer, group.stack).cpu()
        aligned = correlation[:, group.permutations[layer]]
        shown = slice(min(_MOST_NEURONS, len(correlation)))
        for axis, matrix, when in ((left, correlation, "as trained"), (right, aligned, "aligned")):
            image = axis.imshow(matrix[shown, shown], vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
            mean = matrix.diagonal().mean().item()
            axis.set_title(f"{title}, {when}: mean match {mean:.2f}", fontsize=10)
            axis.set_xlabel(f"neuron of layer {layer}")
            axis.set_ylabel(f"neuron of layer {group.anchor} (anchor)")
        figure.colorbar(image, ax=[left, right], label="correlation", shrink=0.8)
    with new_file(path) as beside:
        figure.savefig(beside, dpi=dpi, format=Path(path).suffix.removeprefix("."))
