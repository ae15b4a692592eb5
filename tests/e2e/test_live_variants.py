"""Live variants in real engines: every token is routed by its own request's tables.

The reference is that of ``test_equality``: stock transformers with the plan carried out on its
modules. One engine per base model serves all plans at once, in the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.plan_io import save_plan
from tests.e2e import cases
from tests.e2e.engine import PLUGINS, Outcome, run_script
from tests.e2e.test_equality import LATENT_TOLERANCE, TOLERANCE, worst_difference

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

SCRIPT = Path(__file__).with_name("live_worker.py")
COMPILED = ("mixtral",)
RANKS = {"mixtral": 2}
Expected = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="session")
def job(
    base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plans")

    def make(model: str, name: str, **fields: Any) -> dict[str, Any]:
        base, plans = base_model(model), {}
        for plan in cases.plans_of(model):
            path = folder / f"{model}-{plan}.json"
            if not path.exists():
                save_plan(cases.make_plan(plan, model, base), path)
            plans[plan] = str(path)
        compact = [plan for plan in ("counts", "router_map", "constant") if plan in plans]
        defaults = {
            "name": name,
            "model": str(base),
            "plans": plans,
            "prompts": cases.prompts(),
            "tokens": cases.TOKENS,
            "compiled": False,
            "spare": 40 if "tied" in plans else 0,
            "compact": compact,
        }
        options = {**cases.engine_options(model), **fields.pop("options", {})}
        return {**defaults, **fields, "options": options}

    return make


@pytest.fixture(scope="session")
def eager_live(
    job: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    jobs = [job(model, model, refusals=model == "mixtral") for model in cases.MODELS]
    return run_script(SCRIPT, jobs, tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="session")
def other_live(
    job: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Compiled; started compact; chunked prefill: all with a compile cache of their own."""
    jobs = [job(model, f"{model} compiled", compiled=True) for model in COMPILED]
    jobs.append(job("mixtral", "compact", resident="counts"))
    chunks = {"max_num_batched_tokens": 48, "max_num_seqs": 8}
    jobs.append(job("mixtral", "chunked", options=chunks))
    return run_script(SCRIPT, jobs, tmp_path_factory.mktemp("other"), own_cache=True)


@pytest.fixture(scope="session")
def parallel_live(
    job: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    jobs = [job(model, f"{model} ranks", ranks=ranks) for model, ranks in RANKS.items()]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    folder = tmp_path_factory.mktemp("ranks")
    return run_script(SCRIPT, jobs, folder, environment=environment)


def check_all(
    answers: dict[str, Any], model: str, expected: Expected, *, scored: bool = True
) -> None:
    """Every variant's tokens and log-probabilities are its own reference's."""
    assert set(answers) == {"base", *cases.plans_of(model)}
    for tag, found in answers.items():
        right = expected(model, tag)
        assert found["tokens"] == right["tokens"], tag
        if scored:
            tolerance = LATENT_TOLERANCE if model.startswith("deepseek") else TOLERANCE
            assert worst_difference(found, right) < tolerance, tag


@pytest.mark.parametrize("model", cases.MODELS)
def test_all_variants_in_the_same_batches(
    model: str, eager_live: dict[str, Any], expected: Expected
) -> None:
    check_all(eager_live[model]["mixed"], model, expected)


@pytest.mark.parametrize("model", cases.MODELS)
def test_warm_prefixes_do_not_leak_between_variants(
    model: str, eager_live: dict[str, Any], expected: Expected
) -> None:
    check_all(eager_live[model]["warm"], model, expected, scored=False)
    if not model.startswith("deepseek"):  # vLLM's CPU build has no prefix cache there
        for found in eager_live[model]["warm"].values():
            assert found["cached"] == [0, 0, 32, 64]


@pytest.mark.parametrize("model", cases.MODELS)
def test_the_base_alone_is_bit_identical_to_vllm_without_the_plugin(
    model: str, eager_live: dict[str, Any], stock: dict[str, Outcome]
) -> None:
    bare = stock[f"{model}/base"]
    assert eager_live[model]["alone"]["tokens"] == bare.cold
    assert eager_live[model]["alone"]["logprobs"] == bare.logprobs


@pytest.mark.parametrize("model", cases.MODELS)
def test_compact_engine_is_the_applied_checkpoint(
    model: str, eager_live: dict[str, Any], eager: dict[str, Outcome], expected: Expected
) -> None:
    """A plan by tables on the whole engine = on the compact one = its checkpoint in vLLM."""
    for tag, found in eager_live[model]["compact"].items():
        if tag.endswith("memory"):
            continue
        applied = eager[f"{model}/{tag}"]
        assert found["tokens"] == expected(model, tag)["tokens"] == applied.cold
        by_tables = eager_live[model]["mixed"][tag]
        assert worst_difference(found, by_tables) < TOLERANCE
        assert worst_difference(found, {"logprobs": applied.logprobs}) < LATENT_TOLERANCE


@pytest.mark.parametrize("model", cases.MODELS)
def test_compaction_leaves_only_the_rows_of_the_plan(
    model: str, eager_live: dict[str, Any], base_model: Callable[[str], Path]
) -> None:
    outcome = eager_live[model]
    plan = cases.make_plan("counts", model, base_model(model))
    share = sum(x.kept_experts for x in plan.layers) / sum(x.experts for x in plan.layers)
    memory = outcome["compact"]["counts memory"]
    assert memory["base_rows"] == pytest.approx(memory["all_base_rows"] * share)
    assert memory["spare_rows"] == 0
    assert outcome["freed"]["counts"] > 0


@pytest.mark.parametrize("model", cases.MODELS)
def test_rows_come_back_byte_for_byte(
    model: str, eager_live: dict[str, Any], expected: Expected
) -> None:
    outcome = eager_live[model]
    check_all(outcome["whole"], model, expected)
    crcs = {tag: sorted(rows.items()) for tag, rows in outcome["after"].items()}
    assert crcs["base"] == sorted(outcome["before"]["base"].items())
    assert crcs["counts"] == sorted(outcome["before"]["counts"].items())


def test_the_other_weights_are_counted(
    eager_live: dict[str, Any], base_model: Callable[[str], Path]
) -> None:
    parameters = cases.reference_model(base_model("mixtral"), None).named_parameters()
    others = sum(4 * x.numel() for name, x in parameters if ".experts." not in name)
    assert eager_live["mixtral"]["memory"]["other_weights"] == others


def test_wrong_operations_are_refused_and_change_nothing(eager_live: dict[str, Any]) -> None:
    """What follows in the same engine (``compact``, ``whole``) is checked by the tests above."""
    refused = eager_live["mixtral"]["refusals"]
    assert refused["unknown slot"] == "slot 13: free, expected a prepared or live slot"
    assert refused["taken slot"].endswith("in use, expected a free slot")
    assert "live; expected one that was never published" in refused["live slot cancelled"]
    assert "missing.json" in refused["no such plan"]
    assert refused["spare 13"] == ""
    assert "free spare rows (--spare-rows)" in refused["spare 15"]
    assert "are not resident, expected all that its table names" in refused["row not resident"]


@pytest.mark.parametrize("model", COMPILED)
def test_compiled(model: str, other_live: dict[str, Any], expected: Expected) -> None:
    """Tables, top-k and residency change under compiled code that was traced once."""
    outcome = other_live[f"{model} compiled"]
    check_all(outcome["mixed"], model, expected)
    check_all(outcome["warm"], model, expected, scored=False)
    check_all(outcome["whole"], model, expected)
    assert outcome["compact"]["counts"]["tokens"] == expected(model, "counts")["tokens"]


def test_chunked_prefill(other_live: dict[str, Any], expected: Expected) -> None:
    check_all(other_live["chunked"]["mixed"], "mixtral", expected)


def test_start_compact(other_live: dict[str, Any], expected: Expected) -> None:
    """Only the rows of one variant are loaded; the base can come later."""
    outcome = other_live["compact"]
    assert outcome["start"]["counts"]["tokens"] == expected("mixtral", "counts")["tokens"]
    memory = outcome["start_memory"]
    assert memory["base_rows"] == memory["slots"]["1"] < memory["all_base_rows"]
    check_all(outcome["whole"], "mixtral", expected)


@pytest.mark.parametrize("model", RANKS)
def test_tensor_parallel(model: str, parallel_live: dict[str, Any], expected: Expected) -> None:
    outcome = parallel_live[f"{model} ranks"]
    check_all(outcome["mixed"], model, expected)
    check_all(outcome["whole"], model, expected)
    assert outcome["compact"]["counts"]["tokens"] == expected(model, "counts")["tokens"]
    assert {key.partition("/")[0] for key in outcome["after"]["base"]} == {"0", "1"}


def test_the_script_needs_the_plugin(
    job: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """So that the tests above cannot pass without it."""
    with pytest.raises(RuntimeError, match="liveprune"):
        run_script(
            SCRIPT,
            [job("mixtral", "bare")],
            tmp_path_factory.mktemp("bare"),
            environment={PLUGINS: ""},
        )
