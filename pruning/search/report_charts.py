"""The course of a search, and its finalists, as charts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from liveprune.pruning.report.axis import Axis
from liveprune.pruning.report.markup import Markup, attribute, el, joined, label, svg
from liveprune.pruning.report.numbers import count, fixed, percent

Json = Mapping[str, Any]

_WIDTH, _HEIGHT = 720.0, 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 704.0, 64.0, 310.0
_FAILED = 326.0
"""Middle of the strip for candidates without a score."""
_SIDE = 350.0


def curves(result: Json) -> Markup:
    """Every candidate in its order, the best so far, and the full model."""
    curve: list[Json] = result["curve"]
    full = result["full"]["train"]["mean"]
    scored = [x["mean"] for x in curve if x["mean"] is not None]
    levels = [] if full is None else [full]
    y = Axis.around(scored + levels or [0.0], _BOTTOM, _TOP)
    x = Axis(-0.5, max(len(curve) - 0.5, 0.5), _LEFT, _RIGHT)
    winners = {stage["winner"] for stage in result["stages"]}
    described = (
        f"{count(len(curve), 'candidate')}; best complete one "
        f"{_percent(max((p['best'] for p in curve if p['best'] is not None), default=None))}, "
        f"full model {_percent(full)} on train"
    )
    return svg(
        "curves",
        _WIDTH,
        _HEIGHT,
        "Train score of every candidate in the order of the search",
        described,
        _scale(y, _LEFT, _RIGHT),
        *_places(x, len(curve)),
        _borders(curve, x),
        _level(full, x, y),
        _steps(curve, x, y),
        *(_dot(p, i, x, y) for i, p in enumerate(curve)),
        *(
            el("circle", cx=x(i), cy=y(p["mean"]), r=8, class_="ring")
            for i, p in enumerate(curve)
            if p["index"] in winners and p["mean"] is not None
        ),
        label(_LEFT - 8, _FAILED + 4, "failed", "end") if len(scored) < len(curve) else None,
        _legend(),
    )


def finalists(result: Json, stage: Json) -> Markup | None:
    """Train against dev scores of a stage's finalists; None without any."""
    found: list[Json] = stage["finalists"]
    if not found:
        return None
    full = {name: result["full"][name]["mean"] for name in ("train", "dev")}
    known = None not in full.values()
    start, end = 56.0, _SIDE - 14
    x = Axis.around([p["train"] for p in found] + [full["train"]] * known, start, end)
    y = Axis.around([p["dev"] for p in found] + [full["dev"]] * known, _SIDE - 48, 34)
    low, high = max(x.low, y.low), min(x.high, y.high)
    equal = None
    if low < high:
        equal = el("line", x1=x(low), y1=y(low), x2=x(high), y2=y(high), class_="border")
    ident = f"finalists-{stage['name']}"
    shapes: list[Markup] = []
    for p in found:
        wins = p["index"] == stage["winner"]
        place = {"cx": x(p["train"]), "cy": y(p["dev"])}
        words = (
            f"candidate {p['index']}: train {_percent(p['train'])}, dev {_percent(p['dev'])}"
            f"{', winner' if wins else ''}"
        )
        of = next(c["stage"] for c in result["curve"] if c["index"] == p["index"])
        classes = f"dot complete {_stage_class(of)}"
        shapes.append(el("circle", el("title", words), **place, r=4, class_=classes))
        if wins:
            shapes.append(el("circle", **place, r=8, class_="ring"))
            near = place["cx"] < (start + end) / 2
            side = place["cx"] + (12 if near else -12)
            shapes.append(label(side, place["cy"] - 8, "winner", "start" if near else "end"))
    if known:
        shapes.append(_diamond(x(full["train"]), y(full["dev"])))
    values, decimals = x.score_ticks(4)
    return svg(
        ident,
        _SIDE,
        _SIDE,
        f"Finalists of the {stage['name']} stage, train against dev",
        f"{count(len(found), 'finalist')}; the winner is candidate {stage['winner']}",
        _scale(y, start, end),
        *(label(x(v), _SIDE - 30, fixed(100 * v, decimals), "middle") for v in values),
        label(start, 16, "dev score, %"),
        label(end, _SIDE - 8, "train score, %", "end"),
        equal,
        *shapes,
    )


def _percent(value: float | None) -> str:
    return "no score" if value is None else percent(value, 2)


def _stage_class(stage: str) -> str:
    return "merge" if stage == "merge" else "prune"


def _scale(y: Axis, left: float, right: float) -> Markup:
    values, decimals = y.score_ticks(6)
    return el(
        "g",
        *(el("line", x1=left, x2=right, y1=y(v), y2=y(v), class_="grid") for v in values),
        *(label(left - 8, y(v) + 4, fixed(100 * v, decimals), "end") for v in values),
    )


def _places(x: Axis, candidates: int) -> Iterator[Markup]:
    """Numbers of candidates below the chart; its titles at the axes."""
    step = max(1, 10 ** math.ceil(math.log10(max(1, candidates) / 10)))
    step = step // 2 if step >= 10 and candidates / step < 5 else step
    for place in range(0, candidates, step):
        yield label(x(place), _FAILED + 26, str(place), "middle")
    yield label(_RIGHT, _HEIGHT - 8, "candidate", "end")
    yield label(4, _TOP - 10, "train score, %")


def _borders(curve: Sequence[Json], x: Axis) -> Markup:
    """A line where a stage begins after another, and the stages' names."""
    starts = [i for i, p in enumerate(curve) if i == 0 or p["stage"] != curve[i - 1]["stage"]]
    ends = [*starts[1:], len(curve)]
    lines = [
        el("line", x1=x(i - 0.5), x2=x(i - 0.5), y1=_TOP, y2=_FAILED + 10, class_="border")
        for i in starts[1:]
    ]
    names = [
        # A short stage at an end must not push its name out of the picture.
        label(
            min(max(x((i + end - 1) / 2), _LEFT + 110), _RIGHT - 60),
            _TOP - 10,
            f"{curve[i]['stage']} stage",
            "middle",
        )
        for i, end in zip(starts, ends, strict=True)
    ]
    return joined(*lines, *names)


def _level(full: float | None, x: Axis, y: Axis) -> Markup | None:
    if full is None:
        return None
    return el("line", x1=x.start, x2=x.end, y1=y(full), y2=y(full), class_="full")


def _steps(curve: Sequence[Json], x: Axis, y: Axis) -> Markup | None:
    known = [(i, p["best"]) for i, p in enumerate(curve) if p["best"] is not None]
    if not known:
        return None
    (first, best), *rest = known
    path = [f"M{attribute(x(first))} {attribute(y(best))}"]
    for i, value in rest:
        if value != best:
            path.append(f"H{attribute(x(i))}V{attribute(y(value))}")
            best = value
    path.append(f"H{attribute(x.end)}")
    return el("path", d="".join(path), class_="best")


def _dot(point: Json, place: int, x: Axis, y: Axis) -> Markup:
    state = point["state"]
    words = [f"candidate {point['index']}", f"{point['stage']} stage", state]
    height = _FAILED
    if point["mean"] is not None:
        height = y(point["mean"])
        words.append(f"{_percent(point['mean'])} of {count(point['rows'], 'row')}")
    title = el("title", ", ".join(words))
    return _mark(state, x(place), height, f"dot {_stage_class(point['stage'])}", title)


def _mark(state: str, x: float, y: float, classes: str, title: Markup | None = None) -> Markup:
    """A disc for a complete candidate, a triangle for a dropped one, a cross for a failed one."""
    if state == "complete":
        return el("circle", title, cx=x, cy=y, r=3.5, class_=f"{classes} complete")
    at = f"M{attribute(x - 4)} "
    if state == "dropped":
        path = f"{at}{attribute(y - 3)}h8l-4 7z"
        return el("path", title, d=path, class_=f"{classes} dropped")
    return el("path", title, d=f"{at}{attribute(y - 4)}l8 8m0-8l-8 8", class_=f"{classes} failed")


def _diamond(x: float, y: float) -> Markup:
    path = f"M{attribute(x)} {attribute(y - 7)}l7 7l-7 7l-7-7z"
    return el("path", el("title", "full model"), d=path, class_="full-point")


def _legend() -> Markup:
    marks = [(_mark(x, 0, 0, "prune"), x) for x in ("complete", "dropped", "failed")]
    marks.append((el("path", d="M-12 0h24", class_="best"), "best so far"))
    marks.append((el("path", d="M-12 0h24", class_="full"), "full model"))
    marks.append((el("circle", cx=0, cy=0, r=8, class_="ring"), "stage winner"))
    places = (66, 162, 252, 345, 467, 584)
    return joined(
        *(
            joined(
                el("g", mark, transform=f"translate({place} 20)"),
                label(place + 18, 24, name),
            )
            for place, (mark, name) in zip(places, marks, strict=True)
        )
    )
