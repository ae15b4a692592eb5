"""``liveprune pareto``: the grid, the engine, plans, report."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from liveprune.pruning.calibration.rows import MAX_ROWS, MAX_TOKENS
from liveprune.pruning.errors import DataError
from liveprune.pruning.evaluation.engine import Engine
from liveprune.pruning.evaluation.task import Task
from liveprune.pruning.files import write_atomic
from liveprune.pruning.methods import METHODS
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.pareto.grid import Grid, GridPoint, make_grid
from liveprune.pruning.pareto.report import commands, write_report
from liveprune.pruning.pareto.result import Measured, ParetoResult
from liveprune.pruning.pareto.run import run_pareto
from liveprune.pruning.pareto.timing import Workload
from liveprune.pruning.plan import Plan
from liveprune.pruning.prune import make_plan
from liveprune.pruning.search.run import search
from liveprune.server.interrupt import stop_on_interrupt
from liveprune.server.pareto_options import (
    SEARCH,
    ParetoOptions,
    check_calibration,
    load_search_sets,
    load_tasks,
)
from liveprune.server.progress import stage_bar
from liveprune.server.search_engines import engine_name, search_engine
from liveprune.server.search_options import SearchOptions

PLANS_AT_ONCE = 16
"""Live in the engine together."""


def compare(options: ParetoOptions, console: Console) -> ParetoResult:
    """Run the grid and write ``report.html`` and ``report.json`` into the folder.

    Interrupted by the keyboard or killed, the same call goes on where it stopped.

    Raises:
        LiveprunError: see ``pruning.pareto.run.run_pareto``; everything that can be refused is
            refused before the engine starts.
    """
    spec = ModelSpec.from_path(options.model)
    searches = {SEARCH} & set(options.methods)
    grid = make_grid(
        spec,
        methods=options.methods,
        budgets=options.budgets,
        top_ks=options.top_ks,
        seeds=options.seeds,
        seed=options.seed,
        controls=options.controls,
        calibrated=bool(options.calibration),
        searches=searches,
    )
    for skipped in grid.skipped:
        console.print(f"skipped {skipped.name}: {skipped.reason}", highlight=False, soft_wrap=True)
    tasks = load_tasks(options)
    check_calibration(options, spec)
    sets = load_search_sets(options, tasks) if searches else {}
    workload, untimed = _workload(options, spec, list(tasks.values()))
    longest = max(task.longest for task in (*tasks.values(), *sets.values()))
    if workload is not None:
        longest = max(longest, workload.longest)
    engine_options = _engine_options(options, merges=bool(searches) or _may_merge(grid))
    kept = [layer.experts for layer in spec.layers]
    with (
        search_engine(engine_options, spec, kept, longest) as engine,
        stage_bar("plans") as show,
        stop_on_interrupt() as stop,
    ):
        found = run_pareto(
            options.model,
            spec,
            engine,
            grid=grid,
            make=_maker(options, spec, engine, sets, engine_name(engine_options), stop),
            tasks=tasks,
            folder=options.folder,
            arguments=options.arguments(sets),
            engine_name=engine_name(engine_options),
            workload=workload,
            untimed=untimed,
            progress=show,
            cancel=stop,
        )
    form = {**found.to_json(), "command": options.command}
    write_atomic(options.folder / "report.json", json.dumps(form, indent=1).encode() + b"\n")
    write_report(form, options.folder / "report.html")
    _show(found, form, options.folder, console)
    return found


def _workload(
    options: ParetoOptions, spec: ModelSpec, tasks: Sequence[Task]
) -> tuple[Workload | None, str]:
    """What is timed, and why nothing is, now or at all."""
    if not options.rounds:
        return None, "--rounds is 0"
    if options.engine.startswith(("http://", "https://")):
        return None, "a running server shares its time with its users"
    workload = Workload.of(
        [prompt for task in tasks for prompt in task.prompts],
        batch=options.batch,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
    )
    limit = spec.config.get("max_position_embeddings")
    if limit is not None and workload.longest > limit:
        raise DataError(
            f"--prompt-tokens, --new-tokens: found {workload.longest} together, expected at most "
            f"the model's {limit}"
        )
    if options.actors is not None:
        return workload, (
            "the times of actors are those of several engines, on machines that may differ; the "
            "same command without --actors goes on from here and times the plans"
        )
    return workload, ""


def _may_merge(grid: Grid) -> bool:
    """Some plan may need more than rows of the base model's experts."""
    methods = (METHODS[name] for name in {x.method for x in grid.points} if name in METHODS)
    return any(x.fold is not None or x.choose is not None for x in methods)


def _engine_options(options: ParetoOptions, *, merges: bool) -> SearchOptions:
    """An engine like a search's, whose candidates are the grid's plans."""
    settings = dataclasses.replace(options.settings, children=PLANS_AT_ONCE, merge=merges)
    return SearchOptions(
        model=options.model,
        folder=options.folder,
        train=options.data[0],
        experts="1.0",
        settings=settings,
        engine=options.engine,
        admin_key_file=options.admin_key_file,
        actors=options.actors,
        ray_address=options.ray_address,
        dtype=options.dtype,
    )


def _maker(
    options: ParetoOptions,
    spec: ModelSpec,
    engine: Engine,
    sets: Mapping[str, Task],
    name: str,
    stop: threading.Event,
) -> Callable[[GridPoint], Plan]:
    """Makes the plan of a point: in one pass, or by a search in a folder of its own."""

    def one_pass(point: GridPoint) -> Plan:
        return make_plan(
            options.model,
            method=point.method,
            experts=point.budget,
            top_k=point.top_k,
            calibration=list(options.calibration),
            seed=point.seed,
            max_rows=options.max_rows or MAX_ROWS,
            max_tokens=MAX_TOKENS,
            device=options.device,
            statistics_cache=options.folder / "statistics",
        )

    def by_search(point: GridPoint) -> Plan:
        return search(
            options.model,
            spec,
            engine,
            train=sets["train"],
            dev=sets.get("dev"),
            folder=options.folder / point.name,
            experts=point.budget,
            top_k=point.top_k,
            settings=options.settings,
            engine_name=name,
            seed=point.seed,
            cancel=stop,
        ).plan

    return lambda point: by_search(point) if point.method == SEARCH else one_pass(point)


def _show(found: ParetoResult, form: Mapping[str, Any], folder: Path, console: Console) -> None:
    """The front as a table, and how to serve it."""
    table = Table("", "score", "resident", "decoding", title="front")
    rows = {"full model": found.full}
    rows |= {x.asked.name: x.measured for x in found.front if x.measured is not None}
    for name, measured in rows.items():
        table.add_row(name, str(measured.score), *_cells(measured, found.full))
    console.print(table)
    failed = [x for x in found.points if x.failure is not None]
    for point in failed:
        console.print(
            f"failed: {point.asked.name}: {point.failure}", highlight=False, soft_wrap=True
        )
    lines = commands(form, folder)
    if lines:
        console.print("to serve them as variants of a running server:", highlight=False)
    for line in lines:
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _cells(measured: Measured, full: Measured) -> tuple[str, str]:
    share = f"{100 * measured.bytes.total / full.bytes.total:.1f}%"
    if measured.speed is None:
        return share, measured.speed_failure or ""
    wall = measured.speed.decode.wall
    return share, f"{wall.median:.2f} [{wall.low:.2f}, {wall.high:.2f}]"
