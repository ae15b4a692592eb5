"""Plan files: JSON, with the matrices in a safetensors file beside it (docs/plan-format.md)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from liveprune.pruning.errors import PlanError
from liveprune.pruning.files import write_atomic
from liveprune.pruning.layer_plan import MATRIX_FIELDS, NeuronMap
from liveprune.pruning.plan import LayerPlan, Lineage, Matrix, Plan

FORMAT = "liveprune-plan"
CHECKPOINT_PLAN = Path("liveprune") / "plan.json"
"""Where a pruned checkpoint holds its plan: a folder below, since vLLM reads every
``*.safetensors`` beside ``config.json`` as weights."""
VERSION = 1


def save_plan(plan: Plan, path: Path) -> None:
    """Write ``path`` (JSON) and, where it has matrices, ``path`` with suffix ``.safetensors``.

    The matrices appear first, so that a JSON file never names matrices that are not there.
    """
    matrices = {name: m for layer in plan.layers for name, m in layer.matrices().items()}
    form = json.dumps(plan_to_json(plan, path.stem), indent=1) + "\n"
    if matrices:
        data = save({k: np.asarray(v) for k, v in matrices.items()}, {"plan": plan.digest})
        write_atomic(path.with_suffix(".safetensors"), data)
    write_atomic(path, form.encode())


def plan_to_json(plan: Plan, stem: str = "plan") -> dict[str, Any]:
    """The JSON form; ``stem`` names the safetensors file of a merged plan."""
    form: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "digest": plan.digest,
        "architecture": plan.architecture,
        "base_model": plan.base_model,
        "num_hidden_layers": plan.num_hidden_layers,
        "layers": [_layer_to_json(layer) for layer in plan.layers],
        "lineage": dataclasses.asdict(plan.lineage),
    }
    if plan.has_matrices:
        form["matrices"] = f"{stem}.safetensors"
    return form


def load_plan(path: Path) -> Plan:
    """Read a plan in Liveprune's own form; a folder means the plan of a pruned checkpoint.

    Raises:
        PlanError: not such a file, an unknown version, or content that its digest does not match.
    """
    if path.is_dir():
        if not (path / CHECKPOINT_PLAN).exists():
            raise PlanError(f"{path}: found no {CHECKPOINT_PLAN}; expected a pruned checkpoint")
        path = path / CHECKPOINT_PLAN
    try:
        form = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: not readable as a plan: {error}") from error
    if not isinstance(form, dict) or form.get("format") != FORMAT:
        raise PlanError(f"{path}: expected a JSON object with format {FORMAT!r}")
    if form.get("version") != VERSION:
        raise PlanError(
            f"{path}: plan version is {form.get('version')!r}; this release reads {VERSION}"
        )
    try:
        matrices = _load_matrices(path, form)
        plan = _plan_from_json(form, matrices)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path}: malformed plan: {type(error).__name__}: {error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    if plan.digest != form.get("digest"):
        raise PlanError(
            f"{path}: content has digest {plan.digest}, expected {form.get('digest')} as stated"
        )
    return plan


def _layer_to_json(layer: LayerPlan) -> dict[str, Any]:
    form: dict[str, Any] = {
        "layer": layer.layer,
        "experts": layer.experts,
        "top_k": layer.top_k,
    }
    if layer.kept:
        form["kept"] = list(layer.kept)
    if layer.expert_map:
        form["expert_map"] = list(layer.expert_map)
    form.update({name.rpartition(".")[2]: name for name in layer.matrices()})
    return form


def _load_matrices(path: Path, form: dict[str, Any]) -> dict[str, Matrix | NeuronMap]:
    name = form.get("matrices")
    if name is None:
        return {}
    if not isinstance(name, str) or Path(name).name != name:
        raise PlanError(f"matrices is {name!r}, expected a file name beside the plan")
    file = path.parent / name
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{file}: not readable as safetensors: {error}") from error


def _plan_from_json(form: dict[str, Any], matrices: dict[str, Matrix | NeuronMap]) -> Plan:
    layers = []
    for item in form["layers"]:
        named: dict[str, Any] = {}
        for field in MATRIX_FIELDS:
            if item.get(field) is not None:
                if item[field] not in matrices:
                    raise PlanError(f"layer {item['layer']}: matrix {item[field]!r} is missing")
                named[field] = matrices[item[field]]
        layers.append(
            LayerPlan(
                layer=item["layer"],
                experts=item["experts"],
                top_k=item["top_k"],
                kept=tuple(item.get("kept", ())),
                expert_map=tuple(item.get("expert_map", ())),
                **named,
            )
        )
    return Plan(
        architecture=str(form["architecture"]),
        num_hidden_layers=form["num_hidden_layers"],
        layers=tuple(layers),
        lineage=Lineage(**form["lineage"]),
        base_model=str(form.get("base_model", "")),
    )
