"""Server-sent events: what is sent, when, to whom, and when it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from liveprune.pruning.errors import EngineError
from liveprune.server import admin_server
from liveprune.server.admin_errors import TooManyListenersError
from liveprune.server.event_feed import EventFeed
from tests.server.dashboard_world import world
from tests.server.fake_control import BEARER, KEY, FakeControl, admin_app, ask, serving


class Number(BaseModel):
    value: int


class Counter:
    """A source; ``value`` is what it tells."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.asked = 0
        self.error: Exception | None = None

    async def __call__(self) -> Number:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return Number(value=self.value)


def feed_of(*, most: int = 32, heartbeat: float = 60.0, **sources: Any) -> EventFeed:
    return EventFeed(sources, every=0.005, timeout=5.0, heartbeat=heartbeat, most=most)


async def next_event(stream: AsyncIterator[bytes]) -> tuple[str, Any]:
    """The next one that is no comment."""
    async with asyncio.timeout(20):
        while (text := (await anext(stream)).decode()).startswith(":"):
            pass
    head, data, end = text.split("\n", 2)
    assert end == "\n"
    return head.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the code under test has no event for it
            await asyncio.sleep(0.002)


def always() -> bool:
    return True


async def begun(feed: EventFeed, names: int = 2) -> AsyncIterator[bytes]:
    """A stream whose first events, one of each name, are over."""
    stream = feed.events(always)
    for _ in range(names):
        await next_event(stream)
    return stream


def test_everything_comes_once_and_then_what_changes() -> None:
    async def run() -> None:
        a, b = Counter(1), Counter(2)
        feed = feed_of(a=a, b=b)
        with feed.listening():
            stream = feed.events(always)
            first = [await next_event(stream) for _ in range(3)]
            assert sorted(first, key=str) == [
                ("a", {"value": 1}),
                ("b", {"value": 2}),
                ("problems", {}),
            ]
            looks = a.asked
            await until(lambda: a.asked > looks + 3)
            b.value = 5
            assert await next_event(stream) == ("b", {"value": 5})
            a.value = 6
            assert await next_event(stream) == ("a", {"value": 6})

    asyncio.run(run())


def test_a_slow_listener_gets_the_newest_only() -> None:
    async def run() -> None:
        source = Counter()
        feed = feed_of(n=source)
        with feed.listening():
            stream = await begun(feed)
            for value in range(1, 6):
                source.value = value
                looks = source.asked
                await until(lambda looks=looks: source.asked > looks + 1)  # type: ignore[misc]
            assert await next_event(stream) == ("n", {"value": 5})

    asyncio.run(run())


def test_listeners_share_one_poll_which_ends_with_the_last() -> None:
    async def run() -> None:
        source = Counter()
        feed = feed_of(n=source)
        with feed.listening():
            with feed.listening():
                streams = [await begun(feed), await begun(feed)]
                polls = [t for t in asyncio.all_tasks() if t.get_name() == "liveprune-events"]
                assert len(polls) == 1
                source.value = 1
                assert [await next_event(s) for s in streams] == [("n", {"value": 1})] * 2
            assert not polls[0].cancelling()
            looks = source.asked
            await until(lambda: source.asked > looks + 2)
        await asyncio.wait(polls)
        looks = source.asked
        await asyncio.sleep(0.03)
        assert source.asked == looks
        source.value = 2
        with feed.listening():  # nothing of before is told again
            assert await next_event(feed.events(always)) == ("n", {"value": 2})

    asyncio.run(run())


def test_there_is_a_bound_for_listeners() -> None:
    async def run() -> None:
        feed = feed_of(most=2, n=Counter())
        with feed.listening():
            feed.check_room()
            with feed.listening(), pytest.raises(TooManyListenersError, match="found 2 listeners"):
                feed.check_room()
            feed.check_room()

    asyncio.run(run())


def test_a_source_that_fails_is_a_problem_and_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        good, bad = Counter(1), Counter(2)
        bad.error = EngineError("engine: dead")
        feed = feed_of(good=good, bad=bad)
        with feed.listening():
            stream = feed.events(always)
            first = [await next_event(stream), await next_event(stream)]
            assert first == [("good", {"value": 1}), ("problems", {"bad": "engine: dead"})]
            looks = bad.asked
            await until(lambda: bad.asked > looks + 3)
            bad.error = KeyError("/secret/path")
            told = await next_event(stream)
            assert told[0] == "problems"
            assert "KeyError" in told[1]["bad"]
            assert "secret" not in str(told)
            bad.error = None
            after = [await next_event(stream), await next_event(stream)]
            assert sorted(after, key=str) == [("bad", {"value": 2}), ("problems", {})]

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert [record.message for record in caplog.records] == [
        "events: no bad: engine: dead",
        "events: no bad: unexpected KeyError; the server's log has more",
    ]
    assert "/secret/path" in caplog.text


def test_a_source_that_never_answers_is_a_problem() -> None:
    async def run() -> None:
        async def never() -> Number:
            await asyncio.Event().wait()
            raise AssertionError

        feed = EventFeed({"never": never, "n": Counter(1)}, every=0.005, timeout=0.05)
        with feed.listening():
            stream = feed.events(always)
            assert await next_event(stream) == ("n", {"value": 1})
            assert await next_event(stream) == (
                "problems",
                {"never": "no answer within 0.05 s"},
            )

    asyncio.run(run())


def test_silence_is_broken_by_a_comment() -> None:
    async def run() -> None:
        feed = feed_of(heartbeat=0.02, n=Counter())
        with feed.listening():
            stream = await begun(feed)
            assert await anext(stream) == b": still here\n\n"

    asyncio.run(run())


def test_a_stream_ends_with_the_feed_or_once_it_is_not_allowed() -> None:
    async def run() -> None:
        source = Counter()
        feed = feed_of(n=source)
        allowed = [True]
        with feed.listening():
            mine, other = feed.events(lambda: allowed[0]), await begun(feed)
            for _ in range(2):
                await next_event(mine)
            allowed[0] = False
            source.value = 7
            with pytest.raises(StopAsyncIteration):
                await next_event(mine)
            assert await next_event(other) == ("n", {"value": 7})
            waiting = asyncio.ensure_future(next_event(other))
            await asyncio.sleep(0)
            feed.close()
            with pytest.raises(StopAsyncIteration):
                await waiting

    asyncio.run(run())


# Over HTTP.


def events(stream: httpx.Response) -> Any:
    name = ""
    for line in stream.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_the_stream_tells_of_status_experiments_and_jobs(tmp_path: Path) -> None:
    made = world(tmp_path)
    with (
        serving(made.app) as url,
        httpx.stream("GET", f"{url}/admin/v1/events", headers=BEARER, timeout=30) as stream,
    ):
        assert stream.status_code == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-store"
        told = events(stream)
        first = dict(next(told) for _ in range(4))
        assert first["problems"] == {}
        assert first["status"] == ask(made.app, "GET", "/admin/v1/status").json()
        assert first["jobs"] == ask(made.app, "GET", "/admin/v1/jobs").json()
        names = [x["name"] for x in first["experiments"]["experiments"]]
        assert names == ["halve", "quarter"]
        made.jobs.step(16)
        name, body = next(told)
        assert (name, body["jobs"][0]["cost"]["evaluations"]) == ("jobs", 496)
        made.control.begin_swap()
        name, body = next(told)
        assert (name, body["operation"]["variant"]) == ("status", "olmoe:eep-mixed")
        assert KEY not in json.dumps(first)


def test_a_server_without_jobs_and_experiments_tells_of_none(tmp_path: Path) -> None:
    app = admin_app(FakeControl(), tmp_path)
    with (
        serving(app) as url,
        httpx.stream("GET", f"{url}/admin/v1/events", headers=BEARER, timeout=30) as stream,
    ):
        told = events(stream)
        first = dict(next(told) for _ in range(4))
    assert (first["jobs"], first["experiments"]) == ({"jobs": []}, {"experiments": []})


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}], ids=["none", "wrong"])
def test_events_need_the_key(tmp_path: Path, headers: dict[str, str]) -> None:
    answer = ask(world(tmp_path).app, "GET", "/admin/v1/events", headers=headers)
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "PermissionDeniedError"
    assert KEY not in answer.text
    with_query = ask(world(tmp_path).app, "GET", f"/admin/v1/events?key={KEY}", headers=headers)
    assert with_query.status_code == 403


def test_a_listener_that_leaves_makes_room(tmp_path: Path) -> None:
    made = world(tmp_path)
    feed = made.app.state.events
    feed._most = 1
    with serving(made.app) as url:
        path = f"{url}/admin/v1/events"
        with httpx.stream("GET", path, headers=BEARER, timeout=30) as stream:
            told = events(stream)
            next(told)
            refused = httpx.get(path, headers=BEARER)
            assert refused.status_code == 503
            assert refused.json()["error"]["type"] == "ServiceUnavailableError"
            assert "found 1 listeners" in refused.json()["error"]["message"]
        gone = threading.Event()
        while feed._listeners:
            gone.wait(0.01)
        with httpx.stream("GET", path, headers=BEARER, timeout=30) as stream:
            assert stream.status_code == 200


def test_a_key_that_is_taken_away_takes_its_streams_along(tmp_path: Path) -> None:
    made = world(tmp_path)
    keys: list[Any] = []
    gate = next(m for m in made.app.user_middleware if "keys" in m.kwargs)
    keys += gate.kwargs["keys"]()
    gate.kwargs["keys"] = lambda: tuple(keys)
    with (
        serving(made.app) as url,
        httpx.stream("GET", f"{url}/admin/v1/events", headers=BEARER, timeout=30) as stream,
    ):
        told = events(stream)
        for _ in range(4):
            next(told)
        keys.clear()
        made.jobs.step(16)
        assert list(told) == []


def test_streams_end_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As long as that, if nobody told the stream.
    monkeypatch.setattr(admin_server, "STOP_SECONDS", 3600)
    with serving(world(tmp_path).app) as url:
        client = httpx.Client(headers=BEARER, timeout=30)
        stream = client.send(client.build_request("GET", f"{url}/admin/v1/events"), stream=True)
        told = events(stream)
        for _ in range(4):
            next(told)
    assert list(told) == []
    client.close()
