"""What the methods keep of the demo model, task by task: EEP over seeds against the others.

    python -m benchmarks.eep [--seeds 5] [--tasks sort add] [--rows 128] [--folder build/eep]

One warm engine scores everything. Every search keeps its journal in the folder, so a stopped run
goes on where it was. Test rows are touched once per plan; the table goes to docs/eep.md by hand.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from liveprune.patches.scoring_engine import ScoringEngine
from liveprune.pruning.demo import model_path, rows_path, task_names
from liveprune.pruning.evaluation.intervals import mean_interval
from liveprune.pruning.evaluation.task import Task, load_task
from liveprune.pruning.files import write_atomic
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.prune import make_plan
from liveprune.pruning.search.run import search

RESULT = Path("benchmarks/results/eep.json")
BUDGETS = ((4, 2), (4, 1), (2, 2), (2, 1))
"""(experts, top-k)."""
TAUS = (0.5, 1.25, 2.5, 5.0)
BASELINES = ("frequency", "reap")


@dataclass(frozen=True)
class Row:
    """One plan, on one task."""

    task: str
    method: str
    experts: float
    """Kept, mean over the layers."""
    top_k: int
    seed: int
    train: float | None
    dev: float | None
    test: float
    low: float
    """95 % interval of ``test`` over its rows."""
    high: float
    seconds: float = 0.0
    """CPU seconds of the search."""


class Bench:
    """Tasks and engine, and what one plan is worth."""

    def __init__(self, rows: int, seeds: int, folder: Path) -> None:
        self.model = model_path()
        self.spec = ModelSpec.from_path(self.model)
        self.rows, self.seeds, self.folder = rows, seeds, folder
        self.engine = ScoringEngine(
            self.model,
            candidates=16,
            spare_rows=64,
            max_length=128,
            dtype="float32",
            block_size=32,
            max_num_batched_tokens=4096,
            max_num_seqs=64,
        )

    def task(self, name: str, split: str) -> Task:
        count = self.rows if split == "train" else None
        return load_task(
            rows_path(name, split),
            self.model,
            measure="exact",
            max_rows=count,
            max_answer_tokens=24,
        )

    def score(
        self, task: str, method: str, plan: Plan | None, seed: int, *, experts: float, top_k: int
    ) -> Row:
        """Row of a plan that no search made."""
        dev, test = (
            self.task(task, split).values(self.engine, [plan])[0] for split in ("dev", "test")
        )
        interval = mean_interval(test)
        return Row(
            *(task, method, experts, top_k, seed, None, float(dev.mean()), float(test.mean())),
            low=interval.low,
            high=interval.high,
        )

    def searched(self, task: str, experts: int, top_k: int, seed: int) -> Iterator[Row]:
        """Both stages of one search."""
        found = search(
            self.model,
            self.spec,
            self.engine,
            train=self.task(task, "train"),
            dev=self.task(task, "dev"),
            test=self.task(task, "test"),
            experts=experts,
            top_k=top_k,
            seed=seed,
            folder=self.folder / f"{task}-e{experts}k{top_k}-{seed}",
        )
        for stage in found.stages:
            train, dev, test = (stage.scores[key] for key in ("train", "dev", "test"))
            if test.mean is None or test.low is None or test.high is None:
                raise RuntimeError(f"{task}: the winner was not scored: {test.failure}")
            yield Row(
                *(task, f"eep {stage.name}", experts, top_k, seed, train.mean, dev.mean),
                test=test.mean,
                low=test.low,
                high=test.high,
                seconds=found.cost.cpu_seconds,
            )

    def rows_of(self, task: str) -> Iterator[Row]:
        train = rows_path(task, "train")
        full = self.spec.layers[0]
        yield self.score(task, "full", None, 0, experts=full.experts, top_k=full.top_k)
        one = make_plan(self.model, method="random", experts=full.experts, top_k=1)
        yield self.score(task, "full", one, 0, experts=full.experts, top_k=1)
        for tau in TAUS:
            for k in (2, 1):
                plan = make_plan(self.model, method="moeits", tau=tau, top_k=k)
                kept = sum(x.kept_experts for x in plan.layers) / len(plan.layers)
                yield self.score(task, f"moeits tau {tau:g}", plan, 0, experts=kept, top_k=k)
        for experts, k in BUDGETS:
            for seed in range(self.seeds):
                plan = make_plan(self.model, method="random", experts=experts, top_k=k, seed=seed)
                yield self.score(task, "random", plan, seed, experts=experts, top_k=k)
            for method in (*BASELINES, "moeits"):
                plan = make_plan(
                    self.model,
                    method=method,
                    experts=experts,
                    top_k=k,
                    calibration=None if method == "moeits" else train,
                )
                yield self.score(task, method, plan, 0, experts=experts, top_k=k)
            for seed in range(self.seeds):
                yield from self.searched(task, experts, k, seed)


def run(tasks: Iterable[str], bench: Bench, result: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for task in tasks:
        start = time.process_time()
        for row in bench.rows_of(task):
            rows.append(asdict(row))
            print(
                f"{row.task:10} {row.method:18} e{row.experts:<4g} k{row.top_k} seed {row.seed}: "
                f"dev {row.dev:.3f} test {row.test:.3f}",
                flush=True,
            )
            content = {"machine": describe_machine(), "train_rows": bench.rows, "rows": rows}
            write_atomic(result, json.dumps(content, indent=1).encode())
        print(f"{task}: {time.process_time() - start:.0f} CPU seconds", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=128, help="train rows")
    parser.add_argument("--tasks", nargs="+", default=list(task_names()), choices=task_names())
    parser.add_argument("--folder", type=Path, default=Path("build/eep"))
    parser.add_argument("--result", type=Path, default=RESULT)
    chosen = parser.parse_args()
    logging.getLogger("vllm").setLevel(logging.ERROR)
    bench = Bench(chosen.rows, chosen.seeds, chosen.folder)
    run(chosen.tasks, bench, chosen.result)


if __name__ == "__main__":
    main()
