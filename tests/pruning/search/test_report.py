from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import DataError
from liveprune.pruning.evaluation.intervals import wilson
from liveprune.pruning.plan import Plan
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.report import write_report
from tests.pruning.search.fakes import FakeTask
from tests.pruning.search.report_page import Page, checked_page

Json = dict[str, Any]
Search = Callable[..., Any]


def fitness(plan: Plan | None, row: int) -> float:
    """Best are experts 1 and 3, merging in expert 1 helps, experts 0 and 1 of layer 0 fail."""
    if plan is None:
        return 0.7
    score = 0.3 + 0.02 * (row % 5)
    for layer in plan.layers:
        if layer.merge is not None:
            score += 0.1 * math.tanh(float(layer.merge[:, 1].sum()))
        elif layer.kept == (1, 3):
            score += 0.15
    return math.nan if plan.layers[0].kept == (0, 1) else min(score, 1.0)


def sets(*, binary: bool = True, test: bool = True) -> dict[str, FakeTask]:
    sizes = {"train": 200, "dev": 100} | ({"test": 150} if test else {})
    return {name: FakeTask(fitness, size, name, binary=binary) for name, size in sizes.items()}


@pytest.fixture
def searched(run_search: Search) -> Callable[..., Json]:
    def start(tasks: dict[str, FakeTask] | None = None, **changes: Any) -> Json:
        result = run_search(**(tasks or sets()), **changes).to_json()
        return json.loads(json.dumps(result))  # type: ignore[no-any-return]

    return start


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Json], Page]:
    return lambda result: checked_page(result, tmp_path / "report.html")


def test_all_sets_both_stages(searched: Callable[..., Json], read: Callable[[Json], Page]) -> None:
    result = searched()
    states = {x["state"] for x in result["curve"]}
    assert states == {"complete", "dropped", "failed"}
    page = read(result)
    winner, full = result["stages"][1]["scores"]["test"], result["full"]["test"]
    assert f"scores {100 * winner['mean']:.1f}\xa0% (95\xa0% interval" in page.text
    assert f"the full model scores {100 * full['mean']:.1f}\xa0%" in page.text
    assert "with 2 of 4 experts in every layer and 1 active per token" in page.text
    assert "24\xa0prunings and 24\xa0merges of mixtral" in page.text
    assert "There is no test set" not in page.text
    assert page.headings == [
        (1, f"Search report: {result['model']}"),
        (2, "Scores"),
        (2, "Course of the search"),
        (2, "Finalists"),
        (2, "Layers"),
        (3, f"Prune winner, candidate {result['stages'][0]['winner']}"),
        (3, f"Merge winner, candidate {result['stages'][1]['winner']}"),
        *[x for x in page.headings if x[0] == 4],
        (2, "Cost"),
        (2, "How to repeat it"),
    ]
    assert all(table.caption for table in page.tables)
    assert "preset 'liveprune' with experts = 2, top_k = 1, inits = 8, prune" in page.text


def test_table_has_the_numbers_of_the_result(
    searched: Callable[..., Json], read: Callable[[Json], Page]
) -> None:
    result = searched()
    page = read(result)
    scores, differences = page.tables[:2]
    assert scores.head[1:] == ["train, 200\xa0rows", "dev, 100\xa0rows", "test, 150\xa0rows"]
    models = [result["full"], *(stage["scores"] for stage in result["stages"])]
    for (name, *cells), by_set in zip(scores.rows, models, strict=True):
        for cell, rows in zip(cells, ("train", "dev", "test"), strict=True):
            x = by_set[rows]
            interval = wilson(round(x["mean"] * x["n"]), x["n"])
            right = round(x["mean"] * x["n"])
            assert cell == (
                f"{100 * x['mean']:.1f}\xa0%"
                f"{100 * interval.low:.1f} to {100 * interval.high:.1f}, {right} of {x['n']}"
            ), name
    found = [float(value) for row in differences.values for value in row]
    expected = [
        stage["differences"][rows][other]["difference"]
        for stage in result["stages"]
        for other in ("full", "prune", "runner_up", "train_best")
        for rows in ("train", "dev", "test")
        if other in stage["differences"][rows]
    ]
    assert found == expected
    assert len(found) >= 9


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.05, 0.0, "no difference shown"),
        (-0.01, 0.2, "no difference shown"),
        (0.01, 0.2, "better"),
        (-0.2, -0.01, "worse"),
        (0.0, 0.0, "the same on every row"),
        (0.5, 0.5, "the same difference on every row"),
    ],
)
def test_remarks(
    low: float,
    high: float,
    said: str,
    searched: Callable[..., Json],
    read: Callable[[Json], Page],
) -> None:
    result = searched(settings=Settings(inits=4, prune_candidates=4, merge=False))
    middle = (low + high) / 2
    result["stages"][0]["differences"]["test"] = {
        "full": {"difference": middle, "low": low, "high": high, "z": None}
    }
    cell = read(result).tables[1].rows[0][3]
    number = f"{100 * middle:+.1f}".replace("-", "\u2212").replace("+0.0", "0.0")
    assert cell.startswith(f"{number}\xa0points")
    assert cell.endswith(said)


def test_no_test_set_and_dev_from_train(
    searched: Callable[..., Json], read: Callable[[Json], Page]
) -> None:
    result = searched({"train": FakeTask(fitness, 100, binary=True)})
    page = read(result)
    assert "on 30\xa0dev rows" in page.text
    assert "There is no test set" in page.text
    assert "dev is a part of the train rows" in page.text
    assert "test" not in page.tables[0].head


def test_no_merge_stage(searched: Callable[..., Json], read: Callable[[Json], Page]) -> None:
    result = searched(settings=Settings(inits=8, prune_candidates=12, merge=False))
    page = read(result)
    assert "The best pruned model" in page.text
    assert "merge stage" not in page.svg("curves").words
    assert len(page.tables[0].rows) == 2


def test_merge_only(searched: Callable[..., Json], read: Callable[[Json], Page]) -> None:
    result = searched(experts=4, settings=Settings(merge_candidates=20))
    page = read(result)
    assert [x["name"] for x in result["stages"]] == ["merge"]
    assert "with all 4 experts of every layer" in page.text
    assert "among 20\xa0merges of" in page.text
    assert not page.svg("curves").marked("border")


def test_one_candidate(searched: Callable[..., Json], read: Callable[[Json], Page]) -> None:
    settings = Settings(inits=1, prune_candidates=1, merge=False)
    page = read(searched(sets(binary=False), settings=settings))
    assert "among 1\xa0pruning of" in page.text


def test_all_values_equal(searched: Callable[..., Json], read: Callable[[Json], Page]) -> None:
    tasks = {name: FakeTask(lambda plan, row: 0.5, 30, name) for name in ("train", "dev", "test")}
    result = searched(tasks)
    page = read(result)
    assert "0.0\xa0points (0.0 to 0.0): the same on every row" in page.text
    assert "no merge was better on dev" in page.text
    assert "The same plan as the prune winner's." in page.text


def test_winner_that_fails_on_test(
    searched: Callable[..., Json], read: Callable[[Json], Page]
) -> None:
    def failing(plan: Plan | None, row: int) -> float:
        return 0.7 if plan is None else math.nan

    result = searched(sets() | {"test": FakeTask(failing, 20, "test", binary=True)})
    page = read(result)
    message = "20 of 20 values are not finite"
    assert f"could not be scored ({message}) on 20\xa0test rows" in page.text
    assert page.tables[0].rows[1][3] == f"failed: {message}"
    assert f"The merge winner could not be scored on test: {message}" in page.text


def test_failures_are_grouped(searched: Callable[..., Json], read: Callable[[Json], Page]) -> None:
    result = searched(settings=Settings(inits=4, prune_candidates=8, merge=False))
    for i, point in enumerate(result["curve"]):
        if i != result["stages"][0]["winner"]:
            point |= {"state": "failed", "mean": None, "failure": f"{i} of 40 values & <b>"}
    page = read(result)
    rows = next(x for x in page.tables if x.caption.startswith("Failures")).rows
    others = [i for i in range(len(result["curve"])) if i != result["stages"][0]["winner"]]
    assert [row[:2] for row in rows] == [
        [f"{others[0]} of 40 values & <b> (and alike)", str(len(others))]
    ]


def test_names_are_escaped(
    searched: Callable[..., Json], read: Callable[[Json], Page], tmp_path: Path
) -> None:
    result = searched(settings=Settings(inits=4, prune_candidates=8, merge=False))
    bad = "<script>alert('1')</script>\"&\x00\ud800"
    hostile = copy.deepcopy(result)
    hostile |= {"model": bad, "fingerprint": bad, "method": bad, "versions": {bad: bad}}
    hostile["parameters"] = result["parameters"] | {bad: bad, "experts": bad}
    for about in hostile["data"].values():
        about |= {"digest": bad, "measure": bad}
    hostile["stages"][0]["digest"] = bad
    hostile["curve"][-1] |= {"state": "failed", "mean": None, "failure": bad}
    hostile["stages"][0]["scores"]["test"] |= {"mean": None, "failure": bad}
    page = read(hostile)
    shown = "<script>alert('1')</script>\"&\ufffd?"
    assert page.headings[0] == (1, f"Search report: {shown}")
    assert page.text.count(shown) >= 12
    assert page.tags == read(result).tags | {"span", "p"}
    assert "<script" not in (tmp_path / "report.html").read_text("utf-8")


def test_equal_results_give_equal_files(searched: Callable[..., Json], tmp_path: Path) -> None:
    result = searched(settings=Settings(inits=4, prune_candidates=8, merge_candidates=8))
    for name in ("a", "b"):
        write_report(copy.deepcopy(result), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_loads_nothing(searched: Callable[..., Json], read: Callable[[Json], Page]) -> None:
    source = read(searched(settings=Settings(inits=2, prune_candidates=2, merge=False))).source
    assert (
        '<meta http-equiv="Content-Security-Policy" content="default-src &#x27;none&#x27;; '
        "style-src &#x27;unsafe-inline&#x27;;" in source
    )
    for outside in ("http:", "https:", "url(", "@import", "src=", "href="):
        assert outside not in source


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="format is 2, expected 1"):
        write_report({"format": 2}, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
