"""Expert counts per layer, as other tools state them: a budget, not a plan.

EvoESAP (``num_experts_per_layer``), MoEITS (``num_experts_by_block``) and others publish how many
experts each layer keeps (methods.md, section 11.1), but not which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import BLOCK_KEY, LIST_KEYS, ModelSpec

COUNTS_FORM = "expert-counts"


def read_counts(path: Path, spec: ModelSpec | None = None) -> list[int]:
    """Read expert counts, one per layer that has experts, ascending by layer.

    Accepts a JSON list, an object keyed by layer, an object with one of ``LIST_KEYS``, and the
    ``config.json`` of a pruned checkpoint of a known family.

    Args:
        path: the file.
        spec: the model they are meant for. With it a list over all layers loses the entries of
            the dense ones, and a length that fits neither is refused.

    Raises:
        PlanError: the file states no such counts.
        ArchitectureError: they do not fit the model.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: not readable as JSON: {error}") from error
    if isinstance(content, dict) and "model_type" in content:
        stated = ModelSpec.from_config(content)
        if spec is not None and [x.index for x in stated.layers] != [x.index for x in spec.layers]:
            raise PlanError(
                f"{path}: has experts in the layers {[x.index for x in stated.layers]}, the model "
                f"in {[x.index for x in spec.layers]}"
            )
        return [x.experts for x in stated.layers]
    value = _stated(content)
    if value is None:
        raise PlanError(
            f"{path}: found no expert counts, expected a list, an object by layer, or one of "
            f"{', '.join(LIST_KEYS)}"
        )
    if spec is not None:
        ours = (BLOCK_KEY, "per_layer_config", *LIST_KEYS)
        base = {key: item for key, item in spec.config.items() if key not in ours}
        return [x.experts for x in ModelSpec.from_config({**base, LIST_KEYS[0]: value}).layers]
    return _plain(value, path)


def states_counts(content: object) -> bool:
    """Whether parsed JSON states expert counts, or is a model's config."""
    if isinstance(content, dict) and ("model_type" in content or "per_layer_config" in content):
        return True
    return _stated(content) is not None


def _stated(content: Any) -> Any:
    """The list or object of counts in parsed JSON, or None."""
    if isinstance(content, Mapping):
        for key in LIST_KEYS:
            if isinstance(content.get(key), list | dict):
                return content[key]
    values: Any = content
    if isinstance(content, Mapping) and all(key.isdecimal() for key in content):
        values = list(content.values())
    if isinstance(values, list) and values and all(type(n) is int for n in values):
        return content
    return None


def _plain(value: Any, path: Path) -> list[int]:
    if isinstance(value, dict):
        if not all(key.isdecimal() for key in value):
            raise PlanError(f"{path}: found the keys {list(value)}, expected layer indices")
        value = [value[key] for key in sorted(value, key=int)]
    bad = [n for n in value if type(n) is not int or n < 1]
    if bad or not value:
        raise PlanError(f"{path}: found the counts {bad or value}, expected numbers from 1")
    return list(value)
