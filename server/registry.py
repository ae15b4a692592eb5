"""Which variants there are, which of them answer, and what the bare name means.

The one place that gives out slots and epochs, and that a request asks. It lives in the event loop
of the API server: no locks, and every change is complete before anybody else runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from liveprune.patches.live_types import BASE_SLOT, Served
from liveprune.pruning.errors import ConflictError, VariantError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server.operations import VariantView
from liveprune.server.state_folder import SavedState
from liveprune.server.variant import FULL, Variant


class Phase(StrEnum):
    """The life of a publication."""

    PREPARING = "preparing"
    """Has a slot; nobody can ask for it yet."""
    LIVE = "live"
    DRAINING = "draining"
    """Takes no new request; those begun on it end on it."""
    LEFTOVER = "leftover"
    """Could not be taken out of the engine when it should have been; tried again later."""


@dataclass(eq=False)
class Publication:
    """A variant in a slot. Publishing it anew is another publication, with another epoch."""

    variant: Variant
    served: Served
    phase: Phase
    candidate: bool = False
    """Of a search: it is nobody's variant, and is not shown as one."""


class Registry:
    """Variants by tag, publications by slot; ``server.routing`` asks it for each request."""

    def __init__(self, name: str, aliases: Sequence[str], spec: ModelSpec, slots: int) -> None:
        """``aliases``: further names that the engine serves the model under; ``slots``: of it."""
        self.name = name
        self.spec = spec
        self.slots = slots
        self.alias = FULL
        """Tag that the bare names route to."""
        self.previous: str | None = None
        """Tag that a roll-back returns to."""
        self.published = 0
        """The greatest epoch given out."""
        self.known: dict[str, Variant] = {FULL: Variant(FULL, None)}
        self.unreadable: dict[str, str] = {}
        """Tag to digest of saved variants whose plans cannot be read now; they stay on record."""
        self._bare = frozenset({name, *aliases})
        self._publications: list[Publication] = []
        self._live: dict[str, Publication] = {}
        self._in_flight: Counter[Served] = Counter()
        self._base_published = False

    # What a request asks.

    def resolve(self, model: str) -> Served | None:
        """The variant that a request for ``model`` gets now; None if there is none such."""
        if model in self._bare:
            publication = self._live.get(self.alias)
        else:
            name, _, tag = model.rpartition(":")
            publication = self._live.get(tag) if name == self.name else None
        return publication.served if publication else None

    def counts(self, model: str) -> bool:
        """Whether a model name is the alias: what it is asked is the users' traffic."""
        return model in self._bare

    def pin(self, served: Served) -> None:
        """Count a request in: its variant stays until ``unpin``.

        Raises:
            VariantError: the publication has ended since it was resolved; resolve again.
        """
        if not any(live.served == served for live in self._live.values()):
            raise VariantError(f"{served.name}: no longer live in slot {served.slot}")
        self._in_flight[served] += 1

    def unpin(self, served: Served) -> None:
        """Count a request out.

        Raises:
            VariantError: it was not counted in.
        """
        if not self._in_flight[served]:
            raise VariantError(f"{served.name}: found no request in flight, expected at least 1")
        self._in_flight[served] -= 1
        if not self._in_flight[served]:
            del self._in_flight[served]

    def cards(self) -> list[dict[str, Any]]:
        """One entry of ``/v1/models`` for each live variant."""
        cards = []
        for live in self._live.values():
            experts, top_k = live.variant.counts(self.spec)
            details = {
                "plan": live.variant.digest,
                "experts": {"min": experts["min"], "max": experts["max"]},
                "top_k": dict(top_k),
                "state": live.phase.value,
            }
            cards.append({"id": live.served.name, "parent": self.name, "liveprune": details})
        return cards

    # What an operator asks.

    @property
    def live(self) -> Mapping[str, Publication]:
        """By tag."""
        return self._live

    @property
    def publications(self) -> Sequence[Publication]:
        """Everything that has a slot."""
        return self._publications

    def full_name(self, tag: str) -> str:
        return f"{self.name}:{tag}"

    def variant(self, tag: str) -> Variant:
        """The variant of a tag.

        Raises:
            VariantError: there is none.
        """
        found = self.known.get(tag)
        if found is None:
            names = ", ".join(sorted(self.known))
            raise VariantError(f"variant {tag!r} is unknown, expected one of {names}")
        return found

    def in_flight(self, publication: Publication) -> int:
        """Requests that the publication is answering."""
        return self._in_flight[publication.served]

    def views(self, row_bytes: Mapping[int, int]) -> tuple[VariantView, ...]:
        """Every variant, by name; ``row_bytes``: of each slot that is live in the engine."""
        shown = [p.variant.tag for p in self._publications if not p.candidate]
        tags = {*self.known, *shown}
        return tuple(self._view(tag, row_bytes) for tag in sorted(tags))

    def saved(self) -> SavedState:
        """What must be remembered over a restart."""
        digests = {tag: v.digest for tag, v in self.known.items() if v.digest is not None}
        return SavedState(
            variants={**self.unreadable, **digests},
            live=tuple(self._live),
            alias=self.alias,
            previous=self.previous,
            published=self.published,
        )

    # What a swap changes.

    def claim(self, variant: Variant, *, candidate: bool = False) -> Publication:
        """Give a variant a slot and an epoch; it is being prepared.

        Raises:
            VariantError: no slot is free.
        """
        taken = {publication.served.slot for publication in self._publications}
        free = [BASE_SLOT] if variant.plan is None else range(BASE_SLOT + 1, self.slots)
        slot = next((slot for slot in free if slot not in taken), None)
        if slot is None:
            holders = ", ".join(
                f"{p.served.name} ({p.phase})" for p in self._publications if p.served.slot in free
            )
            raise VariantError(
                f"{self.full_name(variant.tag)}: found no free slot, taken by {holders}; remove "
                "one, or start the server with more"
            )
        publication = self._publish(variant, slot, Phase.PREPARING)
        publication.candidate = candidate
        return publication

    def adopt(self, variant: Variant, slot: int) -> Publication:
        """Take over what the engine came up with; it becomes the alias target."""
        publication = self._publish(variant, slot, Phase.LIVE)
        self._live[variant.tag] = publication
        self.alias = variant.tag
        return publication

    def go_live(self, publication: Publication) -> None:
        """Let requests have it under its tag; what had the tag before is left to be drained."""
        tag = publication.variant.tag
        replaced = self._live.get(tag)
        if replaced is not None and replaced is not publication:
            self.leave(replaced)
        publication.phase = Phase.LIVE
        self._live[tag] = publication
        self.known[tag] = publication.variant
        self.unreadable.pop(tag, None)

    def start_draining(self, publication: Publication) -> None:
        """Send it no new requests.

        Raises:
            ConflictError: the bare name routes to it.
        """
        tag = publication.variant.tag
        if self._live.get(tag) is publication:
            if tag == self.alias:
                raise ConflictError(f"{publication.served.name}: is what {self.name!r} routes to")
            del self._live[tag]
        publication.phase = Phase.DRAINING

    def stop_draining(self, publication: Publication) -> None:
        """Send it requests again; under a name that another has meanwhile, keep it as leftover."""
        tag = publication.variant.tag
        if tag in self._live:
            publication.phase = Phase.LEFTOVER
        else:
            publication.phase = Phase.LIVE
            self._live[tag] = publication

    def leave(self, publication: Publication) -> None:
        """Note that it could not be taken out of the engine; no name leads to it."""
        if self._live.get(publication.variant.tag) is publication:
            del self._live[publication.variant.tag]
        publication.phase = Phase.LEFTOVER

    def drop(self, publication: Publication) -> None:
        """Free its slot: the engine no longer has it."""
        self._publications.remove(publication)
        if self._live.get(publication.variant.tag) is publication:
            del self._live[publication.variant.tag]

    def forget(self, tag: str) -> None:
        """No longer know a variant that is not live."""
        del self.known[tag]
        if self.previous == tag:
            self.previous = None

    def _publish(self, variant: Variant, slot: int, phase: Phase) -> Publication:
        self.published += 1
        name = self.full_name(variant.tag)
        salt: str | None = f"{name}@{variant.digest or 'base'}#{self.published}"
        if variant.plan is None and not self._base_published:
            # Nobody has used stock vLLM's own blocks in this engine yet.
            salt, self._base_published = None, True
        publication = Publication(variant, Served(name, slot, salt), phase)
        self._publications.append(publication)
        return publication

    def _view(self, tag: str, row_bytes: Mapping[int, int]) -> VariantView:
        own = [p for p in self._publications if p.variant.tag == tag and not p.candidate]
        live = self._live.get(tag)
        shown = live or min(own, key=lambda p: list(Phase).index(p.phase), default=None)
        variant = shown.variant if shown else self.known[tag]
        state = "standby"
        if shown is not None:
            state = "draining" if shown.phase is Phase.LEFTOVER else shown.phase.value
        experts, top_k = variant.counts(self.spec)
        return VariantView(
            name=self.full_name(tag),
            tag=tag,
            digest=variant.digest,
            state=state,
            is_alias=tag == self.alias,
            is_previous=tag == self.previous,
            experts=experts,
            top_k=top_k,
            row_bytes=row_bytes.get(live.served.slot, 0) if live else 0,
            in_flight=sum(map(self.in_flight, own)),
        )
