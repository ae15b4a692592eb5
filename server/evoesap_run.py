"""``liveprune prune --allocate evoesap``: budgets by layer from a search on an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liveprune.pruning.calibration.rows import MAX_ROWS
from liveprune.pruning.evaluation.task import load_task
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.search.budget_search import BudgetSettings, EvoESAP
from liveprune.server.interrupt import stop_on_interrupt
from liveprune.server.progress import stage_bar
from liveprune.server.search_engines import engine_name, search_engine
from liveprune.server.search_options import SearchOptions

BUDGET_SETTINGS = tuple(BudgetSettings.__dataclass_fields__)
"""Names that ``--set`` takes here; all others are the method's own."""


@contextmanager
def evoesap(options: SearchOptions, changes: Mapping[str, Any]) -> Iterator[EvoESAP]:
    """Yield the allocator; its engine starts when the first vectors are scored.

    Args:
        options: data, engine and folder; as of a search.
        changes: of ``BudgetSettings``.

    Raises:
        DataError: rows are unusable, or the engine is not known.
        PlanError: a setting is out of range.
    """
    spec = ModelSpec.from_path(options.model)
    settings = BudgetSettings(**changes)
    paths: dict[str, Path | None] = {
        "train": options.train,
        "dev": options.dev,
        "test": options.test,
    }
    tasks = {
        name: load_task(
            path,
            options.model,
            measure=options.measure,
            max_rows=options.max_rows or MAX_ROWS,
            max_answer_tokens=options.max_answer_tokens,
            chat=options.chat,
        )
        for name, path in paths.items()
        if path is not None
    }
    longest = max(task.longest for task in tasks.values())
    kept = [layer.experts for layer in spec.layers]
    with (
        search_engine(options, spec, kept, longest) as engine,
        stage_bar("budgets") as show,
        stop_on_interrupt() as stop,
    ):
        yield EvoESAP(
            model=options.model,
            spec=spec,
            engine=engine,
            tasks=tasks,
            folder=options.folder,
            settings=settings,
            seed=options.seed,
            engine_name=engine_name(options),
            progress=show,
            cancel=stop,
        )
