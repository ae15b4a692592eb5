from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from liveprune.patches import request_scoring
from liveprune.patches.compat import check_seam
from liveprune.patches.request_scoring import RequestScores, attach, read_scores, take_scores
from liveprune.pruning.errors import EngineError

VOCABULARY = 11
HIDDEN = 4
WEIGHT = torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(1))


def text_states(request: str, length: int) -> torch.Tensor:
    """[length, hidden]: what the model makes of each position of a request."""
    seed = torch.Generator().manual_seed(sum(request.encode()))
    return torch.randn(20, HIDDEN, generator=seed)[:length]


def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ WEIGHT


def sampling(key: str | None) -> Any:
    carried: dict[str, Any] = {"slot": 1, "salt": "s"}
    if key is not None:
        carried["score"] = key
    return SimpleNamespace(extra_args={"liveprune": carried})


class V1Runner:
    """Knows requests and, for each batch, where their tokens are."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.originals = 0

    def add(self, request: str, key: str | None) -> None:
        self.requests[request] = SimpleNamespace(sampling_params=sampling(key))

    def remove(self, request: str) -> None:
        del self.requests[request]

    def step(self, batch: dict[str, tuple[int, int]]) -> None:
        """Run tokens ``start`` to ``end`` of each request."""
        starts = np.zeros(len(batch) + 3, np.int32)
        np.cumsum([end - start for start, end in batch.values()], out=starts[1 : len(batch) + 1])
        self.query_start_loc = SimpleNamespace(np=starts)
        # The order of the batch is the runner's own.
        self.input_batch = SimpleNamespace(req_id_to_index={r: i for i, r in enumerate(batch)})
        for request, (start, _) in batch.items():
            self.requests[request].num_computed_tokens = start
        scheduled = {r: end - start for r, (start, end) in reversed(batch.items())}
        hidden = torch.cat([text_states(r, end)[start:] for r, (start, end) in batch.items()])
        method = request_scoring.wrap_prompt_logprobs(V1Runner._get_prompt_logprobs_dict)
        assert method(self, hidden, scheduled) == {"original": len(scheduled)}
        hidden.zero_()  # the runner's own memory: used again by the next step

    def _get_prompt_logprobs_dict(self, hidden_states: Any, num_scheduled_tokens: Any) -> Any:
        self.originals += 1
        return {"original": len(num_scheduled_tokens)}


class V2Worker:
    """vLLM's PromptLogprobsWorker: sees sampling parameters once, then batches."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.originals = 0

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        self.added.append(req_id)

    def compute_prompt_logprobs(self, logits_fn: Any, hidden: Any, batch: Any, *rest: Any) -> Any:
        self.originals += 1
        assert rest == ("tokens", "computed", "lengths")
        return {"original": len(batch.req_ids)}


class V2Runner:
    def __init__(self) -> None:
        self.prompt_logprobs_worker = V2Worker()

    @property
    def originals(self) -> int:
        return self.prompt_logprobs_worker.originals

    def add(self, request: str, key: str | None) -> None:
        method = request_scoring.wrap_v2_add_request(V2Worker.add_request)
        method(self.prompt_logprobs_worker, request, 7, sampling(key))

    def remove(self, request: str) -> None:
        """It is told nothing."""

    def step(self, batch: dict[str, tuple[int, int]]) -> None:
        starts = np.zeros(len(batch) + 3, np.int32)  # padded, as for a full CUDA graph
        np.cumsum([end - start for start, end in batch.values()], out=starts[1 : len(batch) + 1])
        starts[len(batch) + 1 :] = starts[len(batch)]
        made = SimpleNamespace(
            req_ids=list(batch),
            query_start_loc_np=starts,
            num_computed_prefill_tokens_np=np.array([start for start, _ in batch.values()]),
        )
        parts = [text_states(r, end)[start:] for r, (start, end) in batch.items()]
        hidden = torch.cat([*parts, torch.full((3, HIDDEN), torch.nan)])
        method = request_scoring.wrap_v2_prompt_logprobs(V2Worker.compute_prompt_logprobs)
        worker = self.prompt_logprobs_worker
        found = method(worker, compute_logits, hidden, made, "tokens", "computed", "lengths")
        assert found == {"original": len(batch)}
        hidden.zero_()


@pytest.fixture(params=[V1Runner, V2Runner])
def runner(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture
def scores(runner: Any) -> RequestScores:
    made = RequestScores(HIDDEN * 4)
    attach(runner, made)
    return made


def assert_scored(scores: RequestScores, key: str, request: str, tokens: int, answer: int) -> None:
    expected = text_states(request, tokens)[tokens - answer :]
    torch.testing.assert_close(scores.states([key]), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "seam",
    [
        request_scoring.PROMPT_LOGPROBS,
        request_scoring.V2_ADD_REQUEST,
        request_scoring.V2_PROMPT_LOGPROBS,
    ],
    ids=str,
)
def test_seams_are_as_in_this_vllm(seam: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's imports warn
        check_seam(seam)


def test_answers_are_taken_out_of_a_mixed_batch(runner: Any, scores: RequestScores) -> None:
    scores.expect({"x": [7, 3], "y": [4, 4], "z": [1, 1]})
    for request, key in (("a", None), ("b", "x"), ("c", "y"), ("d", "z")):
        runner.add(request, key)
    runner.step({"b": (0, 7), "a": (0, 5), "d": (0, 1), "c": (0, 4)})
    assert_scored(scores, "x", "b", 7, 3)
    assert_scored(scores, "y", "c", 4, 4)
    assert_scored(scores, "z", "d", 1, 1)
    assert runner.originals == 1


@pytest.mark.parametrize("cuts", [(3,), (6,), (7,), (8,), (2, 7, 9), tuple(range(1, 10))])
def test_chunked_prefill(runner: Any, scores: RequestScores, cuts: tuple[int, ...]) -> None:
    scores.expect({"x": [10, 4]})
    runner.add("b", "x")
    runner.add("a", None)
    bounds = [0, *cuts, 10]
    for start, end in pairwise(bounds):
        runner.step({"a": (start, start + 1), "b": (start, end)})
    assert_scored(scores, "x", "b", 10, 4)


@pytest.mark.parametrize("first", [4, 7, 8, 9])
@pytest.mark.parametrize("again", [(0, 10), (0, 5, 10), (0, 7, 8, 10), (0, 9, 10)])
def test_after_a_preemption(
    runner: Any, scores: RequestScores, first: int, again: tuple[int, ...]
) -> None:
    """It starts anew, in other chunks."""
    scores.expect({"x": [10, 4]})
    runner.add("b", "x")
    runner.step({"b": (0, first)})
    runner.remove("b")
    runner.add("b", "x")
    for start, end in pairwise(again):
        runner.step({"b": (start, end)})
    assert_scored(scores, "x", "b", 10, 4)


def test_what_is_sampled_afterwards_does_not_count(runner: Any, scores: RequestScores) -> None:
    scores.expect({"x": [5, 2]})
    runner.add("b", "x")
    runner.step({"b": (0, 5)})
    runner.step({"b": (5, 6)})
    assert_scored(scores, "x", "b", 5, 2)


def test_a_cached_answer_is_an_error_not_a_wrong_score(runner: Any, scores: RequestScores) -> None:
    scores.expect({"x": [10, 4]})
    runner.add("b", "x")
    runner.step({"b": (8, 10)})
    with pytest.raises(EngineError, match="found 0 positions of an answer computed, expected 4"):
        scores.states(["x"])
    scores.expect({"y": [10, 4]})
    runner.add("c", "y")
    runner.step({"c": (0, 8)})
    with pytest.raises(EngineError, match="found 2 positions"):
        scores.states(["y"])


def test_what_nobody_expects_is_not_kept(runner: Any, scores: RequestScores) -> None:
    runner.add("a", None)
    runner.step({"a": (0, 4)})
    scores.expect({"x": [4, 2]})
    runner.add("b", "x")
    runner.add("c", "unknown")
    runner.step({"a": (4, 5), "c": (0, 3)})
    scores.forget()
    assert not scores.waiting
    runner.step({"b": (0, 4)})  # aborted too late
    assert not scores.waiting
    assert not scores.key_of_request
    with pytest.raises(EngineError, match="'x' is not expected"):
        scores.states(["x"])
    assert runner.originals == 3


def test_without_live_variants_the_wrappers_only_call_the_original(runner: Any) -> None:
    runner.add("a", "x")
    runner.step({"a": (0, 4)})
    assert runner.originals == 1


def test_nothing_is_looked_at_while_nothing_is_expected(runner: Any, scores: RequestScores) -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    if isinstance(runner, V1Runner):
        runner.requests = {"a": Untouchable()}
        method = request_scoring.wrap_prompt_logprobs(V1Runner._get_prompt_logprobs_dict)
        assert method(runner, None, {"a": 3}) == {"original": 1}
    else:
        method = request_scoring.wrap_v2_add_request(V2Worker.add_request)
        method(runner.prompt_logprobs_worker, "a", 0, Untouchable())
        assert runner.prompt_logprobs_worker.added == ["a"]


def test_hidden_states_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_scoring, "STATE_BYTES", 10 * 16)
    scores = RequestScores(16)
    scores.expect({"x": [20, 6]})
    with pytest.raises(EngineError, match="found 176 bytes of hidden states, expected at most 160"):
        scores.expect({"y": [20, 5]})
    scores.expect({"y": [20, 4]})
    scores.forget(["x"])
    scores.expect({"z": [20, 6]})


def taken(reference: bool, logits: Callable[[Any], Any] = compute_logits) -> Any:
    scores, runner = RequestScores(HIDDEN * 4), V1Runner()
    attach(runner, scores)
    scores.expect({"x": [6, 2], "y": [3, 3], "fx": [6, 2], "fy": [3, 3]})
    requests = {"a": "x", "b": "y", "c": "fx", "d": "fy"}
    for request, key in requests.items():
        runner.add(request, key)
    runner.step({"a": (0, 6), "b": (0, 3), "c": (0, 6), "d": (0, 3)})
    full = ["fx", "fy"] if reference else None
    found = take_scores(scores, logits, VOCABULARY, ["x", "y"], [1, 2, 3, 4, 5], full)
    with pytest.raises(EngineError):
        scores.states(["x"])
    assert len(scores.states(["fx", "fy"])) == 5, "kept for the next plan"
    return found


def test_scores_against_the_full_model() -> None:
    found = taken(reference=True)
    assert all(type(x) in (int, float) for column in found.values() for x in column)
    own = torch.cat([text_states("a", 6)[4:], text_states("b", 3)]).double() @ WEIGHT.double()
    full = torch.cat([text_states("c", 6)[4:], text_states("d", 3)]).double() @ WEIGHT.double()
    p, q = own.softmax(-1).numpy(), full.softmax(-1).numpy()
    scores = read_scores(found)
    assert scores.predicted.tolist() == p.argmax(-1).tolist()
    np.testing.assert_allclose(scores.logprobs, np.log(p[range(5), [1, 2, 3, 4, 5]]), atol=1e-5)
    assert scores.overlap is not None
    assert scores.divergence is not None
    np.testing.assert_allclose(scores.overlap, np.minimum(p, q).sum(-1), atol=1e-5)
    np.testing.assert_allclose(scores.divergence, (q * np.log(q / p)).sum(-1), atol=1e-5)


def test_scores_alone_and_ranks_without_logits() -> None:
    found = taken(reference=False)
    scores = read_scores(found)
    assert (scores.overlap, scores.divergence) == (None, None)
    assert len(scores.predicted) == len(scores.logprobs) == 5
    assert taken(reference=False, logits=lambda _: None) is None
