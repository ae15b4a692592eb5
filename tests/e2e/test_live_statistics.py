"""Live statistics of real engines are those of the observer pass over the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.pruning.calibration.observer import observe
from liveprune.pruning.calibration.rows import Rows
from liveprune.pruning.calibration.statistics import RoutingStatistics
from liveprune.pruning.plan_io import save_plan
from tests.e2e import cases
from tests.e2e.engine import run_script

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

SCRIPT = Path(__file__).with_name("statistics_worker.py")
PLANS = ("counts", "constant", "tied", "router_map")
EVERY_TOKEN = {"statistics": True, "sample_tokens": 4096, "sample_every": 1}
MODELS = ("mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3")
Make = Callable[..., dict[str, Any]]


def prompts() -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(1, 100, size).tolist() for size in (9, 33, 17, 64, 5, 21)]


@pytest.fixture(scope="session")
def job(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("statistics-plans")

    def make(model: str, name: str, **fields: Any) -> dict[str, Any]:
        base, plans = base_model(model), {}
        for plan in PLANS:
            if plan in cases.plans_of(model):
                path = folder / f"{model}-{plan}.json"
                save_plan(cases.make_plan(plan, model, base), path)
                plans[plan] = str(path)
        return {
            "name": name,
            "model": str(base),
            "plans": plans,
            "prompts": prompts(),
            "compiled": False,
            "spare": 40,
            "config": EVERY_TOKEN,
            **fields,
            "options": {**cases.engine_options(model), **fields.get("options", {})},
        }

    return make


@pytest.fixture(scope="session")
def eager(job: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    jobs = [job(model, model) for model in MODELS]
    chunks = {"max_num_batched_tokens": 48, "max_num_seqs": 8}
    jobs.append(job("mixtral", "chunked", options=chunks))
    return run_script(SCRIPT, jobs, tmp_path_factory.mktemp("statistics"))


@pytest.fixture(scope="session")
def compiled(job: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    jobs = [job("mixtral", "compiled", compiled=True)]
    return run_script(SCRIPT, jobs, tmp_path_factory.mktemp("compiled"), own_cache=True)


@pytest.fixture(scope="session")
def ranks(job: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    jobs = [job("mixtral", "ranks", ranks=2)]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    return run_script(
        SCRIPT, jobs, tmp_path_factory.mktemp("statistics-ranks"), environment=environment
    )


@pytest.fixture(scope="session")
def observed(checkpoint: Callable[[str, str], Path]) -> Callable[..., RoutingStatistics]:
    made: dict[tuple[str, str], RoutingStatistics] = {}

    def make(model: str, plan: str = "base") -> RoutingStatistics:
        if (model, plan) not in made:
            rows = Rows(tuple(np.array(prompt) for prompt in prompts()))
            made[model, plan] = observe(checkpoint(model, plan), rows)
        return made[model, plan]

    return make


def check_base(
    outcome: dict[str, Any], right: RoutingStatistics, *, relative: float = 1e-4
) -> None:
    """Counts are equal, sums and the outputs of every token nearly."""
    assert outcome["start"] == {}
    assert set(outcome["base"]) == {"base"}
    found = outcome["base"]["base"]
    assert found["tokens"] == right.tokens
    assert set(found["layers"]) == {str(index) for index in right.layers}
    for index, layer in right.layers.items():
        mine = {key: np.array(x) for key, x in found["layers"][str(index)].items()}
        assert np.array_equal(mine["gates"][:, 0], layer.counts)
        np.testing.assert_allclose(mine["gates"], layer.sums[:, :, 0], rtol=relative, atol=1e-6)
        np.testing.assert_allclose(mine["sampled"], layer.sums, rtol=relative, atol=1e-6)
        np.testing.assert_allclose(mine["largest"], layer.max_activation, rtol=relative, atol=1e-6)
    assert outcome["after candidates"] == outcome["base"]


@pytest.mark.parametrize("model", MODELS)
def test_the_base_beside_requests_that_nobody_counts(
    model: str, eager: dict[str, Any], observed: Callable[..., RoutingStatistics]
) -> None:
    check_base(eager[model], observed(model))


def test_chunked_prefill(eager: dict[str, Any], observed: Callable[..., RoutingStatistics]) -> None:
    check_base(eager["chunked"], observed("mixtral"))


def test_compiled(compiled: dict[str, Any], observed: Callable[..., RoutingStatistics]) -> None:
    check_base(compiled["compiled"], observed("mixtral"))


def test_tensor_parallel(ranks: dict[str, Any], observed: Callable[..., RoutingStatistics]) -> None:
    """Each rank computes a part of every output; the parts are added up."""
    check_base(ranks["ranks"], observed("mixtral"))


@pytest.mark.parametrize("model", MODELS)
def test_a_variant_in_mixed_batches_is_its_checkpoint(
    model: str,
    eager: dict[str, Any],
    observed: Callable[..., RoutingStatistics],
    base_model: Callable[[str], Path],
) -> None:
    """By base experts: those that are pruned have nothing."""
    plan = cases.make_plan("counts", model, base_model(model))
    found, right = eager[model]["variants"][plan.digest], observed(model, "counts")
    assert found["tokens"] == right.tokens
    for layer in plan.layers:
        mine = np.array(found["layers"][str(layer.layer)]["gates"])
        sampled = np.array(found["layers"][str(layer.layer)]["sampled"])
        kept, theirs = list(layer.kept), right.layers[layer.layer]
        assert np.array_equal(mine[kept, 0], theirs.counts)
        assert not mine[list(layer.pruned)].any()
        np.testing.assert_allclose(sampled[kept], theirs.sums, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["mixtral"])
def test_every_variant_counts_its_choices(
    model: str, eager: dict[str, Any], base_model: Callable[[str], Path]
) -> None:
    """Also where experts are merged or constant: as many choices as tokens times top-k."""
    tokens = sum(map(len, prompts()))
    for tag in PLANS:
        plan = cases.make_plan(tag, model, base_model(model))
        found = eager[model]["variants"][plan.digest]
        assert found["tokens"] == tokens
        for layer in plan.layers:
            gates = np.array(found["layers"][str(layer.layer)]["gates"])
            columns = layer.kept_experts if layer.merges else layer.experts
            assert gates.shape == (columns, 3), tag
            assert gates[:, 0].sum() == tokens * layer.top_k, tag


def test_sums_outlive_the_slot(eager: dict[str, Any]) -> None:
    for model in MODELS:
        assert eager[model]["retired"] == eager[model]["variants"]
