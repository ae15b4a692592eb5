"""Candidates a second: our engine path, one candidate at a time on vLLM, the published way.

    python -m benchmarks.search [--task sort] [--rows 64] [--candidates 8] [--rounds 5]
    python -m benchmarks.search --shape qwen1.5-moe --dtype bfloat16     (a generated model: speed)

The sides score the same candidates on the same rows, in one process and alternated:

* ``engine``: teacher-forced answers of all candidates in one call, merged ones in spare rows;
* ``one at a time``: vLLM generates the answers under one candidate after another;
* ``published``: transformers generates them in batches of 32, weights rebuilt for each candidate.

Then whole searches, same seed: with and without racing on the engine, and the published way, to see
whether they end with the same plans. The floor is the multiply-adds of one candidate's tokens over
what vLLM's expert kernel reaches on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine, probe
from benchmarks.models import ModelShape, write_model
from benchmarks.rounds import alternate, spread
from liveprune.pruning.demo import model_path, rows_path, task_names
from liveprune.pruning.evaluation.engine import AnswerScores, Engine, TokenRow
from liveprune.pruning.evaluation.rows import load_questions
from liveprune.pruning.evaluation.task import load_task
from liveprune.pruning.evaluation.transformers_engine import TransformersEngine
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.search.presets import Settings
from liveprune.pruning.search.run import search

SHAPES = {
    "qwen1.5-moe": ModelShape(2048, 1408, 24, experts=60, top_k=4, kv_heads=16, vocabulary=151936),
    "small": ModelShape(256, 384, 4),
}
MAX_ANSWER_TOKENS = 16
BATCH = 32


@dataclass(frozen=True)
class Taken:
    """One side, one round."""

    wall: float
    cpu: float
    right: tuple[tuple[bool, ...], ...]
    """By candidate and row: the whole answer is right."""


class Generating:
    """An engine that scores by generating: what it predicts up to the first miss is the same."""

    def __init__(self, engine: Engine, end: Collection[int], *, together: bool) -> None:
        """``together``: give the engine all plans in one call."""
        self._engine, self._end, self._together = engine, end, together

    def score(
        self,
        plans: Sequence[Plan | None],
        rows: Sequence[TokenRow],
        *,
        against_full: bool = False,
    ) -> list[AnswerScores]:
        if against_full:
            raise ValueError("a generated answer has no distributions to compare")
        parts = [plans] if self._together else [[plan] for plan in plans]
        return [
            self._scores(answers, rows)
            for part in parts
            for answers in self._engine.generate(
                part,
                [row.prompt for row in rows],
                max_tokens=MAX_ANSWER_TOKENS,
                end=self._end,
            )
        ]

    def generate(self, *arguments: Any, **options: Any) -> list[list[tuple[int, ...]]]:
        return self._engine.generate(*arguments, **options)

    @staticmethod
    def _scores(answers: Sequence[tuple[int, ...]], rows: Sequence[TokenRow]) -> AnswerScores:
        predicted = []
        for answer, row in zip(answers, rows, strict=True):
            size = len(row.answer)
            predicted += [*answer[:size], *[answer[-1]] * (size - len(answer))]
        return AnswerScores(np.array(predicted), np.zeros(len(predicted)))


def candidates(spec: ModelSpec, count: int, experts: int, *, merged: bool) -> list[Plan]:
    """Random ones, of the kind that a stage breeds: one-hot rows, or these with noise."""
    rng = np.random.default_rng(0)
    plans = []
    for _ in range(count):
        layers = []
        for layer in spec.layers:
            kept = tuple(sorted(rng.choice(layer.experts, experts, replace=False).tolist()))
            fields: dict[str, Any] = {"kept": kept}
            if merged:
                rows = np.eye(layer.experts)[list(kept)]
                noise = rng.normal(0, 0.065, (2, *rows.shape))
                touched = rng.random(noise.shape) < 0.25
                merge, router_map = rows + noise * touched
                fields = {"merge": merge, "router_map": router_map}
            layers.append(LayerPlan(layer.index, layer.experts, layer.top_k, **fields))
        kind, depth = spec.architecture.model_type, spec.num_hidden_layers
        plans.append(Plan(kind, depth, tuple(layers), Lineage("benchmark")))
    return plans


def timed(engine: Engine, plans: Sequence[Plan], rows: Sequence[TokenRow]) -> Taken:
    wall, cpu = time.perf_counter(), time.process_time()
    scores = engine.score(plans, rows)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ends = np.cumsum([len(row.answer) for row in rows])
    gold = np.concatenate([row.answer for row in rows])
    right = tuple(
        tuple(bool(part.all()) for part in np.split(score.predicted == gold, ends[:-1]))
        for score in scores
    )
    return Taken(wall, cpu, right)


def compare(
    sides: dict[str, Engine], plans: Sequence[Plan], rows: Sequence[TokenRow], rounds: int
) -> dict[str, Any]:
    """Candidates a second of every side, and how often they agree."""
    runs: dict[str, Callable[[], Taken]] = {
        name: (lambda engine=engine: timed(engine, plans, rows)) for name, engine in sides.items()
    }
    taken = alternate(runs, rounds)
    slowest = taken["published"] if "published" in taken else taken["one at a time"]
    table = {}
    for name, results in taken.items():
        same = [
            a == b
            for ours, theirs in zip(results[0].right, slowest[0].right, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        table[name] = {
            "cpu_seconds_a_candidate": spread([x.cpu / len(plans) for x in results]),
            "candidates_a_cpu_second": statistics.median(len(plans) / x.cpu for x in results),
            "candidates_a_wall_second": statistics.median(len(plans) / x.wall for x in results),
            "speed_cpu": spread([b.cpu / a.cpu for a, b in zip(results, slowest, strict=True)]),
            "speed_wall": spread([b.wall / a.wall for a, b in zip(results, slowest, strict=True)]),
            "agree": sum(same),
            "pairs": len(same),
        }
    return table


def whole_searches(
    sides: dict[str, tuple[Engine, Settings]], task: str, rows: int, experts: int
) -> dict[str, Any]:
    """Complete searches of one seed: cost, and what they end with."""
    spec = ModelSpec.from_path(model_path())
    found = {}
    for name, (engine, settings) in sides.items():
        with tempfile.TemporaryDirectory() as folder:
            tasks = {
                split: load_task(
                    rows_path(task, split),
                    model_path(),
                    measure="exact",
                    max_rows=rows,
                    max_answer_tokens=MAX_ANSWER_TOKENS,
                )
                for split in ("train", "dev", "test")
            }
            result = search(
                model_path(),
                spec,
                engine,
                **tasks,
                experts=experts,
                settings=settings,
                folder=Path(folder) / "search",
            )
        scored = len(result.curve)
        found[name] = {
            "candidates": scored,
            "rows": result.cost.rows,
            "cpu_seconds": result.cost.cpu_seconds,
            "wall_seconds": result.cost.wall_seconds,
            "winners": [stage.plan.digest for stage in result.stages],
            "test": [stage.scores["test"].mean for stage in result.stages],
        }
        print(f"searched: {name}", file=sys.stderr)
    reference = found["published"]["cpu_seconds"]
    for entry in found.values():
        entry["speed_cpu"] = reference / entry["cpu_seconds"]
    return found


def floor(spec: ModelSpec, rows: Sequence[TokenRow], heads: int, dtype: str) -> dict[str, float]:
    """Multiply-adds of one pruned candidate, and the seconds that they take at best."""
    layer = spec.layers[0]
    reached = probe(spec.hidden_size, spec.expert_size, layer.experts, dtype)
    tokens = sum(len(row.text) for row in rows)
    answers = sum(len(row.answer) for row in rows)
    experts = tokens * layer.top_k * 3 * spec.hidden_size * spec.expert_size * len(spec.layers)
    other = tokens * heads * spec.hidden_size * len(spec.layers)
    other += answers * int(spec.config["vocab_size"]) * spec.hidden_size
    return {
        "tokens": tokens,
        "answer_tokens": answers,
        "multiply_adds": experts + other,
        "seconds": experts / reached["experts"] + other / reached["matmul"],
    }


def demo_rows(task: str, count: int) -> tuple[list[TokenRow], tuple[int, ...]]:
    found = load_questions(rows_path(task, "train"), model_path(), form="answer", max_rows=count)
    rows = [TokenRow(x.prompt, (*x.answers[0], found.end[0])) for x in found.rows]
    return rows, found.end


def random_rows(count: int, vocabulary: int) -> list[TokenRow]:
    rng = np.random.default_rng(0)
    return [
        TokenRow(
            tuple(rng.integers(3, vocabulary, 200).tolist()),
            tuple(rng.integers(3, vocabulary, 8).tolist()),
        )
        for _ in range(count)
    ]


def show(title: str, table: dict[str, Any]) -> None:
    print(f"\n{title}\n| side | CPU s a candidate | candidates a CPU s | a wall s | speed, CPU |")
    print("|---|---|---|---|---|")
    for name, row in table.items():
        speed = row["speed_cpu"]
        print(
            f"| {name} | {row['cpu_seconds_a_candidate']['median']:.4f} | "
            f"{row['candidates_a_cpu_second']:.1f} | {row['candidates_a_wall_second']:.1f} | "
            f"{speed['median']:.1f} ({speed['min']:.1f} to {speed['max']:.1f}) |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", default="sort", choices=task_names())
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="a generated model; no searches")
    parser.add_argument("--no-searches", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/search.json"))
    chosen = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(chosen, Path(folder))
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from liveprune.patches.scoring_engine import ScoringEngine

    if chosen.shape:
        model, end = folder / "model", ()
        write_model(model, SHAPES[chosen.shape])
        rows = random_rows(chosen.rows, SHAPES[chosen.shape].vocabulary)
    else:
        model = model_path()
        rows, end = demo_rows(chosen.task, chosen.rows)
    spec = ModelSpec.from_path(model)
    longest = max(len(row.prompt) for row in rows) + max(
        MAX_ANSWER_TOKENS, *(len(row.answer) for row in rows)
    )
    ours = ScoringEngine(
        model,
        candidates=chosen.candidates,
        spare_rows=chosen.candidates * chosen.experts,
        max_length=longest + 8,
        dtype=chosen.dtype,
        block_size=32,
        max_num_batched_tokens=4096,
        max_num_seqs=64,
    )
    sides: dict[str, Engine] = {
        "engine": ours,
        "one at a time": Generating(ours, end, together=False),
    }
    if not chosen.shape:
        theirs = TransformersEngine(model, dtype=chosen.dtype, batch_rows=BATCH)
        sides["published"] = Generating(theirs, end, together=True)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "command": " ".join(sys.argv[1:]),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "rows": len(rows),
        "candidates": chosen.candidates,
    }
    heads = 4 * spec.hidden_size  # query, key, value and output of the demo model
    if not chosen.shape:
        result["floor"] = floor(spec, rows, heads, chosen.dtype)
        print(json.dumps(result["floor"]))
    for stage, merged in (("prune", False), ("merge", True)):
        plans = candidates(spec, chosen.candidates, chosen.experts, merged=merged)
        result[stage] = compare(sides, plans, rows, chosen.rounds)
        show(f"{stage} stage", result[stage])
    if not chosen.shape and not chosen.no_searches:
        plain = Settings(racing=False)
        searches = {
            "engine, racing": (sides["engine"], Settings()),
            "engine": (sides["engine"], plain),
            "published": (sides["published"], plain),
        }
        for stage in ("prune", "whole"):
            variants = {
                name: (engine, _only_prune(settings) if stage == "prune" else settings)
                for name, (engine, settings) in searches.items()
            }
            key = f"search, {stage}"
            result[key] = whole_searches(variants, chosen.task, chosen.rows, chosen.experts)
            print(f"\n{key}: {json.dumps(result[key], indent=1)}")
    ours.close()
    return result


def _only_prune(settings: Settings) -> Settings:
    import dataclasses

    return dataclasses.replace(settings, merge=False)


if __name__ == "__main__":
    main()
