"""One change to what is served, as it passes through its steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from liveprune.pruning.errors import EngineError
from liveprune.server.operations import Operation, State
from liveprune.server.registry import Publication, Registry
from liveprune.server.variant import Variant

Undo = Callable[["Change"], Awaitable[None]]


@dataclass(eq=False)
class Change:
    """One change under way: what comes, what goes, and what the names mean afterwards."""

    operation: Operation
    variant: Variant
    """What comes; where nothing comes, what goes."""
    alias: str
    """Tag that the bare name routes to afterwards."""
    previous: str | None
    """Tag that a roll-back returns to afterwards."""
    new: Publication | None = None
    """The publication of ``variant``; None until it has a slot."""
    old: Publication | None = None
    """What is drained afterwards; None: nothing is."""
    replaced: str | None = None
    """Digest of the plan that the tag names until now, where it gets another."""
    candidate: bool = False
    """It is tried out and undone: no name leads to it, and nothing of it is saved."""
    committed: bool = False
    """The names have moved (or the slot is gone): too late to cancel."""
    mismatch: str | None = None
    """How the golden answers changed when the engine was compacted."""
    cancel_asked: bool = False
    """An operator wants it cancelled."""
    undo: list[tuple[State, Undo]] = field(default_factory=list)
    """What to do if it fails now, in the reverse order; with the state that it belongs to."""
    undone: bool = True
    """False: some step could not be undone."""

    @classmethod
    def asked(cls, kind: str, variant: Variant, registry: Registry) -> Change:
        """A change that leaves the bare name and the roll-back as they are."""
        operation = Operation(kind, registry.full_name(variant.tag))
        return cls(operation, variant, alias=registry.alias, previous=registry.previous)

    @property
    def coming(self) -> Publication:
        """``new`` once it has a slot."""
        if self.new is None:
            raise EngineError(f"{self.variant.tag}: has no slot yet")
        return self.new

    @property
    def going(self) -> Publication:
        """``old`` where there is one."""
        if self.old is None:
            raise EngineError(f"{self.variant.tag}: nothing to drain")
        return self.old

    def commit(self) -> None:
        """Nothing so far is undone any more."""
        self.committed = True
        self.undo.clear()
