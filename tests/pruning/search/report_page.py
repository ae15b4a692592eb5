"""A report read back: its structure, tables, pictures, and whether these fit their frames."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from liveprune.pruning.search.report import write_report

Attributes = dict[str, str]

LETTER = 7.0
"""Width of a letter at 12 pixels, rather too wide."""


@dataclass
class Svg:
    ident: str
    width: float
    height: float
    shapes: list[tuple[str, Attributes]] = field(default_factory=list)
    labels: list[tuple[Attributes, str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def marked(self, *classes: str) -> list[Attributes]:
        return [a for _, a in self.shapes if set(classes) <= set(a.get("class", "").split())]

    def path_count(self, name: str) -> int:
        """Cells in the paths of a class."""
        return sum(a["d"].count("M") for a in self.marked(name))


@dataclass
class Table:
    caption: str = ""
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    values: list[list[str]] = field(default_factory=list)
    """The ``value`` of each ``data``, by row."""


class Page(HTMLParser):
    """Parses strictly: every element is closed where it must be."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.headings: list[tuple[int, str]] = []
        self.tables: list[Table] = []
        self.svgs: list[Svg] = []
        self.text = ""
        self._open: list[tuple[str, Attributes]] = []
        self._moves: list[tuple[float, float]] = []
        self.feed(source)
        self.close()
        assert not self._open

    def svg(self, ident: str) -> Svg:
        return next(x for x in self.svgs if x.ident == ident)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs)
        assert not any(name.startswith("on") for name in found)
        self.tags.add(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.references += found.get("aria-labelledby", "").split()
        if tag == "meta":
            return
        self._open.append((tag, found))
        if tag == "svg":
            assert found["role"] == "img"
            ident = found["aria-labelledby"].split()[0].removesuffix("-title")
            _, _, width, height = map(float, found["viewbox"].split())
            self.svgs.append(Svg(ident, width, height))
        elif tag == "table":
            self.tables.append(Table())
        elif tag == "tr" and self._in("tbody"):
            self.tables[-1].rows.append([])
            self.tables[-1].values.append([])
        elif tag in ("td", "th") and self._in("tbody"):
            self.tables[-1].rows[-1].append("")
        elif tag == "th":
            self.tables[-1].head.append("")
        elif tag == "data":
            self.tables[-1].values[-1].append(found["value"])
        elif tag[0] == "h" and tag[1:].isdigit():
            self.headings.append((int(tag[1:]), ""))
        elif self._in("svg"):
            self._shape(tag, found)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self._open:
            assert not data.strip()
            return
        tag = self._open[-1][0]
        if tag != "style":
            self.text += data
        if self._in("svg"):
            self.svgs[-1].words.append(data)
            if tag == "text":
                self.svgs[-1].labels[-1] = (self.svgs[-1].labels[-1][0], data)
        elif tag == "caption":
            self.tables[-1].caption += data
        elif self._in("tbody"):
            self.tables[-1].rows[-1][-1] += data
        elif self._in("thead"):
            self.tables[-1].head[-1] += data
        elif tag[0] == "h" and tag[1:].isdigit():
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)

    def _in(self, tag: str) -> bool:
        return any(name == tag for name, _ in self._open)

    def _shape(self, tag: str, found: Attributes) -> None:
        transform = next((a["transform"] for _, a in self._open if "transform" in a), None)
        if transform is not None:
            found = {**found, "moved": transform}
        if tag == "text":
            self.svgs[-1].labels.append((found, ""))
        elif tag not in ("title", "desc", "g"):
            self.svgs[-1].shapes.append((tag, found))


def checked_page(result: dict[str, Any], path: Path) -> Page:
    """Write the report, check what holds of every one, and read it."""
    write_report(result, path)
    page = read_page(path.read_text("utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "a", "base"}
    for svg in page.svgs:
        check_geometry(svg)
    curves = page.svg("curves")
    states = Counter(x["state"] for x in result["curve"])
    for state in ("complete", "dropped", "failed"):
        assert len(curves.marked("dot", state)) == states[state]
    for stage in result["stages"]:
        of_stage = page.svg(f"finalists-{stage['name']}")
        assert len(of_stage.marked("dot")) == len(stage["finalists"])
        assert len(of_stage.marked("ring")) == 1
    return page


def read_page(source: str) -> Page:
    assert source.startswith('<!DOCTYPE html>\n<html lang="en">')
    return Page(source.removeprefix("<!DOCTYPE html>\n"))


def check_geometry(svg: Svg) -> None:
    """Everything drawn is finite and lies in the picture, labels included."""
    for tag, found in svg.shapes:
        dx, dy = _moved(found)
        for x, y in _corners(tag, found):
            assert -0.01 <= x + dx <= svg.width + 0.01, (svg.ident, tag, found)
            assert -0.01 <= y + dy <= svg.height + 0.01, (svg.ident, tag, found)
    for found, text in svg.labels:
        part = {"start": 0.0, "middle": 0.5, "end": 1.0}[found["text-anchor"]]
        left = float(found["x"]) - part * LETTER * len(text)
        assert left >= 0, (svg.ident, text)
        assert left + LETTER * len(text) <= svg.width, (svg.ident, text)
        assert 9 <= float(found["y"]) <= svg.height - 2, (svg.ident, text)


def _moved(found: Attributes) -> tuple[float, float]:
    x, y = re.findall(r"[-\d.]+", found.get("moved", "0 0"))
    return float(x), float(y)


def _corners(tag: str, found: Attributes) -> list[tuple[float, float]]:
    if tag == "circle":
        x, y, r = (float(found[name]) for name in ("cx", "cy", "r"))
        return [(x - r, y - r), (x + r, y + r)]
    if tag == "line":
        return [(float(found[f"x{i}"]), float(found[f"y{i}"])) for i in (1, 2)]
    if tag == "rect":
        x, y, width, height = (float(found[name]) for name in ("x", "y", "width", "height"))
        return [(x, y), (x + width, y + height)]
    assert tag == "path"
    return _path(found["d"])


def _path(drawn: str) -> list[tuple[float, float]]:
    """The points of a path of the commands that reports use."""
    points: list[tuple[float, float]] = []
    x = y = 0.0
    for command, text in re.findall(r"([a-zA-Z])([^a-zA-Z]*)", drawn):
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", text)]
        assert all(map(math.isfinite, numbers))
        if command == "M":
            x, y = numbers
        elif command == "H":
            (x,) = numbers
        elif command == "V":
            (y,) = numbers
        elif command == "h":
            x += numbers[0]
        elif command == "v":
            y += numbers[0]
        elif command in "lm":
            for dx, dy in zip(numbers[::2], numbers[1::2], strict=True):
                x, y = x + dx, y + dy
                points.append((x, y))
        else:
            assert command == "z"
        points.append((x, y))
    return points
