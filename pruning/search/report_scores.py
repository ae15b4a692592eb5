"""The outcome of a search in a sentence, its scores in tables, and what they do not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from liveprune.pruning.evaluation.measures import MEASURES
from liveprune.pruning.report.markup import Markup, el, joined, table
from liveprune.pruning.report.numbers import (
    between,
    count,
    decimals_for,
    percent,
    points,
    span,
)
from liveprune.pruning.report.scores import MEASURED, difference_cell, remark, score_cell

Json = Mapping[str, Any]

SETS = ("train", "dev", "test")
_OTHERS = {
    "full": "the full model",
    "prune": "the prune winner",
    "runner_up": "the runner-up on dev",
    "train_best": "the best on train",
}


def kept_count(layer: Json) -> int:
    """Experts of a layer after the plan."""
    return len(layer["kept"] if layer["merge"] is None else layer["merge"])


def winner_stage(result: Json, stage: Json) -> str:
    """The stage that a stage's winner was made in, which may be an earlier one."""
    return next(str(x["stage"]) for x in result["curve"] if x["index"] == stage["winner"])


def outcome(result: Json) -> Markup:
    """The winner against the full model, in one sentence; then what the difference is worth."""
    stage = result["stages"][-1]
    name = "test" if "test" in stage["scores"] else "dev"
    decimals = _decimals(result)
    made = [x["stage"] for x in result["curve"]]
    tried = [(made.count("prune"), "pruning"), (made.count("merge"), "merge")]
    kind = "merged" if winner_stage(result, stage) == "merge" else "pruned"
    sentence = (
        f"The best {kind} model, with {_experts(stage['layers'])} and "
        f"{span(x['top_k'] for x in stage['layers'])} active per token, "
        f"{_scored(stage['scores'][name], decimals)} on "
        f"{count(result['data'][name]['rows'], f'{name} row')}, the full model "
        f"{_scored(result['full'][name], decimals)}; it was chosen among "
        f"{' and '.join(count(number, thing) for number, thing in tried if number)} of "
        f"{result['model']}, by {result['data']['train']['measure']} on "
        f"{count(result['data']['train']['rows'], 'train row')}."
    )
    difference = stage["differences"][name].get("full")
    paired = None
    if difference is not None:
        paired = el(
            "p",
            f"Row by row the difference to the full model is "
            f"{points(difference['difference'], decimals)} "
            f"({between(difference, decimals, signed=True)}): {remark(difference)}.",
        )
    no_test = el(
        "p",
        "There is no test set. The winner was chosen on the dev rows, so its score on them is "
        "optimistic.",
    )
    return joined(el("p", sentence, class_="outcome"), paired, None if name == "test" else no_test)


def scores(result: Json) -> Markup:
    """Both tables and the remarks."""
    sets = [name for name in SETS if name in result["data"]]
    decimals = _decimals(result)
    head = [f"{name}, {count(result['data'][name]['rows'], 'row')}" for name in sets]
    models = {"full model": result["full"]} | {
        f"{stage['name']} winner": stage["scores"] for stage in result["stages"]
    }
    measure = result["data"]["train"]["measure"]
    described = f": {MEASURED[measure]}" if measure in MEASURED else ""
    binary = measure in MEASURES and MEASURES[measure].binary
    kind = "Wilson" if binary else "Student's t"
    first = table(
        f"Mean score in per cent with its 95 % interval ({kind}), by {measure}{described}",
        ["model", *head],
        [
            [name, *(score_cell(by_set.get(x), decimals, binary) for x in sets)]
            for name, by_set in models.items()
        ],
    )
    rows = [
        [
            f"{stage['name']} winner against {_OTHERS[other]}",
            *(difference_cell(stage["differences"][x].get(other), decimals) for x in sets),
        ]
        for stage in result["stages"]
        for other in _OTHERS
        if any(other in stage["differences"][x] for x in sets)
    ]
    second = None
    if rows:
        second = table(
            "Paired differences in percentage points with their 95 % intervals (Student's t of "
            "the differences row by row); above 0 the first one is better",
            ["comparison", *head],
            rows,
        )
    remarks = [el("li", text) for text in _remarks(result, sets, decimals)]
    return joined(first, second, el("ul", *remarks, class_="remarks"))


def _remarks(result: Json, sets: list[str], decimals: int) -> Iterator[str]:
    stages = result["stages"]
    yield (
        "\N{LEFT DOUBLE QUOTATION MARK}No difference shown\N{RIGHT DOUBLE QUOTATION MARK}: the "
        "interval includes 0, so these rows cannot tell the two apart. It does not say that they "
        "are equal."
    )
    if len(stages) == 2 and stages[0]["digest"] == stages[1]["digest"]:
        yield "The merge winner is the prune winner: no merge was better on dev."
    for stage in stages:
        made = sum(x["mean"] is not None for x in result["curve"][: _end(result, stage)])
        finalists = len(stage["finalists"])
        known = [x for x in sets if stage["scores"][x]["mean"] is not None]
        means = ", ".join(f"{x} {percent(stage['scores'][x]['mean'], decimals)}" for x in known)
        changes = [
            f"{points(_gap(stage['scores'], x), decimals)} to {x} "
            f"(the full model {points(_gap(result['full'], x), decimals)})"
            for x in known[1:]
            if result["full"][x]["mean"] is not None
        ]
        moved = f"; from train {' and '.join(changes)}" if changes else ""
        yield (
            f"The {stage['name']} winner: {means or 'no score'}{moved}. It was picked out of "
            f"{count(made, 'scored candidate')} by train and {count(finalists, 'finalist')} by dev."
        )
    yield (
        "The best of many is partly luck, so a winner's train score is optimistic, and its dev "
        "score a little. What it loses from set to set beyond what the full model loses is that "
        "optimism, give or take the intervals."
    )
    if "test" in sets:
        yield "The test rows were scored once, at the end, and chose nothing."


def _end(result: Json, stage: Json) -> int:
    """Candidates made up to the end of a stage."""
    stages = ("prune", "merge") if stage["name"] == "merge" else ("prune",)
    return sum(x["stage"] in stages for x in result["curve"])


def _gap(by_set: Json, name: str) -> float:
    return float(by_set[name]["mean"] - by_set["train"]["mean"])


def _decimals(result: Json) -> int:
    found = list(result["full"].values())
    for stage in result["stages"]:
        found += stage["scores"].values()
        found += [x for others in stage["differences"].values() for x in others.values()]
    return decimals_for(found)


def _experts(layers: list[Json]) -> str:
    sizes = {(kept_count(x), x["experts"]) for x in layers}
    if all(kept == experts for kept, experts in sizes):
        return f"all {span(x['experts'] for x in layers)} experts of every layer"
    if len(sizes) == 1:
        return f"{kept_count(layers[0])} of {layers[0]['experts']} experts in every layer"
    kept, experts = sum(map(kept_count, layers)), sum(x["experts"] for x in layers)
    return f"{span(map(kept_count, layers))} experts in each layer ({kept} of {experts} in all)"


def _scored(score: Json, decimals: int) -> str:
    if score["mean"] is None:
        return f"could not be scored ({score['failure']})"
    mean = percent(score["mean"], decimals)
    return f"scores {mean} (95\N{NO-BREAK SPACE}% interval {between(score, decimals)})"
