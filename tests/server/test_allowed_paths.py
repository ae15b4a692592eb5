from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from liveprune.pruning.errors import PlanError
from liveprune.server import allowed_paths
from liveprune.server.allowed_paths import AllowedPaths, default_roots


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed folder with a plan; the folder above it has a secret."""
    (tmp_path / "secret.json").write_text('{"format": "liveprune-plan"}')
    (tmp_path / "secrets").mkdir()
    folder = tmp_path / "plans"
    folder.mkdir()
    (folder / "p.json").write_text('{"format": "liveprune-plan"}')
    return folder


def test_a_plan_inside_is_found_by_any_of_its_names(root: Path) -> None:
    paths = AllowedPaths([root, root.parent / "secrets"])
    (root / "link.json").symlink_to(root / "p.json")
    (root / "deep").mkdir()
    for name in ("p.json", "./p.json", "deep/../p.json", "link.json", str(root / "p.json")):
        assert paths.plan(name) == root / "p.json"


def test_the_path_returned_has_no_links_left(root: Path, tmp_path: Path) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(root)
    assert AllowedPaths([alias]).plan(str(alias / "p.json")) == root / "p.json"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.json",
        "deep/../../secret.json",
        "{outside}/secret.json",
        "link.json",
        "linked/secret.json",
        "chain.json",
        "{outside}",
        "{outside}/plans-not/p.json",
        "{outside}/nothing-here",
        "/proc/self/environ",
        "~/secret.json/../../secret.json/../../../x",
    ],
)
def test_no_way_leads_out(root: Path, name: str) -> None:
    outside = root.parent
    (outside / "plans-not").mkdir()
    (outside / "plans-not" / "p.json").write_text("{}")
    (root / "link.json").symlink_to("../secret.json")
    (root / "linked").symlink_to(outside)
    (root / "chain.json").symlink_to("link.json")
    with pytest.raises(PlanError, match="leads outside") as caught:
        AllowedPaths([root]).plan(name.format(outside=outside))
    assert repr(name.format(outside=outside)) in str(caught.value)
    assert str(root) in str(caught.value)


def test_a_checkpoint_is_checked_to_the_plan_inside(root: Path) -> None:
    paths = AllowedPaths([root])
    model = root / "model"
    (model / "liveprune").mkdir(parents=True)
    with pytest.raises(PlanError, match="No such file"):
        paths.plan("model")
    (model / "liveprune" / "plan.json").symlink_to(root.parent / "secret.json")
    with pytest.raises(PlanError, match="leads outside"):
        paths.plan("model")
    (model / "liveprune" / "plan.json").unlink()
    (model / "liveprune" / "plan.json").write_text("{}")
    assert paths.plan("model") == model


@pytest.mark.parametrize("name", ["../secret.json", "out.safetensors"])
def test_matrices_cannot_lead_out_either(root: Path, name: str) -> None:
    (root / "out.safetensors").symlink_to(root.parent / "secret.json")
    (root / "p.json").write_text(json.dumps({"matrices": name}))
    with pytest.raises(PlanError, match="leads outside"):
        AllowedPaths([root]).plan("p.json")


def test_matrices_inside_are_fine_and_missing_ones_are_not(root: Path) -> None:
    (root / "p.json").write_text(json.dumps({"matrices": "m.safetensors"}))
    with pytest.raises(PlanError, match="No such file"):
        AllowedPaths([root]).plan("p.json")
    (root / "m.safetensors").write_bytes(b"x")
    assert AllowedPaths([root]).plan("p.json") == root / "p.json"


@pytest.mark.parametrize(
    "content", [b"\x80\x02torch", b"[1, 2]", b"[" * 100_000, b'{"matrices": 3}']
)
def test_files_of_other_forms_are_left_to_the_reader(root: Path, content: bytes) -> None:
    (root / "p.json").write_bytes(content)
    assert AllowedPaths([root]).plan("p.json") == root / "p.json"


def test_a_pipe_is_refused_and_does_not_block(root: Path) -> None:
    os.mkfifo(root / "pipe")
    with pytest.raises(PlanError, match="regular file"):
        AllowedPaths([root]).plan("pipe")


def test_a_shard_named_by_mistake_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowed_paths, "MAX_PLAN_BYTES", 28)
    assert AllowedPaths([root]).plan("p.json")  # 28 bytes
    (root / "p.json").write_bytes(b"x" * 29)
    with pytest.raises(PlanError, match="found 29 bytes, expected a plan of at most 28"):
        AllowedPaths([root]).plan("p.json")


def test_odd_paths_are_plan_errors(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    for name in ("missing.json", "loop", "null\0byte", "x" * 5000):
        with pytest.raises(PlanError, match="not readable as a plan"):
            AllowedPaths([root]).plan(name)


def test_default_roots_never_open_the_whole_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.chdir(tmp_path)
    assert default_roots(state) == (tmp_path, state)
    monkeypatch.chdir("/")
    assert default_roots(state) == (state,)
