"""Many engines as one: actors of Ray that share out the plans of every call."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from liveprune.pruning.errors import EngineError, IncompatibleEnvironmentError, LiveprunError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan import Plan
from liveprune.server.engine_description import EngineDescription
from liveprune.server.ray_actor import Description, EngineActor, Process, identity
from liveprune.server.ray_cluster import import_ray, ray_cluster
from liveprune.server.ray_member import Member, State
from liveprune.server.ray_work import Work

RESTARTS = 3
"""Fresh actors in a row that a place gets between two answers. A plan that kills actors can take
two from one place before it is found guilty, so that fewer would let it take the place, too."""
PLACE_SECONDS = 300.0
"""In which Ray finds room for an actor: a cluster may have to add a machine first."""
CLOSE_SECONDS = 10.0
COMPARED = 4
"""Least plans of a chunk that is compared with the full model: each runs that again, too."""
PASSED_ON = ("HF_HUB_OFFLINE", "VLLM_CPU_KVCACHE_SPACE", "VLLM_PLUGINS")
"""Variables that actors elsewhere must share with the search."""

logger = logging.getLogger("liveprune")


@contextmanager
def ray_pool(description: EngineDescription, actors: int, address: str | None) -> Iterator[RayPool]:
    """A pool on a cluster of its own, or on the one at ``address``.

    An actor has as many threads as ``OMP_NUM_THREADS`` says; without it, its share of this machine,
    or one on a cluster, whose machines are not known. GPUs are taken where the cluster has some.

    Raises:
        IncompatibleEnvironmentError: see ``ray_cluster`` and ``RayPool``.
        EngineError: an engine did not start.
    """
    with ray_cluster(address, actors):
        ray = import_ray()
        share = max(1, len(os.sched_getaffinity(0)) // actors) if address is None else 1
        threads = int(os.environ.get("OMP_NUM_THREADS") or share)
        machines = sum(bool(node["Alive"]) for node in ray.nodes())
        pool = RayPool(
            dataclasses.replace(description, neighbours=math.ceil(actors / machines)),
            actors,
            # A cluster of our own has a CPU for each actor, by name, and nothing else to do.
            cpus=1 if address is None else threads,
            gpus=description.gpus if ray.cluster_resources().get("GPU") else 0,
            threads=threads,
        )
        try:
            yield pool
        finally:
            pool.close()


class RayPool:
    """The protocol ``pruning.evaluation.engine.Engine`` over engines in actors of Ray.

    A lost actor is replaced, and what it ran is run again by another. A plan that two actors died
    with fails its call, which names it. Results do not depend on who gave them, as far as one
    engine's do not depend on what else is in a batch.
    """

    def __init__(
        self,
        description: Description,
        actors: int,
        *,
        cpus: int = 1,
        gpus: int = 0,
        threads: int = 1,
        restarts: int = RESTARTS,
        place_seconds: float = PLACE_SECONDS,
    ) -> None:
        """Start the actors, and wait for all; this process is connected to a cluster.

        Args:
            description: of the engine, the same for all.
            actors: at least 1.
            cpus: that an actor is given, by Ray's count.
            gpus: likewise.
            threads: of an actor's computations.
            restarts: fresh actors in a row that a place gets; afterwards it is given up.
            place_seconds: in which Ray must find room for an actor.

        Raises:
            IncompatibleEnvironmentError: an actor has another version of something that counts, or
                another checkpoint; or the cluster has no room.
            EngineError: an engine did not start.
            CheckpointError: there is no readable checkpoint here.
        """
        self._ray = import_ray()
        self._expected = identity(description.model)
        self._restarts, self._place_seconds = restarts, place_seconds
        self._needs = {"CPU": cpus, "GPU": gpus}
        self._closed = False
        actor = self._ray.remote(EngineActor).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,  # the pool must know: a fresh one has no engine yet
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": _environment(threads)},
        )
        self._members: list[Member] = []
        try:
            for number in range(actors):
                self._members.append(Member(number, lambda: actor.remote(description)))
            self._wait_for_all()
        except BaseException:
            self.close()
            raise

    @property
    def processes(self) -> list[Process]:
        """Where the actors that have found a place run."""
        return [member.process for member in self._members if member.process is not None]

    def score(
        self,
        plans: Sequence[Plan | None],
        rows: Sequence[TokenRow],
        *,
        against_full: bool = False,
    ) -> list[AnswerScores]:
        """See ``Engine``; a plan is run whole by one actor."""
        least = COMPARED if against_full else 1
        return self._call("score", plans, list(rows), {"against_full": against_full}, least)

    def generate(
        self,
        plans: Sequence[Plan | None],
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        end: Collection[int],
    ) -> list[list[tuple[int, ...]]]:
        """See ``Engine``; a plan is run whole by one actor."""
        options = {"max_tokens": max_tokens, "end": tuple(end)}
        return self._call("generate", plans, list(prompts), options, 1)

    def close(self) -> None:
        """End all actors; the pool cannot be used afterwards."""
        if self._closed:
            return
        self._closed = True
        if not self._ray.is_initialized():
            return  # Ray has ended before, and all actors with it; asking would start it anew
        idle = [x.actor.close.remote() for x in self._members if x.state is State.IDLE]
        if idle:
            # In order, if they can: vLLM may have processes of its own in there.
            self._ray.wait(idle, num_returns=len(idle), timeout=CLOSE_SECONDS)
        for member in self._members:
            self._ray.kill(member.actor)
            member.leave("the pool was closed")

    def _call(
        self,
        method: str,
        plans: Sequence[Plan | None],
        data: list[Any],
        options: dict[str, Any],
        least: int,
    ) -> list[Any]:
        if self._closed:
            raise EngineError(f"{method}: the pool is closed")
        there = [member for member in self._members if member.state is not State.GONE]
        workers = max(1, len(there))
        work = Work(plans, workers, min(least, math.ceil(len(plans) / workers)))
        try:
            reference = self._ray.put(data)
            while not work.finished:
                for member in self._members:
                    if member.state is State.IDLE and (
                        chunk := work.take(member.number, self._others(member))
                    ):
                        some = list(plans[chunk.start : chunk.stop])
                        member.ask(chunk, method, some, reference, options)
                self._receive(self._next(), work)
        except LiveprunError:
            raise
        except BaseException:
            # Interrupted: what runs cannot be called back.
            self.close()
            raise
        return work.results()

    def _others(self, member: Member) -> list[int]:
        """Who else has an engine, or will have one soon."""
        soon = (State.STARTING, State.IDLE, State.BUSY)
        return [x.number for x in self._members if x is not member and x.state in soon]

    def _next(self) -> Member:
        """The first member that something has happened to.

        Raises:
            EngineError: no actor is left.
        """
        pending = [member for member in self._members if member.pending is not None]
        if all(member.state is State.PLACING for member in pending):
            last = max((member.since for member in pending), default=0)
            found = self._wait(pending, last)
            if found is None:
                for member in pending:
                    member.leave(f"{member.cause}; since then there was no room for a fresh one")
                causes = "; ".join(f"{x}: {x.cause}" for x in self._members)
                raise EngineError(f"no actor is left of {len(self._members)}: {causes}")
            return found
        return self._wait(pending, None) or pending[0]

    def _wait(self, members: Sequence[Member], since: float | None) -> Member | None:
        """The first of them that is done; None if none is in time. ``since`` None is for ever."""
        if not members:
            return None
        by_reference = {member.pending: member for member in members}
        left = None if since is None else since + self._place_seconds - time.monotonic()
        done, _ = self._ray.wait(
            list(by_reference), timeout=None if left is None else max(0.0, left)
        )
        return by_reference[done[0]] if done else None

    def _receive(self, member: Member, work: Work) -> None:
        chunk = member.chunk
        if chunk is None:
            if (error := self._prepare(member)) is not None:
                self._replace(member, str(error))
            return
        answer = self._fetch(member)
        if isinstance(answer, _Lost):
            for number in work.lose(chunk, member.number, f"{member}: {answer.cause}"):
                self._members[number].deaths = 0
            self._replace(member, answer.cause)
            return
        member.rest()
        member.deaths = 0
        if isinstance(answer, LiveprunError):
            work.refuse(chunk, answer)
        else:
            work.answer(chunk, answer)

    def _wait_for_all(self) -> None:
        """The pool begins whole: what is wrong with a machine is said now, by name."""
        while waiting := [x for x in self._members if x.pending is not None]:
            placing = [x.since for x in waiting if x.state is State.PLACING]
            member = self._wait(waiting, min(placing, default=None))
            if member is None:
                raise IncompatibleEnvironmentError(
                    f"{len(placing)} of {len(self._members)} actors found no room in "
                    f"{self._place_seconds:.0f} s: each needs {self._needs}; the cluster has "
                    f"{_sizes(self._ray.cluster_resources())}, free are "
                    f"{_sizes(self._ray.available_resources())}"
                )
            error = self._prepare(member)
            if error is not None:
                raise error
            if member.state is State.GONE:
                raise EngineError(f"{member} did not start: {member.cause}")

    def _prepare(self, member: Member) -> LiveprunError | None:
        """Take a member's next step to its engine; one that has died is replaced.

        Returns:
            Why it cannot take it.
        """
        answer = self._fetch(member)
        error: LiveprunError | None = None
        if isinstance(answer, _Lost):
            self._replace(member, answer.cause)
        elif isinstance(answer, LiveprunError):
            error = EngineError(f"{member}: {answer}")
        elif member.state is State.STARTING:
            member.rest()
        else:
            process, found = answer
            member.start(process)
            if found != self._expected:
                error = IncompatibleEnvironmentError(
                    f"{member}: {_difference(found, self._expected)} as where the search runs"
                )
        return error

    def _fetch(self, member: Member) -> Any:
        """What a member has answered, an error that its engine raised, or that it is lost."""
        try:
            return self._ray.get(member.pending)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, LiveprunError):
                return cause
            return EngineError(f"{member}: {type(cause).__name__}: {cause}")
        except self._ray.exceptions.RayError as error:
            # Many types: killed, out of memory, machine gone, answer gone with it. All mean: lost.
            return _Lost(" ".join(str(error).split())[:400])

    def _replace(self, member: Member, cause: str) -> None:
        self._ray.kill(member.actor)
        member.deaths += 1
        if member.deaths > self._restarts:
            logger.warning("%s is given up after %d deaths: %s", member, member.deaths, cause)
            member.leave(cause)
        else:
            logger.warning("%s is replaced (%d): %s", member, member.deaths, cause)
            member.cause = cause
            member.place()


@dataclass(frozen=True)
class _Lost:
    cause: str


def _environment(threads: int) -> dict[str, str]:
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    # Unbound, or vLLM would put the threads of all actors of a machine on the same cores.
    bound = {"VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")}
    return {**passed, **bound, "OMP_NUM_THREADS": str(threads)}


def _difference(found: dict[str, str], expected: dict[str, str]) -> str:
    names = sorted(found.keys() | expected.keys())
    return "; ".join(
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'missing')}"
        for name in names
        if found.get(name) != expected.get(name)
    )


def _sizes(resources: dict[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0.0) for name in ("CPU", "GPU")}
