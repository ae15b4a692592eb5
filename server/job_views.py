"""How the terminal shows a background job."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from liveprune.server.admin_client import AdminClient
from liveprune.server.cli_live import console, print_json

POLL_SECONDS = 0.5
ENDED = ("done", "failed", "cancelled")
"""As ``store.jobs.JobState.ended``, without a database library in every command's start."""


def wait_for(client: AdminClient, job: dict[str, Any]) -> dict[str, Any]:
    """Poll until the job has ended; what it is doing is shown on standard error."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        while job["state"] not in ENDED:
            found = job["progress"]
            progress.update(
                task,
                description=f"{job['state']} {found.get('stage', '')} {done(job)} {time_left(job)}",
                completed=found.get("done", 0),
                total=found.get("total") or None,
            )
            time.sleep(POLL_SECONDS)
            job = client.job(job["id"])
    return job


def show(job: Mapping[str, Any], as_json: bool) -> None:
    """One job, whole."""
    if as_json:
        print_json(job)
        return
    request, cost = job["request"], job["cost"]
    source = " ".join(str(x) for x in request["source"].values() if x)
    what = f"{request['method']} from {source}, for the variant {request['tag']}"
    lines = [
        f"job {job['id']}: {job['state']}, {what}",
        f"asked {datetime.fromtimestamp(job['created'], UTC):%Y-%m-%d %H:%M:%S} UTC",
    ]
    if job["progress"]:
        lines.append(f"{job['progress']['stage']}: {done(job)} {time_left(job)}".rstrip(": "))
    if job["best"]:
        lines.append(f"best so far: {100 * job['best']['fitness']:.1f}")
    if cost:
        lines.append(
            f"cost: {cost.get('cpu_seconds', 0):.1f} CPU seconds, "
            f"{cost.get('engine_seconds', 0):.1f} s of engine calls, "
            f"{cost.get('evaluations', 0)} evaluations, {cost.get('tokens', 0):,} tokens"
        )
    if job["error"]:
        lines.append(f"error: {job['error']}")
    console.print("\n".join(lines))
    if job["result"]:
        _show_result(job["result"])


def _show_result(result: Mapping[str, Any]) -> None:
    live = "live" if result["live"] else "stored, not live"
    console.print(
        f"found plan {result['digest']}: {result['experts']} of {result['of']} experts kept; "
        f"variant {result['tag']} is {live}"
    )
    if "live_error" in result:
        console.print(f"it could not be made live: {result['live_error']}")
    if not result["scores"]:
        return
    table = Table(f"{result['measure']}, per cent", "plan", "full model", "difference")
    for name, scores in result["scores"].items():
        cells = [_interval(scores.get(key), key) for key in ("plan", "full", "difference")]
        table.add_row(f"{name} ({scores['plan']['n']} rows)", *cells)
    console.print(table)


def _interval(score: Mapping[str, Any] | None, key: str) -> str:
    if score is None:
        return ""
    middle = score["difference" if key == "difference" else "mean"]
    if middle is None:
        return f"failed: {score['failure']}"
    return f"{100 * middle:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def done(job: Mapping[str, Any]) -> str:
    """How much of its present stage."""
    found = job["progress"]
    return f"{found['done']} of {found['total']}" if found.get("total") else ""


def time_left(job: Mapping[str, Any]) -> str:
    """Time that it still needs."""
    left = job["progress"].get("seconds_left")
    return f"{left:.0f} s left" if left and job["state"] == "running" else ""


def outcome(job: Mapping[str, Any]) -> str:
    """What it found, or why it failed."""
    if job["result"]:
        return f"{job['result']['experts']} of {job['result']['of']} experts"
    return str(job["error"] or "")
