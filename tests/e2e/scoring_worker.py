"""A subprocess of ``engine.run_script``: plans scored and generated on real engines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from liveprune.patches.scoring_engine import ScoringEngine
from liveprune.pruning.errors import LiveprunError
from liveprune.pruning.evaluation.engine import AnswerScores, TokenRow
from liveprune.pruning.plan_io import load_plan


def main(question: str, answer: str) -> None:
    outcomes = {}
    for job in json.loads(Path(question).read_text()):
        print("job", job["name"], flush=True)
        outcomes[job["name"]] = run(job)
    Path(answer).write_text(json.dumps(outcomes))


def run(job: dict[str, Any]) -> dict[str, Any]:
    engine = ScoringEngine(
        Path(job["model"]),
        candidates=job.get("candidates", 8),
        spare_rows=job["spare"],
        max_length=256,
        dtype="float32",
        block_size=32,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=job.get("blocks", 64),
        **job.get("options", {}),
    )
    plans = [None, *(load_plan(Path(path)) for path in job["plans"].values())]
    names = ["base", *job["plans"]]
    rows = [TokenRow(tuple(prompt), tuple(answer)) for prompt, answer in job["rows"]]
    outcome: dict[str, Any] = {
        "scores": _named(names, engine.score(plans, rows)),
        "against": _named(names, engine.score(plans, rows, against_full=True)),
        "alone": _named(names, [engine.score([plan], rows)[0] for plan in plans]),
    }
    if job.get("tokens"):
        prompts = [row.prompt for row in rows]
        answers = engine.generate(plans, prompts, max_tokens=job["tokens"], end=[])
        outcome["generated"] = dict(zip(names, answers, strict=True))
        # Scoring has left nothing behind that requests could read, nor they anything for it.
        outcome["after"] = _named(names, engine.score(plans, rows))
        ends = {answer[1] for answer in answers[0]}
        outcome["ended"] = engine.generate([None], prompts, max_tokens=job["tokens"], end=ends)[0]
    if job.get("tokens"):
        outcome["broken"] = _broken(engine, prompts, job["tokens"])
        again = engine.generate(plans, prompts, max_tokens=job["tokens"], end=[])
        outcome["again"] = dict(zip(names, again, strict=True))
    outcome["refused"] = {
        name: _refusal(engine, load_plan(Path(path)), rows)
        for name, path in job.get("wrong", {}).items()
    }
    outcome["free"] = engine._core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    outcome["recovered"] = _named(names, engine.score(plans, rows))
    engine.close()
    return outcome


def _broken(engine: ScoringEngine, prompts: list[tuple[int, ...]], tokens: int) -> str:
    """The model fails in the middle of the answers."""
    executor = engine._core.model_executor
    whole, steps = executor.execute_model, iter(range(2))

    def fail(*arguments: Any, **options: Any) -> Any:
        if next(steps, None) is None:
            raise RuntimeError("out of order")
        return whole(*arguments, **options)

    executor.execute_model = fail
    try:
        engine.generate([None], prompts, max_tokens=tokens, end=[])
    except LiveprunError as error:
        return str(error)
    finally:
        executor.execute_model = whole
    return ""


def _refusal(engine: ScoringEngine, plan: Any, rows: list[TokenRow]) -> str:
    try:
        engine.score([plan], rows)
    except LiveprunError as error:
        return str(error)
    return ""


def _named(names: list[str], scores: list[AnswerScores]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "predicted": score.predicted.tolist(),
            "logprobs": score.logprobs.tolist(),
            "overlap": None if score.overlap is None else score.overlap.tolist(),
            "divergence": None if score.divergence is None else score.divergence.tolist(),
        }
        for name, score in zip(names, scores, strict=True)
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
