"""Commands that talk to a running server: its variants, swaps, roll-backs and operations."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Column, Table

from liveprune.pruning.errors import EngineError
from liveprune.server.admin_key import KEY_VARIABLE, client_key, default_state_folder
from liveprune.server.cli_experiment_show import summary
from liveprune.server.operations import State

if TYPE_CHECKING:
    from liveprune.server.admin_client import AdminClient

URL_VARIABLE = "LIVEPRUNE_ADMIN_URL"
DEFAULT_URL = "http://127.0.0.1:8001"
POLL_SECONDS = 0.25

variants_app = typer.Typer(
    help="List, add and remove the variants of a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)

UrlOption = Annotated[
    str, typer.Option("--admin-url", envvar=URL_VARIABLE, help="The server's admin API.")
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--admin-key-file", help=f"Holds the key; else {KEY_VARIABLE}, else state."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NoWaitOption = Annotated[
    bool, typer.Option("--no-wait", help="Return as soon as the server has accepted it.")
]
TagArgument = Annotated[str, typer.Argument(metavar="TAG", help="A variant: TAG or NAME:TAG.")]


def register(app: typer.Typer) -> None:
    """Add all commands of this file to the main app."""
    app.add_typer(variants_app, name="variants")
    for command in (swap, rollback, status, operations, cancel):
        app.command()(command)


@variants_app.command("list")
def list_variants(
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the variants that the server knows."""
    with connect(admin_url, admin_key_file) as client:
        found = client.variants()
    if as_json:
        print_json(found)
    else:
        console.print(_variants_table(found))


@variants_app.command("add")
def add_variant(
    plan: Annotated[
        str, typer.Argument(metavar="PLAN", help="A plan file, or a pruned checkpoint's folder.")
    ],
    name: Annotated[str, typer.Option(help="Tag of the new variant.")],
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a plan live under a new name. The server reads PLAN from its own disk."""
    path = Path(plan)
    where = str(path.absolute()) if path.exists() else plan
    with connect(admin_url, admin_key_file) as client:
        _follow(client, client.add(name, where), no_wait, as_json)


@variants_app.command("remove")
def remove_variant(
    tag: TagArgument,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take a variant out of service; its streams end on it first."""
    with connect(admin_url, admin_key_file) as client:
        _follow(client, client.remove(tag), no_wait, as_json)


def swap(
    tag: TagArgument,
    keep_previous: Annotated[
        bool,
        typer.Option("--keep-previous", help="Keep its rows in memory: a roll-back reads nothing."),
    ] = False,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send the requests of the bare model name to a variant, under traffic."""
    with connect(admin_url, admin_key_file) as client:
        _follow(client, client.swap(tag, keep_previous=keep_previous), no_wait, as_json)


def rollback(
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Return to the variant before the last swap."""
    with connect(admin_url, admin_key_file) as client:
        _follow(client, client.rollback(), no_wait, as_json)


def status(
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the server's memory, its variants and what is going on."""
    from liveprune.server.admin_client import AdminUnsupportedError

    experiments: list[dict[str, Any]] = []
    with connect(admin_url, admin_key_file) as client:
        found = client.status()
        with contextlib.suppress(AdminUnsupportedError):
            experiments = [] if as_json else client.experiments()
    if as_json:
        print_json(found)
        return
    console.print(f"{found['alias']} answers for {found['model']}, {_readiness(found)}")
    console.print(f"a roll-back returns to {found['previous'] or 'nothing: there is none'}")
    if found["operation"]:
        console.print(f"under way: {_describe(found['operation'])}")
    for experiment in experiments:
        if experiment["state"] == "running":
            console.print(summary(experiment))
    console.print(_memory_table(found))
    console.print(_variants_table(found["variants"]))


def operations(
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the operations under way, and those that ended a while ago."""
    with connect(admin_url, admin_key_file) as client:
        found = client.operations()
    if as_json:
        print_json(found)
        return
    # An id that is cut off could not be passed to `cancel`.
    table = Table(
        Column("id", no_wrap=True), "kind", "variant", "state", "bytes", "seconds", "error"
    )
    for operation in found:
        table.add_row(
            operation["id"],
            operation["kind"],
            operation["variant"],
            operation["state"],
            decimal(operation["progress"]["bytes_done"]),
            _seconds(operation),
            operation["error"] or "",
        )
    console.print(table)


def cancel(
    operation_id: Annotated[str, typer.Argument(metavar="OPERATION", help="Its id.")],
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give up an operation; possible until it switches."""
    with connect(admin_url, admin_key_file) as client:
        found = client.cancel(operation_id)
    if as_json:
        print_json(found)
    else:
        console.print(_describe(found))


def connect(url: str, key_file: Path | None) -> AdminClient:
    """A client with the key that the options and the environment lead to."""
    from liveprune.server.admin_client import AdminClient

    key, source = client_key(key_file, default_state_folder())
    return AdminClient(url, key, key_source=source)


def _follow(client: AdminClient, operation: dict[str, Any], no_wait: bool, as_json: bool) -> None:
    """Wait for an operation's end unless told not to, and say it in one line.

    Exits with 1 if it did not succeed, with 130 if the user stops waiting.
    """
    if not no_wait:
        try:
            operation = _wait(client, operation)
        except KeyboardInterrupt:
            Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True).print(
                f"no longer waiting; it goes on in the server: {_describe(operation)}\n"
                f"`liveprune operations` shows it, `liveprune cancel {operation['id']}` stops it"
            )
            raise typer.Exit(130) from None
    if as_json:
        print_json(operation)
    else:
        console.print(_describe(operation))
    if operation["state"] in (State.FAILED, State.CANCELLED):
        raise typer.Exit(1)


def _wait(client: AdminClient, operation: dict[str, Any]) -> dict[str, Any]:
    """Poll until the operation has ended; its state and bytes are shown on standard error."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        while not State(operation["state"]).ended:
            size = operation["progress"]
            progress.update(
                task,
                description=f"{operation['kind']} {operation['variant']}: {operation['state']}",
                completed=size["bytes_done"],
                total=size["bytes_total"] or None,
            )
            time.sleep(POLL_SECONDS)
            try:
                operation = client.operation(operation["id"])
            except EngineError:
                # In rebuild mode the server restarts while it switches, the admin API with it.
                if operation["state"] != State.SWITCHING:
                    raise
    return operation


def _describe(operation: Mapping[str, Any]) -> str:
    """One line on an operation, ended or not."""
    text = f"{operation['kind']} {operation['variant']}: {operation['state']}"
    if operation["finished"] is None:
        size = operation["progress"]
        if size["bytes_total"]:
            text += f", {decimal(size['bytes_done'])} of {decimal(size['bytes_total'])}"
        return f"{text} (operation {operation['id']})"
    text += f" after {_seconds(operation)} s"
    if operation["freed_bytes"]:
        text += f", {decimal(operation['freed_bytes'])} freed"
    if operation["error"]:
        text += f": {operation['error']}"
    return "; ".join([text, *operation["notes"]])


def _seconds(operation: Mapping[str, Any]) -> str:
    if operation["finished"] is None:
        return ""
    return f"{operation['finished'] - operation['created']:.1f}"


def _readiness(found: Mapping[str, Any]) -> str:
    return "ready" if found["ready"] else "NOT READY: no variant can answer"


def _memory_table(found: Mapping[str, Any]) -> Table:
    parts = {
        "expert rows": found["expert_bytes"],
        "spare rows": found["spare_bytes"],
        "other weights": found["other_weight_bytes"],
        f"KV cache ({found['kv_blocks']} of {found['kv_max_blocks']} blocks)": found["kv_bytes"],
    }
    table = Table("memory", "bytes")
    for part, size in parts.items():
        table.add_row(part, decimal(size))
    table.add_section()
    table.add_row("sum", decimal(sum(parts.values())))
    if found["memory_target_bytes"] is not None:
        table.add_row("bound of the sum", decimal(found["memory_target_bytes"]))
    table.add_row("resident, says the system", decimal(found["process_bytes"]))
    return table


def _variants_table(variants: list[dict[str, Any]]) -> Table:
    table = Table("name", "state", "alias", "experts", "top-k", "bytes", "in flight")
    for variant in variants:
        mark = "*" if variant["is_alias"] else "previous" if variant["is_previous"] else ""
        table.add_row(
            variant["name"],
            variant["state"],
            mark,
            _span(variant["experts"]),
            _span(variant["top_k"]),
            decimal(variant["row_bytes"]),
            str(variant["in_flight"]),
        )
    return table


def _span(counts: Mapping[str, int]) -> str:
    low, high = counts["min"], counts["max"]
    return str(low) if low == high else f"{low} to {high}"


def print_json(content: object) -> None:
    """As ``--json`` prints."""
    typer.echo(json.dumps(content, indent=1))
