from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.errors import EngineError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import Plan
from liveprune.server import server_engine
from liveprune.server.server_engine import ServerEngine
from tests.server.fake_control import KEY, FakeControl, admin_app, serving
from tests.server.fake_engine import fake_plan
from tests.server.test_candidates import merged

A, B = fake_plan([0, 1, 2]), fake_plan([3, 4], top_k=2)
ROWS = [TokenRow((i, 1), (10 * i, 10 * i + 1)) for i in range(1, 6)]
ANSWER = [10, 11, 20, 21, 30, 31, 40, 41, 50, 51]


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("mixtral")


@pytest.fixture
def control(model: Path) -> FakeControl:
    return FakeControl(fingerprint=fingerprint_model(model))


@pytest.fixture
def url(control: FakeControl, tmp_path: Path) -> Iterator[str]:
    with serving(admin_app(control, tmp_path)) as address:
        yield address


@pytest.fixture
def engine(url: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerEngine]:
    monkeypatch.setattr(server_engine, "PAUSES", (0.001, 0.002))
    with ServerEngine(url, KEY, model) as made:
        yield made


def calls(control: FakeControl) -> list[tuple[Any, ...]]:
    return [call for call in control.calls if call[0] in ("score", "generate")]


def test_plans_and_rows_arrive_as_they_were(engine: ServerEngine, control: FakeControl) -> None:
    plans: list[Plan | None] = [A, None, merged(3), B]
    found = engine.score(plans, ROWS, against_full=True)
    digests = [None if plan is None else plan.digest for plan in plans]
    assert calls(control) == [("score", digests, ROWS, True)]
    for scores, shift in zip(found, (1, 0, 1, 2), strict=True):
        assert scores.predicted.tolist() == [token + shift for token in ANSWER]
        assert scores.logprobs.tolist() == [-token / 8 for token in ANSWER]
        assert scores.overlap is scores.divergence is None


def test_numbers_that_are_not_finite(engine: ServerEngine, control: FakeControl) -> None:
    values = np.array([np.nan, np.inf, -1 / 3])
    scores = AnswerScores(np.array([1, 2, 3]), values, 2 * values, 3 * values)
    control.outcomes[A.digest] = scores
    (found,) = engine.score([A], ROWS[:1])
    for name, factor in (("logprobs", 1), ("overlap", 2), ("divergence", 3)):
        column = getattr(found, name)
        assert np.isnan(column[:2]).all()
        assert column[2] == -factor / 3, "to the last bit"


def test_calls_are_bounded(url: str, model: Path, control: FakeControl) -> None:
    with ServerEngine(url, KEY, model, tokens=9) as engine:  # two rows of four tokens
        _check_bounds(engine, control)


def _check_bounds(engine: ServerEngine, control: FakeControl) -> None:
    found = engine.score([A, None, B], ROWS)
    sizes = [(len(plans), len(rows)) for _, plans, rows, _ in calls(control)]
    assert sizes == [(1, 2)] * 6 + [(2, 1), (1, 1)]
    for scores, shift in zip(found, (1, 0, 2), strict=True):
        assert scores.predicted.tolist() == [token + shift for token in ANSWER]
    control.calls.clear()
    answers = engine.generate([A, B], [(1,), (2, 2), (3, 3, 3)], max_tokens=3, end={4, 2})
    assert answers == [[(1, 3), (2, 3), (3, 3)]] * 2
    assert [len(call[2]) for call in calls(control)] == [2, 2, 1, 1]
    assert {frozenset(call[4]) for call in calls(control)} == {frozenset({2, 4})}


def test_it_waits_for_operations(
    url: str, model: Path, engine: ServerEngine, control: FakeControl
) -> None:
    control.busy = 3
    engine.score([A], ROWS)
    assert len(calls(control)) == 4
    control.busy = 10_000
    with (
        ServerEngine(url, KEY, model, patience=0.01) as hasty,
        pytest.raises(EngineError, match="swap is under way"),
    ):
        hasty.generate([A], [(1,)], max_tokens=1, end=())


def test_errors_of_plans_and_of_the_server(engine: ServerEngine, control: FakeControl) -> None:
    control.outcomes[B.digest] = EngineError("layer 2: no spare rows")
    for plans in ([A, B], [B]):
        with pytest.raises(EngineError, match="layer 2: no spare rows"):
            engine.score(plans, ROWS)
        with pytest.raises(EngineError, match="layer 2: no spare rows"):
            engine.generate(plans, [(1,)], max_tokens=1, end=())
    control.error = EngineError("the engine died")
    with pytest.raises(EngineError, match="the engine died"):
        engine.score([A], ROWS)


def test_another_model_is_refused(
    url: str, control: FakeControl, tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(EngineError, match="plans are for one base model"):
        ServerEngine(url, KEY, tiny_model("mixtral", num_attention_heads=2, num_key_value_heads=1))
    control.fingerprint = ""
    with pytest.raises(EngineError, match="without live variants"):
        ServerEngine(url, KEY, tiny_model("mixtral"))


def test_a_wrong_key_or_address_is_refused(url: str, model: Path) -> None:
    with pytest.raises(EngineError, match=r"the key was refused.*from somewhere"):
        ServerEngine(url, "wrong", model, key_source="somewhere")
    with pytest.raises(EngineError, match="not reachable"):
        ServerEngine("http://127.0.0.1:1", KEY, model)


def test_pieces_hold_what_they_may() -> None:
    for sizes in itertools.product((1, 40_000, 70_000), repeat=3):
        pieces = list(server_engine._pieces(sizes, lambda size: size, 65_536))
        assert [size for piece in pieces for size in piece] == list(sizes)
        assert all(len(piece) == 1 or sum(piece) <= 65_536 for piece in pieces)
    assert list(server_engine._pieces([], len, 1)) == []
