from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from liveprune.pruning.errors import LiveprunError, PlanError, VariantError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_io import save_plan
from liveprune.server.live_options import (
    LiveOptions,
    make_config,
    model_state,
    note_variants,
    parse_bytes,
    read_variants,
    remember_resident,
)
from liveprune.server.state_folder import StateFolder


@pytest.fixture
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("mixtral")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Iterator[StateFolder]:
    opened = StateFolder(model_state(tmp_path, base), base)
    yield opened
    opened.close()


def plan(*kept: int) -> Plan:
    layers = tuple(LayerPlan(i, 8, 1, kept=kept) for i in range(3))
    return Plan("mixtral", 3, layers, Lineage("hand"))


def test_plans_are_read_by_tag_and_checked_at_once(base: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_path(base)
    save_plan(plan(1, 2), tmp_path / "two.json")
    assert read_variants([f"a={tmp_path / 'two.json'}"], spec) == {"a": plan(1, 2)}
    save_plan(replace(plan(1, 2), num_hidden_layers=9), tmp_path / "other.json")
    for text, error, words in (
        ("a", VariantError, "expected TAG=PLAN"),
        ("full=x", VariantError, "reserved"),
        ("a=missing.json", PlanError, "missing.json not found"),
        (f"a={tmp_path / 'other.json'}", PlanError, "--variant a=.*other.json: .*9 layers"),
    ):
        with pytest.raises(error, match=words):
            read_variants([text], spec)
    twice = [f"a={tmp_path / 'two.json'}"] * 2
    with pytest.raises(VariantError, match="'a' twice"):
        read_variants(twice, spec)


def test_variants_of_the_command_line_join_those_of_the_folder(folder: StateFolder) -> None:
    assert note_variants(folder, {"a": plan(1)}, None) is None
    assert note_variants(folder, {"b": plan(2)}, None) is None
    assert folder.state.variants == {"a": plan(1).digest, "b": plan(2).digest}
    assert folder.state.live == ("a", "b", "full")
    assert folder.store.plans.load(plan(2).digest) == plan(2)


def test_resident_decides_once_then_what_was_swapped_in_since(folder: StateFolder) -> None:
    assert note_variants(folder, {"a": plan(1)}, "a") == "a"
    assert folder.state.live == ("a",)
    assert folder.state.alias == "a"
    remember_resident(folder, "a")
    # The operator swaps to the whole model; a restart by the same command line keeps that.
    folder.save(replace(folder.state, live=("full",), alias="full"))
    assert note_variants(folder, {}, "a") is None
    assert folder.state.alias == "full"
    # Without the flag, and then with it anew, it decides again.
    assert note_variants(folder, {}, None) is None
    remember_resident(folder, None)
    assert note_variants(folder, {}, "a") == "a"
    assert folder.state.live == ("a",)


def test_a_compact_state_starts_compact_without_the_flag(folder: StateFolder) -> None:
    note_variants(folder, {"a": plan(1)}, "a")
    assert note_variants(folder, {}, None) == "a"


def test_nothing_is_written_until_the_engine_is_up(folder: StateFolder, base: Path) -> None:
    note_variants(folder, {"a": plan(1)}, "a")
    folder.close()
    again = StateFolder(folder.path, base)
    assert again.state.live == ("full",)
    assert again.state.variants == {}
    again.close()


def test_resident_must_be_a_variant(folder: StateFolder) -> None:
    with pytest.raises(VariantError, match="--resident: found 'x', expected one of full, a"):
        note_variants(folder, {"a": plan(1)}, "x")


def test_what_the_engine_is_told(base: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_path(base)
    whole = make_config(base, spec, LiveOptions(tmp_path), None)
    assert (whole.slots, whole.spare_rows, whole.resident_slot) == (17, 8, 0)
    assert whole.kv_extra_bytes == 2 * 3 * 8 * (3 * 64 * 48) * 4
    assert not whole.required
    options = LiveOptions(tmp_path, resident="a", spare_rows=0, max_variants=2)
    compact = make_config(base, spec, options, tmp_path / "plan.json")
    assert (compact.slots, compact.spare_rows, compact.resident_slot) == (3, 0, 1)
    assert compact.resident_plan == str(tmp_path / "plan.json")
    assert compact.required


@pytest.mark.parametrize(
    ("text", "size"),
    [("40GiB", 40 * 2**30), ("1.5G", 1_500_000_000), ("7", 7), ("2 MB", 2_000_000)],
)
def test_bytes_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes("--memory-target", text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "4 apples", "1PiB", "GiB"])
def test_other_sizes_are_refused_by_name(text: str) -> None:
    with pytest.raises(LiveprunError, match="--memory-target: found"):
        parse_bytes("--memory-target", text)


def test_models_share_a_state_folder(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / base.name
    assert model_state(tmp_path, base) != model_state(tmp_path, other)
    assert model_state(tmp_path, base).name.startswith(base.name)
