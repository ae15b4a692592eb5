"""``liveprune statistics``: what a running server's traffic uses, shown or written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from liveprune.pruning.files import write_atomic
from liveprune.server.cli_live import (
    DEFAULT_URL,
    JsonOption,
    KeyFileOption,
    UrlOption,
    connect,
    console,
    print_json,
)
from liveprune.server.cli_options import check_output
from liveprune.server.variant import FULL


def statistics(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a file for `liveprune prune --statistics`."),
    ] = None,
    variant: Annotated[
        str,
        typer.Option(help="Whose tokens the file holds: a tag, or all: of plans that only prune."),
    ] = FULL,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which experts users' requests use, and how far that is from what was calibrated."""
    if output is not None:
        check_output(output, is_file=True)
    with connect(admin_url, admin_key_file) as client:
        content = None if output is None else client.statistics_file(variant)
        found = client.statistics()
    if output is not None and content is not None:
        write_atomic(output, content)
    if as_json:
        print_json(found)
        return
    for name, tokens in found["tokens"].items():
        console.print(f"{name}: {tokens:,.0f} tokens counted")
    console.print(f"{found['serving']} serves, {_drift(found)}")
    console.print(_table(found))
    if output is not None:
        console.print(f"written to {output}")


def _drift(found: dict[str, Any]) -> str:
    if found["drift"] is None:
        return f"no drift known: {found['why_no_drift']}"
    return f"drift {found['drift']['mean']:.3f}, at most {found['drift']['max']:.3f} in a layer"


def _table(found: dict[str, Any]) -> Table:
    table = Table("layer", "share p10", "p50", "p90", "most used", "unused experts", "drift")
    drift = (found["drift"] or {"layers": {}})["layers"]
    for index, usage in found["layers"].items():
        shares = (f"{usage[key]:.4f}" for key in ("p10", "p50", "p90", "max"))
        moved = f"{drift[index]:.3f}" if index in drift else ""
        table.add_row(index, *shares, str(usage["unused"]), moved)
    return table
