"""Jobs over HTTP: accepted, refused, listed, cancelled; the switch; the audit log; the metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.demo import model_path, rows_path
from liveprune.server.admin_api import make_app
from liveprune.server.admin_key import key_digest
from liveprune.server.audit import AuditLog
from liveprune.server.jobs.background import Background, NoLiveBackground
from liveprune.server.live_metrics import LiveMetrics
from liveprune.server.store.jobs import JobState
from liveprune.server.store.store import Store
from tests.server.fake_control import KEY, FakeControl, ask, view

DATA = rows_path("sort", "train").resolve()
REQUEST: dict[str, Any] = {
    "method": "reap",
    "source": {"data": str(DATA)},
    "experts": "4",
    "tag": "e4",
    "max_rows": 8,
}


class Site:
    """The admin app over a store; nobody does its jobs."""

    def __init__(self, folder: Path) -> None:
        self.control = FakeControl()
        self.store = Store(folder, fingerprint_model(model_path()), replica="here")
        roots = [DATA.parent]
        self.background = Background(
            self.store,
            model_path(),
            self.control,
            roots,
            admin_url="http://nowhere",
            engine=NoLiveBackground(),
            prompts=folder / "prompts",
        )
        self.audit = AuditLog(self.store)
        keys = self.background.keys(lambda: [key_digest(KEY)])
        self.metrics = LiveMetrics(self.control, jobs=self.background.jobs.newest)
        self.app: FastAPI = make_app(
            self.control,
            keys=keys,
            audit=self.audit,
            roots=roots,
            metrics=self.metrics,
            jobs=self.background.jobs,
        )

    def ask(self, method: str, path: str, **arguments: Any) -> Any:
        answer = ask(self.app, method, f"/admin/v1/{path}", **arguments)
        return answer.status_code, answer.json()

    def start(self, key: str | None = None, **changes: Any) -> Any:
        headers = {"Authorization": f"Bearer {KEY}"} | ({"Idempotency-Key": key} if key else {})
        return self.ask("POST", "jobs", json={**REQUEST, **changes}, headers=headers)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.store.close()


def test_a_job_is_queued_listed_and_cancelled(site: Site) -> None:
    status, job = site.start()
    assert status == 202
    assert (job["state"], job["error"], job["result"]) == ("queued", None, None)
    assert job["request"]["tag"] == "e4"
    assert site.ask("GET", f"jobs/{job['id']}") == (200, job)
    assert site.ask("GET", f"jobs/{job['id'][:6]}") == (200, job)
    assert site.ask("GET", "jobs") == (200, {"jobs": [job]})
    assert site.ask("GET", f"jobs/{job['id']}/logs") == (200, {"log": ""})
    status, cancelled = site.ask("POST", f"jobs/{job['id']}/cancel")
    assert (status, cancelled["state"]) == (202, "cancelled")
    assert site.ask("POST", f"jobs/{job['id']}/cancel")[0] == 409
    status, again = site.ask("POST", f"jobs/{job['id']}/resume")
    assert (status, again["state"]) == (202, "queued")
    assert site.ask("GET", "jobs/0000")[0] == 404


def test_the_log_is_shown_from_its_end(site: Site) -> None:
    _, job = site.start()
    folder = site.store.files / "jobs" / job["id"]
    folder.mkdir(parents=True)
    (folder / "log").write_text("x" * 100_000 + "\nlast line\n")
    _, shown = site.ask("GET", f"jobs/{job['id']}/logs")
    assert shown["log"].endswith("xx\nlast line\n")
    assert len(shown["log"]) == 1 << 16


def test_the_same_key_gives_the_same_job(site: Site) -> None:
    status, job = site.start("k")
    assert status == 202
    assert site.start("k") == (202, job)
    status, refused = site.start("k", seed=1)
    assert status == 409
    assert "came with another request" in refused["error"]["message"]
    assert len(site.ask("GET", "jobs")[1]["jobs"]) == 1


def test_tags_are_given_once(site: Site) -> None:
    assert site.start()[0] == 202
    status, refused = site.start(seed=1)
    assert status == 409
    assert "'e4' is taken" in refused["error"]["message"]
    site.control.known.append(view("live"))
    assert site.start(tag="live")[0] == 409
    site.store.variants.publish("stored", "0" * 32, 1, {}, job=None)
    assert site.start(tag="stored")[0] == 409


@pytest.mark.parametrize(
    ("changes", "status", "match"),
    [
        ({"method": "reep"}, 422, "did you mean 'reap'"),
        ({"experts": "99"}, 422, "99"),
        ({"source": {"data": "/etc/passwd"}}, 422, "outside the allowed folders"),
        ({"source": {}}, 400, "expected one of data"),
        ({"share": 7}, 400, "share"),
        ({"tag": "a b"}, 422, "tag is 'a b'"),
    ],
)
def test_what_cannot_work_is_refused(
    site: Site, changes: dict[str, Any], status: int, match: str
) -> None:
    found, body = site.start(**changes)
    assert found == status
    assert match in body["error"]["message"]
    assert site.store.jobs.list() == []


def test_an_engine_that_cannot_try_plans_out(site: Site) -> None:
    site.control.impossible = "rebuild mode"
    status, body = site.start()
    assert status == 501
    assert "expected transformers or vllm: rebuild mode" in body["error"]["message"]
    assert site.start(engine="transformers")[0] == 202


def test_an_earlier_jobs_test_set_is_not_learned_from(site: Site) -> None:
    status, job = site.start(test="sort.test.jsonl")
    assert status == 202
    stored = site.store.jobs.get(job["id"])
    scores = {"mean": 1.0, "data": stored.request["digests"]["test"]}
    site.store.evaluations.add("test", None, scores, job=job["id"])
    status, refused = site.start(tag="b", source={"data": "sort.test.jsonl"})
    assert status == 422
    assert f"is the test set of job {job['id']}" in refused["error"]["message"]


def test_the_switch(site: Site) -> None:
    assert site.ask("GET", "background") == (200, {"enabled": True})
    assert site.ask("POST", "background", json={"enabled": False}) == (202, {"enabled": False})
    assert site.ask("GET", "background") == (200, {"enabled": False})
    assert site.store.settings.get("background") == {"enabled": False}


def test_every_change_is_recorded_and_no_look_is(site: Site) -> None:
    _, job = site.start("k")
    site.start(method="reep")
    site.ask("GET", "jobs")
    site.ask("GET", "background")
    site.ask("POST", f"jobs/{job['id']}/cancel")
    site.ask("POST", "background", json={"enabled": False})
    entries = site.audit.entries()[::-1]
    asked = [(x["path"], x["parameters"]) for x in entries if x["event"] == "asked"]
    request = {"method": "reap", "source": {"data": str(DATA)}, "experts": "4", "tag": "e4"}
    request["max_rows"] = 8
    assert asked[0] == ("/admin/v1/jobs", {**request, "idempotency_key": "k"})
    assert [path for path, _ in asked[1:]] == [
        "/admin/v1/jobs",
        f"/admin/v1/jobs/{job['id']}/cancel",
        "/admin/v1/background",
    ]
    answered = [(x["status"], x["operation"]) for x in entries if x["event"] == "answered"]
    assert answered == [(202, job["id"]), (409, None), (202, job["id"]), (202, "background")]


def test_metrics_of_a_job_go_when_it_is_over(site: Site) -> None:
    _, job = site.start()
    jobs = site.store.jobs
    jobs.claim("me", 60)
    jobs.beat(
        job["id"],
        "me",
        60,
        progress={"ratio": 0.25},
        best={"fitness": 0.5},
        cost={"evaluations": 7},
    )

    def page() -> str:
        asyncio.run(site.metrics.refresh())
        return site.metrics.page("")[0].decode()

    labels = '{model="tiny",variant="tiny:e4"}'
    running = page()
    assert f"liveprune_job_progress_ratio{labels} 0.25" in running
    assert f"liveprune_job_evaluations_total{labels} 7.0" in running
    assert f"liveprune_job_best_fitness{labels} 0.5" in running
    assert 'liveprune_jobs{model="tiny",state="running"} 1.0' in running
    jobs.finish(job["id"], "me", JobState.DONE, result={})
    over = page()
    assert labels not in over
    assert 'liveprune_jobs{model="tiny",state="running"} 0.0' in over
    assert 'liveprune_jobs{model="tiny",state="done"} 1.0' in over
