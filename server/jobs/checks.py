"""What can be known to fail is refused when a job is started, not when it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from liveprune.pruning.calibration.rows import load_rows
from liveprune.pruning.errors import (
    DataError,
    IncompatibleEnvironmentError,
)
from liveprune.pruning.evaluation.measures import measure_of
from liveprune.pruning.evaluation.task import load_task
from liveprune.pruning.given_statistics import load_given
from liveprune.pruning.methods import find_method
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server.allowed_paths import AllowedPaths
from liveprune.server.jobs.budget import check_budget
from liveprune.server.jobs.request import JobRequest
from liveprune.server.jobs.row_files import check_apart, digest_of, measure_for
from liveprune.server.variant import check_tag


@dataclass(frozen=True)
class Surroundings:
    """What a request is checked against."""

    model: Path
    """Checkpoint folder of the base model."""
    paths: AllowedPaths
    tested: Mapping[str, str] = field(default_factory=dict)
    """Digests of files that earlier jobs measured as test sets, and which job that was."""
    why_not_live: str = ""
    """Why plans cannot be tried out on the serving engine; empty if they can."""
    statistics: bytes | None = None
    """The live statistics as a file's content."""
    why_no_statistics: str = "none were asked for"
    """Why there are none."""
    prompts: bool = False
    """There are kept prompts."""


@dataclass(frozen=True)
class Checked:
    """A request that nothing is known against."""

    request: JobRequest
    """Paths are absolute."""
    digests: Mapping[str, str]
    """See ``StoredRequest``."""


def check_request(request: JobRequest, around: Surroundings) -> Checked:
    """Refuse what would fail later; takes as long as reading the rows.

    Raises:
        PlanError: method, budget or settings do not fit each other or the model.
        DataError: rows are missing or unusable, or the test set is learned from.
        VariantError: the tag is malformed.
        IncompatibleEnvironmentError: the engine cannot do this.
    """
    check_tag(request.tag)
    if request.engine == "live" and around.why_not_live:
        raise IncompatibleEnvironmentError(
            f"engine: found live, expected transformers or vllm: {around.why_not_live}"
        )
    if request.actors is not None:
        from liveprune.server.ray_cluster import import_ray

        import_ray()
    spec = ModelSpec.from_path(around.model)
    check_budget(request, around.model, spec)
    _check_source(request, around)
    files = _files(request, around)
    digests = {name: digest_of(path) for name, path in files.items()}
    _check_test(request, files, digests, around)
    _check_rows(request, files, around.model)
    resolved = request.model_copy(
        update={
            "source": request.source.model_copy(
                update={"data": str(files["data"])} if "data" in files else {}
            ),
            **{name: str(files[name]) for name in ("dev", "test") if name in files},
        }
    )
    return Checked(resolved, digests)


def _check_source(request: JobRequest, around: Surroundings) -> None:
    source = request.source
    if source.statistics is not None:
        if request.learns_from_answers:
            asker = "allocate evoesap" if request.searches_budgets else f"method {request.method}"
            raise DataError(
                f"source: found statistics, expected data or prompts for {asker}, which scores "
                f"answers to rows"
            )
        _check_statistics(request, around)
    if source.prompts is not None and not around.prompts:
        raise DataError(
            "source: found no kept prompts, expected a server started with --keep-prompts that "
            "has answered some"
        )


def _check_statistics(request: JobRequest, around: Surroundings) -> None:
    if around.statistics is None:
        raise DataError(f"source: found no live statistics: {around.why_no_statistics}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "live-statistics"
        path.write_bytes(around.statistics)
        method, spec = find_method(request.method), ModelSpec.from_path(around.model)
        load_given(path, around.model, spec, method, super_experts=False)


def _files(request: JobRequest, around: Surroundings) -> dict[str, Path]:
    named = {"data": request.source.data, "dev": request.dev, "test": request.test}
    return {name: around.paths.rows(text) for name, text in named.items() if text is not None}


def _check_test(
    request: JobRequest,
    files: Mapping[str, Path],
    digests: Mapping[str, str],
    around: Surroundings,
) -> None:
    for name in ("data", "dev"):
        if name not in digests:
            continue
        if digests[name] in around.tested:
            raise DataError(
                f"{name}: {files[name]} is the test set of job {around.tested[digests[name]]}; "
                f"expected rows that no result is reported on"
            )
        if "test" in files:
            check_apart(files[name], files["test"], request.max_rows)
    if {"data", "dev"} <= digests.keys() and digests["data"] == digests["dev"]:
        raise DataError("dev: found the same rows as data, expected others")


def _check_rows(request: JobRequest, files: Mapping[str, Path], model: Path) -> None:
    """Read whatever will be measured, by the measure that it will be measured by."""
    if request.measure is not None:
        measure_of(request.measure)
    measured = {
        name: path for name, path in files.items() if name != "data" or request.learns_from_answers
    }
    for name, path in measured.items():
        measure = request.measure or measure_for(path)
        if measure is None:
            raise DataError(
                f"{name}: {path}: found rows without a prompt to be answered, expected prompts"
            )
        load_task(
            path,
            model,
            measure=measure,
            max_rows=request.max_rows,
            max_answer_tokens=request.max_answer_tokens,
            chat=request.chat,
        )
    if "data" in files and not request.searches:
        vocabulary = int(ModelSpec.from_path(model).config["vocab_size"])
        load_rows(files["data"], model, vocab_size=vocabulary, max_rows=request.max_rows)
