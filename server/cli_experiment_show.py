"""An experiment in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = {"ttft_seconds": "TTFT", "inter_token_seconds": "ITL", "e2e_seconds": "E2E"}
"""Metrics whose p95 is shown of each arm, under short names: a terminal has 80 columns. The primary
measure and guardrails are findings."""


def show(experiment: Mapping[str, Any], console: Console) -> None:
    """Arms, findings with their intervals, verdict and reasons."""
    definition, decision = experiment["definition"], experiment["decision"]
    lines = [f"experiment {experiment['name']} on {definition['model']}: {experiment['state']}"]
    if definition["dry_run"]:
        lines[0] += " (dry run)"
    moments = [
        f"{word} {_time(experiment[field])}"
        for word, field in (("asked", "created"), ("started", "started"), ("ended", "ended"))
        if experiment[field] is not None
    ]
    lines.append(", ".join(moments) + f", phase {experiment['phase']}")
    if experiment["reason"]:
        lines.append(f"ended because: {experiment['reason']}")
    if experiment["paused"]:
        lines.append(f"NOT ROUTED HERE: {experiment['paused']}")
    console.print("\n".join(lines))
    console.print(_arms(experiment))
    if decision is None:
        console.print("no decision yet")
        return
    console.print(_findings(decision))
    console.print(_verdict(decision))


def summary(experiment: Mapping[str, Any]) -> str:
    """One line: verdict, shares, units."""
    decision = experiment["decision"]
    verdict = decision["verdict"] if decision else "no decision yet"
    arms = ", ".join(
        f"{arm['name']} {100 * arm['share']:g}% ({arm['units']:,} units)"
        for arm in experiment["arms"]
    )
    text = f"experiment {experiment['name']}: {experiment['state']}, {verdict}: {arms}"
    return f"{text}; not routed here: {experiment['paused']}" if experiment["paused"] else text


def _arms(experiment: Mapping[str, Any]) -> Table:
    seen = {name for arm in experiment["arms"] for name in arm["metrics"]}
    columns = [name for name in COLUMNS if name in seen]
    heads = [f"{COLUMNS[name]} p95" for name in columns]
    table = Table("arm", "variant", "share", "units", "requests", *heads)
    control = experiment["definition"]["control"]
    for arm in experiment["arms"]:
        role = "\ncontrol" if arm["name"] == control else "\nshadow" if arm["shadow"] else ""
        table.add_row(
            f"{arm['name']}{role}",
            arm["variant"],
            f"{100 * arm['share']:g}%",
            f"{arm['units']:,}",
            f"{arm['requests']:,}",
            *(_seconds(arm["metrics"].get(name)) for name in columns),
        )
    return table


def _findings(decision: Mapping[str, Any]) -> Table:
    table = Table("arm", "measure", "state", "control", "arm's", "difference", "limit", "n")
    for finding in decision["findings"]:
        ends = (_number(finding[end], "unbounded") for end in ("lower", "upper"))
        role = "\nprimary" if finding["role"] == "primary" else ""
        table.add_row(
            finding["arm"],
            f"{finding['measure']}{role}",
            finding["state"],
            _number(finding["control"]),
            _number(finding["treatment"]),
            "" if finding["state"] == "no data" else " to\n".join(ends),
            _number(finding["limit"]),
            f"{finding['count']:,}",
        )
    return table


def _verdict(decision: Mapping[str, Any]) -> str:
    arm = f" {decision['arm']}" if decision["arm"] else ""
    head = f"{decision['verdict']}{arm} (decision {decision['id']}, {_time(decision['time'])})"
    lines = [head, *(f"  {reason}" for reason in decision["reasons"])]
    if decision["actions"]:
        lines.append(f"done: {', '.join(decision['actions'])}")
    if decision["withheld"]:
        lines.append(f"withheld: {', '.join(decision['withheld'])}")
    lines.append(f"mismatch of shares: p = {decision['mismatch_p']:.2g}")
    return "\n".join(lines)


def _time(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _seconds(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["p95"] is None:
        return ""
    value = metric["p95"]
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _number(value: float | None, missing: str = "") -> str:
    return missing if value is None else f"{value:.3g}"
