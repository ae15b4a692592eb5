"""What the methods keep of the demo model, task by task: EEP over seeds against the others.

    python -m benchmarks.eep [--seeds 5] [--tasks sort add] [--rows 128] [--folder build/eep]
    python -m benchmarks.eep --started --seeds 3      (adds searches that start from these methods)
    python -m benchmarks.eep --table            (the tables of docs/eep.md, from the JSON)

One warm engine scores everything. Every search keeps its journal in the folder, so a stopped run
goes on where it was. Test rows are touched once per plan.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    def __init__(self, model: Path, rows: int, seeds: int, folder: Path) -> None:
        self.model = model
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

    def searched(
        self,
        task: str,
        experts: int,
        top_k: int,
        seed: int,
        starts: Mapping[str, Plan] | None = None,
    ) -> Iterator[Row]:
        """Both stages of one search."""
        mark = " from one-pass" if starts else ""
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
            starts=starts,
            folder=self.folder / f"{task}-e{experts}k{top_k}-{seed}{mark.replace(' ', '-')}",
        )
        for stage in found.stages:
            train, dev, test = (stage.scores[key] for key in ("train", "dev", "test"))
            if test.mean is None or test.low is None or test.high is None:
                raise RuntimeError(f"{task}: the winner was not scored: {test.failure}")
            yield Row(
                *(task, f"eep {stage.name}{mark}", experts, top_k, seed, train.mean, dev.mean),
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

    def started(self, task: str) -> Iterator[Row]:
        """Searches that try the prunings of the one-pass methods first."""
        for experts, k in BUDGETS:
            plans = {
                method: make_plan(
                    self.model,
                    method=method,
                    experts=experts,
                    top_k=k,
                    calibration=rows_path(task, "train"),
                    max_rows=self.rows,
                )
                for method in BASELINES
            }
            for seed in range(self.seeds):
                yield from self.searched(task, experts, k, seed, plans)


def run(tasks: Iterable[str], bench: Bench, result: Path, *, started: bool) -> None:
    rows: list[dict[str, Any]] = json.loads(result.read_text())["rows"] if started else []
    for task in tasks:
        start = time.process_time()
        for row in bench.started(task) if started else bench.rows_of(task):
            rows.append(asdict(row))
            print(
                f"{row.task:10} {row.method:18} e{row.experts:<4g} k{row.top_k} seed {row.seed}: "
                f"dev {row.dev:.3f} test {row.test:.3f}",
                flush=True,
            )
            save(result, {"machine": describe_machine(), "train_rows": bench.rows, "rows": rows})
        print(f"{task}: {time.process_time() - start:.0f} CPU seconds", flush=True)


def save(path: Path, content: Mapping[str, Any]) -> None:
    """One row a line: 600 rows stay readable, and differences small."""
    lines = ",\n".join(json.dumps(row) for row in content["rows"])
    head = json.dumps({key: value for key, value in content.items() if key != "rows"}, indent=1)
    write_atomic(path, f'{head.removesuffix("}").rstrip()},\n "rows": [\n{lines}\n]\n}}\n'.encode())


def tables(rows: Sequence[Row]) -> str:
    """Test scores in per cent as Markdown: mean and, over seeds, standard deviation."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    cells: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        budget = f"{row.experts:g}" if "tau" not in row.method else "by tau"
        key = f"{budget}, top-{row.top_k}", row.method
        cells.setdefault(key, {}).setdefault(row.task, []).append(row)
    lines = ["| experts | method | " + " | ".join(tasks) + " | mean |"]
    lines.append("|---" * (len(tasks) + 3) + "|")
    budgets = list(dict.fromkeys(budget for budget, _ in cells))
    for (budget, method), of_task in sorted(cells.items(), key=lambda x: budgets.index(x[0][0])):
        found = [of_task.get(task, []) for task in tasks]
        mean = statistics.mean(row.test for some in found for row in some)
        shown = " | ".join(_cell(some) for some in found)
        lines.append(f"| {budget} | {method} | {shown} | {100 * mean:.1f} |")
    marks = dict.fromkeys(x.method.removeprefix("eep merge") for x in rows if "merge" in x.method)
    return "\n".join([*lines, *(line for mark in marks for line in _claims(rows, mark))])


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    values = [100 * row.test for row in rows]
    text = f"{statistics.mean(values):.1f}"
    if len(rows) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    kept = {row.experts for row in rows if "tau" in row.method}
    return f"{text} ({kept.pop():.1f} kept)" if kept else text


def _claims(rows: Sequence[Row], mark: str) -> list[str]:
    """The paper's claims, counted over tasks and seeds; of the searches that ``mark`` names."""
    full = {row.task: row for row in rows if row.method == "full" and row.top_k == 2}
    by_key = {(r.task, r.method, r.experts, r.top_k, r.seed): r for r in rows}
    lines = ["", f"| eep merge{mark} | " + " | ".join(f"{e}, top-{k}" for e, k in BUDGETS) + " |"]
    lines.append("|---" * (len(BUDGETS) + 1) + "|")
    counts: dict[str, list[str]] = {}
    for experts, k in BUDGETS:
        merged = [
            r for r in rows if (r.method, r.experts, r.top_k) == (f"eep merge{mark}", experts, k)
        ]

        def other(row: Row, method: str, seed: int) -> Row:
            return by_key[row.task, method, row.experts, row.top_k, seed]

        def randoms(row: Row) -> float:
            same = (row.task, row.experts, row.top_k)
            return statistics.mean(
                r.test
                for r in rows
                if r.method == "random" and (r.task, r.experts, r.top_k) == same
            )

        pruned = [other(r, f"eep prune{mark}", r.seed) for r in merged]
        pairs = list(zip(merged, pruned, strict=True))
        checks = {
            "reaches the full model's interval": [r.test >= full[r.task].low for r in merged],
            "at least frequency": [r.test >= other(r, "frequency", 0).test for r in merged],
            "at least reap": [r.test >= other(r, "reap", 0).test for r in merged],
            "above the mean of random": [r.test > randoms(r) for r in merged],
            "at least its pruning, on dev": [(r.dev or 0) >= (p.dev or 0) for r, p in pairs],
            "at least its pruning, on test": [r.test >= p.test for r, p in pairs],
        }
        for name, held in checks.items():
            counts.setdefault(name, []).append(f"{sum(held)} of {len(held)}")
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in counts.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=128, help="train rows")
    parser.add_argument("--tasks", nargs="+", default=list(task_names()), choices=task_names())
    parser.add_argument("--folder", type=Path, default=Path("build/eep"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--started", action="store_true", help="only those, added to --result")
    parser.add_argument("--table", action="store_true", help="print the tables of --result")
    chosen = parser.parse_args()
    if chosen.table:
        print(tables([Row(**row) for row in json.loads(chosen.result.read_text())["rows"]]))
        return
    logging.getLogger("vllm").setLevel(logging.ERROR)
    bench = Bench(chosen.model, chosen.rows, chosen.seeds, chosen.folder)
    run(chosen.tasks, bench, chosen.result, started=chosen.started)


if __name__ == "__main__":
    main()
