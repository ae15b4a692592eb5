"""A grid as one page of HTML: what is on the front, against what, and how to serve it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import DataError
from liveprune.pruning.files import write_atomic
from liveprune.pruning.pareto import charts, tables
from liveprune.pruning.pareto.result import FORMAT
from liveprune.pruning.report.markup import Child, Markup, el, figure, joined, table
from liveprune.pruning.report.numbers import (
    between,
    count,
    fixed,
    percent,
    points,
    seconds,
    size,
    times,
)
from liveprune.pruning.report.page import page, section
from liveprune.pruning.report.scores import remark

Json = Mapping[str, Any]

_BYTES = (
    "Score against bytes of weights that a plan needs resident; plans of equal bytes stand side by "
    "side. Vertical lines are 95 % intervals of the score. Rings are on the front, numbered as in "
    "its table; the line is the best score with at most so many bytes."
)
_SPEED = (
    "Score against decoding speed in this engine, the plan served alone, in ratios to the full "
    "model of the same round: the median, and from the slowest to the fastest round as a "
    "horizontal line, cut off at the frame. The line of steps is the best score at least so fast."
)


def write_report(result_json: Json, path: Path) -> None:
    """Write the report of ``ParetoResult.to_json`` to ``path``; equal results give equal files.

    Raises:
        DataError: the result has another format.
        OSError: ``path`` cannot be written.
    """
    if result_json["format"] != FORMAT:
        raise DataError(f"result: format is {result_json['format']!r}, expected {FORMAT}")
    title = f"Quality, bytes, speed: {result_json['model']}"
    write_atomic(path, page(title, *_content(result_json)))


def commands(result: Json, folder: Path | None = None) -> list[str]:
    """For a running server: makes each of the front's plans live.

    ``folder`` is the report's, as seen from where the commands are run; None: in it.
    """
    plans = {x["name"]: x["plan"] for x in result["points"]}
    found = []
    for name in result["front"]:
        path = plans[name] if folder is None else str(folder / plans[name])
        found.append(shlex.join(["liveprune", "variants", "add", path, "--name", name]))
    return found


def _content(result: Json) -> Iterator[Child]:
    speed = charts.speed_chart(result)
    controls, by_task = tables.controls(result), tables.tasks(result)
    yield _outcome(result)
    yield section(
        "charts",
        "Quality against bytes and speed",
        figure("figure-bytes", _BYTES, charts.bytes_chart(result)),
        figure("figure-speed", _SPEED, speed) if speed is not None else _untimed(result),
    )
    yield section("front", "The front", tables.front(result), *_live(result), _remarks(result))
    if controls is not None:
        yield section("controls", "Controls at equal bytes", controls)
    if by_task is not None:
        yield section("tasks", "By file", by_task)
    yield section("points", "All points", tables.everything(result), _skipped(result))
    yield section("again", "How to repeat it", _again(result))


def _outcome(result: Json) -> Markup:
    """The smallest plan that these rows cannot tell from the full model, or that none is."""
    places, full = tables.decimals(result), result["full"]
    rows = sum(x["rows"] for x in result["data"].values())
    begin = (
        f"{result['model']} scores {percent(full['score']['mean'], places)} on "
        f"{count(rows, 'row')} with {size(full['bytes']['total'])} of weights."
    )
    scored = {x["name"]: x for x in result["points"] if "score" in x}
    close = [
        scored[name]
        for name in result["front"]
        if remark(scored[name]["against"]["full"]) != "worse"
    ]
    failed = sum(x["failure"] is not None for x in result["points"])
    after = f" {count(failed, 'plan')} failed." if failed else ""
    if not close:
        said = "Every plan on the front is shown to be worse."
        return el("p", f"{begin} {said}{after}", class_="outcome")
    best = min(close, key=lambda x: x["bytes"]["total"])
    difference = best["against"]["full"]
    saved = 100 * (1 - best["bytes"]["total"] / full["bytes"]["total"])
    speed = ""
    if best["speed"] is not None:
        speed = f" and decodes {times(best['speed']['decode']['wall']['median'])} as fast"
    return el(
        "p",
        f"{begin} Of {count(len(scored), 'plan')}, the smallest on the front that is not shown to "
        f"be worse is {best['name']}: {percent(best['score']['mean'], places)}, "
        f"{points(difference['difference'], places)} from the full model "
        f"({between(difference, places, signed=True)}). It needs {fixed(saved, 1)}"
        f"{tables.NO_BREAK}% fewer bytes{speed}.{after}",
        class_="outcome",
    )


def _live(result: Json) -> Iterator[Markup]:
    lines = commands(result)
    if lines:
        yield el("p", "To serve these plans as variants of a running server, in this folder:")
        yield el("pre", el("code", "\n".join(lines)), tabindex="0")
        yield el("p", "Then send requests to them by name, or swap one in.")


def _remarks(result: Json) -> Markup:
    return el("ul", *(el("li", text) for text in _limits(result)), class_="remarks")


def _limits(result: Json) -> Iterator[str]:
    """What must be known to read the front."""
    yield (
        "On the front is what no other point matches in score and bytes and speed at once. Scores "
        "are compared as they stand, so a place on the front does not show that a plan is better "
        "than its neighbours: the intervals do."
    )
    yield (
        "The best of many is partly luck. Score the plan that you choose once more, on rows that "
        "were not used here."
    )
    workload = result["timing"]["workload"]
    if workload is not None:
        yield (
            f"Speed is that of the engine {result['engine']} on this machine: "
            f"{workload['batch']} prompts at once, of {workload['prompt_tokens']} tokens, "
            f"{workload['new_tokens']} new ones, in {count(workload['rounds'], 'round')} in which "
            f"plan and full model took turns. Speeds whose spreads overlap count as equal. "
            f"Tokens per second are of this run only."
        )
    if workload is not None and result["engine"].startswith("transformers"):
        yield (
            "transformers runs experts one after another in Python, which flatters fewer experts: "
            "time with vLLM what is to be served with it."
        )
    yield (
        f"Bytes are those of the weights that the plan needs resident: expert rows, gates, maps "
        f"and everything else, as the checkpoint stores them. While all this was measured, the "
        f"engine held the whole model, {size(result['full']['bytes']['total'])}. KV cache and "
        f"activations come on top."
    )
    yield "Not among the controls: the full model, quantised to the same bytes."


def _untimed(result: Json) -> Markup:
    reason = result["timing"]["left_out"] or "no plan could be timed"
    return el("p", f"There is no chart of speed: {reason}.")


def _skipped(result: Json) -> Markup | None:
    if not result["skipped"]:
        return None
    rows = [[x["name"], x["reason"]] for x in result["skipped"]]
    return table("Skipped before anything ran", ["combination", "reason"], rows)


def _again(result: Json) -> Markup:
    spent = result["cost"]
    facts: list[list[Child]] = [
        ["model", result["model"]],
        ["fingerprint of its experts", el("code", result["fingerprint"])],
        ["engine", result["engine"]],
        *([name, version] for name, version in result["versions"].items()),
        *([name, json.dumps(value)] for name, value in result["arguments"].items()),
        ["wall time of making, scoring, timing", seconds(spent["wall_seconds"])],
        ["CPU time of the same", seconds(spent["cpu_seconds"])],
    ]
    data: list[list[Child]] = [
        [name, count(x["rows"]), el("code", x["digest"])] for name, x in result["data"].items()
    ]
    plans: list[list[Child]] = [
        [x["name"], None if x["digest"] is None else el("code", x["digest"])]
        for x in result["points"]
    ]
    command = result.get("command")
    return joined(
        el("p", "The command was ", el("code", command), ".") if command else None,
        el(
            "p",
            "The same command on the same model and rows makes plans with the same digests and, on "
            "an engine that rounds alike, gives the same scores; speeds differ from run to run.",
        ),
        table("Model, engine, arguments, cost", ["what", "value"], facts),
        table("Rows", ["file", "rows", "digest"], data),
        table("Plans", ["plan", "digest"], plans),
    )
