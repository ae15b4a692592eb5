"""The demo's picture: quality against memory, one line per task."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from liveprune.pruning.files import write_atomic


def save_chart(
    path: Path, models: Mapping[str, tuple[float, Mapping[str, float]]], *, highlight: str
) -> None:
    """Write a PNG.

    Args:
        path: The file.
        models: By name: expert megabytes, and accuracy (0 to 1) by task.
        highlight: The task drawn strong.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    sizes = [size for size, _ in models.values()]
    tasks = next(iter(models.values()))[1]
    for task in tasks:
        strong = task == highlight
        axes.plot(
            sizes,
            [100 * accuracy[task] for _, accuracy in models.values()],
            marker="o",
            # Wide below thin, so that tasks on the same line all show.
            linewidth=6 if strong else 1.5,
            zorder=1 if strong else 2,
            label=f"{task} (pruned for it)" if strong else task,
        )
    for name, (size, _) in models.items():
        axes.annotate(name, (size, 103), ha="center", fontsize=8)
    axes.set(xlabel="expert weights, MB", ylabel="exact match, %", ylim=(-4, 110))
    axes.set_title("Quality against memory", fontsize=11)
    axes.grid(alpha=0.25)
    axes.margins(x=0.15)
    figure.legend(fontsize=8, loc="outside right upper")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomic(path, picture.getvalue())
