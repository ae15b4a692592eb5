"""Pictures of layers: grids of kept experts, and matrices in a diverging scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

from liveprune.pruning.report.markup import Markup, attribute, el, joined, label, svg
from liveprune.pruning.report.numbers import fixed

LIMIT = 2.0
"""Pruning starts from ones and zeros: coefficients beyond this are few and would pale the rest."""

_LEVELS = 24
"""Shades on each side of zero; cells of one shade are one path, which keeps large maps small."""
_LETTER = 7.5
"""Width of a letter of labels, rather too wide."""
_ROOM = 640
"""Width of a map up to which its cells may grow."""


def kept_grid(ident: str, title: str, rows: Sequence[tuple[str, Sequence[int], int]]) -> Markup:
    """One row of squares per (label, kept ids, number of experts)."""
    experts = max(total for _, _, total in rows)
    size = _cell(experts)
    left = max(len(name) for name, _, _ in rows) * _LETTER + 10
    kept: list[str] = []
    removed: list[str] = []
    for i, (_, ids, total) in enumerate(rows):
        y = 20 + i * max(size, 16)
        for expert in range(total):
            square = f"M{attribute(left + expert * size + 1)} {y + 1}h{size - 2}v{size - 2}"
            (kept if expert in ids else removed).append(f"{square}h{2 - size}z")
    return svg(
        ident,
        left + experts * size + 14,
        20 + len(rows) * max(size, 16) + 2,
        title,
        "; ".join(f"{name} kept" for name, _, _ in rows),
        *_ids(experts, left, size),
        *(
            label(left - 8, 20 + i * max(size, 16) + size / 2 + 4, name, "end")
            for i, (name, _, _) in enumerate(rows)
        ),
        el("path", d="".join(removed), class_="removed") if removed else None,
        el("path", d="".join(kept), class_="kept"),
    )


def heat_map(
    ident: str,
    title: str,
    description: str,
    matrix: Sequence[Sequence[float]],
    limit: float,
) -> Markup:
    """``matrix`` [rows][columns]; the strongest colour stands for ``limit`` and beyond.

    Small matrices carry their numbers, in others negative cells are struck through.
    """
    width, height = len(matrix[0]), len(matrix)
    numbers = width <= 10
    size = 44 if numbers else _cell(width)
    left, top = 34, 20
    shades: dict[tuple[str, int], list[str]] = {}
    strokes = []
    for j, row in enumerate(matrix):
        for i, value in enumerate(row):
            shade = _shade(value, limit)
            if shade:
                x, y = left + i * size, top + j * size
                square = f"M{x} {y}h{size}v{size}h-{size}z"
                shades.setdefault((_sign(value), shade), []).append(square)
                if value < 0 and not numbers:
                    strokes.append(f"M{x + size - 1} {y + 1}l{2 - size} {size - 2}")
    every = max(1, math.ceil(18 / size))
    return svg(
        ident,
        left + width * size + 14,
        top + height * size + 2,
        title,
        description,
        *_ids(width, left, size),
        *(
            label(left - 6, top + j * size + size / 2 + 4, str(j), "end")
            for j in range(0, height, every)
        ),
        el("rect", x=left, y=top, width=width * size, height=height * size, class_="zero"),
        *(
            el("path", d="".join(cells), class_=sign, fill_opacity=shade / _LEVELS)
            for (sign, shade), cells in sorted(shades.items())
        ),
        el("path", d="".join(strokes), class_="strokes") if strokes else None,
        _numbers(matrix, left, top, size) if numbers else None,
    )


def scale(ident: str, limit: float) -> Markup:
    """The legend: a shade for each of some coefficients from -limit to limit."""
    parts = (-1, -0.5625, -0.25, -0.0625, 0, 0.0625, 0.25, 0.5625, 1)
    shapes = []
    for i, part in enumerate(parts):
        x, value = 20 + 56 * i, part * limit
        shapes.append(el("rect", x=x, y=4, width=56, height=20, class_="zero"))
        if value:
            opacity = _shade(value, limit) / _LEVELS
            shapes.append(
                el(
                    "rect",
                    x=x,
                    y=4,
                    width=56,
                    height=20,
                    class_=_sign(value),
                    fill_opacity=opacity,
                )
            )
        if value < 0:
            shapes.append(el("path", d=f"M{x + 37} 5l-18 18", class_="strokes"))
        shapes.append(label(x + 28, 42, fixed(value, 2), "middle"))
    ends = f"from {fixed(-limit, 2)} to {fixed(limit, 2)}"
    return svg(ident, 544, 50, "Colours of coefficients", ends, *shapes)


def _shade(value: float, limit: float) -> int:
    """0 for a zero alone; the square root shows small coefficients beside the ones of pruning."""
    if value == 0:
        return 0
    return max(1, round(_LEVELS * math.sqrt(min(abs(value) / limit, 1.0))))


def _sign(value: float) -> str:
    return "negative" if value < 0 else "positive"


def _cell(columns: int) -> int:
    return max(7, min(22, _ROOM // columns))


def _ids(experts: int, left: float, size: int) -> list[Markup]:
    """Expert ids above the columns, as many as have room."""
    need = (len(str(experts - 1)) + 1) * _LETTER
    every = next(x for x in (1, 2, 5, 10, 20, 50, 100) if x * size >= need)
    return [
        label(left + i * size + size / 2, 14, str(i), "middle") for i in range(0, experts, every)
    ]


def _numbers(matrix: Sequence[Sequence[float]], left: float, top: float, size: int) -> Markup:
    return joined(
        *(
            label(left + (i + 0.5) * size, top + (j + 0.5) * size + 4, fixed(value, 2), "middle")
            for j, row in enumerate(matrix)
            for i, value in enumerate(row)
        )
    )
