"""Reports of other pruners in JSON: kept ids per layer (llm-compressor), ranked experts (Ascend).

llm-compressor's REAP modifier writes ``{module name of the MoE block: retained ids}`` to its
``report_path``; that form is written as well as read (docs/plan-format.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liveprune.pruning.architectures import ARCHITECTURES
from liveprune.pruning.errors import PlanError
from liveprune.pruning.files import write_atomic
from liveprune.pruning.foreign.layers import active_experts, plan_over
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan

REPORT_FORM = "llm-compressor-report"
RANKED_FORM = "ranked-jsonl"
LAYER_KEYS = ("layer", "layer_idx", "layer_id")
RANKING_KEYS = ("experts", "ranking", "ranked_experts", "expert_ids")
_LAYER_NAME = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def layer_index(name: str) -> int | None:
    """The decoder layer that a module name such as ``model.layers.3.mlp`` lies in."""
    found = _LAYER_NAME.search(name)
    return int(found[1]) if found else None


def report_plan(
    report: Mapping[str, Any], spec: ModelSpec, top_k: int | None, lineage: Lineage
) -> Plan:
    """A plan from ``{module name: kept ids}``; layers that the report leaves out stay whole.

    Raises:
        PlanError: a name is no layer with experts or repeats one, or its ids are unusable.
    """
    kept: dict[int, Sequence[Any]] = {}
    for name, ids in report.items():
        index = layer_index(name)
        if index is None:
            raise PlanError(f"{name!r} names no layer, expected e.g. 'model.layers.3.mlp'")
        if index in kept:
            raise PlanError(f"layer {index}: named twice, the second time as {name!r}")
        kept[index] = _ids(ids, index)
    return _plan(kept, spec, top_k, lineage)


def ranked_plan(
    rows: Sequence[Mapping[str, Any]],
    spec: ModelSpec,
    ratio: float,
    top_k: int | None,
    lineage: Lineage,
) -> Plan:
    """A plan from one row per layer with all experts, most important first.

    Args:
        rows: each states a layer under one of ``LAYER_KEYS`` and every expert id of that layer
            once under one of ``RANKING_KEYS``. Every layer with experts has one row.
        spec: the model.
        ratio: fraction of the experts to remove, in [0, 1): ``floor(experts * (1 - ratio))``
            of each layer stay.
        top_k: active experts per token; None means the model's.
        lineage: where the plan comes from.

    Raises:
        PlanError: a row, or the set of rows, is not as described; or nothing would stay.
    """
    if not 0 <= ratio < 1:
        raise PlanError(f"ratio is {ratio}, expected the fraction to remove, 0 <= ratio < 1")
    rankings: dict[int, list[int]] = {}
    for number, row in enumerate(rows, start=1):
        index = _one_of(row, LAYER_KEYS, number)
        if not isinstance(index, int) or isinstance(index, bool):
            raise PlanError(f"row {number}: layer is {index!r}, expected a number")
        if index in rankings:
            raise PlanError(f"row {number}: layer {index} is ranked a second time")
        rankings[index] = _ids(_one_of(row, RANKING_KEYS, number), index)
    missing = [x.index for x in spec.layers if x.index not in rankings]
    if missing:
        raise PlanError(f"found no row for the layers {missing}, expected one for each layer")
    kept: dict[int, Sequence[int]] = {}
    for index, ranking in rankings.items():
        if sorted(ranking) != list(range(len(ranking))):
            raise PlanError(
                f"layer {index}: found the ranking {ranking}, expected every expert once"
            )
        # The small term keeps 1 of 10 at ratio 0.9, which is 0.9999... in binary.
        kept[index] = ranking[: int(len(ranking) * (1 - ratio) + 1e-9)]
    for base in spec.layers:
        if len(rankings[base.index]) != base.experts:
            raise PlanError(
                f"layer {base.index}: {len(rankings[base.index])} experts are ranked, the model "
                f"has {base.experts}"
            )
    return _plan(kept, spec, top_k, lineage)


def write_llm_compressor_report(plan: Plan, path: Path) -> None:
    """Write a plan as ``{module name of the MoE block: kept ids}``, every layer stated.

    The form holds kept ids only: top-k, the counts of the base model, the lineage and the digest
    are lost. Reading it back with the same model and ``top_k`` gives an equal plan.

    Raises:
        PlanError: the plan has a field that kept ids cannot say, a merge for one.
    """
    for layer in plan.layers:
        beyond = [name.rpartition(".")[2] for name in layer.matrices()]
        beyond += ["expert_map"] if layer.expert_map else []
        if beyond:
            raise PlanError(
                f"layer {layer.layer}: found {', '.join(beyond)}; an llm-compressor report states "
                f"kept ids only, expected a plan without"
            )
    architecture = ARCHITECTURES.get(plan.architecture)
    if architecture is None:
        raise PlanError(
            f"plan: architecture is {plan.architecture!r}, expected one of "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    report = {architecture.block_prefix(x.layer).rstrip("."): list(x.kept) for x in plan.layers}
    write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())


def _plan(
    kept: Mapping[int, Sequence[int]], spec: ModelSpec, top_k: int | None, lineage: Lineage
) -> Plan:
    expected = [x.index for x in spec.layers]
    unknown = sorted(set(kept) - set(expected))
    if unknown:
        raise PlanError(f"states the layers {unknown}, the model has experts in {expected}")
    layers = []
    for base in spec.layers:
        ids = tuple(sorted(kept.get(base.index, range(base.experts))))
        active = active_experts(base, len(ids), top_k)
        layers.append(LayerPlan(base.index, base.experts, active, kept=ids))
    return plan_over(spec, layers, lineage)


def _ids(value: Any, layer: int) -> list[int]:
    if not isinstance(value, list) or any(type(i) is not int for i in value):
        raise PlanError(f"layer {layer}: found {value!r}, expected a list of expert ids")
    return value


def _one_of(row: Mapping[str, Any], keys: tuple[str, ...], number: int) -> Any:
    found = [key for key in keys if key in row]
    if len(found) != 1:
        raise PlanError(f"row {number}: found the keys {sorted(row)}, expected one of {keys}")
    return row[found[0]]
