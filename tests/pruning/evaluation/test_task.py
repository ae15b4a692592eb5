from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.pruning.demo import model_path, rows_path
from liveprune.pruning.errors import DataError, EngineError
from liveprune.pruning.evaluation.engine import AnswerScores
from liveprune.pruning.evaluation.rows import load_questions
from liveprune.pruning.evaluation.task import Task, load_task
from liveprune.pruning.evaluation.transformers_engine import TransformersEngine
from tests.checkpoints import make_plan, merge_plan
from tests.pruning.evaluation.fake_engine import OTHER, FakeEngine

DEMO = model_path()
PLANS = [make_plan(DEMO, [[0, 1, 2]]), make_plan(DEMO, [[3, 4]]), make_plan(DEMO, [[5]], top_k=1)]
END = 2
POSITIVE, POS, ITIVE, SPACE = 324, 323, 322, 223
"""Tokens of the demo: "positive" is one, and two others spell it, too."""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(*rows: Any) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return make


def labelled(*answers: str) -> list[dict[str, str]]:
    return [{"prompt": f"{i}\n", "answer": answer} for i, answer in enumerate(answers)]


def scripted(task: Task, *of_plans: Sequence[tuple[int, ...]], **options: Any) -> FakeEngine:
    """An engine for the full model and as many of ``PLANS`` as there are lists of answers."""
    plans = [None, *PLANS]
    prompts = [row.prompt for row in task._questions.rows]
    answers = {
        plan: dict(zip(prompts, given, strict=True))
        for plan, given in zip(plans, of_plans, strict=False)
    }
    return FakeEngine(answers, **options)


def test_exact_match_of_tokens_needs_one_call(write: Callable[..., Path]) -> None:
    task = load_task(write(*labelled("positive", "positive")), DEMO, measure="exact")
    right, wrong, endless = (POSITIVE, END), (POSITIVE, ITIVE, END), (POSITIVE, POSITIVE, END)
    engine = scripted(task, [right, right], [right, wrong], [endless, (END,)])
    found = task.values(engine, [None, *PLANS[:2]])
    assert found.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert engine.calls == [("score", 3, 2)]
    assert task.values(engine, [PLANS[0]], [1]).tolist() == [[0]]
    assert task.values(engine, [PLANS[0]], [1, 0, 1]).tolist() == [[0, 1, 0]]


def test_exact_match_of_text_in_other_tokens(write: Callable[..., Path]) -> None:
    """Only rows where the text still fits after the first miss are generated."""
    task = load_task(write(*labelled(*["positive"] * 4)), DEMO, measure="exact")
    engine = scripted(
        task,
        [
            (POS, ITIVE, END),  # the same text
            (POS, POS, END),  # begins like it
            (POSITIVE, SPACE, END),  # the same text, stripped
            (ITIVE, END),  # does not begin like it
        ],
    )
    assert task.values(engine, [None]).tolist() == [[1, 0, 1, 0]]
    assert engine.calls == [("score", 1, 4), ("generate", 1, 3)]


def test_an_answer_that_does_not_end_is_no_exact_match(write: Callable[..., Path]) -> None:
    task = load_task(write(*labelled("positive")), DEMO, measure="exact", max_answer_tokens=3)
    engine = scripted(task, [(POS, ITIVE, SPACE, SPACE)], [(POS, ITIVE, SPACE)])
    assert task.values(engine, [None]).tolist() == [[0]]
    task = load_task(write(*labelled("positive")), DEMO, measure="exact", max_answer_tokens=4)
    engine = scripted(task, [(POS, ITIVE, SPACE, END)])
    assert task.values(engine, [None]).tolist() == [[1]]


def test_an_early_end_needs_no_generation(write: Callable[..., Path]) -> None:
    """The gold answer's own blank at its end is not part of its text."""
    task = load_task(write(*labelled("positive ", "positive")), DEMO, measure="exact")
    engine = scripted(task, [(POSITIVE, END), (POS, END)])
    assert task.values(engine, [None], [0]).tolist() == [[1]]
    assert engine.calls == [("score", 1, 1)]


def test_numbers_that_are_not_finite_are_nan(write: Callable[..., Path]) -> None:
    """Of the plan that gave them, and of no other."""
    right = [(POSITIVE, END)]
    for measure in ("exact", "nll"):
        task = load_task(write(*labelled("positive")), DEMO, measure=measure)
        engine = scripted(task, right, right, right, broken=frozenset([PLANS[0]]))
        found = task.values(engine, [PLANS[1], PLANS[0]])
        assert found[0, 0] > 0.8
        assert math.isnan(found[1, 0])


def test_contains(write: Callable[..., Path]) -> None:
    task = load_task(write(*labelled("positive", "positive")), DEMO, measure="contains")
    engine = scripted(
        task, [(POS, POS, ITIVE, POS, END), (POS, END)], [(ITIVE, END), (SPACE, POSITIVE)]
    )
    assert task.values(engine, [None, PLANS[0]]).tolist() == [[1, 0], [0, 1]]
    assert engine.calls == [("generate", 2, 2)]
    assert task.answer_tokens() == 2 * 64


def test_choice_is_scored_without_end(write: Callable[..., Path]) -> None:
    rows = [{"prompt": "?", "choices": ["pos", "positive", "ab"], "answer": 1}]
    task = load_task(write(*rows), DEMO, measure="choice")
    engine = scripted(task, [(POSITIVE, END)], [(POS, END)])
    assert task.values(engine, [None, PLANS[0]]).tolist() == [[1], [0]]
    assert engine.calls == [("score", 2, 3)]
    assert task.binary
    assert task.answer_tokens() == sum(map(len, task._questions.rows[0].answers))


def test_label_free_measures_by_hand(write: Callable[..., Path]) -> None:
    """The full model answers two tokens; the plan agrees on the first, with less certainty."""
    values = {}
    for measure in ("esap", "kl", "nll"):
        task = load_task(write({"prompt": "a"}), DEMO, measure=measure)
        assert task.answer_tokens() == 64
        engine = scripted(
            task, [(POS, END)], [(POS, ITIVE)], vocabulary=401, sure={None: 0.8, PLANS[0]: 0.6}
        )
        found = task.values(engine, [None, PLANS[0]])
        assert engine.calls == [("generate", 1, 1), ("score", 2, 1)]
        assert task.answer_tokens() == 2
        assert not task.binary
        values[measure] = found[:, 0]
    # Other tokens: 0.0005 each under the full model, 0.001 under the plan.
    assert values["esap"] == pytest.approx([1, (0.6 + 400 * 0.0005 + 0.0005 * 401 + 0.0005) / 2])
    first = 0.8 * math.log(0.8 / 0.6) + 0.2 * math.log(0.5)
    second = 0.8 * math.log(0.8 / 0.001) + 0.0005 * math.log(0.0005 / 0.6)
    second += 399 * 0.0005 * math.log(0.5)
    assert values["kl"] == pytest.approx([1, math.exp(-(first + second) / 2)])
    assert values["nll"] == pytest.approx([0.8, math.sqrt(0.6 * 0.001)])


def test_the_full_model_answers_once_per_engine(write: Callable[..., Path]) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    task = load_task(write(*rows), DEMO, measure="esap")
    first, second = (scripted(task, [(POS, END), (END,)]) for _ in range(2))
    for engine in (first, second):
        task.values(engine, [None], [1])
        task.values(engine, [None], [0, 1])
        assert engine.calls == [("generate", 1, 2), ("score", 1, 1), ("score", 1, 2)]
    assert [task.answer_tokens([i]) for i in (0, 1)] == [2, 1]


def test_nothing_asked_is_not_asked(write: Callable[..., Path]) -> None:
    task = load_task(write(*labelled("a")), DEMO, measure="exact")
    engine = scripted(task, [(OTHER,)])
    assert task.values(engine, []).shape == (0, 1)
    assert task.values(engine, [None], []).shape == (1, 0)
    assert engine.calls == []


def test_an_engine_that_scores_other_tokens_is_refused(write: Callable[..., Path]) -> None:
    class Short(FakeEngine):
        def _scores(self, *args: Any, **options: Any) -> AnswerScores:
            scores = super()._scores(*args, **options)
            return AnswerScores(scores.predicted, scores.logprobs[1:])

    task = load_task(write(*labelled("positive")), DEMO, measure="exact")
    engine = Short(scripted(task, [(POSITIVE, END)]).answers)
    with pytest.raises(EngineError, match=r"found \[1\] tokens scored, expected 2"):
        task.values(engine, [None])
    task = load_task(write(*labelled("positive")), DEMO, measure="kl")
    with pytest.raises(EngineError, match="tokens scored"):
        task.values(engine, [None])


def test_the_digest_covers_tokens_measure_and_parameters(write: Callable[..., Path]) -> None:
    def digest(*answers: str, measure: str = "exact", **options: Any) -> str:
        return load_task(write(*labelled(*answers)), DEMO, measure=measure, **options).digest

    first = digest("a", "b")
    assert len(first) == 32
    assert digest("a", "b") == first
    others = [
        digest("a"),
        digest("a", "c"),
        digest("a", "b", measure="contains"),
        digest("a", "b", max_answer_tokens=32),
    ]
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        ("bleu", {}, "measure is 'bleu', expected one of"),
        ("exact", {"max_answer_tokens": 0}, "max_answer_tokens is 0, expected at least 1"),
        ("exact", {"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        (
            "exact",
            {"max_answer_tokens": 2},
            r"rows\.jsonl:2: found an answer of 2 tokens and its end, expected at most 2",
        ),
        (
            "exact",
            {"max_tokens": 9, "max_answer_tokens": 7},
            r"rows\.jsonl:1: found 3 tokens in the prompt and up to 7 .* at most 9 together",
        ),
        ("esap", {"max_answer_tokens": 254}, r"rows\.jsonl:1: .* at most 256 together"),
        # Longer than the model takes is never allowed.
        ("nll", {"max_answer_tokens": 254, "max_tokens": 999}, "at most 256 together"),
        ("choice", {}, r"rows\.jsonl:1: found no choices"),
    ],
)
def test_refusals(
    write: Callable[..., Path], measure: str, options: dict[str, int], message: str
) -> None:
    path = write(*labelled("5", "20"))
    with pytest.raises(DataError, match=message):
        load_task(path, DEMO, measure=measure, **options)


def test_choices_are_bounded_by_their_own_length(write: Callable[..., Path]) -> None:
    path = write({"prompt": "a", "choices": ["5", "123"], "answer": 0})
    assert load_task(path, DEMO, measure="choice", max_tokens=5).size == 1
    with pytest.raises(DataError, match="2 tokens in the prompt and up to 3 in the answer"):
        load_task(path, DEMO, measure="choice", max_tokens=4)


def test_an_end_token_inside_an_answer_is_refused(write: Callable[..., Path]) -> None:
    path = write(*labelled("5<eos>5"))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: found an end token inside"):
        load_task(path, DEMO, measure="exact")


@pytest.fixture(scope="module")
def demo_engine() -> TransformersEngine:
    return TransformersEngine(DEMO)


@pytest.mark.parametrize("name", ["add", "sentiment", "reverse"])
def test_exact_equals_real_generation(demo_engine: TransformersEngine, name: str) -> None:
    path = rows_path(name, "dev")
    rows = 40
    task = load_task(path, DEMO, measure="exact", max_rows=rows, max_answer_tokens=48)
    plans = [None, make_plan(DEMO, [[0, 2, 5, 7]]), merge_plan(DEMO, 4, router_map=True)]
    found = task.values(demo_engine, plans)
    questions = load_questions(path, DEMO, form="answer", max_rows=rows)
    answers = demo_engine.generate(
        plans, [row.prompt for row in questions.rows], max_tokens=48, end=questions.end
    )
    gold = [json.loads(line)["answer"] for line in path.read_text().splitlines()[:rows]]
    expected = [
        [float(questions.decode(x).strip() == text) for x, text in zip(given, gold, strict=True)]
        for given in answers
    ]
    assert found.tolist() == expected
    assert 0 < found[0].mean() != found[1].mean()


@pytest.mark.parametrize("measure", ["esap", "kl", "nll"])
def test_agreement_on_the_demo_model(demo_engine: TransformersEngine, measure: str) -> None:
    """The full model agrees with itself; fewer experts agree less."""
    task = load_task(
        rows_path("sort", "dev"), DEMO, measure=measure, max_rows=12, max_answer_tokens=24
    )
    plans = [None, make_plan(DEMO, [[0, 1, 3, 4, 5, 7]]), make_plan(DEMO, [[0]], top_k=1)]
    found = task.values(demo_engine, plans)
    assert ((found >= 0) & (found <= 1)).all()
    if measure != "nll":
        assert found[0] == pytest.approx(np.ones(12), abs=1e-5)
    assert found[0].mean() > found[1].mean() > found[2].mean()


def test_the_longest_text_has_room_for_its_answer(write: Callable[..., Path]) -> None:
    rows = labelled("positive")
    generated = load_task(write(*rows), DEMO, measure="exact", max_answer_tokens=7)
    assert generated.longest == len(generated._questions.rows[0].prompt) + 7
    path = write({"prompt": "a", "choices": ["5", "123"], "answer": 0})
    assert load_task(path, DEMO, measure="choice").longest == 2 + 3
