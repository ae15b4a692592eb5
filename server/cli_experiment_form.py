"""An experiment's definition from the options of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liveprune.pruning.errors import ExperimentError
from liveprune.server.cli_options import parse_changes


def definition_of(
    base: Mapping[str, Any],
    *,
    name: str | None,
    arms: Sequence[str] | None,
    control: str | None,
    primary: str | None,
    guardrails: Sequence[str] | None,
    actions: Sequence[str] | None,
    ramp: str | None,
    changes: Sequence[str] | None,
    dry_run: bool,
) -> dict[str, Any]:
    """``base`` with what the options say; the server checks it.

    Raises:
        ExperimentError: an option is malformed, or there is nothing at all.
        PlanError: ``changes`` is.
    """
    found = dict(base)
    if arms:
        found["arms"] = [_arm(text) for text in arms]
        found.setdefault("control", found["arms"][0]["name"])
    if primary is not None:
        found["primary"] = _measure("--primary", primary)
    if guardrails:
        found["guardrails"] = [_guardrail(text) for text in guardrails]
    if ramp is not None:
        found["ramp"] = [_number("--ramp", part) for part in ramp.split(",")]
    stated = {"name": name, "control": control, "actions": list(actions or ()) or None}
    found |= {field: value for field, value in stated.items() if value is not None}
    if dry_run:
        found["dry_run"] = True
    found |= parse_changes(changes or ())
    if not found:
        raise ExperimentError("found no definition, expected FILE or options such as --arm")
    return found


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """``ARM=SHARE``, each arm once.

    Raises:
        ExperimentError: malformed.
    """
    found: dict[str, float] = {}
    for text in texts:
        arm, equals, share = text.partition("=")
        if not equals or not arm or arm in found:
            raise ExperimentError(f"weights: found {text!r}, expected ARM=SHARE, each arm once")
        found[arm] = _number("weights", share)
    return found


def _arm(text: str) -> dict[str, Any]:
    """``[NAME:]TAG=SHARE``; without a name the tag is one."""
    who, equals, share = text.rpartition("=")
    name, _, tag = who.rpartition(":")
    if not equals or not tag:
        raise ExperimentError(f"--arm: found {text!r}, expected [NAME:]TAG=SHARE")
    return {"name": name or tag, "variant": tag, "weight": _number("--arm", share)}


def _measure(option: str, text: str) -> dict[str, Any]:
    metric, colon, statistic = text.partition(":")
    if not metric or (colon and not statistic):
        raise ExperimentError(f"{option}: found {text!r}, expected METRIC[:STATISTIC]")
    return {"metric": metric, "statistic": statistic} if colon else {"metric": metric}


def _guardrail(text: str) -> dict[str, Any]:
    """``METRIC[:STATISTIC]:MARGIN``; a margin of ``5%`` is relative."""
    measure, colon, margin = text.rpartition(":")
    if not colon:
        raise ExperimentError(
            f"--guardrail: found {text!r}, expected METRIC:MARGIN or METRIC:STATISTIC:MARGIN"
        )
    found = _measure("--guardrail", measure)
    if margin.endswith("%"):
        share = _number("--guardrail", margin.removesuffix("%")) / 100
        return {**found, "margin": share, "relative": True}
    return {**found, "margin": _number("--guardrail", margin)}


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ExperimentError(f"{option}: found {text!r}, expected a number") from None
