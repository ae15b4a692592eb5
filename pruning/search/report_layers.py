"""What a plan does to each layer: kept experts as a grid, coefficients as heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liveprune.pruning.report.markup import Markup, el, figure, joined, table
from liveprune.pruning.report.numbers import count, fixed, runs
from liveprune.pruning.search.report_heatmaps import LIMIT, heat_map, kept_grid, scale

Json = Mapping[str, Any]
Rows = Sequence[Sequence[float]]

_MATRICES = {
    "merge": "expert merging (merge): how much of each old expert is in a new one",
    "router_map": "router mapping (router_map): how much of an old expert's routing a new one gets",
}


@dataclass(frozen=True)
class _Block:
    """Layers with the same coefficients, and the plan of one of them."""

    layers: tuple[int, ...]
    plan: Json
    kept: tuple[int, ...] | None
    """Expert ids, where the layers are pruned; None where they are merged."""

    @property
    def name(self) -> str:
        return f"{'layer' if len(self.layers) == 1 else 'layers'} {runs(self.layers)}"

    @property
    def short(self) -> str:
        return f"{'layer' if len(self.layers) == 1 else 'layers'} {runs(self.layers, 3)}"

    @property
    def new(self) -> int:
        return len(self.plan["merge"] if self.kept is None else self.kept)


def pictures(result: Json, stage: Json) -> Markup:
    """Everything a stage's winner does, each group of layers once."""
    layers = {layer["layer"]: layer for layer in stage["layers"]}
    blocks = [
        _Block(tuple(group), layers[group[0]], kept_ids(layers[group[0]]))
        for group in result["groups"]
    ]
    pruned = [x for x in blocks if x.kept is not None]
    merged = [x for x in blocks if x.kept is None]
    return joined(
        _grid(stage["name"], pruned) if pruned else None,
        _maps(stage["name"], merged) if merged else None,
    )


def kept_ids(layer: Json) -> tuple[int, ...] | None:
    """Experts that a layer keeps; None where it merges.

    A router that does not renormalise is pruned by a router map of one-hot rows (methods.md, 1.2).
    """
    if layer["merge"] is None:
        return tuple(layer["kept"])
    ids = [_place_of_one(row) for row in layer["merge"]]
    known = [i for i in ids if i is not None]
    pruned = layer["merge"] == layer["router_map"] and len(set(known)) == len(ids)
    return tuple(sorted(known)) if pruned else None


def _place_of_one(row: Sequence[float]) -> int | None:
    ones = [i for i, value in enumerate(row) if value != 0]
    return ones[0] if len(ones) == 1 and row[ones[0]] == 1 else None


def _grid(stage: str, blocks: Sequence[_Block]) -> Markup:
    rows = [
        (f"{x.short}: {x.new} of {x.plan['experts']}", x.kept or (), x.plan["experts"])
        for x in blocks
    ]
    ident = f"kept-{stage}"
    picture = kept_grid(ident, f"Kept experts of the {stage} winner", rows)
    caption = "Kept experts, filled, by layers (down) and expert id (across)."
    if any(x.plan["merge"] is not None for x in blocks):
        caption += (
            " They are served by a router map of ones and zeros: the router does not renormalise, "
            "so the share of the removed experts stays lost."
        )
    numbers = table(
        f"Kept experts of the {stage} winner as numbers",
        ["layers", "kept ids", "active per token"],
        [[x.name, runs(x.kept or ()), str(x.plan["top_k"])] for x in blocks],
    )
    text = el("details", el("summary", "As numbers"), numbers)
    return joined(figure(f"figure-{ident}", caption, picture), text)


def _maps(stage: str, blocks: Sequence[_Block]) -> Markup:
    largest = max(
        abs(value)
        for block in blocks
        for name in _MATRICES
        for row in block.plan[name] or ()
        for value in row
    )
    limit = min(largest, LIMIT) or 1.0
    beyond = ""
    if largest > LIMIT:
        beyond = (
            f" What is farther from 0 than {fixed(LIMIT, 0)} (up to {fixed(largest, 1)}) has the "
            f"colour of {fixed(LIMIT, 0)}."
        )
    legend = figure(
        f"figure-scale-{stage}",
        "Coefficients of the heat maps, on a square-root scale so that small ones show; "
        "negative ones carry their sign or are struck through. Rows are new experts, columns old "
        f"ones.{beyond}",
        scale(f"scale-{stage}", limit),
    )
    figures = []
    for i, block in enumerate(blocks):
        maps = [
            figure(
                f"figure-{name}-{stage}-{i}",
                f"{block.name}, {meaning}",
                _map(f"{name}-{stage}-{i}", f"{name} of {block.name}", block.plan[name], limit),
            )
            for name, meaning in _MATRICES.items()
            if block.plan[name] is not None
        ]
        heading = (
            f"{block.name}: {count(block.new, 'new expert')} from {block.plan['experts']}, "
            f"{block.plan['top_k']} active per token"
        )
        figures.append(el("section", el("h4", heading), el("div", *maps, class_="pair")))
    return joined(legend, *figures)


def _map(ident: str, title: str, matrix: Rows, limit: float) -> Markup:
    values = [value for row in matrix for value in row]
    described = (
        f"{len(matrix)} new experts from {len(matrix[0])}; coefficients from "
        f"{fixed(min(values), 3)} to {fixed(max(values), 3)}, "
        f"{sum(value < 0 for value in values)} of {len(values)} negative"
    )
    return heat_map(ident, title, described, matrix, limit)
