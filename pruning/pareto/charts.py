"""Quality against bytes and against speed: one mark a plan, intervals as whiskers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liveprune.pruning.report.axis import Axis
from liveprune.pruning.report.markup import Markup, attribute, el, joined, label, svg
from liveprune.pruning.report.numbers import (
    between,
    count,
    decimals_for,
    fixed,
    percent,
    size,
    times,
)

Json = Mapping[str, Any]

_WIDTH = 720.0
_LEFT, _RIGHT = 60.0, 704.0
_PLOT, _BELOW = 260.0, 56.0
_LINE, _LETTER = 22.0, 7.0
"""Height of a line of the legend, width of a letter in it."""
_MARGIN = 44.0
"""Inside the frame, for marks that are moved aside."""
_APART = 9.0
"""Pixels between marks of equal bytes."""
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


@dataclass(frozen=True)
class Mark:
    """One plan, or the full model, as it is drawn."""

    x: float
    low: float
    high: float
    """Ends of its whisker along x; ``x`` where there is none."""
    point: Json
    number: int | None
    """In the table of the front; None off it."""
    aside: float = 0.0
    """Pixels that it is moved to the right."""


def numbered(result: Json) -> dict[str, int]:
    """Places in the front's table by name, from 1."""
    return {name: place for place, name in enumerate(result["front"], 1)}


def bytes_chart(result: Json) -> Markup:
    """Quality against resident bytes."""
    marks = [_of_bytes(point, result) for point in _measured(result)]
    ends = [mark.x for mark in marks]
    scale, unit = next(x for x in _UNITS if max(ends) >= x[0])
    x = Axis.around(ends, _LEFT + _MARGIN, _RIGHT - _MARGIN, 0.01 * max(ends))
    x = _stretched(x)
    values, decimals = x.ticks(6, scale)
    ticks = [(v, fixed(v / scale, decimals)) for v in values]
    return _chart("bytes", result, _aside(marks), x, ticks, f"resident weights, {unit}", rises=True)


def speed_chart(result: Json) -> Markup | None:
    """Quality against decoding speed; None where nothing was timed."""
    marks = [_of_speed(point, result) for point in _measured(result) if point["speed"] is not None]
    if not marks:
        return None
    # By the medians: one round in which the machine was busy must not squeeze all the others.
    x = Axis.around([mark.x for mark in marks], _LEFT, _RIGHT, 0.1)
    values, decimals = x.ticks(6, 1.0)
    ticks = [(v, fixed(v, decimals)) for v in values]
    name = "decoding speed, full model = 1"
    return _chart("speed", result, marks, x, ticks, name, rises=False)


def _measured(result: Json) -> list[Json]:
    """The full model, then all plans that have a score."""
    return [result["full"], *(x for x in result["points"] if x.get("score") is not None)]


def _of_bytes(point: Json, result: Json) -> Mark:
    total = float(point["bytes"]["total"])
    return Mark(total, total, total, point, numbered(result).get(point.get("name", "")))


def _of_speed(point: Json, result: Json) -> Mark:
    wall = point["speed"]["decode"]["wall"]
    number = numbered(result).get(point.get("name", ""))
    return Mark(wall["median"], wall["low"], wall["high"], point, number)


def _aside(marks: Sequence[Mark]) -> list[Mark]:
    """Marks of equal bytes side by side, in the grid's order."""
    moved = []
    for mark in marks:
        alike = [other for other in marks if other.x == mark.x]
        apart = min(_APART, 2 * _MARGIN / len(alike))
        place = next(i for i, other in enumerate(alike) if other is mark)
        aside = (place - (len(alike) - 1) / 2) * apart
        moved.append(Mark(mark.x, mark.low, mark.high, mark.point, mark.number, aside))
    return moved


def _stretched(x: Axis) -> Axis:
    """The same axis over the whole frame, so that its ticks are, too."""
    each = (x.high - x.low) / (x.end - x.start)
    return Axis(x.low - _MARGIN * each, x.high + _MARGIN * each, _LEFT, _RIGHT)


def _chart(
    ident: str,
    result: Json,
    marks: Sequence[Mark],
    x: Axis,
    ticks: Sequence[tuple[float, str]],
    name: str,
    *,
    rises: bool,
) -> Markup:
    methods = list(dict.fromkeys(point["method"] for point in result["points"]))
    legend, height = _legend(methods, result)
    top, bottom = height + 26, height + 26 + _PLOT
    scores = [mark.point["score"] for mark in marks]
    y = Axis.around([end for s in scores for end in (s["low"], s["high"])], bottom, top)
    values, decimals = y.score_ticks(6)
    best = "at most so many bytes" if rises else "at least so fast"
    described = (
        f"{count(len(marks) - 1, 'plan')} and the full model; the line is the best score with "
        f"{best}"
    )
    return svg(
        f"quality-{ident}",
        _WIDTH,
        bottom + _BELOW,
        f"Quality against {name}",
        described,
        legend,
        *(el("line", x1=_LEFT, x2=_RIGHT, y1=y(v), y2=y(v), class_="grid") for v in values),
        *(label(_LEFT - 8, y(v) + 4, fixed(100 * v, decimals), "end") for v in values),
        *(label(x(v), bottom + 22, text, "middle") for v, text in ticks if x(v) > _LEFT),
        label(_RIGHT, bottom + _BELOW - 10, name, "end"),
        label(4, top - 10, "score, %"),
        _best(marks, x, y, rises=rises),
        *(shape for mark in marks for shape in _drawn(mark, methods, x, y)),
    )


def _best(marks: Sequence[Mark], x: Axis, y: Axis, *, rises: bool) -> Markup:
    """Steps through the best scores: of fewer bytes so far, or of at least that speed."""
    ordered = sorted(marks, key=lambda mark: mark.x if rises else -mark.x)
    corners: list[tuple[float, float]] = []
    for mark in ordered:
        score = mark.point["score"]["mean"]
        if not corners or score > corners[-1][1]:
            if corners and corners[-1][0] == mark.x:
                corners.pop()
            corners.append((mark.x, score))
    (first, score), *rest = corners
    path = [f"M{attribute(x(first))} {attribute(y(score))}"]
    path += [f"H{attribute(x(place))}V{attribute(y(value))}" for place, value in rest]
    path.append(f"H{attribute(_RIGHT if rises else _LEFT)}")
    return el("path", d="".join(path), class_="best")


def _drawn(mark: Mark, methods: Sequence[str], x: Axis, y: Axis) -> Iterator[Markup]:
    score = mark.point["score"]
    across, up = x(mark.x) + mark.aside, y(score["mean"])
    method = mark.point.get("method")
    colour = "" if method is None else f" m{methods.index(method) % 6}"
    ends = {"y1": y(score["low"]), "y2": y(score["high"])}
    yield el("line", x1=across, x2=across, **ends, class_=f"whisker{colour}")
    if mark.low < mark.high:
        left, right = x(max(mark.low, x.low)), x(min(mark.high, x.high))
        yield el("line", x1=left, x2=right, y1=up, y2=up, class_=f"whisker{colour}")
    title = el("title", _words(mark))
    if method is None:
        yield _diamond(across, up, title)
        return
    control = " control" if mark.point["control"] else ""
    classes = f"plan{colour}{control}"
    yield _SHAPES[methods.index(method) % len(_SHAPES)](across, up, classes, title)
    if mark.number is not None:
        yield el("circle", cx=across, cy=up, r=8, class_="ring")
        yield label(across, up - 12, str(mark.number), "middle")


def _words(mark: Mark) -> str:
    point, score = mark.point, mark.point["score"]
    decimals = decimals_for([score])
    speed = point["speed"]
    timed = "" if speed is None else f", decodes {times(speed['decode']['wall']['median'])}"
    return (
        f"{point.get('name', 'full model')}: {percent(score['mean'], decimals)} "
        f"({between(score, decimals)}), {size(point['bytes']['total'])}{timed}"
    )


def _disc(x: float, y: float, classes: str, title: Markup | None = None) -> Markup:
    return el("circle", title, cx=x, cy=y, r=4, class_=classes)


def _square(x: float, y: float, classes: str, title: Markup | None = None) -> Markup:
    return el("rect", title, x=x - 3.5, y=y - 3.5, width=7, height=7, class_=classes)


def _triangle(x: float, y: float, classes: str, title: Markup | None = None) -> Markup:
    path = f"M{attribute(x - 4.5)} {attribute(y + 3.5)}h9l-4.5 -8z"
    return el("path", title, d=path, class_=classes)


def _wedge(x: float, y: float, classes: str, title: Markup | None = None) -> Markup:
    path = f"M{attribute(x - 4.5)} {attribute(y - 3.5)}h9l-4.5 8z"
    return el("path", title, d=path, class_=classes)


_SHAPES: tuple[Callable[..., Markup], ...] = (_disc, _square, _triangle, _wedge)


def _diamond(x: float, y: float, title: Markup | None = None) -> Markup:
    path = f"M{attribute(x)} {attribute(y - 7)}l7 7l-7 7l-7-7z"
    return el("path", title, d=path, class_="full-point")


def _legend(methods: Sequence[str], result: Json) -> tuple[Markup, float]:
    """Marks with their meaning, in as many lines as they need; and their height."""
    added = {x["method"] for x in result["points"] if x["control"]}
    entries: list[tuple[Markup, str]] = []
    for place, method in enumerate(methods):
        classes = f"plan m{place % 6}" + (" control" if method in added else "")
        shape = _SHAPES[place % len(_SHAPES)](0, 0, classes)
        entries.append((shape, f"{method} (control)" if method in added else method))
    entries.append((_diamond(0, 0), "full model"))
    entries.append((el("circle", cx=0, cy=0, r=8, class_="ring"), "on the front"))
    entries.append((el("path", d="M-12 0h24", class_="best"), "best so far"))
    parts: list[Markup] = []
    across, down = 16.0, 14.0
    for shape, text in entries:
        width = 40 + _LETTER * len(text)
        if across + width > _WIDTH:
            across, down = 16.0, down + _LINE
        moved = f"translate({attribute(across)} {attribute(down)})"
        parts += [el("g", shape, transform=moved), label(across + 16, down + 4, text)]
        across += width
    return joined(*parts), down + 10
