"""``liveprune demo``: the story of one pruned model, on real vLLM, in minutes on a laptop."""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.inspect import inspect
from liveprune.pruning.demo import model_path, rows_path, task_names
from liveprune.pruning.demo.rows import read_rows
from liveprune.pruning.demo.tasks import Row
from liveprune.pruning.errors import DataError
from liveprune.pruning.files import write_atomic
from liveprune.pruning.prune import make_plan
from liveprune.server.chart import save_chart
from liveprune.server.served_model import ServedModel

FLAGS = (
    *("--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16"),
    *("--gpu-memory-utilization", "0.2"),  # on a CPU: share of memory that must be free at start
)
MAX_TOKENS = 48
ROUNDS = 5
"""Alternated timing rounds; the median is reported."""


@dataclass
class Measured:
    """What was measured of one served model."""

    name: str
    expert_bytes: int
    resident_bytes: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    """Exact match by task, 0 to 1."""
    speeds: list[float] = field(default_factory=list)
    """Generated tokens per second, one per round."""
    sample: str = ""

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(self.speeds)


def run_demo(output: Path, *, task: str, rows: int, console: Console) -> None:
    """Calibrate, prune 8 -> 4 experts top-1, apply, serve both, ask both, compare.

    Args:
        output: Folder for the pruned checkpoint, logs, ``demo.json`` and ``demo.png``.
        task: The task family to prune for.
        rows: Held-out test rows asked per task.
        console: Where the story is told.

    Raises:
        DataError: unknown task.
    """
    if task not in task_names():
        raise DataError(f"--task: found {task!r}, expected one of {', '.join(task_names())}")
    base, pruned = model_path(), output / "demo-e4k1"
    console.print(f"[bold]1[/] score the experts on {task} rows, keep 4 of 8 per layer, top-1")
    plan = make_plan(
        base, method="reap", experts=4, top_k=1, calibration=rows_path(task, "train"), max_rows=256
    )
    console.print(f"[bold]2[/] write the pruned checkpoint to {pruned} (plan {plan.digest})")
    shutil.rmtree(pruned, ignore_errors=True)
    apply_plan(base, plan, pruned)
    console.print("[bold]3[/] serve the full and the pruned model on vLLM (a minute or two)")
    models = {"demo": base, "demo-e4k1": pruned}
    measured = [Measured(name, inspect(path).expert_bytes or 0) for name, path in models.items()]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                ServedModel(path, name=name, log=output / f"{name}.log", flags=FLAGS)
            )
            for name, path in models.items()
        ]
        for server in servers:
            server.wait_ready()
        console.print(f"[bold]4[/] ask both {rows} held-out questions of each task")
        asyncio.run(_measure(servers, measured, task, rows))
        for server, result in zip(servers, measured, strict=True):
            result.resident_bytes = server.resident_bytes()
    _report(measured, task, rows, output, console)


async def _measure(
    servers: Sequence[ServedModel], measured: Sequence[Measured], task: str, rows: int
) -> None:
    clients = [AsyncOpenAI(base_url=f"{s.base_url}/v1", api_key="none") for s in servers]
    for name in task_names():
        questions = _rows(name, rows)
        for client, result in zip(clients, measured, strict=True):
            answers, _ = await _ask(client, result.name, [row.prompt for row in questions])
            right = [a == row.answer for a, row in zip(answers, questions, strict=True)]
            result.accuracy[name] = statistics.mean(right)
            if name == task:
                result.sample = f"{questions[0].prompt.strip()} -> {answers[0]}"
    prompts = [row.prompt for row in _rows(task, rows)]
    for _ in range(ROUNDS):  # alternated, so that a slow moment of the machine hits both
        for client, result in zip(clients, measured, strict=True):
            start = time.perf_counter()
            _, tokens = await _ask(client, result.name, prompts, ignore_eos=True)
            result.speeds.append(tokens / (time.perf_counter() - start))
    for client in clients:
        await client.close()


async def _ask(
    client: AsyncOpenAI, model: str, prompts: Sequence[str], *, ignore_eos: bool = False
) -> tuple[list[str], int]:
    """Greedy answers to all prompts, sent at once, and the tokens generated."""
    done = await asyncio.gather(
        *(
            client.completions.create(
                model=model,
                prompt=prompt,
                temperature=0,
                max_tokens=MAX_TOKENS,
                extra_body={"ignore_eos": ignore_eos},
            )
            for prompt in prompts
        )
    )
    tokens = sum(answer.usage.completion_tokens for answer in done if answer.usage)
    return [answer.choices[0].text.strip() for answer in done], tokens


def _rows(task: str, count: int) -> list[Row]:
    return read_rows(rows_path(task, "test"))[:count]


def _report(
    measured: Sequence[Measured], task: str, rows: int, output: Path, console: Console
) -> None:
    table = Table(title=f"8 experts top-2 against 4 experts top-1, pruned for {task!r}")
    table.add_column("measured")
    for result in measured:
        table.add_column(result.name, justify="right")
    for name in task_names():
        label = f"accuracy, {name}" + (" (pruned for it)" if name == task else "")
        table.add_row(label, *(f"{r.accuracy[name]:.0%}" for r in measured))
    table.add_row("expert bytes", *(f"{r.expert_bytes / 1e6:.2f} MB" for r in measured))
    table.add_row("resident memory", *(f"{r.resident_bytes / 1e6:.0f} MB" for r in measured))
    table.add_row("tokens per second", *(f"{r.tokens_per_second:.0f}" for r in measured))
    console.print(table)
    console.print(
        f"{rows} held-out rows per task, exact match, greedy. Resident memory is the whole server: "
        "Python, vLLM and the KV cache weigh far more than this small model's experts."
    )
    for result in measured:
        console.print(f"{result.name}: {result.sample}", highlight=False, markup=False)
    content = [{**vars(r), "tokens_per_second": r.tokens_per_second} for r in measured]
    write_atomic(output / "demo.json", (json.dumps(content, indent=1) + "\n").encode())
    points = {r.name: (r.expert_bytes / 1e6, r.accuracy) for r in measured}
    save_chart(output / "demo.png", points, highlight=task)
    console.print(f"chart: {output / 'demo.png'}   numbers: {output / 'demo.json'}")
