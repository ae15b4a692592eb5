"""KV blocks of different variants never mix: the variant becomes part of the cache salt.

vLLM hashes the salt into the first block of a request, and each block's hash into the next one's,
so no block of two requests with different salts is shared.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

from liveprune.patches.compat import Seam
from liveprune.patches.live_types import EXTRA_ARG

FROM_ENGINE_CORE_REQUEST = Seam(
    "vllm.v1.request", "Request.from_engine_core_request", ("request", "block_hasher")
)

_PREFIX = "liveprune-"


def wrap_from_engine_core_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Salt a request with its variant as it enters the scheduler."""

    def from_engine_core_request(request: Any, block_hasher: Any) -> Any:
        salt = combine(request.cache_salt, _variant_salt(request.sampling_params))
        if salt != request.cache_salt:
            request = copy.copy(request)  # the caller may keep its own
            request.cache_salt = salt
        return original(request, block_hasher)

    return from_engine_core_request


def combine(user: str | None, variant: str | None) -> str | None:
    """One salt for a user's and a variant's: different pairs give different salts.

    A user's salt alone stays as it is, unless it looks like one that is made here: whatever starts
    with the prefix is a digest of the pair, so no user can name the blocks of a variant. The digest
    has the length and the characters that KV stores accept.
    """
    if variant is None and not (user or "").startswith(_PREFIX):
        return user
    pair = json.dumps([user, variant]).encode()
    return _PREFIX + hashlib.sha256(pair).hexdigest()


def _variant_salt(sampling: Any) -> str | None:
    carried = (sampling.extra_args or {}).get(EXTRA_ARG) if sampling is not None else None
    return carried["salt"] if carried else None
