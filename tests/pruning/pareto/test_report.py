"""The page of a grid, read back: whole, escaped, nothing from elsewhere."""

from __future__ import annotations

import copy
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import DataError
from liveprune.pruning.pareto import timing
from liveprune.pruning.pareto.report import commands, write_report
from tests.pruning.pareto.bench import WORKLOAD, Bench, sample
from tests.pruning.search.fakes import FakeTask
from tests.pruning.search.report_page import Page, check_geometry, read_page

Json = dict[str, Any]
FAILED = "weight-norm-e6"


@pytest.fixture
def made(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Json]:
    """``made(*names of files, **changes)``: a result as it is read from report.json."""
    monkeypatch.setattr(timing, "measure", lambda engine, plan, workload: sample(plan))

    def make(*names: str, **changes: Any) -> Json:
        tasks = {name: FakeTask(bench.task.fitness, 20, name) for name in names or ("data",)}
        fields = {"workload": WORKLOAD, "untimed": "", "tasks": tasks, **changes}
        form = {**bench.run(**fields).to_json(), "command": "liveprune pareto"}
        return json.loads(json.dumps(form, allow_nan=False))  # type: ignore[no-any-return]

    return make


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Json], Page]:
    def page_of(result: Json) -> Page:
        path = tmp_path / "report.html"
        write_report(result, path)
        page = read_page(path.read_text("utf-8"))
        assert len(page.ids) == len(set(page.ids))
        assert set(page.references) <= set(page.ids)
        for svg in page.svgs:
            check_geometry(svg)
        return page

    return page_of


def table(page: Page, caption: str) -> Any:
    (found,) = [x for x in page.tables if x.caption.startswith(caption)]
    return found


def test_one_row_a_plan(made: Callable[..., Json], read: Callable[[Json], Page]) -> None:
    result = made()
    page = read(result)
    names = [point["name"] for point in result["points"]]
    points = table(page, "All points")
    rows, values = points.rows, points.values
    assert rows[0][0] == "full model"
    assert len(rows) == 1 + len(names)
    for (cell, *cells), numbers, point in zip(rows[1:], values[1:], result["points"], strict=True):
        assert cell.startswith(point["name"])
        assert ("control" in cell) == point["control"]
        assert ("on the front" in cell) == (point["name"] in result["front"])
        if point["name"] == FAILED:
            assert cells[0] == "failed: no such thing"
        else:
            assert float(numbers[0]) == point["score"]["mean"]
            assert float(numbers[1]) == point["against"]["full"]["difference"]
            assert int(numbers[2]) == point["bytes"]["total"]
            assert "2.00\xd7" in cells[3]
    front = table(page, "The front").rows
    assert [x[0] for x in front[1:]] == [f"{i}. {x}" for i, x in enumerate(result["front"], 1)]
    skipped = table(page, "Skipped before anything ran").rows
    assert skipped == [[x["name"], x["reason"]] for x in result["skipped"]]


def test_one_mark_a_plan(made: Callable[..., Json], read: Callable[[Json], Page]) -> None:
    result = made()
    page = read(result)
    scored = [x for x in result["points"] if x["failure"] is None]
    methods = list(dict.fromkeys(x["method"] for x in result["points"]))
    for picture in ("quality-bytes", "quality-speed"):
        svg = page.svg(picture)
        # The legend has one of each method, a diamond and a ring more.
        assert len(svg.marked("plan")) == len(scored) + len(methods)
        assert len(svg.marked("full-point")) == 2
        assert len(svg.marked("ring")) == len(result["front"]) + 1
        for point in scored:
            assert any(word.startswith(f"{point['name']}: ") for word in svg.words)


def test_untimed(made: Callable[..., Json], read: Callable[[Json], Page]) -> None:
    page = read(made(untimed="it is Sunday"))
    assert [svg.ident for svg in page.svgs] == ["quality-bytes"]
    assert "There is no chart of speed: it is Sunday." in page.text
    assert "decoding" not in table(page, "All points").head


def test_a_column_a_file(made: Callable[..., Json], read: Callable[[Json], Page]) -> None:
    result = made("one", "two")
    by_file = table(read(result), "Score by file")
    assert by_file.head == ["plan", "one, 20\xa0rows", "two, 20\xa0rows"]
    names = [x["name"] for x in result["points"] if x["failure"] is None]
    assert [row[0] for row in by_file.rows] == ["full model", *names]


def test_names_are_escaped(
    made: Callable[..., Json], read: Callable[[Json], Page], tmp_path: Path
) -> None:
    bad = "<script>alert('1')</script>\"&\x00\ud800"
    shown = "<script>alert('1')</script>\"&\ufffd?"
    result = made("one", "two")
    plain = read(result)
    hostile = copy.deepcopy(result)
    first = hostile["front"][0]
    for measured in (hostile["full"], *hostile["points"]):
        if "tasks" in measured:
            measured["tasks"][bad] = measured["tasks"].pop("two")
    hostile["data"][bad] = hostile["data"].pop("two")
    for point in hostile["points"]:
        if point["name"] == first:
            point |= {"name": bad, "plan": f"plans/{bad}.json"}
        if point["failure"] is not None:
            point["failure"] = bad
    hostile["front"][0] = bad
    hostile |= {"model": bad, "engine": bad, "fingerprint": bad, "command": bad}
    hostile["skipped"][0]["reason"] = bad
    hostile["versions"] = {bad: bad}
    page = read(hostile)
    assert "<script" not in (tmp_path / "report.html").read_text("utf-8")
    assert page.tags == plain.tags
    assert page.headings[0] == (1, f"Quality, bytes, speed: {shown}")
    assert f"{shown}, 20\xa0rows" in table(page, "Score by file").head
    assert any(row[0].startswith(shown) for row in table(page, "All points").rows)
    assert any(row[1] == f"failed: {shown}" for row in table(page, "All points").rows)
    assert any(word.startswith(f"{shown}: ") for word in page.svg("quality-bytes").words)


def test_nothing_comes_from_elsewhere(
    made: Callable[..., Json], read: Callable[[Json], Page]
) -> None:
    page = read(made())
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "a", "base"}
    assert not re.search(r"https?:|//|url\(|@import|\bsrc=|\bhref=", page.source)
    assert "default-src 'none'" in html.unescape(page.source)


def test_commands_name_the_files_from_where_they_are_run(made: Callable[..., Json]) -> None:
    result = made()
    result["front"] = ["aimer-e2"]
    start = "liveprune variants add"
    assert commands(result) == [f"{start} plans/aimer-e2.json --name aimer-e2"]
    assert commands(result, Path("/a folder")) == [
        f"{start} '/a folder/plans/aimer-e2.json' --name aimer-e2"
    ]


def test_another_format_is_refused(made: Callable[..., Json], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="format is 99, expected 1"):
        write_report({**made(), "format": 99}, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
