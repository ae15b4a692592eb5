from __future__ import annotations

from pathlib import Path

import pytest

from liveprune.pruning.errors import ConflictError, VariantError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.server.registry import Publication, Registry
from liveprune.server.state_folder import SavedState
from liveprune.server.variant import FULL, Variant, check_tag
from tests.server.fake_engine import fake_base
from tests.server.live_world import A, B, C


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry("org/m", ["short"], ModelSpec.from_path(fake_base(tmp_path)), slots=3)
    made.adopt(made.known[FULL], 0)
    return made


def live(registry: Registry, tag: str, plan: object) -> Publication:
    publication = registry.claim(Variant(tag, plan))  # type: ignore[arg-type]
    registry.go_live(publication)
    return publication


def test_names(registry: Registry) -> None:
    base = registry.resolve("org/m")
    assert base is not None
    assert (base.name, base.slot, base.salt) == ("org/m:full", 0, None)
    assert registry.resolve("short") == registry.resolve("org/m:full") == base
    for unknown in ("", "m", "org/m:", ":full", "short:full", "org/m:a", "full", "org/m:full:full"):
        assert registry.resolve(unknown) is None


def test_a_variant_answers_once_it_is_live(registry: Registry) -> None:
    publication = registry.claim(Variant("a", A))
    assert registry.resolve("org/m:a") is None
    registry.go_live(publication)
    served = registry.resolve("org/m:a")
    assert served is not None
    assert (served.slot, served.salt) == (1, f"org/m:a@{A.digest}#2")
    registry.alias = "a"
    assert registry.resolve("org/m") == registry.resolve("short") == served


def test_every_publication_has_its_own_salt(registry: Registry) -> None:
    salts = [registry.live[FULL].served.salt]
    for plan in (A, A, B):
        publication = live(registry, "a", plan)
        salts.append(publication.served.salt)
        registry.drop(publication)
    registry.alias = "a"
    live(registry, "a", A)
    registry.drop(registry.live[FULL])
    for _ in range(2):
        base = registry.claim(registry.known[FULL])
        salts.append(base.served.salt)
        registry.drop(base)
    assert salts == [
        None,
        f"org/m:a@{A.digest}#2",
        f"org/m:a@{A.digest}#3",
        f"org/m:a@{B.digest}#4",
        "org/m:full@base#6",
        "org/m:full@base#7",
    ]


def test_the_first_base_shares_blocks_with_stock_vllm_even_if_it_comes_late(tmp_path: Path) -> None:
    registry = Registry("m", [], ModelSpec.from_path(fake_base(tmp_path)), slots=3)
    registry.adopt(Variant("a", A), 1)
    first = registry.claim(registry.known[FULL])
    assert (first.served.slot, first.served.salt) == (0, None)
    registry.drop(first)  # it failed; canaries may have left blocks under that salt
    assert registry.claim(registry.known[FULL]).served.salt == "m:full@base#3"


def test_slots_run_out_and_come_back(registry: Registry) -> None:
    first = live(registry, "a", A)
    live(registry, "b", B)
    with pytest.raises(VariantError, match=r"c: found no free slot, taken by org/m:a \(live\), "):
        registry.claim(Variant("c", C))
    registry.drop(first)
    assert registry.claim(Variant("c", C)).served.slot == 1


def test_requests_are_counted_by_publication(registry: Registry) -> None:
    old = live(registry, "a", A)
    registry.pin(old.served)
    registry.pin(old.served)
    new = live(registry, "a", B)
    registry.pin(new.served)
    assert (registry.in_flight(old), registry.in_flight(new)) == (2, 1)
    assert [v.in_flight for v in registry.views({}) if v.tag == "a"] == [3]
    registry.unpin(old.served)
    registry.unpin(old.served)
    with pytest.raises(VariantError, match="found no request in flight"):
        registry.unpin(old.served)
    with pytest.raises(VariantError, match="no longer live in slot 1"):
        registry.pin(old.served)
    assert (registry.in_flight(old), registry.in_flight(new)) == (0, 1)


def test_what_drains_takes_no_new_requests(registry: Registry) -> None:
    publication = live(registry, "a", A)
    served = publication.served
    registry.pin(served)
    registry.start_draining(publication)
    assert registry.resolve("org/m:a") is None
    with pytest.raises(VariantError, match="no longer live"):
        registry.pin(served)
    registry.unpin(served)
    registry.stop_draining(publication)
    assert registry.resolve("org/m:a") == served
    with pytest.raises(ConflictError, match="org/m:full: is what 'org/m' routes to"):
        registry.start_draining(registry.live[FULL])


def test_a_name_moves_to_the_new_definition(registry: Registry) -> None:
    old, new = live(registry, "a", A), registry.claim(Variant("a", B))
    assert registry.resolve("org/m:a") == old.served
    registry.go_live(new)
    assert registry.resolve("org/m:a") == new.served
    assert registry.known["a"].digest == B.digest
    registry.start_draining(old)
    registry.stop_draining(old)
    assert registry.resolve("org/m:a") == new.served
    assert [p.phase.value for p in registry.publications] == ["live", "leftover", "live"]


def test_views(registry: Registry) -> None:
    registry.known["b"] = Variant("b", C)
    publication = registry.claim(Variant("a", A))
    registry.previous = "b"

    def states() -> dict[str, str]:
        return {view.tag: view.state for view in registry.views({})}

    assert states() == {"a": "preparing", "b": "standby", "full": "live"}
    registry.go_live(publication)
    a, b, full = (view.to_json() for view in registry.views({0: 24, 1: 12}))
    assert a == {
        "name": "org/m:a", "tag": "a", "digest": A.digest, "state": "live", "is_alias": False,
        "is_previous": False, "experts": {"min": 4, "max": 4, "total": 12},
        "top_k": {"min": 1, "max": 1}, "row_bytes": 12, "in_flight": 0,
    }  # fmt: skip
    assert (b["experts"], b["is_previous"]) == ({"min": 1, "max": 8, "total": 11}, True)
    assert (full["digest"], full["is_alias"], full["top_k"]) == (None, True, {"min": 2, "max": 2})
    registry.start_draining(publication)
    assert states()["a"] == "draining"
    registry.leave(publication)
    assert states()["a"] == "draining"


def test_cards_of_live_variants(registry: Registry) -> None:
    live(registry, "a", C)
    registry.claim(Variant("b", B))
    full, a = registry.cards()
    assert full == {
        "id": "org/m:full",
        "parent": "org/m",
        "liveprune": {
            "plan": None,
            "experts": {"min": 8, "max": 8},
            "top_k": {"min": 2, "max": 2},
            "state": "live",
        },
    }
    assert a["id"] == "org/m:a"
    assert a["liveprune"]["plan"] == C.digest
    assert a["liveprune"]["experts"] == {"min": 1, "max": 8}


def test_what_is_saved(registry: Registry) -> None:
    live(registry, "a", A)
    registry.unreadable["lost"] = "0" * 32
    registry.alias, registry.previous = "a", FULL
    assert registry.saved() == SavedState(
        {"lost": "0" * 32, "a": A.digest}, (FULL, "a"), "a", FULL, 2
    )


def test_forgetting(registry: Registry) -> None:
    registry.known["a"] = Variant("a", A)
    registry.previous = "a"
    registry.forget("a")
    assert registry.previous is None
    with pytest.raises(VariantError, match="variant 'a' is unknown, expected one of full"):
        registry.variant("a")


@pytest.mark.parametrize("tag", ["", "-a", ".", "a b", "a:b", "a/b", "../a", "ä", "a\n", "full"])
def test_bad_tags(tag: str) -> None:
    with pytest.raises(VariantError, match="tag"):
        check_tag(tag)


@pytest.mark.parametrize("tag", ["a", "e4k1", "2024-10.b_3", "Full"])
def test_good_tags(tag: str) -> None:
    check_tag(tag)
