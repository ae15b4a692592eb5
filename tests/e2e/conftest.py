"""Checkpoints made by ``apply_plan``, engines that ran them, and what the reference says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.plan import Plan
from tests.e2e import cases
from tests.e2e.damaged import DAMAGED
from tests.e2e.engine import PLUGINS, Job, Outcome, run_jobs
from tests.e2e.rewritten import REWRITTEN

COMPILED = [
    ("mixtral", "counts"),
    # The same shapes and another top-k: only its own key in the compile cache keeps it apart.
    ("mixtral", "merged"),
    ("mixtral", "router_map"),
    ("qwen2_moe", "counts"),  # not renormalised
    ("qwen2_moe", "router_map"),
    ("qwen2_moe", "constant"),
    ("mixtral", "gathered_tied"),
]
STOCK = [(model, plan) for model in cases.MODELS for plan in ("base", "uniform")]


@pytest.fixture(scope="session")
def base_model(tiny_model: Callable[..., Path]) -> Callable[[str], Path]:
    """``base_model(name) -> Path`` of one of ``cases.MODELS``."""

    def make(name: str) -> Path:
        family, fields = cases.MODELS[name]
        return tiny_model(family, **fields)

    return make


@pytest.fixture(scope="session")
def checkpoint(
    base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """``checkpoint(model, plan) -> Path``; the plan ``base`` is the base model itself."""
    made: dict[tuple[str, str], Path] = {}

    def make(model: str, plan: str) -> Path:
        if plan == "base":
            return base_model(model)
        if (model, plan) not in made:
            folder = tmp_path_factory.mktemp(f"{model}-{plan}") / "checkpoint"
            base = base_model(model)
            apply_plan(base, cases.make_plan(plan, model, base), folder)
            made[model, plan] = folder
        return made[model, plan]

    return make


@pytest.fixture(scope="session")
def expected(base_model: Callable[[str], Path]) -> Callable[[str, str], dict[str, Any]]:
    """``expected(model, plan)``: tokens and log-probabilities of the reference, by prompt."""
    made: dict[tuple[str, str], dict[str, Any]] = {}

    def make(model: str, plan: str) -> dict[str, Any]:
        if (model, plan) not in made:
            base = base_model(model)
            recipe: Plan | None = None
            if plan != "base":
                recipe = cases.make_plan(plan, model, base)
            made[model, plan] = cases.answers(cases.reference_model(base, recipe))
        return made[model, plan]

    return make


@pytest.fixture(scope="session")
def eager(
    checkpoint: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """Under the plugin, not compiled: all models and plans, ``REWRITTEN``, ``DAMAGED``."""
    jobs = [
        _job(model, plan, checkpoint)
        for model in cases.MODELS
        for plan in ("base", *cases.plans_of(model))
    ]
    folder = tmp_path_factory.mktemp("eager")
    for name, rewritten in REWRITTEN.items():
        target = rewritten.write(checkpoint(rewritten.model, "counts"), folder / name)
        options = cases.engine_options(rewritten.model)
        jobs.append(Job(name, str(target), cases.prompts(), cases.TOKENS, options=options))
    for name, damaged in DAMAGED.items():
        target = damaged.write(checkpoint("mixtral", damaged.plan), folder / name)
        jobs.append(Job(name, str(target), cases.prompts(), cases.TOKENS))
    return run_jobs(jobs, folder)


@pytest.fixture(scope="session")
def compiled(
    checkpoint: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """``COMPILED`` under the plugin, in this order, one compile cache for all."""
    jobs = [_job(model, plan, checkpoint, compiled=True) for model, plan in COMPILED]
    return run_jobs(jobs, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def stock(
    checkpoint: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """``STOCK`` in vLLM without any plugin."""
    jobs = [_job(model, plan, checkpoint) for model, plan in STOCK]
    return run_jobs(jobs, tmp_path_factory.mktemp("stock"), {PLUGINS: ""})


@pytest.fixture(scope="session")
def damaged_job(
    checkpoint: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Job:
    """A checkpoint that misses a tensor."""
    damaged = DAMAGED["missing tensor"]
    folder = tmp_path_factory.mktemp("damaged") / "checkpoint"
    return Job("damaged", str(damaged.write(checkpoint("mixtral", damaged.plan), folder)), [], 1)


def _job(
    model: str, plan: str, checkpoint: Callable[[str, str], Path], *, compiled: bool = False
) -> Job:
    folder = checkpoint(model, plan)
    options = cases.engine_options(model)
    return Job(f"{model}/{plan}", str(folder), cases.prompts(), cases.TOKENS, compiled, options)
