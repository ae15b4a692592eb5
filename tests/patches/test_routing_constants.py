from __future__ import annotations

import numpy as np
import pytest
import torch

from liveprune.patches.routing import route, split_constants
from liveprune.patches.routing_tables import LayerTables
from tests.patches.plain_routing import KINDS, Chosen, Kind, plain_route


def constant_tables(kind: Kind, *, hidden: int = 5) -> LayerTables:
    """Base, a mask, two slots with constants of their own, and one with rows of others."""
    made = LayerTables(5, kind.experts, 8, kind.top_k, hidden=hidden, device="cpu")
    made.set_base(0)
    made.set_kept(1, [e for e in range(kind.experts) if e % 4 < 2], 1)
    rng = np.random.default_rng(11)
    for slot, count, top_k in ((2, 5, kind.top_k), (3, 3, 1)):
        pruned = sorted(rng.choice(kind.experts, count, replace=False).tolist())
        kept = [e for e in range(kind.experts) if e not in pruned]
        vectors = {e: torch.from_numpy(rng.normal(size=hidden)).float() for e in pruned}
        made.set_constant(slot, kept, top_k, vectors)
    work = list(range(kind.experts))
    work[2] = kind.experts + 4
    made.set_kept(4, range(kind.experts), kind.top_k, work)
    return made


def test_constants_by_hand() -> None:
    """Four experts, two spare rows: rows 6 and 7 are the answers of experts 0 and 2."""
    tables = LayerTables(3, 4, 2, 2, hidden=2, device="cpu")
    tables.set_base(0)
    answers = {0: torch.tensor([1.0, 0.0]), 2: torch.tensor([0.0, 10.0])}
    tables.set_constant(2, [1, 3], 2, answers)
    weights = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5], [0.625, 0.375], [0.5, 0.5]])
    rows = torch.tensor([[0, 2], [6, 7], [3, 7], [1, 3], [6, 6]], dtype=torch.int32)
    slots = torch.tensor([0, 2, 2, 2, 2])
    added, found, kernel_rows = split_constants(weights, rows, slots, tables)
    assert added.tolist() == [[0, 0], [0.75, 2.5], [0, 5], [0, 0], [1, 0]]
    assert found.tolist() == [[0.75, 0.25], [0, 0], [0.5, 0], [0.625, 0.375], [0, 0]]
    assert kernel_rows.tolist() == [[0, 2], [1, 1], [3, 1], [1, 3], [1, 1]]
    assert kernel_rows.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", range(4))
def test_constants_equal_a_loop_over_tokens(seed: int, dtype: torch.dtype) -> None:
    """Any ids and weights, the same id twice too; slots with and without constants, mixed."""
    kind = Kind(12, 4)
    tables = constant_tables(kind)
    rng = np.random.default_rng(seed)
    slots = rng.integers(0, 5, 150)
    allowed = [tables.row_of[slot][tables.allow[slot]].tolist() for slot in range(5)]
    rows = torch.tensor([rng.choice(allowed[slot], kind.top_k).tolist() for slot in slots])
    weights = torch.from_numpy(rng.normal(size=rows.shape)).float()
    with_slots = split_constants(weights, rows.to(dtype), torch.from_numpy(slots), tables)
    answered = 0
    for token, slot in enumerate(slots.tolist()):
        right_weights, right_rows = weights[token].tolist(), rows[token].tolist()
        right = [0.0] * 5
        for column, row in enumerate(rows[token].tolist()):
            if row < 12 + 8:
                continue
            vector = tables.constants[row - 20].tolist()
            right = [a + right_weights[column] * b for a, b in zip(right, vector, strict=True)]
            right_weights[column], right_rows[column] = 0.0, int(tables.stand_in[slot])
            answered += 1
        added, found, kernel_rows = (part[token] for part in with_slots)
        assert added.tolist() == pytest.approx(right, abs=1e-5)
        assert (found.tolist(), kernel_rows.tolist()) == (right_weights, right_rows)
        assert set(kernel_rows.tolist()) <= tables.needed_rows(slot)
    assert answered > 50
    assert with_slots[2].dtype == dtype
    for slot in range(5):
        mine = torch.from_numpy(slots == slot)
        alone = split_constants(weights[mine], rows[mine].to(dtype), slot, tables)
        assert torch.equal(alone[1], with_slots[1][mine])
        assert torch.equal(alone[2], with_slots[2][mine])
        torch.testing.assert_close(alone[0], with_slots[0][mine], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_constants_of_what_every_router_chooses(name: str) -> None:
    """All experts can be chosen; what a constant one weighs is its own weight in the base."""
    kind = KINDS[name]
    tables = constant_tables(kind)
    logits = 3 * torch.randn(100, kind.experts, generator=torch.Generator().manual_seed(13))
    slots = torch.arange(100) % 5
    routed = route(logits, kind.spec, tables, slots, kind.top_k, mapped=False, remapped=True)
    added, weights, rows = split_constants(*routed, slots, tables)
    answered = 0
    for token, slot in enumerate(slots.tolist()):
        top_k = tables.top_ks[slot]
        everyone = [e for e in range(kind.experts) if tables.allow[slot, e]]
        right = plain_route(kind, logits[token].tolist(), everyone, top_k)
        does = {expert: int(tables.row_of[slot, expert]) for expert in right}
        vector = torch.zeros(5, dtype=torch.float64)
        for expert, weight in right.items():
            if does[expert] >= tables.rows:
                vector += weight * tables.constants[does[expert] - tables.rows].double()
                answered += 1
        torch.testing.assert_close(added[token].double(), vector, rtol=1e-4, atol=1e-5)
        found: Chosen = {}
        for row, weight in zip(rows[token].tolist(), weights[token].tolist(), strict=True):
            found[row] = found.get(row, 0.0) + weight
        computed = {does[e]: w for e, w in right.items() if does[e] < tables.rows}
        assert {row: w for row, w in found.items() if w} == pytest.approx(computed, rel=1e-4)
        assert found.keys() <= tables.needed_rows(slot)
    assert answered > 20
