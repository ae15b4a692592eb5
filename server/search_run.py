"""``liveprune prune --method eep``: data, engine, search, report, plan."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from liveprune.patches.tuned_kernels import untuned
from liveprune.pruning.calibration.rows import MAX_ROWS
from liveprune.pruning.errors import PlanError
from liveprune.pruning.evaluation.task import load_task
from liveprune.pruning.files import write_atomic
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_io import save_plan
from liveprune.pruning.prune import make_plan
from liveprune.pruning.search.genome import make_space
from liveprune.pruning.search.report import write_report
from liveprune.pruning.search.result import Score, SearchResult
from liveprune.pruning.search.run import search
from liveprune.server.interrupt import stop_on_interrupt
from liveprune.server.progress import progress_bar, stage_bar
from liveprune.server.search_engines import engine_name, search_engine
from liveprune.server.search_options import SearchOptions

logger = logging.getLogger("liveprune")


def run_search(options: SearchOptions, console: Console) -> Plan:
    """Search, write the report and both stages' plans into the folder, return the last plan.

    Interrupted by the keyboard or killed, the same call goes on where it stopped.

    Raises:
        LiveprunError: see ``pruning.search.run.search``; everything that can be refused is
            refused before the engine starts.
    """
    spec = ModelSpec.from_path(options.model)
    space = make_space(spec, options.settings, experts=options.experts, top_k=options.top_k)
    kept = [group.kept for group in space.groups for _ in group.layers]
    uneven = sorted({count for count in kept if count % options.expert_parallel})
    if uneven:
        raise PlanError(
            f"--experts: {uneven[0]} experts cannot be shared equally by --expert-parallel "
            f"{options.expert_parallel}; expected a multiple"
        )
    if warning := untuned(spec, set(kept)):
        logger.warning("%s", warning)
    paths = {"train": options.train, "dev": options.dev, "test": options.test}
    tasks = {
        name: load_task(
            path,
            options.model,
            measure=options.measure,
            max_rows=options.max_rows,
            max_answer_tokens=options.max_answer_tokens,
            chat=options.chat,
        )
        for name, path in paths.items()
        if path is not None
    }
    longest = max(task.longest for task in tasks.values())
    with search_engine(options, spec, kept, longest) as engine:
        starts = {name: _start(options, name) for name in options.starts}
        with stage_bar("search") as show, stop_on_interrupt() as stop:
            found = search(
                options.model,
                spec,
                engine,
                train=tasks["train"],
                dev=tasks.get("dev"),
                test=tasks.get("test"),
                experts=options.experts,
                top_k=options.top_k,
                settings=options.settings,
                starts=starts,
                engine_name=engine_name(options),
                seed=options.seed,
                folder=options.folder,
                progress=show,
                cancel=stop,
            )
    _write(found, options)
    console.print(_table(found))
    console.print(f"report: {options.folder / 'report.html'}", highlight=False, soft_wrap=True)
    return found.plan


def _start(options: SearchOptions, method: str) -> Plan:
    """The plan of a one-pass method under the search's budget."""
    import torch

    with progress_bar(f"{method}: scoring experts") as update:
        return make_plan(
            options.model,
            method=method,
            experts=options.experts,
            top_k=options.top_k,
            calibration=options.train,
            max_rows=options.max_rows or MAX_ROWS,
            seed=options.seed,
            device="cuda" if torch.cuda.is_available() else "cpu",
            statistics_cache=options.folder / "statistics",
            progress=update,
        )


def _write(found: SearchResult, options: SearchOptions) -> None:
    form: dict[str, Any] = {**found.to_json(), "command": options.command}
    write_atomic(options.folder / "report.json", json.dumps(form, indent=1).encode() + b"\n")
    write_report(form, options.folder / "report.html")
    for stage in found.stages:
        save_plan(stage.plan, options.folder / f"{stage.name}.plan.json")


def _table(found: SearchResult) -> Table:
    """Per cent, with 95 % intervals: train flatters, since the winner was chosen by it."""
    table = Table("", *(f"{name} ({x['rows']} rows)" for name, x in found.data.items()))
    rows: dict[str, Mapping[str, Score]] = {"full model": found.full}
    rows |= {stage.name: stage.scores for stage in found.stages}
    for name, scores in rows.items():
        table.add_row(name, *(str(scores[key]) for key in found.data))
    return table
