from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveprune.pruning.errors import ExperimentError
from liveprune.server.experiments.assignment import (
    Allocation,
    allocate,
    arm_of,
    assign,
    point,
    unit_of,
)
from liveprune.server.experiments.definition import PPM, UNIT_CHAIN, Experiment, experiment_from

SALT = bytes(range(32))


def experiment(name: str = "halve", traffic: tuple[float, float] = (0, 1)) -> Experiment:
    return experiment_from(
        {
            "name": name,
            "model": "mixtral",
            "arms": [
                {"name": "A", "variant": "full", "weight": 0.7},
                {"name": "B", "variant": "e4", "weight": 0.2},
                {"name": "C", "variant": "e2", "weight": 0.1},
            ],
            "control": "A",
            "primary": {"metric": "e2e_seconds"},
            "traffic": list(traffic),
        }
    )


shares = (
    st.lists(st.integers(0, 20), min_size=4, max_size=4)
    .filter(any)
    .map(lambda parts: dict(zip("ABCD", _scaled(parts), strict=True)))
)


def _scaled(parts: list[int]) -> list[int]:
    found = [PPM * part // sum(parts) for part in parts]
    found[0] += PPM - sum(found)
    return found


@given(st.lists(shares, min_size=1, max_size=6))
def test_intervals_have_the_shares_asked_for(history: list[dict[str, int]]) -> None:
    found = allocate(history)
    assert found.shares() == {arm: ppm for arm, ppm in history[-1].items() if ppm}
    assert found.ends[-1] == PPM
    assert list(found.ends) == sorted(set(found.ends))


@given(st.lists(shares, min_size=2, max_size=5), st.lists(st.floats(0, 1, exclude_max=True)))
def test_units_move_only_from_shrinking_to_growing_arms(
    history: list[dict[str, int]], places: list[float]
) -> None:
    before, after = allocate(history[:-1]), allocate(history)
    old, new = history[-2], history[-1]
    # The ends of all intervals are where an error would show.
    edges = [edge / PPM for edge in {0, *before.ends, *after.ends} if edge < PPM]
    for place in places + edges:
        a, b = arm_of(before, place), arm_of(after, place)
        if a != b:
            assert new[a] < old[a]
            assert new[b] > old[b]


@given(st.lists(shares, min_size=2, max_size=4))
def test_a_change_moves_no_more_than_it_must(history: list[dict[str, int]]) -> None:
    before, after = allocate(history[:-1]), allocate(history)
    edges = sorted({0, *before.ends, *after.ends})
    moved = sum(
        end - start
        for start, end in itertools.pairwise(edges)
        if arm_of(before, (start + 0.5) / PPM) != arm_of(after, (start + 0.5) / PPM)
    )
    assert moved == sum(max(0, history[-1][arm] - history[-2][arm]) for arm in "ABCD")


def test_a_ramp_moves_nobody_off_the_growing_arm() -> None:
    history = [{"A": PPM - ppm, "B": ppm} for ppm in (100_000, 250_000, 500_000, 900_000)]
    units = [point(SALT, "arm:halve", f"user={i}") for i in range(5000)]
    on: set[int] = set()
    for steps in range(1, 5):
        now = allocate(history[:steps])
        found = {i for i, place in enumerate(units) if arm_of(now, place) == "B"}
        assert on <= found
        assert abs(len(found) / 5000 - history[steps - 1]["B"] / PPM) < 0.03
        on = found


def test_point_is_the_keyed_hash() -> None:
    digest = hashlib.blake2b(b"3:abcuser=7", key=SALT, digest_size=8).digest()
    assert point(SALT, "abc", "user=7") == int.from_bytes(digest, "big") // 2**11 / 2**53
    assert point(SALT, "ab", "cuser=7") != point(SALT, "abc", "user=7")
    assert 0 <= point(SALT, "x", "\ud800") < 1


def test_point_is_the_same_in_another_process() -> None:
    code = (
        "from liveprune.server.experiments.assignment import point;"
        "print(repr([point(bytes(range(32)), 'arm:halve', f'user={i}') for i in range(20)]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [point(SALT, "arm:halve", f"user={i}") for i in range(20)]
    assert out.stdout.strip() == repr(here)


def test_points_are_uniform_and_independent_of_the_layer() -> None:
    units = [f"user={i}" for i in range(20_000)]
    low = [point(SALT, "arm:e", u) for u in units if point(SALT, "layer:m", u) < 0.5]
    cells = Counter(int(10 * x) for x in low)
    expected = len(low) / 10
    # Chi-square with 9 degrees of freedom, 0.9999 quantile.
    assert sum((cells[i] - expected) ** 2 / expected for i in range(10)) < 33.7
    assert abs(len(low) - 10_000) < 4 * 20_000**0.5 / 2


def test_experiments_on_one_alias_never_share_a_unit() -> None:
    one, two = experiment("one", (0, 0.3)), experiment("two", (0.3, 0.9))
    running = [(x, allocate([x.shares])) for x in (one, two)]
    found = Counter[str | None]()
    for i in range(10_000):
        unit = f"user={i}"
        hit = assign(SALT, running, "mixtral", unit)
        reverse = assign(SALT, running[::-1], "mixtral", unit)
        assert hit == reverse
        found[hit[0].name if hit else None] += 1
    assert {name: round(count / 10_000, 1) for name, count in found.items()} == {
        "one": 0.3,
        "two": 0.6,
        None: 0.1,
    }


def test_other_models_have_no_experiment() -> None:
    one = experiment()
    assert assign(SALT, [(one, allocate([one.shares]))], "qwen", "user=1") is None


def test_arm_of_includes_the_start_and_not_the_end() -> None:
    found = Allocation((250_000, PPM), ("A", "B"))
    assert [arm_of(found, x) for x in (0.0, 0.2499999, 0.25, 0.9999999999)] == list("AABB")


@pytest.mark.parametrize("history", [[], [{"A": 1}], [{"A": PPM}, {"A": PPM + 1, "B": -1}]])
def test_bad_shares_are_refused(history: list[dict[str, int]]) -> None:
    with pytest.raises(ExperimentError, match="allocation: found"):
        allocate(history)


@pytest.mark.parametrize(
    ("headers", "body", "key_id", "expected"),
    [
        ({"x-liveprune-unit": "u1"}, {"user": "u2"}, "k", "header:x-liveprune-unit=u1"),
        ({}, {"user": "u2", "prompt_cache_key": "p"}, "k", "body:user=u2"),
        ({}, {"user": "", "prompt_cache_key": "p"}, "k", "body:prompt_cache_key=p"),
        ({}, {"user": ["u2"]}, "k", "api-key=k"),
        ({"x-liveprune-unit": ""}, {}, None, "request-id=r"),
    ],
)
def test_the_first_source_that_a_request_has_names_its_unit(
    headers: dict[str, str], body: dict[str, object], key_id: str | None, expected: str
) -> None:
    assert unit_of(UNIT_CHAIN, headers, body, key_id, "r") == expected
