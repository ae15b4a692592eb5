"""The command line's side of the admin API: one call per route, errors in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from liveprune.pruning.errors import EngineError

TIMEOUT = 60.0
"""Seconds; nearly every route answers at once, long work is an operation."""
EVALUATION_TIMEOUT = 3600.0
"""Seconds that candidates may take, behind all that users ask."""

Json = dict[str, Any]


class AdminConflictError(EngineError):
    """Another operation is in the way (409): what was asked for may be possible later."""


class AdminUnsupportedError(EngineError):
    """The server cannot do this at all (501)."""


class AdminClient:
    """Talks to one server; use it as a context manager.

    Every method returns the answer's JSON and raises EngineError if the server cannot be reached,
    refuses the key, or answers with an error (whose message is passed on as it is).
    """

    def __init__(self, url: str, key: str, *, key_source: str = "") -> None:
        """``key_source`` says in errors where the key was found."""
        self._url = url.rstrip("/")
        self._key_source = key_source
        self._http = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=TIMEOUT,
            trust_env=False,  # the key does not go to a proxy, nor a loopback address through one
        )

    def variants(self) -> list[Json]:
        """All variants."""
        found: list[Json] = self._call("GET", "variants")["variants"]
        return found

    def add(self, tag: str, plan: str) -> Json:
        """Start to make a plan live; returns the operation. ``plan`` is a path on the server."""
        return self._call("POST", "variants", {"tag": tag, "plan": plan})

    def remove(self, tag: str) -> Json:
        """Start to take a variant out of service; returns the operation."""
        return self._call("DELETE", f"variants/{quote(tag)}")

    def swap(self, tag: str, *, keep_previous: bool = False) -> Json:
        """Start a swap; returns the operation."""
        return self._call("POST", "swap", {"variant": tag, "keep_previous": keep_previous})

    def rollback(self) -> Json:
        """Start to return to the variant before; returns the operation."""
        return self._call("POST", "rollback")

    def cancel(self, operation_id: str) -> Json:
        """Give up an operation; returns it."""
        return self._call("POST", f"operations/{quote(operation_id, safe='')}/cancel")

    def operation(self, operation_id: str) -> Json:
        """One operation."""
        return self._call("GET", f"operations/{quote(operation_id, safe='')}")

    def operations(self) -> list[Json]:
        """All operations that the server remembers."""
        found: list[Json] = self._call("GET", "operations")["operations"]
        return found

    def status(self) -> Json:
        """The engine's memory, its variants and what is going on."""
        return self._call("GET", "status")

    def statistics(self) -> Json:
        """What users' requests use lately."""
        return self._call("GET", "statistics")

    def statistics_file(self, variant: str) -> bytes:
        """The statistics of a variant, or of ``all``, as a file."""
        query = quote(variant, safe="")
        return self._ask("GET", f"statistics/file?variant={query}", None, TIMEOUT).content

    def score(self, body: Json) -> Json:
        """Score answers under plans that nobody else sees (``candidate_models.Score``)."""
        return self._call("POST", "score", body, timeout=EVALUATION_TIMEOUT)

    def generate(self, body: Json) -> Json:
        """Decode under plans that nobody else sees (``candidate_models.Generate``)."""
        return self._call("POST", "generate", body, timeout=EVALUATION_TIMEOUT)

    def start_job(self, request: Json) -> Json:
        """Queue a background job (``jobs.request.JobRequest``); returns it."""
        return self._call("POST", "jobs", request)

    def jobs(self) -> list[Json]:
        """The newest first."""
        found: list[Json] = self._call("GET", "jobs")["jobs"]
        return found

    def job(self, job_id: str) -> Json:
        """One job; the beginning of its id will do."""
        return self._call("GET", f"jobs/{quote(job_id, safe='')}")

    def job_log(self, job_id: str) -> str:
        """The end of a job's log."""
        return str(self._call("GET", f"jobs/{quote(job_id, safe='')}/logs")["log"])

    def cancel_job(self, job_id: str) -> Json:
        """Stop a job; returns it."""
        return self._call("POST", f"jobs/{quote(job_id, safe='')}/cancel")

    def resume_job(self, job_id: str) -> Json:
        """Queue a job again that failed or was cancelled; returns it."""
        return self._call("POST", f"jobs/{quote(job_id, safe='')}/resume")

    def background(self) -> Json:
        """Whether background work is on."""
        return self._call("GET", "background")

    def set_background(self, enabled: bool) -> Json:
        """Turn all background work on or off."""
        return self._call("POST", "background", {"enabled": enabled})

    def start_experiment(self, definition: Json) -> Json:
        """Start or schedule an experiment (docs/experiments.md); returns it."""
        return self._call("POST", "experiments", definition)

    def check_experiment(self, definition: Json) -> Json:
        """The definition as it would be started, with all defaults."""
        found: Json = self._call("POST", "experiments/check", definition)["definition"]
        return found

    def experiments(self) -> list[Json]:
        """The newest first."""
        found: list[Json] = self._call("GET", "experiments")["experiments"]
        return found

    def experiment(self, name: str) -> Json:
        """One experiment."""
        return self._call("GET", f"experiments/{quote(name, safe='')}")

    def stop_experiment(self, name: str, reason: str) -> Json:
        """End an experiment; returns it."""
        return self._call("POST", f"experiments/{quote(name, safe='')}/stop", {"reason": reason})

    def set_weights(self, name: str, weights: Mapping[str, float]) -> Json:
        """Change the shares of all arms; returns the experiment."""
        body = {"weights": dict(weights)}
        return self._call("PATCH", f"experiments/{quote(name, safe='')}/weights", body)

    def decisions(self, name: str) -> list[Json]:
        """The oldest first."""
        path = f"experiments/{quote(name, safe='')}/decisions"
        found: list[Json] = self._call("GET", path)["decisions"]
        return found

    def decision(self, name: str, number: int) -> Json:
        """One decision with the numbers that it follows from."""
        return self._call("GET", f"experiments/{quote(name, safe='')}/decisions/{number}")

    def feedback(self, response_id: str, score: float) -> Json:
        """Score an answer; returns the experiment and the arm."""
        return self._call("POST", "feedback", {"response_id": response_id, "score": score})

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(
        self, method: str, path: str, body: Json | None = None, *, timeout: float = TIMEOUT
    ) -> Json:
        answer = self._ask(method, path, body, timeout)
        content = _json(answer)
        if not isinstance(content, dict):
            raise self._stranger(answer)
        return content

    def _ask(self, method: str, path: str, body: Json | None, timeout: float) -> httpx.Response:
        """The answer if it is a success; errors as the class says."""
        try:
            answer = self._http.request(method, f"/admin/v1/{path}", json=body, timeout=timeout)
        except httpx.TimeoutException as error:
            raise EngineError(f"{self._url}: no answer within {timeout:.0f} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EngineError(
                f"{self._url}: not reachable ({error}); expected the admin API of a running server "
                "(--admin-url says where it is)"
            ) from error
        if answer.is_success:
            return answer
        message = _message(_json(answer))
        if message is None:
            raise self._stranger(answer)
        if answer.status_code in (401, 403):
            raise EngineError(
                f"{self._url}: the key was refused: {message} (the key is from {self._key_source})"
            )
        kinds = {409: AdminConflictError, 501: AdminUnsupportedError}
        raise kinds.get(answer.status_code, EngineError)(message)

    def _stranger(self, answer: httpx.Response) -> EngineError:
        return EngineError(
            f"{self._url}: found an answer with status {answer.status_code} that is not the "
            "admin API's; is this the admin port?"
        )


def _json(answer: httpx.Response) -> object:
    try:
        return answer.json()
    except ValueError:
        return None


def _message(content: object) -> str | None:
    """The message of an error body in OpenAI's shape."""
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else None
