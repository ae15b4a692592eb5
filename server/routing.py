"""What answers a request: the registry's variants, chosen by the experiments on the alias."""

from __future__ import annotations

import uuid
from collections import ChainMap
from typing import Any

from starlette.datastructures import Headers

from liveprune.patches.admission import Admission
from liveprune.patches.live_types import Served
from liveprune.server.experiments.live import Assignment, LiveExperiments
from liveprune.server.registry import Registry

GENERATING = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/cohere/v2/chat",
        "/inference/v1/generate",
        "/invocations",
    }
)
"""vLLM's routes that generate text. Others (tokenizing, rendering, scoring) get what the alias
serves: their answers say nothing about a variant's quality."""


def generates(request: Admission) -> bool:
    """Whether a request is answered with generated text.

    Responses that go on in the background are left out: nobody waits for them.
    """
    body = request.body
    if body is None or request.scope.get("path") not in GENERATING:
        return False
    return not getattr(body, "background", False)


class Routing:
    """The ``Directory`` of ``patches.admission``."""

    def __init__(self, registry: Registry, experiments: LiveExperiments) -> None:
        self._registry, self._experiments = registry, experiments

    def resolve(self, model: str, request: Admission) -> Served | None:
        """The variant that a request for ``model`` gets now; None if there is none such.

        Only names of the alias take part in experiments; ``name:tag`` is pinned.
        """
        if self._experiments.running and self._registry.counts(model) and generates(request):
            assigned = self._assign(request)
            if assigned is not None:
                request.assignment = assigned
                return self._registry.live[assigned.variant].served
        return self._registry.resolve(model)

    def _assign(self, request: Admission) -> Assignment | None:
        headers = Headers(scope=dict(request.scope))
        key = _key(headers)
        return self._experiments.route(
            self._registry.name,
            headers,
            _fields(request.body),
            None if key is None else self._experiments.key_id(key),
            headers.get("x-request-id") or uuid.uuid4().hex,
            self._registry.live,
        )

    def counts(self, model: str) -> bool:
        return self._registry.counts(model)

    def pin(self, served: Served) -> None:
        self._registry.pin(served)

    def unpin(self, served: Served) -> None:
        self._registry.unpin(served)

    def cards(self) -> list[dict[str, Any]]:
        return self._registry.cards()


def _key(headers: Headers) -> str | None:
    """The API key of a request."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or None


def _fields(body: Any) -> ChainMap[str, Any]:
    """Fields of a parsed request (pydantic), those that vLLM does not know included."""
    return ChainMap(vars(body), getattr(body, "model_extra", None) or {})
