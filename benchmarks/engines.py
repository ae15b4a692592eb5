"""Child processes that hold one vLLM engine each and answer over a pipe, one JSON line a question.

Several stay loaded, so that rounds can alternate between them. The child times its own steps:
those until every request has its first token are prefill, the rest decode.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self, cast

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
PLUGINS = "VLLM_PLUGINS"
BASE_SLOT = 0


@dataclass(frozen=True)
class Batch:
    """Requests that are sent together, and again when all have ended."""

    prompts: Sequence[Sequence[int]]
    """Token ids."""
    new_tokens: int
    repeats: int = 1

    @classmethod
    def random(
        cls, count: int, tokens: int, vocabulary: int, new_tokens: int, repeats: int = 1
    ) -> Batch:
        """``count`` prompts of ``tokens`` random ids; the same each time."""
        generator = random.Random(0)
        prompts = [[generator.randrange(vocabulary) for _ in range(tokens)] for _ in range(count)]
        return cls(prompts, new_tokens, repeats)


@dataclass(frozen=True)
class Sample:
    """What one batch took: seconds over all repeats."""

    prefill_wall: float
    prefill_cpu: float
    decode_wall: float
    decode_cpu: float
    tokens: list[list[int]]
    """Of each request, in the first repeat."""


class Engine:
    """One engine in a child process."""

    def __init__(
        self, name: str, model: Path, log: Path, *, compiled: bool, dtype: str, live: Any = None
    ) -> None:
        """Start it and wait until it answers; ``live``: a LiveConfig, or None for stock vLLM."""
        self.name = name
        self._log = log
        inherited = {key: value for key, value in os.environ.items() if key != PLUGINS}
        stock = {PLUGINS: ""} if live is None else {}
        # A cache of its own: compiled code of an earlier run must not stand in for today's.
        cache = {"VLLM_CACHE_ROOT": str(log.parent / "cache")}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engines"],
                env=inherited | ENVIRONMENT | stock | cache,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self._questions = cast("IO[str]", self._process.stdin)
        self._answers = cast("IO[str]", self._process.stdout)
        additional = None if live is None else live.to_additional_config()
        self._ask("start", model=str(model), compiled=compiled, dtype=dtype, additional=additional)

    def generate(self, batch: Batch, slots: Sequence[int] | None = None) -> Sample:
        """``slots``: the routing tables of each request, in turn, one on in each repeat."""
        return Sample(**self._ask("generate", **asdict(batch), slots=list(slots or [BASE_SLOT])))

    def resident(self) -> int:
        """Bytes of the process in memory, files not counted."""
        return int(self._ask("resident"))

    def probe(self, **arguments: Any) -> dict[str, float]:
        return dict(self._ask("probe", **arguments))

    def make_live(self, slot: int, plan: Path | None) -> None:
        """Fill the slot's rows and publish its tables."""
        self._live("prepare", slot=slot, plan=None if plan is None else str(plan))
        while (progress := self._live("progress", slot=slot))["phase"] != "ready":
            if progress["phase"] == "failed":
                raise RuntimeError(f"{self.name}: {progress['error']}")
            time.sleep(0.02)
        self._live("publish", slot=slot)

    def retire(self, slot: int) -> None:
        if not self._live("retire", slot=slot):
            raise RuntimeError(f"{self.name}: slot {slot} is in use")

    def release(self) -> int:
        """Give back the rows that no slot needs; returns their bytes."""
        return sum(iter(lambda: int(self._live("release")), 0))

    def memory(self) -> dict[str, Any]:
        return dict(self._live("memory"))

    def _live(self, operation: str, **arguments: Any) -> Any:
        return self._ask("live", operation=operation, arguments=arguments)

    def _ask(self, command: str, **arguments: Any) -> Any:
        # A child that died shows in the empty answer, with its log.
        with contextlib.suppress(BrokenPipeError):
            self._questions.write(json.dumps([command, arguments]) + "\n")
            self._questions.flush()
        answer = self._answers.readline()
        if not answer:
            tail = self._log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"engine {self.name} ended at {command!r}:\n{tail}")
        return json.loads(answer)

    def close(self) -> None:
        self._questions.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Child:
    """The other end: holds the engine."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._ids = itertools.count()

    def start(self, model: str, compiled: bool, dtype: str, additional: Any) -> None:
        from vllm import LLM

        self._llm = LLM(
            model,
            enforce_eager=not compiled,
            dtype=dtype,
            max_model_len=1024,
            max_num_batched_tokens=4096,
            max_num_seqs=32,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            seed=0,
            additional_config=additional or {},
        )
        self._with_slots = bool(additional)

    def generate(
        self, prompts: list[list[int]], new_tokens: int, repeats: int, slots: list[int]
    ) -> dict[str, Any]:
        seconds = {"prefill": [0.0, 0.0], "decode": [0.0, 0.0]}
        first: list[list[int]] = []
        for repeat in range(repeats):
            tokens: dict[str, list[int]] = {}
            for i, prompt in enumerate(prompts):
                tokens[self._add(prompt, new_tokens, slots[(i + repeat) % len(slots)])] = []
            while self._llm.llm_engine.has_unfinished_requests():
                phase = "decode" if all(tokens.values()) else "prefill"
                start = (time.perf_counter(), time.process_time())
                outputs = self._llm.llm_engine.step()
                seconds[phase][0] += time.perf_counter() - start[0]
                seconds[phase][1] += time.process_time() - start[1]
                for output in outputs:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
            first = first or list(tokens.values())
        return {
            "prefill_wall": seconds["prefill"][0],
            "prefill_cpu": seconds["prefill"][1],
            "decode_wall": seconds["decode"][0],
            "decode_cpu": seconds["decode"][1],
            "tokens": first,
        }

    def _add(self, prompt: list[int], new_tokens: int, slot: int) -> str:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        if self._with_slots:
            salt = None if slot == BASE_SLOT else str(slot)
            sampling.extra_args = {"liveprune": {"slot": slot, "salt": salt}}
        name = str(next(self._ids))
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return name

    def live(self, operation: str, arguments: dict[str, Any]) -> Any:
        core = self._llm.llm_engine.engine_core.engine_core
        reply = core.liveprune(operation, arguments)
        if reply.get("error"):
            raise RuntimeError(f"{operation}: {reply['error']}")
        return reply["value"]

    def resident(self) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/self/status has no RssAnon")

    def probe(self, **arguments: Any) -> dict[str, float]:
        from benchmarks.machine import probe

        return probe(**arguments)


def _serve() -> None:
    """Answer until the questions end; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    child = Child()
    for command, arguments in _questions():
        method: Callable[..., Any] = getattr(child, command)
        print(json.dumps(method(**arguments)), file=answers, flush=True)


def _questions() -> Iterator[tuple[str, dict[str, Any]]]:
    for line in sys.stdin:
        command, arguments = json.loads(line)
        yield command, arguments


if __name__ == "__main__":
    _serve()
