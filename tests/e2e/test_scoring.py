"""Candidates scored on a warm vLLM engine equal the reference engine on transformers.

All families; several plans in one call, merged ones in spare rows; and EEP's own outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.evaluation.transformers_engine import TransformersEngine
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_io import load_plan, save_plan
from tests.e2e import cases
from tests.e2e.engine import run_script
from tests.e2e.padded_heads import pad_heads
from tests.e2e.test_equality import LATENT_TOLERANCE, TOLERANCE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

SCRIPT = Path(__file__).with_name("scoring_worker.py")
TOKENS = 6
MODELS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
KINDS = {"onehot": 5e-5, "onehot_unsorted": 5e-5, "continuous_nonneg": 5e-5, "continuous": 1e-3}
"""Golden kind of coefficients -> tolerance of its logits (golden/eep/README.md)."""
COMMON = list(range(20, 75))
"""What all prompts of ``SHARED`` begin with: a block of 32, and a part of one."""


def _rows() -> list[tuple[list[int], list[int]]]:
    """Unlike prompts: one of a single token, one over several blocks; an answer over a border."""
    prompts = [[7], *cases.prompts()]
    return [(prompt, [11 + i, 60, 33, 90, 2][: i + 1]) for i, prompt in enumerate(prompts)]


def _choices() -> list[tuple[list[int], list[int]]]:
    """Rows of the same questions, whose prompts are computed once."""
    prompts = cases.prompts()[1:]
    return [(prompt, [20 + i, 50, 81 + i]) for prompt in prompts for i in range(3)]


ROWS = {
    "unlike": _rows(),
    "shared": [([*COMMON, 80 + i], [30 + i, 5, 2]) for i in range(9)],
    "choices": _choices(),
}


@pytest.fixture(scope="session")
def plans(
    base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, str]]:
    """``plans(model) -> {name: path}``."""
    folder = tmp_path_factory.mktemp("scored")

    def make(model: str) -> dict[str, str]:
        found = {}
        for name in cases.plans_of(model):
            path = folder / f"{model}-{name}.json"
            if not path.exists():
                save_plan(cases.make_plan(name, model, base_model(model)), path)
            found[name] = str(path)
        return found

    return make


@pytest.fixture(scope="session")
def scored(
    base_model: Callable[[str], Path],
    plans: Callable[[str], dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    jobs = []
    for model in MODELS:
        job = {
            "model": str(base_model(model)),
            "plans": plans(model),
            "spare": 40,
            "options": cases.engine_options(model),
        }
        jobs.append({**job, "name": model, "rows": ROWS["unlike"], "tokens": TOKENS})
    mixtral = next(job for job in jobs if job["name"] == "mixtral")
    olmoe = plans("olmoe")["counts"]
    for kind in ("shared", "choices"):
        # Few blocks: packs and passes are split; few slots and rows: plans come in parts.
        small = {"blocks": 14, "candidates": 2, "spare": 14, "tokens": 0}
        jobs.append({**mixtral, "name": kind, "rows": ROWS[kind], **small, "wrong": {"m": olmoe}})
    few = {"blocks": 10, "tokens": 0, "plans": {}, "rows": ROWS["unlike"][:3]}
    router_map = {"spare": plans("mixtral")["router_map"]}
    jobs.append({**mixtral, "name": "few", **few, "spare": 4, "wrong": router_map})
    return run_script(SCRIPT, jobs, tmp_path_factory.mktemp("scoring"))


@pytest.fixture(scope="session")
def in_parallel(
    base_model: Callable[[str], Path],
    plans: Callable[[str], dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Two tensor-parallel ranks, each a process with its half of every expert."""
    job = {
        "name": "ranks",
        "model": str(base_model("mixtral")),
        "plans": plans("mixtral"),
        "spare": 24,
        "rows": ROWS["shared"],
        "options": {"tensor_parallel_size": 2},
    }
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    return run_script(SCRIPT, [job], tmp_path_factory.mktemp("ranks"), environment=bind)


def reference_scores(
    base: Path, plans: dict[str, str], rows: list[tuple[list[int], list[int]]]
) -> dict[str, AnswerScores]:
    engine = TransformersEngine(base)
    asked = [TokenRow(tuple(prompt), tuple(answer)) for prompt, answer in rows]
    loaded = [None, *(load_plan(Path(path)) for path in plans.values())]
    return dict(zip(["base", *plans], engine.score(loaded, asked, against_full=True), strict=True))


def check(found: dict[str, Any], expected: dict[str, AnswerScores], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        np.testing.assert_array_equal(found[name]["predicted"], score.predicted, name)
        close: dict[str, Any] = {"rtol": 0, "atol": tolerance, "err_msg": name}
        np.testing.assert_allclose(found[name]["logprobs"], score.logprobs, **close)
        if found[name]["overlap"] is not None:
            assert score.overlap is not None
            assert score.divergence is not None
            np.testing.assert_allclose(found[name]["overlap"], score.overlap, **close)
            close["rtol"] = 1e-5  # differences of up to tens of nats
            np.testing.assert_allclose(found[name]["divergence"], score.divergence, **close)


@pytest.mark.parametrize("model", MODELS)
def test_scores_equal_transformers(
    model: str,
    scored: dict[str, Any],
    base_model: Callable[[str], Path],
    plans: Callable[[str], dict[str, str]],
) -> None:
    expected = reference_scores(base_model(model), plans(model), ROWS["unlike"])
    if model == "deepseek_v2":
        # It never divides by the sum of the selected weights, which ``cases`` knows.
        for plan in ("router_map", "identity"):
            expected.pop(plan)
    tolerance = LATENT_TOLERANCE if model.startswith("deepseek") else TOLERANCE
    for call in ("scores", "against", "alone", "after", "recovered"):
        found = {name: scored[model][call][name] for name in expected}
        check(found, expected, tolerance)


@pytest.mark.parametrize("kind", ["shared", "choices"])
def test_texts_that_begin_alike_equal_transformers(
    kind: str,
    scored: dict[str, Any],
    base_model: Callable[[str], Path],
    plans: Callable[[str], dict[str, str]],
) -> None:
    expected = reference_scores(base_model("mixtral"), plans("mixtral"), ROWS[kind])
    for call in ("scores", "against", "alone", "recovered"):
        check(scored[kind][call], expected, TOLERANCE)


def test_tensor_parallel_ranks_equal_transformers(
    in_parallel: dict[str, Any],
    base_model: Callable[[str], Path],
    plans: Callable[[str], dict[str, str]],
) -> None:
    expected = reference_scores(base_model("mixtral"), plans("mixtral"), ROWS["shared"])
    for call in ("scores", "against", "recovered"):
        check(in_parallel["ranks"][call], expected, TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
def test_generated_answers_are_those_that_scoring_predicts(
    model: str, scored: dict[str, Any]
) -> None:
    """The first token of each, and what follows where the answer agrees so far."""
    outcome = scored[model]
    for name, answers in outcome["generated"].items():
        start = 0
        for (_, answer), made in zip(ROWS["unlike"], answers, strict=True):
            assert len(made) == TOKENS
            same = 0
            while same < len(answer) and answer[:same] == made[:same]:
                assert outcome["scores"][name]["predicted"][start + same] == made[same]
                same += 1
            start += len(answer)


def test_an_end_token_is_the_last(scored: dict[str, Any]) -> None:
    outcome = scored["mixtral"]
    ends = {answer[1] for answer in outcome["generated"]["base"]}
    for made, ended in zip(outcome["generated"]["base"], outcome["ended"], strict=True):
        stop = next((i for i, token in enumerate(made) if token in ends), TOKENS - 1)
        assert ended == made[: stop + 1]


def test_a_failed_step_leaves_nothing_behind(scored: dict[str, Any]) -> None:
    for model in MODELS:
        assert scored[model]["broken"] == "generating failed: out of order"
        assert scored[model]["again"] == scored[model]["generated"]


def test_refusals_leave_the_engine_as_it_was(scored: dict[str, Any]) -> None:
    assert "made for 'olmoe', the model is 'mixtral'" in scored["shared"]["refused"]["m"]
    assert "spare rows (--spare-rows)" in scored["few"]["refused"]["spare"]
    for name, blocks in (("shared", 14), ("choices", 14), ("few", 10)):
        assert scored[name]["free"] == blocks - 1  # all but the null block
        assert scored[name]["recovered"] == scored[name]["scores"]


@pytest.fixture(scope="session")
def golden(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """EEP's own coefficients through the engine."""
    folder = tmp_path_factory.mktemp("golden")
    pad_heads(shared / "golden/ckpt/mixtral_rand", folder / "model")
    inputs = load_file(shared / "golden/calib_rand.safetensors")
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        tokens = ids[mask].tolist()
        rows.append((tokens[:1], tokens[1:]))
    paths = {}
    for kind in KINDS:
        held = load_file(shared / f"golden/eep/mixtral_rand.b4.{kind}.coeff.safetensors")
        names = [(f"layers.{i}", f"transfer.{i}") for i in range(2)]
        layers = tuple(
            LayerPlan(i, 8, 2, merge=held[merge].numpy(), router_map=held[mapped].numpy())
            for i, (merge, mapped) in enumerate([*names, ("others", "others_transfer")])
        )
        paths[kind] = str(folder / f"{kind}.json")
        save_plan(Plan("mixtral", 3, layers, Lineage("eep")), Path(paths[kind]))
    job = {
        "name": "golden",
        "model": str(folder / "model"),
        "plans": paths,
        "rows": rows,
        "spare": 16,
    }
    return {"rows": rows, **run_script(SCRIPT, [job], folder)["golden"]}


@pytest.mark.parametrize("kind", ["full", *KINDS])
def test_merges_equal_the_official_implementation(
    kind: str, golden: dict[str, Any], shared: Path
) -> None:
    name = "mixtral_rand.full" if kind == "full" else f"mixtral_rand.b4.{kind}"
    logits = load_file(shared / f"golden/eep/{name}.logits.safetensors")["logits"]
    wanted, likeliest = [], []
    for of_row, (first, rest) in zip(logits, golden["rows"], strict=True):
        logprobs = of_row.log_softmax(-1)[: len(first) + len(rest) - 1]
        wanted += logprobs.gather(1, torch.tensor(rest).unsqueeze(1)).squeeze(1).tolist()
        likeliest += logprobs.argmax(-1).tolist()
    found = golden["scores"]["base" if kind == "full" else kind]
    # Of two log-probabilities' difference, each may be off by a logit's tolerance.
    tolerance = 2 * KINDS.get(kind, 5e-5)
    np.testing.assert_allclose(found["logprobs"], wanted, rtol=0, atol=tolerance)
    assert found["predicted"] == likeliest
