"""The real command line of Liveprune, to compare what the chart says with."""

from __future__ import annotations

from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from liveprune.server.cli import app


def command(*words: str) -> tuple[TyperCommand, list[str]]:
    """The command that WORDS start with, and the words after it."""
    rest = list(words)
    found = get_command(app)
    while isinstance(found, TyperGroup):
        found = found.commands[rest.pop(0)]
    assert isinstance(found, TyperCommand)
    return found, rest
