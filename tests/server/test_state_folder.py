from __future__ import annotations

import errno
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.pruning.errors import CheckpointError, ConflictError, PlanError, StoreError
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.server.saved_form import base_fingerprint
from liveprune.server.state_folder import SavedState, StateFolder
from liveprune.server.store.store import DATABASE
from tests.server.fake_engine import fake_base, fake_plan
from tests.server.live_world import before_writes

PLAN = fake_plan([1, 2])
MERGE = np.ones((2, 8), np.float32)
MERGED = Plan(
    "mixtral",
    3,
    tuple(LayerPlan(i, 8, 1, merge=MERGE, router_map=MERGE) for i in range(3)),
    Lineage("eep"),
)
STATE = SavedState({"a": PLAN.digest, "b": MERGED.digest}, ("a", "full"), "a", "full", 7)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return fake_base(tmp_path / "base")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def saved(path: Path, base: Path) -> StateFolder:
    """A closed folder that holds STATE and its plans."""
    folder = StateFolder(path, base)
    folder.store_plan(PLAN)
    folder.store_plan(MERGED)
    folder.save(STATE)
    folder.close()
    return folder


def test_a_fresh_folder_is_private_and_serves_the_base(path: Path, base: Path) -> None:
    folder = StateFolder(path, base)
    assert folder.state == SavedState({}, ("full",), "full", None, 0)
    assert [x.stat().st_mode & 0o777 for x in (path, path / "plans", path / "golden")] == [
        0o700
    ] * 3
    assert (path / "lock").stat().st_mode & 0o777 == 0o600


def test_what_is_saved_comes_back(path: Path, base: Path) -> None:
    assert saved(path, base).state == STATE
    folder = StateFolder(path, base)
    assert folder.state == STATE
    assert folder.store.plans.load(PLAN.digest) == PLAN
    assert folder.store.plans.load(MERGED.digest) == MERGED
    assert sorted(x.name for x in (path / "plans").iterdir()) == sorted(
        [f"{PLAN.digest}.json", f"{MERGED.digest}.json", f"{MERGED.digest}.safetensors"]
    )


def test_one_server_at_a_time(path: Path, base: Path) -> None:
    code = (
        "import sys, pathlib; from liveprune.server.state_folder import StateFolder\n"
        "folder = StateFolder(*map(pathlib.Path, sys.argv[1:]))\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, path, base],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    with pytest.raises(ConflictError, match=f"used by another server .process {other.pid}"):
        StateFolder(path, base)
    other.kill()
    other.communicate()
    folder = StateFolder(path, base)  # a lock dies with its holder
    with pytest.raises(ConflictError):
        StateFolder(path, base)
    folder.close()
    folder.close()
    StateFolder(path, base).close()


def test_another_base_model_is_refused(path: Path, base: Path, tmp_path: Path) -> None:
    saved(path, base)
    with pytest.raises(CheckpointError, match=r"expected .*other.*; choose another state folder"):
        StateFolder(path, fake_base(tmp_path / "other"))
    fake_base(base, hidden_size=128)
    with pytest.raises(CheckpointError, match="choose another state folder, or empty this one"):
        StateFolder(path, base)
    fake_base(base)
    assert StateFolder(path, base).state == STATE  # no refusal keeps the lock


def test_a_base_without_config(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not readable"):
        StateFolder(path, tmp_path)


def edit(**fields: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **fields})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[:50], "not readable as JSON"),
        (lambda _: "[]", "version is None; this release reads 1"),
        (edit(version=2), "version is 2; this release reads 1"),
        (edit(variants=None), "damaged: TypeError"),
        (edit(variants={"a:b": PLAN.digest}, live=[], alias=""), "damaged: VariantError"),
        (edit(variants={"full": PLAN.digest}), "damaged: VariantError"),
        (edit(variants={"a": "../../etc/passwd"}), "expected a plan digest"),
        (edit(variants={"a": "../../../../../../../../etc/pass"}), "damaged: ValueError"),
        (edit(live=["a", "c"]), "found 'c', expected the tag of a variant"),
        (edit(live=[["a"]]), "damaged: TypeError"),
        (edit(alias="b"), "found 'b', expected a live tag as the alias"),
        (edit(previous="c"), "found 'c', expected the tag of a variant as previous"),
        (edit(published=-1), "found -1, expected a count of publications"),
        (edit(published=True), "found True, expected a count"),
        (lambda text: text.replace('"live"', '"lives"'), "damaged: KeyError: 'live'"),
    ],
)
def test_damage_is_refused_by_name(
    change: Callable[[str], str], reason: str, path: Path, base: Path
) -> None:
    """In the file of releases before the store, from which the state is taken over."""
    path.mkdir()
    file = path / "state.json"
    form = {"version": 1, "base": base_fingerprint(base), **asdict(STATE)}
    file.write_text(change(json.dumps(form)))
    with pytest.raises(CheckpointError, match=reason) as caught:
        StateFolder(path, base)
    assert str(caught.value).startswith(str(file))


def test_the_state_of_an_older_release_is_taken_over_once(path: Path, base: Path) -> None:
    path.mkdir()
    form = {"version": 1, "base": base_fingerprint(base), **asdict(STATE)}
    (path / "state.json").write_text(json.dumps(form))
    folder = StateFolder(path, base)
    assert folder.state == STATE
    assert not (path / "state.json").exists()
    assert (path / "state.json.imported").exists()
    folder.save(replace(STATE, alias="full"))
    folder.close()
    assert StateFolder(path, base).state == replace(STATE, alias="full")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"version": 2}, "version is 2; this release reads 1"),
        ({"live": ["a", "c"]}, "found 'c', expected the tag of a variant"),
        ({"alias": "b"}, "found 'b', expected a live tag as the alias"),
        ({"published": -1}, "found -1, expected a count of publications"),
    ],
)
def test_damage_of_the_store_is_refused_by_name(
    fields: dict[str, Any], reason: str, path: Path, base: Path
) -> None:
    folder = saved(path, base)
    with closing(sqlite3.connect(path / DATABASE)) as connection, connection:
        (text,) = connection.execute("SELECT state FROM servers").fetchone()
        changed = json.dumps({**json.loads(text), **fields})
        connection.execute("UPDATE servers SET state = ?", (changed,))
    with pytest.raises(CheckpointError, match=f"store of {folder.path}: .*{reason}"):
        StateFolder(path, base)


def test_a_full_disk_leaves_the_old_state(
    path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(path, base)
    folder = StateFolder(path, base)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        before_writes(patched, full)
        with pytest.raises(StoreError, match="No space"):
            folder.save(replace(STATE, alias="full"))
    assert folder.state == STATE
    folder.close()
    assert StateFolder(path, base).state == STATE


def test_plans_that_are_missing_or_not_what_their_name_says(path: Path, base: Path) -> None:
    saved(path, base)
    folder = StateFolder(path, base)
    file = folder.store.plans.path(PLAN.digest)
    file.write_text(folder.store.plans.path(MERGED.digest).read_text())
    with pytest.raises(PlanError, match=f"holds the plan {MERGED.digest}, expected {PLAN.digest}"):
        folder.store.plans.load(PLAN.digest)
    file.unlink()
    with pytest.raises(PlanError, match="not readable as a plan"):
        folder.store.plans.load(PLAN.digest)
    folder.store_plan(PLAN)
    assert folder.store.plans.load(PLAN.digest) == PLAN


def test_only_plans_that_no_variant_has_are_discarded(path: Path, base: Path) -> None:
    saved(path, base)
    folder = StateFolder(path, base)
    for digest in (PLAN.digest, MERGED.digest, None):
        folder.golden_path(digest, "key").write_text("{}")
    folder.discard(MERGED.digest)
    assert folder.store.plans.load(MERGED.digest) == MERGED
    folder.save(replace(STATE, variants={"a": PLAN.digest}))
    folder.discard(MERGED.digest)
    assert [x.name for x in (path / "plans").iterdir()] == [f"{PLAN.digest}.json"]
    assert sorted(x.name for x in (path / "golden").iterdir()) == sorted(
        ["base-key.json", f"{PLAN.digest}-key.json"]
    )
