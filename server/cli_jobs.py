"""Commands about background pruning in a running server."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

from liveprune.pruning.errors import DataError
from liveprune.server.cli_live import (
    DEFAULT_URL,
    JsonOption,
    KeyFileOption,
    UrlOption,
    connect,
    console,
    print_json,
)
from liveprune.server.cli_options import number_or_list, parse_changes
from liveprune.server.live_options import parse_bytes

POLL_SECONDS = 0.5
ENDED = ("done", "failed", "cancelled")
LIVE, KEPT = "live", "kept"

jobs_app = typer.Typer(
    help="Prune in the background of a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
background_app = typer.Typer(
    help="The one switch of all background work.", no_args_is_help=True, rich_markup_mode=None
)
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="Its id, or at least four digits that it begins with.")
]


class JobEngine(StrEnum):
    """What scores a job's plans."""

    LIVE = "live"
    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class Shares(StrEnum):
    """How a one-pass method shares the budget out."""

    UNIFORM = "uniform"
    GLOBAL = "global"


def register(app: typer.Typer) -> None:
    """Add all commands of this file to the main app."""
    app.add_typer(jobs_app, name="jobs")
    app.add_typer(background_app, name="background")


@jobs_app.command("start")
def start_job(
    method: Annotated[str, typer.Option(help="See docs/methods.md; or eep, which searches.")],
    name: Annotated[str, typer.Option(help="Tag of the variant that it becomes.")],
    experts: Annotated[
        str | None, typer.Option(help="Kept per layer: a number, a fraction, or a list.")
    ] = None,
    target_memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Instead of --experts: all weights, e.g. 40GiB."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Learn from JSONL rows, on the server's disk.")
    ] = None,
    statistics: Annotated[
        bool, typer.Option("--live-statistics", help="Learn from what the server counted.")
    ] = False,
    prompts: Annotated[
        bool, typer.Option("--kept-prompts", help="Learn from prompts that the server kept.")
    ] = False,
    top_k: Annotated[str | None, typer.Option(help="Active experts: one number or a list.")] = None,
    allocate: Annotated[
        Shares | None, typer.Option(help="One-pass methods: share one total out, or not.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the method; repeatable."),
    ] = None,
    preset: Annotated[str, typer.Option(help="eep: liveprune, released, paper.")] = "liveprune",
    measure: Annotated[
        str | None, typer.Option(help="exact, contains, choice; without labels esap, kl, nll.")
    ] = None,
    dev: Annotated[
        Path | None, typer.Option(help="Rows to choose on; default: a part of the source's.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Rows scored once, at the end.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts through the chat template.")
    ] = False,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows used, of each file.")] = 1024,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    engine: Annotated[
        JobEngine, typer.Option(help="What scores plans: the serving engine, or its own.")
    ] = JobEngine.LIVE,
    actors: Annotated[
        int | None, typer.Option(min=1, help="So many engines, each in an actor of Ray.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster, as the server reaches it.")
    ] = None,
    make_live: Annotated[
        bool, typer.Option("--make-live", help="Make the variant live when it is found.")
    ] = False,
    share: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Of the serving engine's time, at most.")
    ] = 0.5,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end.")] = False,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Queue a background pruning run; what it finds becomes a variant of the server."""
    source: dict[str, str] = {}
    if data is not None:
        source["data"] = _on_server(data)
    if statistics:
        source["statistics"] = LIVE
    if prompts:
        source["prompts"] = KEPT
    if len(source) != 1:
        raise DataError(
            f"found {' and '.join(source) or 'no source'}, expected one of --data, "
            "--live-statistics and --kept-prompts"
        )
    request = {
        "method": method,
        "source": source,
        "tag": name,
        "experts": experts,
        "target_memory": parse_bytes("--target-memory", target_memory) if target_memory else None,
        "top_k": number_or_list("--top-k", top_k),
        "allocate": None if allocate is None else allocate.value,
        "seed": seed,
        "settings": parse_changes(change or ()),
        "preset": preset,
        "measure": measure,
        "dev": None if dev is None else _on_server(dev),
        "test": None if test is None else _on_server(test),
        "chat": chat,
        "max_rows": max_rows,
        "max_answer_tokens": max_answer_tokens,
        "engine": engine.value,
        "actors": actors,
        "ray_address": ray_address,
        "make_live": make_live,
        "share": share,
    }
    with connect(admin_url, admin_key_file) as client:
        job = client.start_job(request)
        if wait:
            job = _wait(client, job)
    _show(job, as_json)
    if wait and job["state"] != "done":
        raise typer.Exit(1)


@jobs_app.command("list")
def list_jobs(
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the jobs, the newest first."""
    with connect(admin_url, admin_key_file) as client:
        found = client.jobs()
    if as_json:
        print_json(found)
        return
    table = Table(
        Column("id", no_wrap=True), "method", "variant", "state", "done", "left", "best", "result"
    )
    for job in found:
        table.add_row(
            job["id"][:12],
            job["request"]["method"],
            job["request"]["tag"],
            job["state"],
            _done(job),
            _left(job),
            f"{100 * job['best']['fitness']:.1f}" if job["best"] else "",
            _outcome(job),
        )
    console.print(table)


@jobs_app.command("show")
def show_job(
    job: JobArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end.")] = False,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one job: how far it is, what it costs, what it found."""
    with connect(admin_url, admin_key_file) as client:
        found = client.job(job)
        if wait:
            found = _wait(client, found)
    _show(found, as_json)


@jobs_app.command("logs")
def show_log(
    job: JobArgument, admin_url: UrlOption = DEFAULT_URL, admin_key_file: KeyFileOption = None
) -> None:
    """Show the end of a job's log."""
    with connect(admin_url, admin_key_file) as client:
        typer.echo(client.job_log(job), nl=False)


@jobs_app.command("cancel")
def cancel_job(
    job: JobArgument,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop a job at its next safe point; it can be resumed."""
    with connect(admin_url, admin_key_file) as client:
        _show(client.cancel_job(job), as_json)


@jobs_app.command("resume")
def resume_job(
    job: JobArgument,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Queue a job again that failed or was cancelled; it goes on where it stopped."""
    with connect(admin_url, admin_key_file) as client:
        _show(client.resume_job(job), as_json)


@background_app.command("on")
def background_on(admin_url: UrlOption = DEFAULT_URL, admin_key_file: KeyFileOption = None) -> None:
    """Let background work go on."""
    _switch(admin_url, admin_key_file, enabled=True)


@background_app.command("off")
def background_off(
    admin_url: UrlOption = DEFAULT_URL, admin_key_file: KeyFileOption = None
) -> None:
    """Stop all background work, jobs and searches of others; it lasts over restarts."""
    _switch(admin_url, admin_key_file, enabled=False)


@background_app.command("status")
def background_status(
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether background work is on."""
    with connect(admin_url, admin_key_file) as client:
        found = client.background()
    if as_json:
        print_json(found)
    else:
        console.print(f"background work is {'on' if found['enabled'] else 'off'}")


def _switch(admin_url: str, admin_key_file: Path | None, *, enabled: bool) -> None:
    with connect(admin_url, admin_key_file) as client:
        client.set_background(enabled)
    console.print(f"background work is {'on' if enabled else 'off'}")


def _on_server(path: Path) -> str:
    """As the server is to find it; what is not there may be on the server's own disk."""
    return str(path.absolute()) if path.exists() else str(path)


def _wait(client: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Poll until the job has ended; what it is doing is shown on standard error."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        while job["state"] not in ENDED:
            found = job["progress"]
            progress.update(
                task,
                description=f"{job['state']} {found.get('stage', '')} {_done(job)} {_left(job)}",
                completed=found.get("done", 0),
                total=found.get("total") or None,
            )
            time.sleep(POLL_SECONDS)
            job = client.job(job["id"])
    return job


def _show(job: Mapping[str, Any], as_json: bool) -> None:
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
        lines.append(f"{job['progress']['stage']}: {_done(job)} {_left(job)}".rstrip(": "))
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


def _done(job: Mapping[str, Any]) -> str:
    found = job["progress"]
    return f"{found['done']} of {found['total']}" if found.get("total") else ""


def _left(job: Mapping[str, Any]) -> str:
    left = job["progress"].get("seconds_left")
    return f"{left:.0f} s left" if left and job["state"] == "running" else ""


def _outcome(job: Mapping[str, Any]) -> str:
    if job["result"]:
        return f"{job['result']['experts']} of {job['result']['of']} experts"
    return str(job["error"] or "")
