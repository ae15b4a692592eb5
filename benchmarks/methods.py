"""All methods at equal bytes on the demo model: the specialised one, and a generalist.

    python -m liveprune.pruning.demo.train --output build/generalist --balance generalist
    python -m benchmarks.methods --generalist build/generalist [--seeds 5] [--methods reap naee]
    python -m benchmarks.eep --model build/generalist --folder build/eep-generalist \
        --result benchmarks/results/eep-generalist.json
    python -m benchmarks.methods --table        (writes those of docs/comparison.md, from the JSON)

A plan is made from train rows of one task, or of all six in equal parts ("mix"); a seed draws which
rows these are, and is the method's own seed. Dev and test rows are scored once per plan by one warm
engine per model. What was scored is kept in the folder, so a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import eep
from benchmarks.machine import describe_machine
from benchmarks.methods_table import MIX, Row, write_tables
from liveprune.patches.scoring_engine import ScoringEngine
from liveprune.pruning.demo import model_path, rows_path, task_names
from liveprune.pruning.errors import LiveprunError
from liveprune.pruning.evaluation.task import Task, load_task
from liveprune.pruning.files import write_atomic
from liveprune.pruning.methods import METHODS, Method
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.prune import make_plan

RESULT = Path("benchmarks/results/methods.json")
PAGE = Path("docs/comparison.md")
SEARCHED = {"specialised": eep.RESULT, "generalist": Path("benchmarks/results/eep-generalist.json")}
"""What ``benchmarks.eep`` found on the two models."""
BUDGETS = ((4, 2), (4, 1), (2, 1))
"""(experts kept per layer on average, top-k)."""
BATCH = 15
"""Plans scored in one call."""
TRAIN_ROWS = 128


@dataclass(frozen=True)
class Made:
    """A plan that waits to be scored."""

    key: tuple[str, int, int, int]
    """Method, experts, top-k, seed."""
    plan: Plan
    seconds: float


class Bench:
    """One model, its engine, and the tasks."""

    def __init__(self, name: str, model: Path, folder: Path, seeds: int) -> None:
        self.name, self.model, self.folder, self.seeds = name, model, folder, seeds
        self.spec = ModelSpec.from_path(model)
        self.engine = ScoringEngine(
            model,
            candidates=BATCH,
            spare_rows=8 * BATCH,
            max_length=128,
            dtype="float32",
            block_size=32,
            max_num_batched_tokens=4096,
            max_num_seqs=64,
        )
        self.tasks = {
            (task, split): self._task(task, split)
            for task in task_names()
            for split in ("dev", "test")
        }

    def rows_of(self, calibrated: str, methods: Sequence[Method]) -> Iterator[Row]:
        waiting: list[Made] = []
        for method in methods:
            varies = method.needs_calibration or method.draws
            for seed in range(self.seeds if varies else 1):
                for experts, top_k in BUDGETS:
                    key = (method.name, experts, top_k, seed)
                    try:
                        waiting.append(self._made(method, calibrated, key))
                    except LiveprunError as error:
                        yield self._failed(calibrated, key, str(error))
                    if len(waiting) == BATCH:
                        yield from self._scored(calibrated, waiting)
                        waiting = []
        yield from self._scored(calibrated, waiting)

    def full(self) -> Iterator[Row]:
        """The full model, and the full model with one active expert."""
        one = make_plan(self.model, method="random", experts=8, top_k=1)
        plans: list[Plan | None] = [None, one]
        for task in task_names():
            dev, test = (
                self.tasks[task, split].values(self.engine, plans).mean(axis=1)
                for split in ("dev", "test")
            )
            for i, k in enumerate((2, 1)):
                numbers = float(dev[i]), float(test[i])
                yield Row(self.name, "", task, "full", 8, k, 0, *numbers, 0, 0.0)

    def _made(self, method: Method, calibrated: str, key: tuple[str, int, int, int]) -> Made:
        _, experts, top_k, seed = key
        start = time.process_time()
        plan = make_plan(
            self.model,
            method=method.name,
            experts=experts,
            top_k=top_k,
            calibration=self._calibration(calibrated, seed) if method.needs_calibration else None,
            seed=seed,
            statistics_cache=self.folder / "statistics",
        )
        kept = sum(layer.kept_experts for layer in plan.layers)
        if kept != experts * len(plan.layers):
            raise RuntimeError(f"{key}: keeps {kept} experts, expected {experts} in each layer")
        return Made(key, plan, time.process_time() - start)

    def _scored(self, calibrated: str, made: Sequence[Made]) -> Iterator[Row]:
        if not made:
            return
        for task in task_names() if calibrated == MIX else (calibrated,):
            plans = [x.plan for x in made]
            dev, test = (
                self.tasks[task, split].values(self.engine, plans).mean(axis=1)
                for split in ("dev", "test")
            )
            for i, x in enumerate(made):
                extra = self._extra_bytes(x.plan)
                numbers = (float(dev[i]), float(test[i]), extra, round(x.seconds, 2))
                yield Row(self.name, calibrated, task, *x.key, *numbers)

    def _failed(self, calibrated: str, key: tuple[str, int, int, int], why: str) -> Row:
        return Row(self.name, calibrated, "", *key, 0.0, 0.0, 0, 0.0, failure=why)

    def _extra_bytes(self, plan: Plan) -> int:
        """Gate rows above those of a sliced gate and constants, in float32 and bfloat16."""
        gate = 2 * self.spec.hidden_size
        return sum(
            gate * (layer.router_width - layer.kept_experts)
            + (0 if layer.constants is None else layer.constants.nbytes)
            for layer in plan.layers
        )

    def _calibration(self, calibrated: str, seed: int) -> list[Path]:
        """Train rows drawn by seed: of one task, or a file for each of all."""
        names = task_names() if calibrated == MIX else (calibrated,)
        files = []
        for name in names:
            path = self.folder / "rows" / f"{name}-{len(names)}-{seed}.jsonl"
            if not path.exists():
                lines = rows_path(name, "train").read_text().splitlines(keepends=True)
                drawn = random.Random(seed).sample(lines, TRAIN_ROWS // len(names))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(drawn))
            files.append(path)
        return files

    def _task(self, name: str, split: str) -> Task:
        rows = rows_path(name, split)
        return load_task(rows, self.model, measure="exact", max_answer_tokens=24)


def run(models: dict[str, Path], methods: Sequence[Method], folder: Path, seeds: int) -> list[Row]:
    """Score everything that is not in the folder yet."""
    rows: list[Row] = []
    for name, model in models.items():
        bench: Bench | None = None
        for calibrated in ("", *task_names(), MIX):
            done = folder / name / f"{calibrated or 'full'}.json"
            if not done.exists():
                bench = bench or Bench(name, model, folder / name, seeds)
                start = time.process_time()
                found = [*(bench.rows_of(calibrated, methods) if calibrated else bench.full())]
                done.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(done, json.dumps([asdict(row) for row in found]).encode())
                print(f"{name} {calibrated}: {time.process_time() - start:.0f} CPU s", flush=True)
            rows += [Row(**row) for row in json.loads(done.read_text())]
        if bench is not None:
            bench.engine.close()
    return rows


def searched() -> Iterator[Row]:
    """EEP's winners at the same budgets, from the results of ``benchmarks.eep``."""
    spec = ModelSpec.from_path(model_path())
    layers, width = len(spec.layers), spec.layers[0].experts
    for model, path in SEARCHED.items():
        found = [eep.Row(**row) for row in json.loads(path.read_text())["rows"]]
        searches = Counter(row.task for row in found if row.method.startswith("eep "))
        for row in found:
            kept = int(row.experts)
            if not row.method.startswith("eep ") or (kept, row.top_k) not in BUDGETS:
                continue
            if searches[row.task] < max(searches.values()):  # the run was ended in this task
                continue
            # A merged variant keeps the gate's rows and has a router map.
            gate, mapping = 2 * spec.hidden_size * (width - kept), 4 * kept * width
            extra = layers * (gate + mapping) if "merge" in row.method else 0
            numbers = (row.seed, row.dev or 0.0, row.test, extra, row.seconds)
            yield Row(model, row.task, row.task, row.method, kept, row.top_k, *numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--generalist", type=Path, help="its checkpoint; without it, only the other"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path("build/methods"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="of --result, into the docs")
    chosen = parser.parse_args()
    if chosen.table:
        rows = [Row(**row) for row in json.loads(chosen.result.read_text())["rows"]]
        write_tables([*rows, *searched()], PAGE)
        return
    logging.getLogger("vllm").setLevel(logging.ERROR)
    models = {"specialised": model_path()}
    if chosen.generalist:
        models["generalist"] = chosen.generalist
    methods = [METHODS[name] for name in chosen.methods]
    rows = run(models, methods, chosen.folder, chosen.seeds)
    content = {"machine": describe_machine(), "train_rows": TRAIN_ROWS, "seeds": chosen.seeds}
    eep.save(chosen.result, {**content, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
