from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from liveprune.patches.admission import carrying
from liveprune.patches.live_config import LiveConfig
from liveprune.patches.live_engine import BACKGROUND, VLLMLiveEngine
from liveprune.patches.live_types import EXTRA_ARG, Served
from liveprune.pruning.errors import EngineError, IncompatibleEnvironmentError
from liveprune.pruning.evaluation.engine import TokenRow

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn
    from vllm.sampling_params import SamplingParams

CANDIDATE = Served("m:candidate", 3, "m:candidate@00ff#7")
FULL = Served("m:full", 0, None)
ROWS = [TokenRow((1, 2, 3), (4, 5)), TokenRow((6,), (7,)), TokenRow((8, 9), (10, 11, 12))]


class Client:
    """AsyncLLM as far as this goes: notes requests, answers with what ``answer`` says."""

    def __init__(self, policy: str = "priority", max_num_seqs: int = 8) -> None:
        scheduler = SimpleNamespace(policy=policy, max_num_seqs=max_num_seqs)
        self.vllm_config = SimpleNamespace(scheduler_config=scheduler)
        self.engine_core = self
        self.requests: list[tuple[list[int], SamplingParams, int]] = []
        self.names: list[str] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.running = self.most = 0
        self.aborted: list[str] = []
        self.bad: tuple[int, ...] = ()
        """The prompt that fails."""
        self.taken: dict[str, Any] = {}

    async def generate(
        self, question: Any, sampling: SamplingParams, name: str, *, priority: int
    ) -> AsyncIterator[Any]:
        tokens = question["prompt_token_ids"]
        self.requests.append((tokens, carrying(sampling), priority))
        self.names.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(3):
                await asyncio.sleep(0)
            if tuple(tokens) == self.bad:
                raise ValueError("the prompt is too long")
            output = SimpleNamespace(token_ids=[tokens[0], sampling.max_tokens])
            yield SimpleNamespace(outputs=[output])
        except asyncio.CancelledError:
            self.aborted.append(name)
            raise
        finally:
            self.running -= 1

    async def call_utility_async(self, method: str, operation: str, arguments: Any) -> Any:
        assert method == "liveprune"
        self.calls.append((operation, arguments))
        return {"value": self.taken if operation == "take_scores" else None}

    @property
    def carried(self) -> list[dict[str, Any]]:
        return [sampling.extra_args[EXTRA_ARG] for _, sampling, _ in self.requests]


def engine(client: Client) -> VLLMLiveEngine:
    return VLLMLiveEngine(client, LiveConfig("base", 4, 0, 0))


def test_scoring_requests_are_expected_sent_below_users_and_taken() -> None:
    client = Client()
    client.taken = {
        "predicted": [1, 2, 3, 4, 5, 6],
        "logprobs": [-1.0] * 6,
        "overlap": [0.5] * 6,
        "divergence": [float("nan")] * 6,
    }

    async def test() -> Any:
        made = engine(client)
        await made.keep_reference(FULL, ROWS)
        return await made.score(CANDIDATE, ROWS, against_full=True)

    found = asyncio.run(test())
    assert found.predicted.tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isnan(found.divergence).all()
    texts = [[1, 2, 3, 4], [6], [8, 9, 10, 11]]
    assert [tokens for tokens, *_ in client.requests] == texts * 2
    assert {priority for *_, priority in client.requests} == {BACKGROUND}
    assert all(sampling.skip_reading_prefix_cache for _, sampling, _ in client.requests)
    assert {sampling.max_tokens for _, sampling, _ in client.requests} == {1}
    assert [x["slot"] for x in client.carried] == [0] * 3 + [3] * 3
    assert len({x["salt"] for x in client.carried}) == 6, "nothing is read from a cache"
    (first, full), (second, own), (last, take) = client.calls
    assert (first, second, last) == ("expect_scores", "expect_scores", "take_scores")
    lengths = [[4, 2], [1, 1], [4, 3]]
    assert list(full["answers"].values()) == list(own["answers"].values()) == lengths
    keys = [x["score"] for x in client.carried]
    assert keys == [*full["answers"], *own["answers"]]
    assert len(set(keys)) == 6
    assert take == {
        "keys": list(own["answers"]),
        "targets": [4, 5, 7, 10, 11, 12],
        "reference": list(full["answers"]),
    }


def test_keys_are_never_used_again() -> None:
    client = Client()
    client.taken = {"predicted": [0], "logprobs": [0], "overlap": None, "divergence": None}

    async def test() -> None:
        made = engine(client)
        for _ in range(2):
            found = await made.score(CANDIDATE, ROWS[1:2], against_full=False)
            assert found.overlap is None
        await made.forget_scores()

    asyncio.run(test())
    assert len({x["score"] for x in client.carried}) == 2
    assert client.calls[1][1]["reference"] is None
    assert client.calls[-1] == ("forget_scores", {})


def test_generation_below_users() -> None:
    client = Client()
    prompts = [(5, 6), (7,), (8, 8, 8)]
    made = engine(client)
    found = asyncio.run(made.generate(CANDIDATE, prompts, max_tokens=9, end={2}))
    assert found == [(5, 9), (7, 9), (8, 9)]
    for (tokens, sampling, priority), prompt in zip(client.requests, prompts, strict=True):
        assert tuple(tokens) == prompt
        assert (sampling.temperature, sampling.stop_token_ids) == (0, [2])
        assert sampling.ignore_eos
        assert priority == BACKGROUND
    assert client.carried == [{"slot": 3, "salt": CANDIDATE.salt}] * 3


def test_users_keep_most_places() -> None:
    client = Client(max_num_seqs=8)
    asyncio.run(engine(client).generate(CANDIDATE, [(1,)] * 20, max_tokens=1, end=()))
    assert client.most == 2
    small = Client(max_num_seqs=1)
    asyncio.run(engine(small).generate(CANDIDATE, [(1,)] * 3, max_tokens=1, end=()))
    assert small.most == 1


def test_one_failure_ends_the_others() -> None:
    client = Client(max_num_seqs=8)
    client.bad = (1,)
    prompts = [(1,), *[(2,)] * 10]
    with pytest.raises(EngineError, match="m:candidate: not answered: the prompt is too long"):
        asyncio.run(engine(client).generate(CANDIDATE, prompts, max_tokens=1, end=()))
    assert client.running == 0
    assert len(client.requests) < 11


def test_whoever_stops_waiting_aborts_the_requests() -> None:
    client = Client(max_num_seqs=8)

    async def test() -> None:
        task = asyncio.create_task(engine(client).score(CANDIDATE, ROWS, against_full=False))
        while not client.running:  # noqa: ASYNC110 - turns of the loop
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(test())
    assert client.running == 0
    assert client.aborted == client.names
    assert [operation for operation, _ in client.calls] == ["expect_scores"]


def test_another_scheduler_is_refused() -> None:
    engine(Client()).check_background()
    with pytest.raises(IncompatibleEnvironmentError, match="--scheduling-policy fcfs, expected"):
        engine(Client(policy="fcfs")).check_background()


def test_histograms_have_vllms_bounds() -> None:
    from vllm.v1.metrics import buckets

    client = Client()
    client.vllm_config.model_config = SimpleNamespace(max_model_len=60)
    client.vllm_config.observability_config = SimpleNamespace(
        custom_histogram_buckets={"inter_token_latency": [1.0, 2.0]}
    )
    made = engine(client)
    assert made.buckets("request_latency") == buckets.REQUEST_LATENCY_BUCKETS
    assert made.buckets("request_tokens") == (1, 2, 5, 10, 20, 50)
    assert made.buckets("inter_token_latency") == (1.0, 2.0), "as the operator sets them"
