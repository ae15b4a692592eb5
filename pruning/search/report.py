"""A search as one page of HTML: no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import DataError
from liveprune.pruning.files import write_atomic
from liveprune.pruning.report.markup import Markup, el, figure, joined
from liveprune.pruning.report.page import page, section
from liveprune.pruning.search import report_charts, report_facts, report_layers, report_scores
from liveprune.pruning.search.result import FORMAT


def write_report(result_json: Mapping[str, Any], path: Path) -> None:
    """Write the report of ``SearchResult.to_json`` to ``path``; equal results give equal files.

    Raises:
        DataError: the result has another format.
        OSError: ``path`` cannot be written.
    """
    if result_json["format"] != FORMAT:
        raise DataError(f"result: format is {result_json['format']!r}, expected {FORMAT}")
    title = f"Search report: {result_json['model']}"
    write_atomic(path, page(title, *_content(result_json)))


def _content(result: Mapping[str, Any]) -> tuple[Markup, ...]:
    return (
        report_scores.outcome(result),
        section("scores", "Scores", report_scores.scores(result)),
        section("course", "Course of the search", _course(result)),
        section("finalists", "Finalists", _finalists(result)),
        section("layers", "Layers", *_layers(result)),
        section("cost", "Cost", report_facts.cost(result)),
        section("again", "How to repeat it", report_facts.reproduction(result)),
    )


def _course(result: Mapping[str, Any]) -> Markup:
    caption = (
        "Mean train score of every candidate in its order. One dropped in a race is shown at its "
        "mean over the rows it was scored on; the line takes complete candidates only."
    )
    return figure("figure-curves", caption, report_charts.curves(result))


def _finalists(result: Mapping[str, Any]) -> Markup:
    figures = []
    for stage in result["stages"]:
        picture = report_charts.finalists(result, stage)
        if picture is not None:
            caption = (
                f"{stage['name'].capitalize()} stage: candidates scored again on dev. The diamond "
                f"is the full model; on the dotted line both scores are equal."
            )
            if stage is not result["stages"][0]:
                caption += " Blue ones are prunings, orange ones merges."
            figures.append(figure(f"figure-finalists-{stage['name']}", caption, picture))
    return el("div", *figures, class_="pair")


def _layers(result: Mapping[str, Any]) -> list[Markup]:
    shown: dict[str, str] = {}
    parts = []
    for stage in result["stages"]:
        name = stage["name"]
        parts.append(el("h3", f"{name.capitalize()} winner, candidate {stage['winner']}"))
        if stage["digest"] in shown:
            parts.append(el("p", f"The same plan as the {shown[stage['digest']]} winner's."))
        else:
            parts.append(joined(report_layers.pictures(result, stage)))
        shown.setdefault(stage["digest"], name)
    return parts
