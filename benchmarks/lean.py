"""What a pruned variant gains: prefill and decode speed of every way to serve it.

    python -m benchmarks.lean [--kept 4] [--top-k 1] [--modes eager compiled] [--output FILE.json]

Four engines stay loaded, each round runs all rows once, medians are of ratios within a round, of
CPU seconds against the full model on stock vLLM:

* full, ours: base requests where the variant is live too;
* by tables: the variant's requests in the same engine; and with base requests, half and half;
* compact: the base was retired and its rows released, only the variant is live;
* applied: the checkpoint that ``liveprune apply`` writes, on stock vLLM.

The model is large enough that a decode step reads far more than the caches hold. Floors: the
weights that a step must read (experts: those that its tokens hit if all are equally likely) over
the read bandwidth of one thread, and its multiply-adds over the speed of a large matrix product in
one thread; the larger of the two. Both are measured in every round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engines import BASE_SLOT, Batch, Engine, Sample
from benchmarks.machine import describe_machine
from benchmarks.models import ModelShape, add_shape_arguments, describe, prune_plan, write_model
from benchmarks.rounds import agreement, alternate, speed, spread
from liveprune.patches.live_config import LiveConfig
from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.plan_io import save_plan

FULL, OURS, TABLES, HALF, COMPACT, APPLIED = (
    "full, stock",
    "full, ours",
    "by tables",
    "by tables, half base",
    "compact",
    "applied, stock",
)
PRUNED = (TABLES, COMPACT, APPLIED)
SLOT = 1
PROMPT = 16
PREFILL = 512
DECODE = {1: 33, 8: 17, 32: 9}
"""New tokens by batch size; the first one belongs to prefill."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_shape_arguments(parser, hidden=1024, intermediate=2560, layers=6)
    parser.add_argument("--kept", type=int, default=4, help="experts of 8")
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds after the warm-up")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    shape = ModelShape.from_arguments(arguments)
    pruned = dataclasses.replace(shape, experts=arguments.kept, top_k=arguments.top_k)
    result: dict[str, Any] = {"machine": describe_machine(), "model": describe(shape)}
    result["pruned"] = describe(pruned)
    with tempfile.TemporaryDirectory(prefix="lean-") as folder:
        bench = Bench(Path(folder), shape, pruned, arguments.rounds)
        result["modes"] = {mode: bench.run(mode) for mode in arguments.modes}
    _print(result)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


class Bench:
    """The model, whole and pruned, and the rounds."""

    def __init__(self, folder: Path, shape: ModelShape, pruned: ModelShape, rounds: int) -> None:
        self._folder, self._shape, self._pruned, self._rounds = folder, shape, pruned, rounds
        self._model, self._applied = folder / "model", folder / "applied"
        self._plan = folder / "plan.json"
        write_model(self._model, shape)
        plan = prune_plan(shape, pruned.experts, pruned.top_k)
        save_plan(plan, self._plan)
        apply_plan(self._model, plan, self._applied)

    def run(self, mode: str) -> dict[str, Any]:
        live = LiveConfig(
            checkpoint=str(self._model), slots=4, spare_rows=0, kv_extra_bytes=0, required=True
        )

        def start(name: str, model: Path, config: LiveConfig | None = None) -> Engine:
            return Engine(
                name,
                model,
                self._folder / f"{mode}-{name}.log",
                compiled=mode == "compiled",
                dtype=self._shape.dtype,
                live=config,
            )

        with (
            start("full", self._model) as full,
            start("applied", self._applied) as applied,
            start("tables", self._model, live) as tables,
            start("compact", self._model, live) as compact,
        ):
            tables.make_live(SLOT, self._plan)
            memory = self._compact(compact)
            memory["stock"] = {"full": full.resident(), "applied": applied.resident()}
            engines = {FULL: full, APPLIED: applied, TABLES: tables, COMPACT: compact}
            work = [("prefill", 1), *(("decode", size) for size in DECODE)]
            rows = [self._measure(kind, size, engines) for kind, size in work]
        return {"memory": memory, "work": rows}

    def _compact(self, engine: Engine) -> dict[str, Any]:
        """Retire the base, release its rows; resident bytes before and after."""
        engine.make_live(SLOT, self._plan)
        before = engine.resident()
        engine.retire(BASE_SLOT)
        released = engine.release()
        return {"before": before, "released": released, "after": engine.resident()} | {
            "rows": engine.memory()["base_rows"]
        }

    def _measure(self, kind: str, size: int, engines: dict[str, Engine]) -> dict[str, Any]:
        tokens, new = (PREFILL, 1) if kind == "prefill" else (PROMPT, DECODE[size])
        batch = Batch.random(size, tokens, self._shape.vocabulary, new)
        tables = engines[TABLES]
        runs: dict[str, Callable[[], Any]] = {
            FULL: lambda: engines[FULL].generate(batch),
            OURS: lambda: tables.generate(batch, [BASE_SLOT]),
            TABLES: lambda: tables.generate(batch, [SLOT]),
            HALF: lambda: tables.generate(batch, [BASE_SLOT, SLOT]),
            COMPACT: lambda: engines[COMPACT].generate(batch, [SLOT]),
            APPLIED: lambda: engines[APPLIED].generate(batch),
        }
        if size == 1:
            del runs[HALF]
        shape = self._shape
        probe = {
            "hidden": shape.hidden,
            "intermediate": shape.intermediate,
            "experts": shape.experts,
            "dtype": shape.dtype,
        }
        taken = alternate(runs | {"probe": lambda: engines[FULL].probe(**probe)}, self._rounds)
        probes: list[dict[str, float]] = taken.pop("probe")
        seconds = {
            unit: {row: [_pass(x, kind, unit, new) for x in runs] for row, runs in taken.items()}
            for unit in ("cpu", "wall")
        }
        return {
            "work": kind,
            "batch": size,
            "tokens_as_full": agreement(taken[FULL][0].tokens, taken[OURS][0].tokens),
            "tokens_as_applied": {
                row: agreement(taken[APPLIED][0].tokens, taken[row][0].tokens)
                for row in (TABLES, COMPACT)
            },
            "probes": probes,
            "rows": {row: self._row(kind, size, row, seconds, probes) for row in taken},
        }

    def _row(
        self,
        kind: str,
        size: int,
        row: str,
        seconds: dict[str, dict[str, list[float]]],
        probes: list[dict[str, float]],
    ) -> dict[str, Any]:
        cpu, wall = seconds["cpu"][row], seconds["wall"][row]
        tokens = PREFILL if kind == "prefill" else size
        entry = {
            "tokens_per_second": tokens / spread(cpu)["median"],
            "seconds": spread(cpu),
            "cpu_ratio": speed(seconds["cpu"][FULL], cpu),
            "wall_ratio": speed(seconds["wall"][FULL], wall),
            "cpu_ratio_to_ours": speed(seconds["cpu"][OURS], cpu),
            "cpu": cpu,
            "wall": wall,
        }
        if row != HALF:
            shape = self._pruned if row in PRUNED else self._shape
            floors = self._floors(kind, size, shape, probes)
            entry["floor"] = {name: spread(values) for name, values in floors.items()}
            entry["share_of_floor"] = speed(list(map(max, *floors.values())), cpu)
        return entry

    def _floors(
        self, kind: str, size: int, shape: ModelShape, probes: list[dict[str, float]]
    ) -> dict[str, list[float]]:
        """Seconds that one pass takes at least, in each round."""
        if kind == "prefill":
            # Every expert is hit.
            read, operations = shape.decode_bytes(shape.experts), shape.prefill_operations(PREFILL)
        else:
            read = shape.decode_bytes(shape.expected_experts(size))
            operations = shape.decode_operations(size)
        return {
            "bytes": [read / probe["read"] for probe in probes],
            "operations": [operations / probe["matmul"] for probe in probes],
        }


def _pass(sample: Sample, kind: str, unit: str, new_tokens: int) -> float:
    """Seconds of one pass: a whole prompt, or one step of decoding."""
    return float(getattr(sample, f"{kind}_{unit}")) / max(1, new_tokens - 1)


def _print(result: dict[str, Any]) -> None:
    print("speed / full model on stock vLLM (CPU seconds; median, lowest-highest of the rounds)")
    print(
        "| mode | work | row | tokens/s | speed | / full, ours | ms a pass "
        "| floor ms: bytes, mult. | share |"
    )
    print("|---" * 9 + "|")
    for mode, measured in result["modes"].items():
        for work in measured["work"]:
            for row, x in work["rows"].items():
                floor = share = ""
                if "floor" in x:
                    parts = [1e3 * x["floor"][key]["median"] for key in ("bytes", "operations")]
                    floor = ", ".join(f"{part:.1f}" for part in parts)
                    share = f"{x['share_of_floor']['median']:.0%}"
                ratio = "{median:.2f} ({min:.2f}-{max:.2f})".format(**x["cpu_ratio"])
                print(
                    f"| {mode} | {work['work']} {work['batch']} | {row} "
                    f"| {x['tokens_per_second']:.0f} | {ratio} "
                    f"| {x['cpu_ratio_to_ours']['median']:.2f} "
                    f"| {1e3 * x['seconds']['median']:.1f} | {floor} | {share} |"
                )
    for mode, measured in result["modes"].items():
        memory = measured["memory"]
        print(
            f"{mode}: compaction released {memory['released'] / 1e6:.0f} MB; resident "
            f"{memory['before'] / 1e6:.0f} -> {memory['after'] / 1e6:.0f} MB "
            f"(stock vLLM: full {memory['stock']['full'] / 1e6:.0f}, applied "
            f"{memory['stock']['applied'] / 1e6:.0f} MB)"
        )


if __name__ == "__main__":
    main()
