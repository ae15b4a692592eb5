"""Swaps: what they move, what streams notice of them, and what the alternatives cost.

    python -m benchmarks.swap [--parts rates load memory others] [--dtypes bfloat16 float32]
        [--streams 8] [--seconds 180] [--output FILE.json]

* rates: no engine. Filling rows (read, check, pack, checksum, read back) on one thread and on two,
  against copies of the same bytes into equally cold memory of the same kind by as many threads;
  giving rows back against the same copy. Sources are in the page cache (``--cold``: not), and
  before each run the same memory is written once, untimed, and given back: on a virtual machine
  the first use of a page can cost ten times a copy.
* load: a real server, and streams from another process that never stop; windows with swaps every
  few seconds (full, 4 of 8 experts top-1, 4 merged ones, in turn) alternate with windows without,
  which serve the same three variants in turn. Every answer is compared with what the same server
  said to one request at a time, and answers that differ are counted with and without swaps: the
  rounding of 16 bit types depends on the size of the batch.
* memory: idle cycles between the full model and 4 of 8 experts; the worker's resident size.
* others: the pause and the time to the new variant's first token, as one stream sees them: a swap;
  a restart on the checkpoint that ``liveprune apply`` wrote; vLLM's own pause, reload_weights and
  resume, which can only bring weights of the same shapes, so it reloads the same checkpoint.

``load``, ``memory`` and the swap of ``others`` share one server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import torch

from benchmarks.machine import describe_machine
from benchmarks.models import ModelShape, describe, merge_plan, prune_plan, write_model
from benchmarks.rounds import alternate, speed, spread
from benchmarks.served import FLAGS, POLL, Served, write_tokenizer
from benchmarks.streams import NAME, PROMPTS, ask, read, streaming
from liveprune.patches.elastic_memory import elastic_tensor
from liveprune.patches.expert_packing import Packing
from liveprune.patches.expert_reader import ExpertReader
from liveprune.patches.expert_rows import ExpertRows
from liveprune.patches.row_checks import RowChecks
from liveprune.patches.row_filler import RowFiller, RowJob
from liveprune.patches.row_writer import RowWriter
from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan_io import load_plan, save_plan
from liveprune.server.served_model import ServedModel

PARTS = ("rates", "load", "memory", "others")
TAGS = ("full", "e4k1", "merged")
COPY = {1: "copy, 1 thread", 2: "copy, 2 threads"}
SEEN = 3
"""Times that the pause of each swap, and of a reload, is looked at."""
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of load")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2560)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of each streamed answer")
    parser.add_argument(
        "--seconds", type=float, default=180, help="with swaps, and as many without"
    )
    parser.add_argument("--window", type=float, default=15)
    parser.add_argument("--every", type=float, default=4, help="seconds between swaps' starts")
    parser.add_argument("--cycles", type=int, default=20, help="of memory")
    parser.add_argument("--rounds", type=int, default=7, help="of rates, after the warm-up")
    parser.add_argument("--cold", action="store_true", help="rates: evict the files before a fill")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's)")
    parser.add_argument("--output", type=Path, help="JSON file that the numbers are added to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swap-", dir=arguments.folder) as folder:
        if "rates" in arguments.parts:
            _report("rates", _rates(Path(folder), arguments), arguments)
        for dtype in arguments.dtypes if set(arguments.parts) - {"rates"} else ():
            for part, found in _serve(Path(folder), dtype, arguments):
                _report(f"{part}, {dtype}", found, arguments)


def _report(name: str, found: Json, arguments: argparse.Namespace) -> None:
    """Print one part's table; its numbers join those of other parts in the output file."""
    {"rates": _print_rates, "load": _print_load}.get(name.partition(",")[0], _print_plain)(found)
    if output := arguments.output:
        whole = json.loads(output.read_text()) if output.exists() else {}
        left_out = ("folder", "output")
        settings = {key: x for key, x in vars(arguments).items() if key not in left_out}
        whole[name] = {"machine": describe_machine(), "settings": settings, **found}
        output.write_text(json.dumps(whole, indent=1) + "\n")


# ---- rates


class Rates:
    """Rows of experts of 25 MB, a checkpoint of them, and as much memory to copy into."""

    def __init__(self, folder: Path, *, evict: bool) -> None:
        import vllm._custom_ops  # noqa: F401 - loads the packing kernel

        torch.set_num_threads(1)
        self.shape = shape = ModelShape(1024, 4096, 2)
        self._model, self._evict = folder / "rates", evict
        write_model(self._model, shape)
        spec, dtype = ModelSpec.from_path(self._model), shape.torch_dtype
        self.reader = ExpertReader(self._model, spec, dtype=dtype, tp_rank=0, tp_size=1)
        self._packing = Packing(shape.hidden, shape.intermediate, shape.intermediate, isa="vec")
        self._rows = {index: self._layer() for index in range(shape.layers)}
        self._jobs = [
            RowJob(index, expert, expert) for index in self._rows for expert in range(shape.experts)
        ]
        row_bytes = self._rows[0].row_bytes
        self.bytes = row_bytes * len(self._jobs)
        self._source = torch.ones(len(self._jobs), row_bytes // dtype.itemsize, dtype=dtype)
        # Rows as large as an expert's, so that huge pages are used in the same way.
        self._target = elastic_tensor(self._source.shape, dtype, "cpu")
        self._fillers = {
            threads: RowFiller(
                self.reader, dict.fromkeys(self._rows, self._packing), self._rows, threads=threads
            )
            for threads in (1, 2)
        }
        self._writer = RowWriter(self.reader)
        self._buffers = [torch.empty(x, dtype=dtype) for x in self._packing.expert_shapes()]

    def _layer(self) -> ExpertRows:
        owner = torch.nn.Module()
        for name in ("w13_weight", "w2_weight"):
            empty = torch.empty(0, dtype=self.shape.torch_dtype, device="meta")
            owner.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
        return ExpertRows(owner, self._packing, self.shape.experts, torch.device("cpu"))

    def runs(self) -> dict[str, Callable[[], tuple[float, float]]]:
        """What is timed; each returns its wall seconds and CPU seconds."""
        return {
            COPY[1]: self._cold(lambda: self._copy(1)),
            "fill, 1 thread": self._cold(lambda: self._fill(1)),
            "of it: read, check for NaN": self._cold(self._read),
            "of it: the same, pack, write": self._cold(self._write),
            "of it: checksum (made twice)": self._filled(self._checksum),
            COPY[2]: self._cold(lambda: self._copy(2)),
            "fill, 2 threads": self._cold(lambda: self._fill(2)),
            "release": self._filled(self._release),
        }

    def _cold(self, run: Callable[[], object]) -> Callable[[], tuple[float, float]]:
        """Time ``run`` into memory that was in use a moment before."""

        def timed() -> tuple[float, float]:
            self._release()
            self._copy(1)
            self._target.release(range(len(self._jobs)))
            _prepare(self._model, evict=self._evict)
            return _seconds(run)

        return timed

    def _filled(self, run: Callable[[], object]) -> Callable[[], tuple[float, float]]:
        """Time ``run`` over rows that are there."""

        def timed() -> tuple[float, float]:
            self._release()
            self._fill(2)
            return _seconds(run)

        return timed

    def _release(self) -> None:
        for rows in self._rows.values():
            rows.release(range(self.shape.experts))
        self._target.release(range(len(self._jobs)))

    def _copy(self, threads: int) -> None:
        self._target.commit(range(len(self._jobs)))

        def part(number: int) -> None:
            for row in range(number, len(self._jobs), threads):
                self._target.tensor[row].copy_(self._source[row])

        _in_threads(part, threads)

    def _fill(self, threads: int) -> None:
        progress = self._fillers[threads].start(self._jobs).wait()
        if progress.phase != "ready":
            raise RuntimeError(f"fill {progress.phase}: {progress.error}")

    def _read(self) -> None:
        for job in self._jobs:
            self.reader.read_into(job.layer, job.expert, self._buffers[0], self._buffers[1])

    def _write(self) -> None:
        for rows in self._rows.values():
            rows.commit(range(self.shape.experts))
        for job in self._jobs:
            w13, w2 = self._rows[job.layer].w13[job.row], self._rows[job.layer].w2[job.row]
            self._writer.write(job.layer, job.expert, self._packing, w13, w2)

    def _checksum(self) -> None:
        for job in self._jobs:
            RowChecks.measure(self._rows[job.layer], job.row)


def _rates(folder: Path, arguments: argparse.Namespace) -> Json:
    rates = Rates(folder, evict=arguments.cold)
    taken = alternate(rates.runs(), arguments.rounds)
    rates.reader.close()
    table = {}
    for name, samples in taken.items():
        wall, cpu = zip(*samples, strict=True)
        copy = list(zip(*taken[COPY[2 if "2 threads" in name else 1]], strict=True))
        table[name] = {
            "gigabytes_per_second": spread([rates.bytes / x / 1e9 for x in wall]),
            "speed_vs_copy": speed(copy[0], wall),
            "cpu_speed_vs_copy": speed(copy[1], cpu),
        }
    return {"model": describe(rates.shape), "bytes": rates.bytes, "runs": table, "samples": taken}


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    start = (time.perf_counter(), time.process_time())
    run()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def _in_threads(part: Callable[[int], None], threads: int) -> None:
    others = [threading.Thread(target=part, args=(number,)) for number in range(1, threads)]
    for other in others:
        other.start()
    part(0)
    for other in others:
        other.join()


def _prepare(model: Path, *, evict: bool) -> None:
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            if evict:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def _print_rates(result: Json) -> None:
    print("| run | GB/s | speed / copy | lowest, highest | by CPU seconds |")
    print("|---|---|---|---|---|")
    for name, x in result["runs"].items():
        ratio = x["speed_vs_copy"]
        print(
            f"| {name} | {x['gigabytes_per_second']['median']:.2f} | {ratio['median']:.2f} "
            f"| {ratio['min']:.2f}, {ratio['max']:.2f} | {x['cpu_speed_vs_copy']['median']:.2f} |"
        )


def _serve(folder: Path, dtype: str, arguments: argparse.Namespace) -> Iterator[tuple[str, Json]]:
    """The parts that need servers; after the first type only ``load`` is measured."""
    shape = ModelShape(arguments.hidden, arguments.intermediate, arguments.layers, dtype=dtype)
    model = folder / dtype
    write_model(model, shape)
    write_tokenizer(model, shape.vocabulary)
    save_plan(prune_plan(shape, 4, 1), folder / "e4k1.json")
    save_plan(merge_plan(shape, 4, 2), folder / "merged.json")
    parts = arguments.parts if dtype == arguments.dtypes[0] else {"load"} & {*arguments.parts}
    others: Json = {"model": describe(shape)}
    served = Served(model, dtype)
    with served.server:
        for tag in TAGS[1:]:
            operation = served.follow(served.admin.add(tag, str(folder / f"{tag}.json")))
            if operation["state"] != "done":
                raise RuntimeError(f"adding {tag}: {operation}")
            served.follow(served.admin.remove(tag))
        if "load" in parts:
            yield "load", {"model": describe(shape), **_load(served, arguments)}
        if "memory" in parts:
            yield "memory", {"model": describe(shape), **_memory(served, arguments.cycles)}
        if "others" in parts:
            others["swap"] = [_swap_seen(served, tag) for tag in (TAGS[1:] + TAGS[:1]) * SEEN]
    if "others" in parts:
        others["restart"] = _restart(folder, model, dtype)
        others["reload"] = _reload(folder, model, dtype)
        yield "others", others


# ---- load


def _load(served: Served, arguments: argparse.Namespace) -> Json:
    golden: dict[tuple[str, int], str] = {}
    for tag in TAGS[1:] + TAGS[:1]:
        served.swap(tag)
        for number, prompt in enumerate(PROMPTS):
            lines = asyncio.run(ask(served.server.port, NAME, prompt, arguments.tokens))
            golden[f"{NAME}:{tag}", number] = read(number, lines)["text"]
    output = served.state / "streams.json"
    windows: list[Json] = []
    swaps: list[Json] = []
    states: list[tuple[float, str]] = []
    order = _turns()
    with streaming(served.server.port, arguments.streams, arguments.tokens, output):
        for number in range(2 * round(arguments.seconds / arguments.window)):
            quiet = number % 2 == 0
            if quiet:
                # Each variant has its share of the windows without swaps; getting there is not
                # measured. A swap that failed in the load may have left any of them.
                with contextlib.suppress(RuntimeError):
                    served.swap(TAGS[number // 2 % len(TAGS)])
                time.sleep(1)
            start = time.monotonic()
            if quiet:
                time.sleep(arguments.window)
            while not quiet and time.monotonic() < start + arguments.window:
                swaps.append(_timed_swap(served, next(order), states))
                elapsed = time.monotonic() - swaps[-1]["begun"]
                time.sleep(max(0.0, arguments.every - elapsed))
            windows.append({"quiet": quiet, "start": start, "end": time.monotonic()})
    found = json.loads(output.read_text())
    return _judge(found, golden, windows, swaps, states, arguments)


def _turns() -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield TAGS[number % len(TAGS)]


def _timed_swap(served: Served, tag: str, states: list[tuple[float, str]]) -> Json:
    before, begun = served.resident(), time.monotonic()
    operation = served.follow(served.admin.swap(tag), states)
    seconds = time.monotonic() - begun
    return operation | {
        "begun": begun,
        "total": seconds,
        "resident": [before, served.resident()],
    }


def _judge(
    found: Sequence[Json],
    golden: dict[tuple[str, int], str],
    windows: Sequence[Json],
    swaps: Sequence[Json],
    states: Sequence[tuple[float, str]],
    arguments: argparse.Namespace,
) -> Json:
    answers: Counter[str] = Counter()
    differing = {True: [0, 0], False: [0, 0]}
    examples = []
    gaps = [
        (after - before, before, after)
        for x in found
        for before, after in zip(x["times"], x["times"][1:], strict=False)
    ]
    for x in found:
        cut = not x["done"] or x["finish"] != "length" or x["tokens"] != arguments.tokens
        verdict = "failed" if x["error"] or not x["times"] else "truncated" if cut else "whole"
        answers[verdict] += 1
        if verdict != "whole":
            examples.append({key: x[key] for key in ("header", "error", "finish", "text")})
            continue
        answers["mixed by name"] += x["models"] != [x["header"]]
        within = [w for w in windows if w["start"] <= x["asked"] and x["ended"] <= w["end"]]
        differs = x["text"] != golden[x["header"], x["prompt"]]
        answers["text differs"] += differs
        # What another variant would have said, or the start of one and the end of the other.
        for w in within:
            differing[w["quiet"]][0] += differs
            differing[w["quiet"]][1] += 1
    for w in windows:
        inside = sorted(gap for gap in gaps if w["start"] <= gap[2] <= w["end"])
        w["tokens"] = len(inside)
        w["longest"] = inside[-1][0] if inside else 0.0
        w["p99"] = inside[int(0.99 * len(inside))][0] if inside else 0.0
        w["median"] = inside[len(inside) // 2][0] if inside else 0.0
    by_state: dict[str, float] = {}
    for gap, before, after in gaps:
        for when, state in states:
            if before <= when <= after:
                by_state[state] = max(gap, by_state.get(state, 0.0))
    sides = {
        side: {
            "longest": max(w["longest"] for w in windows if w["quiet"] == quiet),
            "longest_of_window": spread([w["longest"] for w in windows if w["quiet"] == quiet]),
            "p99": spread([w["p99"] for w in windows if w["quiet"] == quiet]),
            "median": spread([w["median"] for w in windows if w["quiet"] == quiet]),
            "tokens": sum(w["tokens"] for w in windows if w["quiet"] == quiet),
            "texts_that_differ": differing[quiet],
        }
        for side, quiet in (("without", True), ("with", False))
    }
    done = [x for x in swaps if x["state"] == "done"]
    return {
        "answers": {"all": len(found), **answers},
        "examples": examples[:5],
        "sides": sides,
        "ratio_of_longest": sides["with"]["longest"] / sides["without"]["longest"],
        "ratio_of_windows": statistics.median(
            b["longest"] / a["longest"] for a, b in zip(windows[::2], windows[1::2], strict=True)
        ),
        "longest_by_state": by_state,
        "swaps": len(swaps),
        "swaps_failed": [[x["variant"], x["error"]] for x in swaps if x["state"] != "done"],
        "golden_mismatches": sum("golden answers differ" in str(x) for x in swaps),
        "by_variant": {
            tag: _swap_times([x for x in done if x["variant"] == f"{NAME}:{tag}"]) for tag in TAGS
        },
        "windows": list(windows),
        "operations": list(swaps),
    }


def _swap_times(swaps: Sequence[Json]) -> Json:
    if not swaps:
        return {}
    states = {state for x in swaps for state in x["seconds"]}
    return {
        "count": len(swaps),
        "total": spread([x["total"] for x in swaps]),
        "filled_bytes": statistics.median(x["progress"]["bytes_total"] for x in swaps),
        "seconds": {
            state: statistics.median(x["seconds"].get(state, 0.0) for x in swaps)
            for state in sorted(states)
        },
    }


# ---- memory


def _memory(served: Served, cycles: int) -> Json:
    """Resident bytes over idle cycles; the first cycle warms up."""
    samples = []
    served.swap("full")
    for _ in range(cycles + 1):
        before = served.resident()
        operation = served.swap("e4k1")
        after = served.resident()
        status = served.admin.status()
        served.swap("full")
        samples.append(
            {
                "full": before,
                "e4k1": after,
                "status": status["process_bytes"],
                "freed": operation["freed_bytes"],
                "filled": served.resident() - after,
            }
        )
    kept = samples[1:]
    return {
        "cycles": len(kept),
        "freed": kept[0]["freed"],
        "fall_over_freed": spread([(x["full"] - x["e4k1"]) / x["freed"] for x in kept]),
        "drift_full": kept[-1]["full"] - kept[0]["full"],
        "drift_e4k1": kept[-1]["e4k1"] - kept[0]["e4k1"],
        "samples": samples,
    }


# ---- the alternatives


class Watch:
    """One stream after another, in a thread: when did tokens come, and of whom."""

    def __init__(self, port: int) -> None:
        self.times: list[float] = []
        self.first: dict[str, float] = {}
        self._port, self._stop = port, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        while len(self.times) < 20:
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def longest(self, since: float) -> float:
        """Longest gap that ended after ``since``, also between two answers."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return max(after - before for before, after in pairs if after > since)

    def _run(self) -> None:
        while not self._stop.is_set():
            found = read(0, asyncio.run(ask(self._port, NAME, PROMPTS[0], 16)))
            if found["times"]:
                self.first.setdefault(found["header"], found["times"][0])
            self.times += found["times"]


def _swap_seen(served: Served, tag: str) -> Json:
    with Watch(served.server.port) as watch:
        time.sleep(3)
        usual = watch.longest(0)
        watch.first.clear()
        start = time.monotonic()
        operation = served.swap(tag)
        while f"{NAME}:{tag}" not in watch.first:
            time.sleep(POLL)
        return {
            "variant": tag,
            "usual_gap": usual,
            "pause": watch.longest(start),
            "to_first_token": watch.first[f"{NAME}:{tag}"] - start,
            "whole": sum(operation["seconds"].values()),
            "filled_bytes": operation["progress"]["bytes_total"],
        }


def _restart(folder: Path, model: Path, dtype: str) -> Json:
    """Stop a server that serves the full model, start one on the applied checkpoint."""
    applied = folder / "applied"
    start = time.monotonic()
    apply_plan(model, load_plan(folder / "e4k1.json"), applied)
    write_tokenizer(applied, ModelShape(128, 128, 1).vocabulary)
    apply_seconds = time.monotonic() - start
    flags = [*FLAGS, "--dtype", dtype]
    with ServedModel(model, log=folder / "old.log", flags=flags, name=NAME) as old:
        old.wait_ready()
        stopped = time.monotonic()
        old.stop()
    down = time.monotonic() - stopped
    with ServedModel(applied, log=folder / "new.log", flags=flags, name=NAME) as new:
        new.wait_ready()
        answer = read(0, asyncio.run(ask(new.port, NAME, PROMPTS[0], 16)))
        pause = answer["times"][0] - stopped
    return {"apply": apply_seconds, "stop": down, "pause": pause}


def _reload(folder: Path, model: Path, dtype: str) -> Json:
    """VLLM's own: /pause, reload_weights of the same checkpoint, /resume."""
    os.environ |= {"VLLM_SERVER_DEV_MODE": "1"}
    try:
        server = ServedModel(
            model, log=folder / "reload.log", flags=[*FLAGS, "--dtype", dtype], name=NAME
        )
    finally:
        del os.environ["VLLM_SERVER_DEV_MODE"]
    taken = []

    def texts() -> list[str]:
        answers = [asyncio.run(ask(server.port, NAME, prompt, 16)) for prompt in PROMPTS]
        return [read(0, lines)["text"] for lines in answers]

    with server, httpx.Client(base_url=server.base_url, timeout=600) as http:
        server.wait_ready()
        first, before = texts(), texts()
        for _ in range(SEEN):
            with Watch(server.port) as watch:
                start = time.monotonic()
                try:
                    http.post("/pause", params={"mode": "keep"}).raise_for_status()
                    reload = {"method": "reload_weights"}
                    http.post("/collective_rpc", json=reload).raise_for_status()
                except httpx.HTTPError as error:
                    return {"error": f"{error}; {server.log_tail(3)}"}
                finally:
                    http.post("/resume")
                whole = time.monotonic() - start
                time.sleep(2)
                taken.append({"pause": watch.longest(start), "whole": whole})
        after = texts()
    return {
        "runs": taken,
        "texts_unlike_before": sum(a != b for a, b in zip(before, after, strict=True)),
        "texts_unlike_without_reload": sum(a != b for a, b in zip(first, before, strict=True)),
        "texts": len(PROMPTS),
    }


def _print_load(load: Json) -> None:
    dtype = load["model"]["dtype"]
    print(f"\n{dtype}: {load['answers']}, {load['swaps']} swaps, failed: {load['swaps_failed']}")
    print("| gaps, ms | longest | longest of a window | p99 | median | texts that differ |")
    print("|---|---|---|---|---|---|")
    for side, x in load["sides"].items():
        middle = (x[key]["median"] * 1e3 for key in ("longest_of_window", "p99", "median"))
        texts = " of ".join(map(str, x["texts_that_differ"]))
        rest = " | ".join(f"{value:.0f}" for value in middle)
        print(f"| {side} swaps | {x['longest'] * 1e3:.0f} | {rest} | {texts} |")
    print(
        f"longest with / without: {load['ratio_of_longest']:.2f}; of neighbouring windows: "
        f"{load['ratio_of_windows']:.2f}; golden mismatches {load['golden_mismatches']}"
    )
    print("longest gap, ms, by state:", _milliseconds(load["longest_by_state"]))
    for tag, x in load["by_variant"].items():
        if x:
            print(f"swap to {tag}: {x['total']['median']:.2f} s;", _milliseconds(x["seconds"]))


def _print_plain(found: Json) -> None:
    rest = {key: value for key, value in found.items() if key not in ("samples", "model")}
    print(json.dumps(rest, indent=1))


def _milliseconds(seconds: dict[str, float]) -> dict[str, int]:
    return {key: round(1e3 * value) for key, value in seconds.items()}


if __name__ == "__main__":
    main()
