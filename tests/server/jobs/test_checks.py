"""What a job is refused for before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from liveprune.pruning.calibration.statistics import LayerStatistics, RoutingStatistics
from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.demo import model_path, rows_path
from liveprune.pruning.errors import (
    DataError,
    IncompatibleEnvironmentError,
    PlanError,
    VariantError,
)
from liveprune.server.allowed_paths import AllowedPaths
from liveprune.server.jobs.checks import Surroundings, check_request
from liveprune.server.jobs.request import JobRequest
from liveprune.server.jobs.row_files import digest_of, measure_for, put_aside

SORT = str(rows_path("sort", "train").resolve())
DEV = str(rows_path("sort", "dev").resolve())
TEST = str(rows_path("sort", "test").resolve())


def request(**changes: Any) -> JobRequest:
    fields: dict[str, Any] = {"method": "reap", "source": {"data": SORT}, "tag": "a"}
    if "target_memory" not in changes and "experts" not in changes:
        fields["experts"] = "4"
    return JobRequest.model_validate({**fields, **changes})


def around(**changes: Any) -> Surroundings:
    paths = AllowedPaths([Path(SORT).parent, *changes.pop("roots", ())])
    return Surroundings(model_path(), paths, **changes)


def counted() -> bytes:
    """Live statistics of a server that samples no outputs."""
    sums = np.full((8, 3, 3), np.nan)
    sums[:, :, 0] = np.arange(24).reshape(8, 3)
    unknown = np.full(8, np.nan)
    layer = LayerStatistics(sums, unknown, unknown)
    return RoutingStatistics(
        dict.fromkeys(range(4), layer), 100, "live", fingerprint_model(model_path())
    ).to_bytes()


def test_a_good_request_gets_absolute_paths_and_digests() -> None:
    asked = request(
        source={"data": "sort.train.jsonl"}, dev="sort.dev.jsonl", test="sort.test.jsonl"
    )
    found = check_request(asked, around())
    assert found.request.source.data == SORT
    assert (found.request.dev, found.request.test) == (DEV, TEST)
    assert found.digests == {
        name: digest_of(Path(path)) for name, path in (("data", SORT), ("dev", DEV), ("test", TEST))
    }
    again = JobRequest.model_validate_json(found.request.model_dump_json())
    assert again == found.request


@pytest.mark.parametrize(
    "good",
    [
        {"method": "eep", "settings": {"merge": False, "prune_candidates": 8}},
        {"method": "random", "source": {"data": SORT}},
        {"method": "frequency", "source": {"statistics": "live"}},
        {"method": "reap", "target_memory": 3_000_000},
        {"method": "moeits", "settings": {"nmi": "shuffled"}},
        {"method": "eep", "source": {"prompts": "kept"}},
        {"allocate": "global", "seed": 3},
        {"allocate": "evoesap", "settings": {"population": 4, "elites": 2}},
        {"allocate": "global", "min_experts": 2, "max_experts": 6, "skip_layers": [0]},
        {"experts": "5", "snap": "servable", "expert_parallel": 2},
        {"method": "hc-smoe", "router": "drop"},
        {"keep_super_experts": True},
    ],
)
def test_every_kind_of_method_and_source_passes(good: dict[str, Any]) -> None:
    check_request(request(**good), around(prompts=True, statistics=counted()))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"source": {}}, "found none, expected one of data"),
        ({"source": {"data": SORT, "statistics": "live"}}, "found data and statistics"),
        ({"source": {"statistics": "old"}}, "live"),
        ({"experts": None}, "found neither of experts and target_memory"),
        ({"experts": "4", "target_memory": 5}, "found both"),
        ({"share": 0.05}, "greater than or equal to 0.1"),
        ({"share": 1.5}, "less than or equal to 1"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"engine": "cuda"}, "live"),
        ({"actors": 2}, "found with engine live"),
        ({"ray_address": "auto", "engine": "vllm"}, "found without actors"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_what_contradicts_itself_is_no_request(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        request(**bad)


@pytest.mark.parametrize(
    ("bad", "kind", "match"),
    [
        ({"tag": "full"}, VariantError, "reserved"),
        ({"tag": "a b"}, VariantError, "tag is 'a b'"),
        ({"method": "reep"}, PlanError, "did you mean 'reap'.*or eep"),
        ({"settings": {"nope": 1}}, PlanError, "found parameter 'nope'"),
        ({"method": "eep", "settings": {"nope": 1}}, PlanError, "found nope"),
        ({"method": "eep", "preset": "best"}, PlanError, "preset is 'best'"),
        ({"experts": "9"}, PlanError, "9"),
        ({"experts": "4,4"}, PlanError, "list"),
        ({"experts": "1", "top_k": 2}, PlanError, "top"),
        ({"method": "eep", "top_k": [1, 1]}, PlanError, "top_k: found a list"),
        ({"method": "eep", "target_memory": 10**6}, PlanError, "target_memory: found"),
        ({"method": "eep", "allocate": "global"}, PlanError, "allocate: found"),
        ({"target_memory": 10}, PlanError, "expected at least"),
        ({"method": "eep", "snap": "4"}, PlanError, "snap: found with method eep"),
        ({"method": "eep", "skip_layers": [1]}, PlanError, "skip_layers: found"),
        ({"skip_layers": [9]}, PlanError, r"skip_layers is \[9\]"),
        ({"snap": "9"}, PlanError, "--snap"),
        ({"expert_parallel": 2}, PlanError, "without --snap"),
        ({"experts": "1", "snap": "servable", "expert_parallel": 2}, PlanError, "1"),
        ({"router": "keep"}, PlanError, "router: found with method reap"),
        ({"min_experts": 2}, PlanError, "global"),
        ({"allocate": "evoesap", "settings": {"population": 0}}, PlanError, "population is 0"),
        ({"settings": {"population": 4}}, PlanError, "found parameter 'population'"),
        ({"method": "stun", "allocate": "evoesap"}, PlanError, "shares experts out itself"),
        (
            {"allocate": "evoesap", "method": "frequency", "source": {"statistics": "live"}},
            DataError,
            "found statistics, expected data or prompts for allocate evoesap",
        ),
        ({"measure": "best"}, DataError, "best"),
        ({"measure": "choice", "dev": DEV}, DataError, "no choices"),
        ({"method": "eep", "source": {"statistics": "live"}}, DataError, "method eep"),
        ({"method": "naee", "source": {"statistics": "live"}}, DataError, "reads calibration rows"),
        ({"method": "reap", "source": {"statistics": "live"}}, DataError, "reap: needs the exp"),
        ({"method": "eep", "experts": "8", "settings": {"merge": False}}, PlanError, "nothing"),
        ({"dev": SORT}, DataError, "dev: found the same rows as data"),
        ({"test": SORT}, DataError, "found a row of the test set"),
        ({"dev": DEV, "test": DEV}, DataError, "found a row of the test set"),
        ({"source": {"data": "/etc/passwd"}}, DataError, "outside the allowed"),
        ({"source": {"data": "nothing.jsonl"}}, DataError, "No such file"),
    ],
)
def test_what_cannot_work_is_refused(
    bad: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        check_request(request(**bad), around(statistics=counted()))


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="found no live statistics"):
        check_request(
            request(source={"statistics": "live"}), around(why_no_statistics="none counted")
        )
    with pytest.raises(DataError, match="found no kept prompts"):
        check_request(request(source={"prompts": "kept"}), around())
    with pytest.raises(IncompatibleEnvironmentError, match="no priority scheduler"):
        check_request(request(), around(why_not_live="no priority scheduler"))
    check_request(request(engine="transformers"), around(why_not_live="no priority scheduler"))


def test_an_earlier_jobs_test_set_is_not_learned_from() -> None:
    with pytest.raises(DataError, match="is the test set of job 12ab"):
        check_request(request(), around(tested={digest_of(Path(SORT)): "12ab"}))


def test_broken_rows_are_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": 3}\n')
    for method in ("eep", "reap"):
        with pytest.raises(DataError, match=r"rows\.jsonl:2"):
            check_request(
                request(method=method, source={"data": str(rows)}), around(roots=[tmp_path])
            )


@pytest.mark.parametrize(
    ("row", "measure"),
    [
        ({"prompt": "a", "answer": "b"}, "exact"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 1}, "choice"),
        ({"prompt": "a"}, "esap"),
        ({"messages": [{"role": "user", "content": "a"}]}, "esap"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, None),
        ({"text": "a"}, None),
    ],
)
def test_the_measure_follows_the_form(row: dict[str, Any], measure: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert measure_for(path) == measure


def test_a_part_is_put_aside(tmp_path: Path) -> None:
    path, train, dev = (tmp_path / name for name in ("rows", "train", "dev"))
    rows = [json.dumps({"prompt": f"{i}"}) for i in range(10)]
    path.write_text("\n".join(rows))
    put_aside(path, train, dev, seed=1, max_rows=10)
    parts = train.read_text().splitlines(), dev.read_text().splitlines()
    assert [len(part) for part in parts] == [7, 3]
    assert sorted(parts[0] + parts[1]) == sorted(rows)
    assert all(part == sorted(part) for part in parts)
    assert train.stat().st_mode & 0o777 == dev.stat().st_mode & 0o777 == 0o600
    put_aside(path, tmp_path / "again", dev, seed=1, max_rows=10)
    assert (tmp_path / "again").read_text() == train.read_text()
    with pytest.raises(DataError, match="found 1 rows, expected at least 2"):
        put_aside(path, train, dev, seed=1, max_rows=1)
