"""``liveprune store``: look after what a server remembers; none needs to run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liveprune.pruning.errors import StoreError
from liveprune.server.admin_key import STATE_VARIABLE, STORE_VARIABLE, default_state_folder
from liveprune.server.cli_options import ModelArgument, check_output

if TYPE_CHECKING:
    from liveprune.server.store.store import Store

store_app = typer.Typer(
    help="Check, export, back up or restore what servers of MODEL remember.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
StateOption = Annotated[
    Path | None, typer.Option("--state-dir", envvar=STATE_VARIABLE, help="Of the server.")
]
UrlOption = Annotated[
    str | None,
    typer.Option("--store", envvar=STORE_VARIABLE, metavar="URL", help="As the server has it."),
]
FilesOption = Annotated[Path | None, typer.Option("--store-files", help="As the server has it.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.")]


@store_app.command("check")
def check_store(
    model: ModelArgument,
    state_dir: StateOption = None,
    store: UrlOption = None,
    store_files: FilesOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete plan files that nothing counts on.")
    ] = False,
) -> None:
    """Say what is missing, damaged or left over; exit status 1 if anything is."""
    from liveprune.server.store import check as checks
    from liveprune.server.store.store import ALL_JOBS

    with _opened(model, state_dir, store, store_files, idle=repair) as opened:
        # Of a shared database other servers may be at work: what is new may be in the making.
        age = 0.0 if store is None else checks.SETTLED
        for name in checks.repair(opened, age=age) if repair else ():
            typer.echo(f"deleted {name}")
        findings = checks.check(opened)
        for finding in findings:
            typer.echo(finding.what)
        counts = len(opened.variants.all()), len(opened.jobs.list(limit=ALL_JOBS))
    typer.echo(f"{counts[0]} variants, {counts[1]} jobs, {len(findings)} findings")
    if any(not finding.harmless for finding in findings):
        raise typer.Exit(1)


@store_app.command("export")
def export_store(
    model: ModelArgument,
    state_dir: StateOption = None,
    store: UrlOption = None,
    store_files: FilesOption = None,
) -> None:
    """Print all rows as JSON: variants, jobs, experiments, swaps, the audit log, ..."""
    from liveprune.server.store.transfer import export

    with _opened(model, state_dir, store, store_files) as opened:
        typer.echo(json.dumps(export(opened), indent=1))


@store_app.command("backup")
def back_up_store(
    model: ModelArgument,
    output: OutputOption,
    state_dir: StateOption = None,
    store: UrlOption = None,
    store_files: FilesOption = None,
) -> None:
    """Write rows and plans to one tar file, while servers go on."""
    from liveprune.server.store.transfer import back_up

    check_output(output, is_file=True)
    with _opened(model, state_dir, store, store_files) as opened:
        back_up(opened, output)
    typer.echo(f"written to {output}")


@store_app.command("restore")
def restore_store(
    model: ModelArgument,
    backup: Annotated[Path, typer.Argument(help="What `store backup` has written.")],
    state_dir: StateOption = None,
    store: UrlOption = None,
    store_files: FilesOption = None,
) -> None:
    """Put a backup into a new, empty store, of whichever kind."""
    from liveprune.server.store.transfer import restore

    with _opened(model, state_dir, store, store_files, idle=True, new=True) as opened:
        restore(opened, backup)
        typer.echo(f"restored {len(opened.variants.all())} variants")


@contextmanager
def _opened(
    model: str,
    state_dir: Path | None,
    url: str | None,
    shared: Path | None,
    *,
    idle: bool = False,
    new: bool = False,
) -> Iterator[Store]:
    """The store of a model; ``idle``: no server of this state folder may run meanwhile."""
    from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
    from liveprune.server.live_options import model_state
    from liveprune.server.model_path import local_model
    from liveprune.server.state_folder import locked
    from liveprune.server.store.store import DATABASE, Store

    base = local_model(model)
    folder = model_state(state_dir or default_state_folder(), base)
    if not new and url is None and not (folder / DATABASE).exists():
        raise StoreError(f"{folder}: found no {DATABASE}, expected a server's state folder")
    fingerprint = fingerprint_model(base)
    files = folder if shared is None else shared / fingerprint
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(folder, needed=idle):
        opened = Store(files, fingerprint, url=url)
        try:
            yield opened
        finally:
            opened.close()
