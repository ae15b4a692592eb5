"""The tables of a report: the front, all points, controls at equal bytes, tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liveprune.pruning.evaluation.measures import MEASURES
from liveprune.pruning.pareto.charts import numbered
from liveprune.pruning.report.markup import Child, Markup, el, joined, table
from liveprune.pruning.report.numbers import (
    count,
    decimals_for,
    fixed,
    percent,
    significant,
    size,
    span,
    times,
)
from liveprune.pruning.report.scores import MEASURED, difference_cell, score_cell

Json = Mapping[str, Any]

NO_BREAK = "\N{NO-BREAK SPACE}"


def decimals(result: Json) -> int:
    """Of per cents, in all tables."""
    measured = [result["full"], *(x for x in result["points"] if "score" in x)]
    found = [x["score"] for x in measured]
    found += [y for x in measured for y in x["against"].values()]
    return decimals_for(found)


def front(result: Json) -> Markup:
    """The plans on the front beside the full model."""
    number = numbered(result)
    by_name = {x["name"]: x for x in result["points"]}
    rows = [
        [_name(f"{number[name]}. {name}"), *_cells(by_name[name], result)]
        for name in result["front"]
    ]
    full = "full model" if result["full"]["on_front"] else "full model (not on the front)"
    caption = (
        f"The front. Score in per cent with its 95{NO_BREAK}% interval, by {result['measure']}"
        f"{_described(result)}; difference to the full model row by row, in points"
    )
    return table(caption, _head(result), [[full, *_cells(result["full"], result)], *rows])


def everything(result: Json) -> Markup:
    """Every point of the grid, those that failed included."""
    number = numbered(result)
    rows: list[list[Child]] = [["full model", *_cells(result["full"], result)]]
    for point in result["points"]:
        name = joined(_name(point["name"]), *_notes(point, number))
        if point["failure"] is None:
            rows.append([name, *_cells(point, result)])
        else:
            message = el("span", f"failed: {point['failure']}", class_="bad")
            rows.append([name, message, *[None] * (len(_head(result)) - 2)])
    return table("All points, in the order of the grid", _head(result), rows)


def controls(result: Json) -> Markup | None:
    """Each plan against chance and frequency at the same budget and top-k."""
    others = ("random", "frequency")
    shown = [x for x in result["points"] if any(o in x.get("against", ()) for o in others)]
    if not shown:
        return None
    places = decimals(result)
    first = None
    if result["chance"]:
        first = table(
            "Random prunings: mean score and standard deviation over the seeds",
            ["budget", "seeds", "mean", "each"],
            [
                [
                    _budget(x),
                    count(len(x["means"])),
                    percent(x["mean"], places)
                    + ("" if x["deviation"] is None else f" ± {fixed(100 * x['deviation'], 1)}"),
                    ", ".join(fixed(100 * mean, places) for mean in x["means"]),
                ]
                for x in result["chance"]
            ],
        )
    second = table(
        f"Differences at the same budget and top-k, row by row, in points with their 95{NO_BREAK}% "
        f"intervals: to the mean of the random prunings, and to frequency",
        ["plan", "score", "against random", "against frequency"],
        [
            [
                _name(x["name"]),
                score_cell(x["score"], places, _binary(result)),
                *(difference_cell(x["against"].get(other), places) for other in others),
            ]
            for x in shown
        ],
    )
    return joined(first, second)


def tasks(result: Json) -> Markup | None:
    """Scores by file; None where there is one."""
    if len(result["data"]) < 2:
        return None
    places, binary = decimals(result), _binary(result)
    head = [f"{name}, {count(x['rows'], 'row')}" for name, x in result["data"].items()]
    named = {"full model": result["full"]}
    named |= {x["name"]: x for x in result["points"] if "score" in x}
    return table(
        f"Score by file, in per cent with its 95{NO_BREAK}% interval",
        ["plan", *head],
        [
            [
                _name(name),
                *(score_cell(x["tasks"][t], places, binary) for t in result["data"]),
            ]
            for name, x in named.items()
        ],
    )


def _head(result: Json) -> list[str]:
    timed = ["decoding", "prefill"] if result["timing"]["workload"] is not None else []
    return ["plan", "score", "against full", "resident", *timed, "experts, top-k"]


def _cells(point: Json, result: Json) -> list[Child]:
    places = decimals(result)
    parts, full = point["bytes"], result["full"]["bytes"]["total"]
    cells: list[Child] = [
        score_cell(point["score"], places, _binary(result)),
        difference_cell(point["against"].get("full"), places),
        joined(
            el("data", size(parts["total"]), value=str(parts["total"])),
            el("small", f"{fixed(100 * parts['total'] / full, 1)}{NO_BREAK}% of full"),
            el("small", f"{size(parts['experts'])} of it expert rows"),
        ),
    ]
    if result["timing"]["workload"] is not None:
        cells += [_pace(point, name) for name in ("decode", "prefill")]
    kept, experts = point.get("kept"), result["full"]["experts"]
    if kept is None:
        cells.append(f"all {span(experts)}")
    else:
        cells.append(f"{span(kept)} of {span(experts)}, top-{span(point['top_k'])}")
    return cells


def _pace(point: Json, name: str) -> Markup:
    if point["speed"] is None:
        message = point["speed_failure"] or "not timed"
        return el("span", message, class_="bad" if point["speed_failure"] else None)
    pace = point["speed"][name]
    wall, cpu = pace["wall"], pace["cpu"]
    spread = f"{fixed(wall['low'], 2)} to {fixed(wall['high'], 2)}"
    return joined(
        el("data", times(wall["median"]), value=repr(wall["median"])),
        el("small", spread),
        None if cpu is None else el("small", f"{times(cpu['median'])} by CPU time"),
        el("small", f"{significant(pace['tokens_per_second'])} tokens/s"),
    )


def _name(name: str) -> Markup:
    return el("span", name, class_="name")


def _notes(point: Json, number: Mapping[str, int]) -> Sequence[Markup]:
    notes = []
    if point["name"] in number:
        notes.append(f"on the front: {number[point['name']]}")
    if point["control"]:
        notes.append("control")
    if point["same_as"] is not None:
        other = "the full model" if point["same_as"] == "full" else point["same_as"]
        notes.append(f"the same plan as {other}")
    return [el("small", note) for note in notes]


def _budget(chance: Json) -> str:
    top_k = "" if chance["top_k"] is None else f", top-{chance['top_k']}"
    return f"{chance['experts']} experts{top_k}"


def _binary(result: Json) -> bool:
    return result["measure"] in MEASURES and MEASURES[result["measure"]].binary


def _described(result: Json) -> str:
    return f": {MEASURED[result['measure']]}" if result["measure"] in MEASURED else ""
