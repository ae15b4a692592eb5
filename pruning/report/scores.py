"""Scores and paired differences, as they stand in the cells of tables, and what they show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from liveprune.pruning.report.markup import Markup, el, joined
from liveprune.pruning.report.numbers import between, percent, points

Json = Mapping[str, Any]

MEASURED = {
    "exact": "share of rows whose greedy answer is exactly the given one",
    "contains": "share of rows whose greedy answer contains the given one",
    "choice": "share of rows where the right choice is the likeliest",
    "esap": "agreement with the full model's answers: 1 minus the total variation",
    "kl": "agreement with the full model's answers: exp(minus the Kullback-Leibler divergence)",
    "nll": "mean probability of the tokens of the full model's answers: 1 / perplexity",
}


def remark(difference: Json) -> str:
    """What a paired difference with its interval shows, in plain words."""
    low, high = difference["low"], difference["high"]
    if low == high:
        return "the same on every row" if low == 0 else "the same difference on every row"
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if low > 0 else "worse"


def score_cell(score: Json | None, decimals: int, binary: bool) -> Markup | None:
    """A ``Score`` in per cent over its interval; None stays None."""
    if score is None:
        return None
    if score["mean"] is None:
        return el("span", f"failed: {score['failure']}", class_="bad")
    right = f", {round(score['mean'] * score['n']):,} of {score['n']:,}" if binary else ""
    return joined(
        el("data", percent(score["mean"], decimals), value=repr(score["mean"])),
        el("small", f"{between(score, decimals)}{right}"),
    )


def difference_cell(difference: Json | None, decimals: int) -> Markup | None:
    """A ``Difference`` in points over its interval, and what it shows; None stays None."""
    if difference is None:
        return None
    z = "" if difference["z"] is None else f", z {difference['z']:.1f}".replace("-", "\u2212")
    return joined(
        el(
            "data",
            points(difference["difference"], decimals),
            value=repr(difference["difference"]),
        ),
        el("small", f"{between(difference, decimals, signed=True)}{z}"),
        el("small", remark(difference), class_="remark"),
    )
