"""Attempts at one job: those that died without getting anywhere are counted, in its cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STALLS = 5
"""Attempts in a row that died without a new evaluation: then the job is given up."""
_AT_START, _STALLED = "evaluations_at_start", "stalled"


def begun(cost: Mapping[str, Any]) -> dict[str, Any]:
    """The cost of a job whose next attempt begins; the one before did not end in order."""
    done = cost.get("evaluations", 0)
    nowhere = cost.get(_AT_START) == done
    stalled = cost.get(_STALLED, 0) + 1 if nowhere else 0
    return {**cost, _AT_START: done, _STALLED: stalled}


def settled(cost: Mapping[str, Any]) -> dict[str, Any]:
    """The cost of a job whose attempt ended in order, or that an operator resumes."""
    return {name: value for name, value in cost.items() if name not in (_AT_START, _STALLED)}


def hopeless(cost: Mapping[str, Any]) -> bool:
    """Whether too many attempts in a row got nowhere."""
    return bool(cost.get(_STALLED, 0) >= STALLS)
