from __future__ import annotations

import numpy as np
import pytest
import torch

from liveprune.patches.routing_tables import LayerTables
from liveprune.pruning.errors import EngineError
from liveprune.pruning.plan import LayerPlan


def tables(spare: int = 3, **other: object) -> LayerTables:
    """Four slots over six experts, two active."""
    return LayerTables(4, 6, spare, 2, device="cpu", **other)  # type: ignore[arg-type]


def test_all_slots_are_free_at_first() -> None:
    made = tables()
    assert made.top_ks == [0] * 4
    assert not made.allow.any()
    assert [made.needed_rows(slot) for slot in range(4)] == [frozenset()] * 4


def test_base_needs_every_row_of_its_own() -> None:
    made = tables()
    made.set_base(0)
    assert made.needed_rows(0) == set(range(6))
    assert made.top_ks[0] == made.top_k[0] == 2


def test_kept_needs_only_the_kept() -> None:
    made = tables()
    made.set_kept(2, [0, 3, 5], 1)
    assert made.allow[2].tolist() == [True, False, False, True, False, True]
    assert made.needed_rows(2) == {0, 3, 5}
    assert (made.top_ks[2], made.mapped[2], made.remapped[2]) == (1, False, False)
    assert made.needed_rows(1) == frozenset()


def test_merged_with_rows_dropped_needs_the_rows_that_do_the_work() -> None:
    made = tables()
    made.set_kept(1, [0, 3, 5], 2, [7, 3, 6])
    assert made.needed_rows(1) == {3, 6, 7}
    assert made.remapped == [False, True, False, False]


def test_own_rows_by_name_are_no_remapping() -> None:
    made = tables(spare=0)
    made.set_kept(1, (1, 4), 2, [1, 4])
    assert made.remapped[1] is False


def test_mapped_needs_the_rows_of_its_scores_base_rows_too() -> None:
    made = tables()
    router_map = torch.arange(12.0).reshape(2, 6)
    made.set_mapped(3, router_map, [8, 4], 1)
    assert made.needed_rows(3) == {4, 8}
    assert made.mapped[3] is True
    assert bool(made.is_mapped[3])
    own = made.map_allow[3]
    assert torch.equal(made.router_map[own], router_map)
    assert made.map_row[own].tolist() == [8, 4]
    assert not made.allow[3].any()


def test_variants_share_the_map_rows_and_give_them_back() -> None:
    made = tables(spare=3)
    one, two = torch.ones(1, 6), torch.full((2, 6), 2.0)
    made.set_mapped(1, one, [6], 1)
    made.set_mapped(2, two, [7, 8], 2)
    assert not (made.map_allow[1] & made.map_allow[2]).any()
    with pytest.raises(EngineError, match="found 0 free rows of the router map, expected 1"):
        made.set_mapped(3, one, [6], 1)
    assert made.top_ks[3] == 0
    made.clear(2)
    made.set_mapped(3, two, [1, 1], 2)
    assert made.needed_rows(3) == {1}
    assert torch.equal(made.router_map[made.map_allow[1]], one)


def test_a_slot_may_be_written_again() -> None:
    """Three map rows in all: the slot's own are free for it."""
    made = tables(spare=3)
    made.set_mapped(1, torch.ones(3, 6), [6, 7, 8], 2)
    made.set_mapped(1, torch.full((2, 6), 3.0), [8, 0], 1)
    assert made.needed_rows(1) == {0, 8}
    made.set_kept(1, [2], 1)
    assert made.needed_rows(1) == {2}
    assert (made.mapped[1], bool(made.is_mapped[1])) == (False, False)


def test_clear_forgets_everything() -> None:
    made = tables()
    made.set_kept(1, [0, 1], 2, [6, 7])
    made.clear(1)
    assert made.needed_rows(1) == frozenset()
    assert (made.top_ks[1], int(made.top_k[1]), made.remapped[1]) == (0, 0, False)
    assert made.row_of[1].tolist() == list(range(6))


def test_addresses_never_change() -> None:
    made = tables(hidden=2)
    names = (
        *("allow", "top_k", "row_of", "is_mapped", "map_allow", "router_map", "map_row"),
        *("constants", "stand_in"),
    )
    before = [getattr(made, name).data_ptr() for name in names]
    made.set_base(0)
    made.set_kept(1, [0, 1], 2, [6, 7])
    made.set_mapped(2, torch.ones(2, 6), [7, 8], 1)
    made.clear(2)
    made.set_kept(2, [5], 1)
    made.set_constant(3, [0, 1, 2, 3, 4], 2, {5: torch.ones(2)})
    made.set_constant(3, [0, 2, 4, 5], 2, {1: torch.ones(2), 3: torch.ones(2)})
    assert [getattr(made, name).data_ptr() for name in names] == before


def test_map_rows_are_at_least_as_many_as_top_k_takes() -> None:
    assert LayerTables(2, 8, 1, 4, device="cpu").router_map.shape == (4, 8)
    assert LayerTables(2, 8, 6, 4, device="cpu").router_map.shape == (6, 8)
    without = LayerTables(2, 8, 0, 4, device="cpu")
    assert without.router_map.shape == (0, 8)
    assert not without.can_map
    assert not without.can_remap


def test_checkpoint_with_a_map_of_its_own() -> None:
    """Six merged experts over a gate of nine rows: every slot selects by the map."""
    base_map = torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    made = tables(base_map=base_map)
    assert torch.equal(made.router_map, base_map)
    assert made.map_row.tolist() == list(range(6))
    made.set_base(0)
    made.set_kept(1, [0, 4], 1, [0, 4])
    assert made.needed_rows(0) == set(range(6))
    assert made.needed_rows(1) == {0, 4}
    assert made.mapped[:2] == [True, True]
    with pytest.raises(EngineError, match="over the checkpoint's own one"):
        made.set_mapped(2, torch.ones(1, 9), [6], 1)
    with pytest.raises(EngineError, match=r"found rows \[6, 4\], expected the experts' own"):
        made.set_kept(2, [0, 4], 1, [6, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, [1, 2], 1), "slot 0: it is the base model's"),
        ((4, [1, 2], 1), "slot 4: expected 0 to 3"),
        ((-1, [1, 2], 1), "slot -1: expected 0 to 3"),
        ((1, [1, 6], 1), r"found expert ids \[1, 6\], expected 0 to 5"),
        ((1, [-1, 2], 1), r"found expert ids \[-1, 2\], expected 0 to 5"),
        ((1, [1, 2], 1, [6, 9]), r"found rows \[6, 9\], expected 0 to 8"),
        ((1, [1, 2], 1, [-1, 2]), r"found rows \[-1, 2\], expected 0 to 8"),
        ((1, [1, 2], 1, [6]), "found 1 rows, expected 2"),
        ((1, [1], 2), "top-k is 2, expected 1 to 1"),
        ((1, [1, 2, 3], 3), "top-k is 3, expected 1 to 2"),
        ((1, [1, 2], 0), "top-k is 0, expected 1 to 2"),
    ],
)
def test_kept_out_of_range(arguments: tuple[object, ...], message: str) -> None:
    made = tables()
    with pytest.raises(EngineError, match=message):
        made.set_kept(*arguments)  # type: ignore[arg-type]
    assert made.top_ks == [0] * 4


def test_other_rows_need_spare_rows() -> None:
    with pytest.raises(EngineError, match="there are no spare rows"):
        tables(spare=0).set_kept(1, [1, 2], 1, [2, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, torch.ones(2, 6), [6, 7], 1), "slot 0: it is the base model's"),
        ((1, torch.ones(2, 5), [6, 7], 1), r"router map is \(2, 5\), expected \(2, 6\)"),
        ((1, torch.ones(2, 6), [6], 1), r"router map is \(2, 6\), expected \(1, 6\)"),
        ((1, torch.ones(2, 6), [6, 9], 1), r"found rows \[6, 9\], expected 0 to 8"),
        ((1, torch.ones(2, 6), [6, 7], 3), "top-k is 3, expected 1 to 2"),
        ((1, torch.ones(4, 6), [6, 7, 8, 0], 1), "found 3 free rows of the router map, expected 4"),
    ],
)
def test_mapped_out_of_range(arguments: tuple[object, ...], message: str) -> None:
    made = tables()
    with pytest.raises(EngineError, match=message):
        made.set_mapped(*arguments)  # type: ignore[arg-type]
    assert made.top_ks == [0] * 4


def test_write_takes_every_form_of_plan() -> None:
    made = tables()
    merge = np.eye(6, dtype=np.float32)[:2] + 0.5
    made.write(0, None, range(6))
    made.write(1, LayerPlan(3, 6, 1, kept=(2, 4)), (2, 4))
    made.write(2, LayerPlan(3, 6, 2, kept=(2, 4), merge=merge), (6, 7))
    made.write(3, LayerPlan(3, 6, 2, merge=merge, router_map=merge * 2), (8, 1))
    assert [made.needed_rows(slot) for slot in range(4)] == [set(range(6)), {2, 4}, {6, 7}, {1, 8}]
    assert made.top_ks == [2, 1, 2, 2]
    assert made.mapped == [False, False, False, True]
    assert torch.equal(made.router_map[made.map_allow[3]], torch.from_numpy(merge * 2))


# Constants


def vectors(*experts: int) -> dict[int, torch.Tensor]:
    """[10 * expert, 1] for each."""
    return {expert: torch.tensor([10.0 * expert, 1.0]) for expert in experts}


def test_constants_by_hand() -> None:
    """Rows 0 to 8 are there; 1, 3 and 4 answer with vectors 0, 1 and 2 of the pool."""
    made = tables(hidden=2)
    made.set_constant(2, [0, 2, 5], 2, vectors(1, 3, 4))
    assert made.row_of[2].tolist() == [0, 9, 2, 10, 11, 5]
    assert made.constants.tolist() == [[10, 1], [30, 1], [40, 1]]
    assert made.allow[2].all(), "the gate chooses among all"
    assert made.needed_rows(2) == {0, 2, 5}
    assert int(made.stand_in[2]) == 0
    assert (made.constant, made.mapped[2], made.top_ks[2]) == (
        [False, False, True, False],
        False,
        2,
    )
    assert made.remapped[2] is True, "or the rows beyond the last would not be looked up"


def test_the_stand_in_is_a_row_that_the_slot_needs() -> None:
    made = tables(hidden=2)
    made.set_constant(1, [3, 4, 5], 1, vectors(0, 1, 2))
    assert int(made.stand_in[1]) == 3
    assert made.needed_rows(1) == {3, 4, 5}


def test_slots_share_the_pool_and_give_it_back() -> None:
    made = tables(hidden=2)
    made.set_base(0)
    made.set_constant(1, [0, 2, 4, 5], 2, vectors(1, 3))
    made.set_constant(2, [0, 1, 2, 3, 4], 1, vectors(5))
    assert made.constants.tolist() == [[10, 1], [30, 1], [50, 1]]
    assert made.row_of[1].tolist() == [0, 9, 2, 10, 4, 5]
    assert made.row_of[2].tolist() == [0, 1, 2, 3, 4, 11]
    with pytest.raises(EngineError, match="slot 3: found 0 free constant vectors, expected 1"):
        made.set_constant(3, [0, 1, 2, 3, 4], 2, vectors(5))
    made.clear(1)
    assert made.constants.tolist() == [[0, 0], [0, 0], [50, 1]], "of slot 1 nothing is left"
    assert made.constant == [False, False, True, False]
    assert made.needed_rows(1) == frozenset()
    made.set_constant(3, [1, 2, 3, 4], 2, vectors(5, 0))
    assert made.row_of[3].tolist() == [10, 1, 2, 3, 4, 9]
    assert made.constants.tolist() == [[50, 1], [0, 1], [50, 1]]
    assert made.needed_rows(3) == {1, 2, 3, 4}
    assert made.row_of[2].tolist() == [0, 1, 2, 3, 4, 11], "the neighbour is where it was"


def test_constants_are_replaced_within_their_own_room() -> None:
    made = tables(hidden=2)
    made.set_constant(1, [0, 1, 2], 2, vectors(3, 4, 5))
    made.set_constant(1, [3, 4, 5], 1, vectors(0, 1, 2))
    assert made.constants.tolist() == [[0, 1], [10, 1], [20, 1]]
    assert made.needed_rows(1) == {3, 4, 5}
    made.set_constant(1, [0, 1, 2, 3, 5], 1, vectors(4))
    assert made.constants.tolist() == [[40, 1], [0, 0], [0, 0]]
    assert made.needed_rows(1) == {0, 1, 2, 3, 5}


@pytest.mark.parametrize("form", ["kept", "mapped", "base"])
def test_another_plan_takes_the_constants_away(form: str) -> None:
    made = tables(hidden=2)
    made.set_constant(1, [0, 1, 2], 2, vectors(3, 4, 5))
    if form == "kept":
        made.set_kept(1, [4, 5], 1)
    elif form == "mapped":
        made.set_mapped(1, torch.ones(1, 6), [7], 1)
    else:
        made.write(1, None, range(6))
    assert made.needed_rows(1) == {"kept": {4, 5}, "mapped": {7}, "base": set(range(6))}[form]
    assert made.row_of[1].tolist() == list(range(6))
    assert (made.constant[1], made.remapped[1]) == (False, False)
    assert not made.constants.any()
    made.set_constant(2, [0, 1, 2], 2, vectors(3, 4, 5))


def test_write_takes_a_plan_with_constants() -> None:
    made = tables(hidden=2)
    plan = LayerPlan(3, 6, 2, kept=(0, 2, 5), constants=np.arange(6.0).reshape(3, 2))
    made.write(1, plan, plan.kept)
    assert made.row_of[1].tolist() == [0, 9, 2, 10, 11, 5]
    assert made.constants.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert made.needed_rows(1) == {0, 2, 5}


def test_there_is_a_vector_for_each_spare_row() -> None:
    assert tables(hidden=7).constants.shape == (3, 7)
    assert tables(hidden=7).can_be_constant
    base_map = torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    for other in (tables(), tables(spare=0, hidden=7), tables(hidden=7, base_map=base_map)):
        assert not other.can_be_constant
        with pytest.raises(EngineError, match="found 0 free constant vectors, expected 3"):
            other.set_constant(1, [0, 1, 2], 2, vectors(3, 4, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, [0, 1, 2], 1, vectors(3, 4, 5)), "slot 0: it is the base model's"),
        ((4, [0, 1, 2], 1, vectors(3, 4, 5)), "slot 4: expected 0 to 3"),
        ((1, [0, 1], 1, vectors(2, 3, 4, 5)), "found 3 free constant vectors, expected 4"),
        ((1, [0, 1, 2], 3, vectors(3, 4, 5)), "top-k is 3, expected 1 to 2"),
        ((1, [0, 1, 2], 0, vectors(3, 4, 5)), "top-k is 0, expected 1 to 2"),
        (
            (1, [0, 1, 2, 3], 1, {**vectors(4), 5: torch.ones(3)}),
            r"expert 5's constant is \(3,\), expected \(2,\)",
        ),
        ((1, [0, 1, 2], 1, vectors(3, 4)), r"kept \[0, 1, 2\] and constants for \[3, 4\]"),
        ((1, [0, 1, 2, 3], 1, vectors(3, 4, 5)), r"kept \[0, 1, 2, 3\] and constants for"),
        ((1, [6, 1, 2], 1, vectors(3, 4, 5)), r"kept \[6, 1, 2\] and constants for"),
        ((1, [0, 1, 2], 1, vectors(3, 4, 6)), r"and constants for \[3, 4, 6\]"),
        ((1, [0, 1, 2, 3, 4, 5], 1, {}), "and constants for"),
    ],
)
def test_constants_that_do_not_fit(arguments: tuple[object, ...], message: str) -> None:
    """And the slot is free then, also of the constants that it had."""
    made = tables(hidden=2)
    made.set_constant(1, [0, 1, 3, 4, 5], 2, vectors(2))
    with pytest.raises(EngineError, match=message):
        made.set_constant(*arguments)  # type: ignore[arg-type]
    if arguments[0] == 1:
        assert made.top_ks == [0] * 4
        assert made.constant == [False] * 4
        assert made.needed_rows(1) == frozenset()
        assert not made.constants.any()
    else:
        assert made.needed_rows(1) == {0, 1, 3, 4, 5}


def test_no_expert_left_to_compute_is_refused() -> None:
    made = LayerTables(2, 3, 3, 1, hidden=2, device="cpu")
    with pytest.raises(EngineError, match=r"kept \[\] and constants for \[0, 1, 2\]"):
        made.set_constant(1, [], 1, vectors(0, 1, 2))
