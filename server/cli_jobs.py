"""Commands about background pruning in a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from liveprune.server.cli_job_start import start_job
from liveprune.server.cli_live import (
    DEFAULT_URL,
    JsonOption,
    KeyFileOption,
    UrlOption,
    connect,
    console,
    print_json,
)
from liveprune.server.job_views import done, outcome, show, time_left, wait_for

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


def register(app: typer.Typer) -> None:
    """Add all commands of this file to the main app."""
    jobs_app.command("start")(start_job)
    app.add_typer(jobs_app, name="jobs")
    app.add_typer(background_app, name="background")


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
            done(job),
            time_left(job),
            f"{100 * job['best']['fitness']:.1f}" if job["best"] else "",
            outcome(job),
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
            found = wait_for(client, found)
    show(found, as_json)


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
        show(client.cancel_job(job), as_json)


@jobs_app.command("resume")
def resume_job(
    job: JobArgument,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Queue a job again that failed or was cancelled; it goes on where it stopped."""
    with connect(admin_url, admin_key_file) as client:
        show(client.resume_job(job), as_json)


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
