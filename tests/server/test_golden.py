from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from liveprune.patches.live_types import GoldenAnswer
from liveprune.pruning.errors import CheckpointError, DataError
from liveprune.server.golden import (
    Canaries,
    canary_prompts,
    compare,
    engine_key,
    flaw,
    read_golden,
    read_prompts,
    write_golden,
)

GOLDEN = [GoldenAnswer([4, 5, 6], [-0.1, -0.2, -0.3]), GoldenAnswer([7], [-1 / 3])]


def changed(**fields: list[float]) -> list[GoldenAnswer]:
    """The second answer differs."""
    first, second = GOLDEN
    return [first, GoldenAnswer(**{"tokens": second.tokens, "logprobs": second.logprobs, **fields})]


def test_equal_answers_agree() -> None:
    assert compare(GOLDEN, GOLDEN, 0.0) is None
    assert compare(GOLDEN, changed(logprobs=[-1 / 3 + 0.9e-3]), 1e-3) is None


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (changed(tokens=[8]), "prompt 1, token 0: found token 8, expected 7"),
        (
            changed(logprobs=[-0.3311]),
            "prompt 1, token 0: log-probability is -0.331100, expected -0.333333 within 0.001",
        ),
        (
            changed(logprobs=[math.nan]),
            "prompt 1, token 0: log-probability is nan, expected -0.333333 within 0.001",
        ),
        (
            changed(tokens=[7, 8], logprobs=[-1 / 3, -1]),
            "prompt 1: found 2 tokens, expected 1 (equal as far as they go)",
        ),
        (
            changed(tokens=[], logprobs=[]),
            "prompt 1: found 0 tokens, expected 1 (equal as far as they go)",
        ),
        (GOLDEN[:1], "found answers to 1 prompts, expected 2"),
    ],
)
def test_differences_are_named(found: list[GoldenAnswer], reason: str) -> None:
    assert compare(GOLDEN, found, 1e-3) == reason


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (GOLDEN[:1], "found answers to 1 prompts, expected 2"),
        (changed(tokens=[], logprobs=[]), "prompt 1: found 0 tokens with 0 log-probabilities"),
        (changed(tokens=[1, 2]), "prompt 1: found 2 tokens with 1 log-probabilities"),
        (changed(logprobs=[math.nan]), "prompt 1, token 0: log-probability is nan"),
        (changed(logprobs=[-math.inf]), "prompt 1, token 0: log-probability is -inf"),
    ],
)
def test_answers_that_cannot_be_golden(answers: list[GoldenAnswer], reason: str) -> None:
    found = flaw(answers, 2)
    assert found is not None
    assert found.startswith(reason)


def test_good_answers_have_no_flaw() -> None:
    assert flaw(GOLDEN, 2) is None


def test_recorded_answers_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    assert read_golden(path) is None
    write_golden(path, GOLDEN)
    found = read_golden(path)
    assert found is not None
    assert compare(GOLDEN, found, 0.0) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not readable as golden answers"),
        ("[]", "version of golden answers is None; this release reads 1"),
        ('{"version": 2}', "version of golden answers is 2"),
        ('{"version": 1}', "malformed golden answers: KeyError"),
        ('{"version": 1, "answers": [{"tokens": ["x"], "logprobs": [0]}]}', "malformed"),
        ('{"version": 1, "answers": [{"tokens": [1], "logprobs": [NaN]}]}', "is nan"),
        ('{"version": 1, "answers": [{"tokens": [1, 2], "logprobs": [0]}]}', "2 tokens with 1"),
    ],
)
def test_damaged_answers_are_refused(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_golden(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("vocabulary", [1, 5, 128, 151_936])
def test_prompts_fit_the_vocabulary_and_never_change(vocabulary: int) -> None:
    prompts = canary_prompts(vocabulary)
    assert prompts == canary_prompts(vocabulary)
    assert [len(prompt) for prompt in prompts] == [9, 12, 15, 18, 21]
    for prompt in prompts:
        assert all(0 <= token < vocabulary for token in prompt)
        third = len(prompt) // 3
        assert prompt[:third] * 3 == prompt
    if vocabulary > 100:
        assert len({prompt[:3] for prompt in prompts}) == 5


def test_the_key_names_engine_and_questions() -> None:
    key = engine_key("bfloat16", 2, "0.32.0+cpu", compiled=False)
    assert key == "bfloat16-eager-tp2-0.32.0+cpu"
    assert engine_key("bfloat16", 2, "0.32.0+cpu", compiled=True) != key
    one = Canaries(((1, 2),), key)
    assert one.key.startswith(f"{key}-")
    assert Canaries(((1, 2),), key).key == one.key
    assert Canaries(((1, 3),), key).key != one.key
    assert Canaries(((1, 2),), key, tokens=8).key != one.key


def test_an_operators_prompts(tmp_path: Path) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(json.dumps({"prompt": "ab", "answer": "c"}) + "\n\n" + '{"prompt": "b"}\n')
    assert read_prompts(path, lambda text: [ord(x) for x in text]) == ((97, 98), (98,))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"prompt": "a"}\n{', "line 2 is not JSON"),
        ('{"text": "a"}', "line 1 is .* expected an object with a"),
        ('["a"]', "line 1 is"),
        ('{"prompt": ""}', "line 1 is"),
    ],
)
def test_an_operators_mistakes(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=reason):
        read_prompts(path, lambda text: [ord(x) for x in text])


def test_a_missing_file_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not readable"):
        read_prompts(tmp_path / "none.jsonl", lambda _: [1])
