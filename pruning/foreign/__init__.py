"""Plans in any form: Liveprune's own, and what other pruners publish (docs/plan-format.md).

A file is recognised by its content; its suffix is not looked at.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import PlanError
from liveprune.pruning.foreign.counts import COUNTS_FORM, read_counts, states_counts
from liveprune.pruning.foreign.eep import (
    EEP_FORM,
    CoefficientFile,
    Coefficients,
    eep_plan,
    read_coefficients,
)
from liveprune.pruning.foreign.reports import (
    LAYER_KEYS,
    RANKED_FORM,
    REPORT_FORM,
    layer_index,
    ranked_plan,
    report_plan,
    write_llm_compressor_report,
)
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Lineage, Plan
from liveprune.pruning.plan_guards import check_plan
from liveprune.pruning.plan_io import FORMAT, load_plan

__all__ = [
    "CoefficientFile",
    "Coefficients",
    "Form",
    "form_of",
    "read_any_plan",
    "read_coefficients",
    "read_counts",
    "write_llm_compressor_report",
]

_TORCH_MAGIC = (b"PK\x03\x04", b"\x80")
_SAFETENSORS_HEADER_LIMIT = 100_000_000


class Form(StrEnum):
    """What a file that may hold a plan turns out to be; also the method in its lineage."""

    OWN = FORMAT
    EEP = EEP_FORM
    REPORT = REPORT_FORM
    RANKED = RANKED_FORM
    COUNTS = COUNTS_FORM
    """Counts per layer: a budget for a method, not a plan."""


def form_of(path: Path) -> Form:
    """Recognise a file by its content; a folder is a checkpoint with its plan.

    Raises:
        PlanError: the file is unreadable or in no known form.
    """
    return _recognise(path)[0]


def read_any_plan(
    path: Path,
    spec: ModelSpec | None = None,
    *,
    ratio: float | None = None,
    top_k: int | None = None,
) -> Plan:
    """Read a plan in Liveprune's own form or a foreign one.

    Args:
        path: the file, or the folder of a checkpoint that Liveprune wrote.
        spec: the base model. Foreign forms do not state it and need it; any plan is checked
            against it when given.
        ratio: for ranked experts, the fraction to remove.
        top_k: for foreign forms, the active experts per token of every layer; None means the
            model's, which every layer must then keep. With a number, a layer that keeps fewer
            activates all it keeps.

    Raises:
        PlanError: the file is in no known form, damaged, or does not fit the model; or an
            argument is missing, or of no use for its form.
    """
    form, content = _recognise(path)
    if ratio is not None and form is not Form.RANKED:
        raise PlanError(f"{path}: ratio is {ratio}, but only ranked experts take one; found {form}")
    if form is Form.OWN:
        if top_k is not None:
            raise PlanError(f"{path}: top_k is {top_k}, but a {form} states its own top-k")
        plan = load_plan(path)
        if spec is not None:
            check_plan(plan, spec)
        return plan
    if form is Form.COUNTS:
        raise PlanError(
            f"{path}: states how many experts each layer keeps, not which; expected a plan. Give "
            "the counts to a method as its budget (prune --experts LIST)"
        )
    if spec is None:
        raise PlanError(
            f"{path}: found {form}, which does not state its model; pass the model it is for"
        )
    try:
        plan = _foreign_plan(form, content, path, spec, ratio, top_k)
        check_plan(plan, spec)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    return plan


def _foreign_plan(
    form: Form, content: Any, path: Path, spec: ModelSpec, ratio: float | None, top_k: int | None
) -> Plan:
    if top_k is not None and top_k < 1:
        raise PlanError(f"top_k is {top_k}, expected at least 1")
    stated = {"source": path.name, "ratio": ratio, "top_k": top_k}
    parameters = {key: value for key, value in stated.items() if value is not None}
    lineage = Lineage(form.value, parameters)
    if form is Form.EEP:
        return eep_plan(content, spec, top_k, Lineage(form.value, parameters, scores=content.score))
    if form is Form.REPORT:
        return report_plan(content, spec, top_k, lineage)
    if ratio is None:
        raise PlanError("experts are ranked, not chosen; pass ratio, the fraction to remove")
    return ranked_plan(content, spec, ratio, top_k, lineage)


def _recognise(path: Path) -> tuple[Form, Any]:
    """The form, and the parsed content where it is foreign."""
    if path.is_dir():
        return Form.OWN, None
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head.startswith(_TORCH_MAGIC) or _is_safetensors(head):
            return Form.EEP, read_coefficients(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: not readable as a plan: {error}") from error
    try:
        content = json.loads(text)
    except ValueError:
        content = _json_lines(text)
    form = _form_of_json(content)
    if form is None:
        raise PlanError(
            f"{path}: in no known form, expected one of {', '.join(Form)} (docs/plan-format.md)"
        )
    return form, [content] if form is Form.RANKED and isinstance(content, dict) else content


def _is_safetensors(head: bytes) -> bool:
    size = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and size < _SAFETENSORS_HEADER_LIMIT


def _json_lines(text: str) -> list[Any] | None:
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        return None


def _form_of_json(content: Any) -> Form | None:
    if isinstance(content, dict):
        if content.get("format") == FORMAT:
            return Form.OWN
        if any(key in content for key in LAYER_KEYS):
            return Form.RANKED
        if any(layer_index(key) is not None for key in content):
            return Form.REPORT
    elif isinstance(content, list) and content and all(isinstance(x, dict) for x in content):
        return Form.RANKED
    return Form.COUNTS if states_counts(content) else None
