"""What routing and measuring add to a request: stock vLLM against Liveprune with an experiment.

    python -m benchmarks.gateway [--streams 1 4 16] [--rounds 8] [--window 10] [--output FILE.json]

Two servers stay up on the same model: ``vllm serve`` without any plugin, and ``liveprune serve``
with an experiment that splits the name over two variants with the same experts, so that nothing but
the way to the engine differs. Streams ask each in turn for one window. Sides:

* stock: vLLM;
* pinned: Liveprune, asked for ``name:full``: measured, no experiment;
* split: Liveprune, asked for the name: routed by the experiment, measured for its arm.

Time to the first token and of the whole answer at the median and the 99th percentile, and CPU time
of the API server's process a request, which other tenants of a machine disturb least. Ratios are of
neighbouring windows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.background import latency
from benchmarks.machine import describe_machine
from benchmarks.models import ModelShape, describe, write_model
from benchmarks.rounds import spread
from benchmarks.served import FLAGS, Served, write_tokenizer
from benchmarks.streams import NAME, streaming
from liveprune.server.served_model import free_port

SIDES = ("stock", "pinned", "split")
SETTLE = 1.0
START_SECONDS = 600
Json = dict[str, Any]


class Door:
    """A server as the streams see it, and the process whose CPU time is its way to the engine."""

    def __init__(self, port: int, model: str, process: psutil.Process) -> None:
        self.port, self.model, self.process = port, model, process

    def cpu(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=32, help="of each streamed answer")
    parser.add_argument("--rounds", type=int, default=8, help="windows of each side")
    parser.add_argument("--window", type=float, default=10, help="seconds")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    shape = ModelShape(arguments.hidden, arguments.intermediate, arguments.layers, dtype="float32")
    found: Json = {"machine": describe_machine(), "model": describe(shape)}
    with tempfile.TemporaryDirectory(prefix="gateway-") as folder:
        model = Path(folder) / "model"
        write_model(model, shape)
        write_tokenizer(model, shape.vocabulary)
        with _doors(model) as doors:
            found["streams"] = {
                str(count): _alternate(doors, count, Path(folder), arguments)
                for count in arguments.streams
            }
    for count, sides in found["streams"].items():
        _print(count, sides)
    if arguments.output:
        settings = {key: x for key, x in vars(arguments).items() if key != "output"}
        arguments.output.write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n")


@contextlib.contextmanager
def _doors(model: Path) -> Iterator[dict[str, Door]]:
    served = Served(model, "float32", flags=["--no-live-statistics"])
    with served.server, _stock(model) as (port, process):
        served.follow(served.admin.add("same", str(_whole_plan(model))))
        arms = [
            {"name": "a", "variant": "full", "weight": 0.5},
            {"name": "b", "variant": "same", "weight": 0.5},
        ]
        experiment: Json = {"name": "same", "model": NAME, "arms": arms, "control": "a"}
        experiment |= {"primary": {"metric": "e2e_seconds"}, "warm_up_seconds": 0}
        served.admin.start_experiment(experiment)
        server = psutil.Process(served.server.pid)
        yield {
            "stock": Door(port, NAME, process),
            "pinned": Door(served.server.port, f"{NAME}:full", server),
            "split": Door(served.server.port, NAME, server),
        }


@contextlib.contextmanager
def _stock(model: Path) -> Iterator[tuple[int, psutil.Process]]:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    command += [*FLAGS, "--dtype", "float32"]
    defaults = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**defaults, **os.environ, "VLLM_PLUGINS": ""}
    log = model.parent / "stock.log"
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vllm serve: {log.read_text()[-2000:]}")
                time.sleep(0.5)
            yield port, psutil.Process(process.pid)
        finally:
            process.terminate()


def _answers(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success
    return False


def _whole_plan(model: Path) -> Path:
    """A plan that keeps every expert: another variant, the same work."""
    from liveprune.pruning.plan_io import save_plan
    from liveprune.pruning.prune import make_plan

    path = model.parent / "same.json"
    save_plan(make_plan(model, method="random", experts=1.0), path)
    return path


def _alternate(
    doors: dict[str, Door], streams: int, folder: Path, arguments: argparse.Namespace
) -> Json:
    windows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds + 1):
        for side in SIDES if number % 2 else reversed(SIDES):
            found = _window(doors[side], streams, folder, arguments)
            if number:  # a first round warms up
                windows[side].append(found)
    return {
        "windows": windows,
        "sides": {side: _spread(found) for side, found in windows.items()},
        "ratio": {side: _ratios(windows[side], windows["stock"]) for side in SIDES[1:]},
    }


def _window(
    door: Door, streams: int, folder: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    output = folder / "streams.json"
    with streaming(door.port, streams, arguments.tokens, output, door.model):
        time.sleep(SETTLE)
        cpu, start = door.cpu(), time.monotonic()
        time.sleep(arguments.window)
        cpu, end = door.cpu() - cpu, time.monotonic()
    answers = json.loads(output.read_text())
    ended = sum(start <= x["ended"] <= end for x in answers)
    return latency(answers, (start, end)) | {"API server's CPU per request": cpu / ended}


def _spread(windows: Sequence[dict[str, float]]) -> Json:
    return {name: spread([window[name] for window in windows]) for name in windows[0]}


def _ratios(ours: Sequence[dict[str, float]], stock: Sequence[dict[str, float]]) -> Json:
    return {
        name: spread([a[name] / b[name] for a, b in zip(ours, stock, strict=True)])
        for name in stock[0]
    }


def _print(streams: str, found: Json) -> None:
    print(f"\n{streams} streams\n")
    print("| | stock | pinned | split | pinned / stock | split / stock |")
    print("|---|---|---|---|---|---|")
    for name in found["sides"]["stock"]:
        factor, unit = (1, "") if "per second" in name else (1000, " ms")
        values = [f"{factor * found['sides'][side][name]['median']:.2f}{unit}" for side in SIDES]
        ratios = [
            f"{x['median']:.3f} ({x['min']:.3f} to {x['max']:.3f})"
            for x in (found["ratio"][side][name] for side in SIDES[1:])
        ]
        print(f"| {name} | {' | '.join([*values, *ratios])} |")


if __name__ == "__main__":
    main()
