"""vLLM's own requests and block hasher: which requests could share a block of the KV cache."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

from liveprune.patches.cache_salt import combine, wrap_from_engine_core_request
from liveprune.patches.live_types import EXTRA_ARG

BLOCK = 4
TOKENS = list(range(10, 10 + 3 * BLOCK + 1))


def entering(user: str | None, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A request as it comes from the front end."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    values: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": list(TOKENS),
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=8, extra_args=extra),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": user,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**{**values, **fields})


def of_variant(salt: str | None, slot: int = 1) -> dict[str, Any]:
    return {EXTRA_ARG: {"slot": slot, "salt": salt}}


@pytest.fixture
def hasher() -> Any:
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK, sha256)


def stock(request: Any, hasher: Any) -> Any:
    from vllm.v1.request import Request

    made = getattr(Request.from_engine_core_request, "__wrapped__", None)
    return (made or Request.from_engine_core_request)(request, hasher)


def salted(request: Any, hasher: Any) -> Any:
    return wrap_from_engine_core_request(stock)(request, hasher)


def test_no_block_is_shared_between_variants_or_users(hasher: Any) -> None:
    variants = (None, of_variant("m:e4@00ff"), of_variant("m:e4@00aa"), of_variant("m:e2@00ff"))
    seen: list[bytes] = []
    for user, extra in itertools.product((None, "alice", "bob"), variants):
        request = salted(entering(user, extra), hasher)
        assert len(request.block_hashes) == 3
        # Blocks that answers fill follow the same chain.
        request.append_output_token_ids([7] * BLOCK)
        assert len(request.block_hashes) == 4
        seen += request.block_hashes
    assert len(set(seen)) == len(seen) == 3 * 4 * 4


@pytest.mark.parametrize("user", [None, "alice"])
@pytest.mark.parametrize("extra", [None, {"other": 1}, of_variant(None, slot=0)])
def test_the_untouched_base_shares_blocks_with_stock_vllm(
    user: str | None, extra: dict[str, Any] | None, hasher: Any
) -> None:
    expected = stock(entering(user), hasher)
    request = salted(entering(user, extra), hasher)
    assert request.block_hashes == expected.block_hashes
    assert request.cache_salt == user


def test_requests_of_one_variant_and_user_share_blocks(hasher: Any) -> None:
    """The slot does not matter: a variant that went and came back has the same KV."""
    for user in (None, "alice"):
        one = salted(entering(user, of_variant("m:e4@00ff", slot=1)), hasher)
        two = salted(entering(user, of_variant("m:e4@00ff", slot=9)), hasher)
        assert one.block_hashes == two.block_hashes


def test_the_struct_that_came_in_stays_as_it_was(hasher: Any) -> None:
    request = entering("alice", of_variant("m:e4@00ff"))
    before = copy.deepcopy(request)
    made = salted(request, hasher)
    assert request == before
    assert made.cache_salt == combine("alice", "m:e4@00ff") != "alice"
    assert made.sampling_params is request.sampling_params
    assert made.prompt_token_ids == TOKENS


def test_requests_without_sampling_parameters_keep_their_salt(hasher: Any) -> None:
    from vllm import PoolingParams

    pooling = {"sampling_params": None, "pooling_params": PoolingParams(task="embed")}
    assert salted(entering("alice", **pooling), hasher).cache_salt == "alice"
    forged = combine(None, "m:e4@00ff")
    assert salted(entering(forged, **pooling), hasher).cache_salt != forged


def test_different_pairs_make_different_salts() -> None:
    plain = [None, "", "a", "b", "a|b", "b|c", "c", "null", '"a"', '["a", "b"]', "liveprune-", "ü"]
    made = [combine(user, variant) for user in plain for variant in plain]
    # Users who know the scheme, and users who know users who know it.
    forged = [combine(user, None) for user in made]
    users = {*plain, *made, *forged}
    salts = [combine(user, variant) for user in users for variant in plain]
    assert len(set(salts)) == len(salts) == len(users) * len(plain)


def test_a_users_salt_alone_stays() -> None:
    for user in (None, "", "alice", "m:e4@00ff", "not-liveprune-x"):
        assert combine(user, None) == user


def test_salts_are_such_as_kv_stores_accept() -> None:
    from vllm.entrypoints.generate.base.protocol import validate_cache_salt

    made = combine("alice" * 30, "org/model:e4@00ff\\")
    assert made is not None
    validate_cache_salt(made)
