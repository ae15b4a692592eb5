"""A variant: a tag, and the plan that it names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from liveprune.patches.live_types import BASE_TAG
from liveprune.pruning.errors import VariantError
from liveprune.pruning.foreign import read_any_plan
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan

FULL = BASE_TAG
"""Tag of the base model."""
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, eq=False)
class Variant:
    """What a tag means; under another plan the same tag is another variant."""

    tag: str
    plan: Plan | None
    """None: the base model."""

    @property
    def digest(self) -> str | None:
        return None if self.plan is None else self.plan.digest

    def counts(self, spec: ModelSpec) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Experts (min, max, total over the layers) and top-k (min, max)."""
        if self.plan is None:
            experts = [layer.experts for layer in spec.layers]
            top_k = [layer.top_k for layer in spec.layers]
        else:
            experts = [layer.kept_experts for layer in self.plan.layers]
            top_k = [layer.top_k for layer in self.plan.layers]
        return (
            {"min": min(experts), "max": max(experts), "total": sum(experts)},
            {"min": min(top_k), "max": max(top_k)},
        )


def check_tag(tag: str) -> None:
    """Refuse a tag that an operator cannot give.

    Raises:
        VariantError: it is reserved, or not of letters, digits, ``.``, ``_`` and ``-``.
    """
    if tag == FULL:
        raise VariantError(f"tag {tag!r} is reserved for the base model; choose another")
    if not _TAG.fullmatch(tag):
        raise VariantError(
            f"tag is {tag!r}, expected a letter or digit, then letters, digits, '.', '_' or '-'"
        )


def read_variant(tag: str, path: Path, spec: ModelSpec) -> Variant:
    """Read the plan of a variant, in any form, and check it against the base model.

    Raises:
        PlanError: the plan is unreadable or does not fit.
    """
    plan = read_any_plan(path, spec)
    _ = plan.digest  # computed here, once: large merges take a while
    return Variant(tag, plan)
