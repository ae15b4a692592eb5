"""What users notice of background work: a search on the live engine, and live statistics.

    python -m benchmarks.background [--parts search statistics] [--streams 4] [--pause 1]
        [--rounds 8] [--window 20] [--output FILE.json]

* search: one server, streams from another process that think for a second between two requests
  (where users never let go of the engine, candidates have no turn), and a job (EEP without labels,
  agreement with the full model) that the switch of background work stops and lets go on: windows
  with and without it alternate. A window with it begins once it has scored a candidate. Time to the
  first token, time per output token, the longest gap between two chunks of an answer, and the whole
  answer, at the median and the 99th percentile, and tokens a second.
* statistics: two servers, one of which counts its routing; each in turn answers the same prompts
  one window long while the other is idle. CPU seconds of its engine per token, which the other
  tenants of a machine disturb least.

Ratios are of neighbouring windows; their median is what counts.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import describe_machine
from benchmarks.models import ModelShape, describe, write_model
from benchmarks.rounds import spread
from benchmarks.served import Served, write_tokenizer
from benchmarks.streams import streaming

PARTS = ("search", "statistics")
KINDS = ("first token", "per output token", "longest gap", "whole answer")
ROWS = 64
SETTLE = 2.0
"""Seconds after a change before a window begins."""
PATIENCE = 300.0
"""Seconds that a search may take to go on."""
Json = dict[str, Any]
Window = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="of each streamed answer")
    parser.add_argument(
        "--pause", type=float, default=1, help="seconds between a stream's answers, part search"
    )
    parser.add_argument("--rounds", type=int, default=8, help="windows of each side")
    parser.add_argument("--window", type=float, default=20, help="seconds")
    parser.add_argument("--share", type=float, help="of the engine's time; default: the server's")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    shape = ModelShape(arguments.hidden, arguments.intermediate, arguments.layers, dtype="float32")
    found: Json = {"machine": describe_machine(), "model": describe(shape)}
    with tempfile.TemporaryDirectory(prefix="background-") as folder:
        model = Path(folder) / "model"
        write_model(model, shape)
        write_tokenizer(model, shape.vocabulary)
        if "search" in arguments.parts:
            found["search"] = _search(model, shape.vocabulary, arguments)
            _print_latency(found["search"])
        if "statistics" in arguments.parts:
            found["statistics"] = _statistics(model, arguments)
            print(json.dumps(found["statistics"]["ratio"]))
    if arguments.output:
        settings = {key: x for key, x in vars(arguments).items() if key != "output"}
        arguments.output.write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n")


# ---- search


def _search(model: Path, vocabulary: int, arguments: argparse.Namespace) -> Json:
    rows = model.parent / "rows.jsonl"
    _write_rows(rows, vocabulary)
    served = Served(model, "float32")
    with served.server:
        job = served.admin.start_job(_request(rows, arguments.share))["id"]

        def on() -> None:
            before = _evaluations(served, job)
            served.admin.set_background(True)
            deadline = time.monotonic() + PATIENCE
            while _evaluations(served, job) == before:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no candidate in {PATIENCE:g} s: {served.admin.job(job)}")
                time.sleep(0.2)

        windows = {"off": lambda: served.admin.set_background(False), "on": on}
        streams, taken = _windows(served, windows, arguments)
        state = served.admin.job(job)
    sides = {side: [latency(streams, window) for window in taken[side]] for side in windows}
    return {
        "job": {key: state[key] for key in ("progress", "cost")},
        "windows": sides,
        "sides": {side: _medians(found) for side, found in sides.items()},
        "ratio": {
            name: spread(
                [on[name] / off[name] for on, off in zip(sides["on"], sides["off"], strict=True)]
            )
            for name in sides["on"][0]
        },
    }


def _evaluations(served: Served, job: str) -> int:
    """Plans that it has scored."""
    found = served.admin.job(job)
    if found["state"] not in ("queued", "running"):
        raise RuntimeError(f"the job ended before the last window: {found}")
    return int(found["cost"].get("evaluations", 0))


def _request(rows: Path, share: float | None) -> Json:
    request: Json = {
        "method": "eep",
        "experts": "4",
        "source": {"data": str(rows)},
        "measure": "kl",
        "tag": "found",
        # More candidates than the windows have time for.
        "settings": {"prune_candidates": 100000, "merge": False},
    }
    return request if share is None else request | {"share": share}


def _write_rows(path: Path, vocabulary: int) -> None:
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"t{draw.randrange(8, vocabulary)}" for _ in range(count))

    rows = ({"prompt": words(48), "answer": f" {words(16)}"} for _ in range(ROWS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _windows(
    served: Served, sides: dict[str, Callable[[], object]], arguments: argparse.Namespace
) -> tuple[list[Json], dict[str, list[Window]]]:
    """Everything that was answered, and the windows of each side; a first round warms up."""
    taken: dict[str, list[Window]] = {side: [] for side in sides}
    output = served.state / "streams.json"
    pause = arguments.pause
    with streaming(served.server.port, arguments.streams, arguments.tokens, output, pause=pause):
        for number in range(arguments.rounds + 1):
            # One after the other first: a drift of the machine has no side.
            for side in sorted(sides, reverse=bool(number % 2)):
                sides[side]()
                time.sleep(SETTLE)
                start = time.monotonic()
                time.sleep(arguments.window)
                if number:
                    taken[side].append((start, time.monotonic()))
    return json.loads(output.read_text()), taken


def latency(streams: Sequence[Json], window: Window) -> dict[str, float]:
    """Of the answers that began and ended within a window."""
    inside = [x for x in streams if window[0] <= x["asked"] and x["ended"] <= window[1]]
    failed = [x["error"] for x in inside if x["error"] or not x["times"]]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, the first: {failed[0]}")
    # Chunks may hold several tokens, and several chunks may come at once: the time between two of
    # them says little of the pace.
    samples = (
        [x["times"][0] - x["asked"] for x in inside],
        [(x["times"][-1] - x["times"][0]) / (x["tokens"] - 1) for x in inside],
        [max(b - a for a, b in pairwise(x["times"])) for x in inside],
        [x["times"][-1] - x["asked"] for x in inside],
    )
    found = {}
    for kind, values in zip(KINDS, samples, strict=True):
        values.sort()
        found[f"{kind}, p50"] = values[len(values) // 2]
        found[f"{kind}, p99"] = values[int(0.99 * len(values))]
    found["tokens per second"] = sum(x["tokens"] for x in inside) / (window[1] - window[0])
    return found


def _medians(windows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: spread([window[name] for window in windows]) for name in windows[0]}


def _print_latency(found: Json) -> None:
    print("| | off | on | on / off | lowest, highest |")
    print("|---|---|---|---|---|")
    for name, ratio in found["ratio"].items():
        off, on = (found["sides"][side][name]["median"] for side in ("off", "on"))
        factor, unit = (1, "") if "per second" in name else (1000, " ms")
        print(
            f"| {name} | {factor * off:.1f}{unit} | {factor * on:.1f}{unit} "
            f"| {ratio['median']:.3f} | {ratio['min']:.3f}, {ratio['max']:.3f} |"
        )


# ---- statistics


def _statistics(model: Path, arguments: argparse.Namespace) -> Json:
    flags = {"without": ["--no-live-statistics"], "with": ["--live-statistics"]}
    servers = {
        side: Served(model, "float32", flags=more, name=side) for side, more in flags.items()
    }
    costs: dict[str, list[float]] = {side: [] for side in servers}
    try:
        for number in range(arguments.rounds + 1):
            for side in sorted(servers, reverse=bool(number % 2)):
                cost = _cost(servers[side], arguments)
                if number:
                    costs[side].append(cost)
    finally:
        for served in servers.values():
            served.server.stop()
    return {
        "cpu_seconds_per_1000_tokens": {side: spread(found) for side, found in costs.items()},
        "ratio": spread([a / b for a, b in zip(costs["with"], costs["without"], strict=True)]),
        "samples": costs,
    }


def _cost(served: Served, arguments: argparse.Namespace) -> float:
    """CPU seconds of the engine for 1000 answered tokens."""
    output = served.state / "streams.json"
    worker = psutil.Process(served.worker.pid)
    with streaming(served.server.port, arguments.streams, arguments.tokens, output):
        time.sleep(SETTLE)
        before, start = worker.cpu_times(), time.monotonic()
        time.sleep(arguments.window)
        after, end = worker.cpu_times(), time.monotonic()
    streams = json.loads(output.read_text())
    tokens = sum(sum(start <= when <= end for when in x["times"]) for x in streams)
    spent = after.user + after.system - before.user - before.system
    return 1000 * spent / tokens


if __name__ == "__main__":
    main()
