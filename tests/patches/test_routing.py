from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from liveprune.patches import router_map as eep
from liveprune.patches.routing import RouterSpec, route
from liveprune.patches.routing_tables import LayerTables
from liveprune.pruning.errors import ArchitectureError
from tests.patches.plain_routing import KINDS, Chosen, Kind, plain_map, plain_route, random_kept


def full_tables(kind: Kind, variants: Sequence[tuple[Sequence[int], int]]) -> LayerTables:
    """Slot 0 the base, then one slot for each (kept, top-k)."""
    made = LayerTables(len(variants) + 1, kind.experts, 0, kind.top_k, device="cpu")
    made.set_base(0)
    for slot, (kept, top_k) in enumerate(variants, start=1):
        made.set_kept(slot, kept, top_k)
    return made


def chosen(weights: torch.Tensor, rows: torch.Tensor, top_k: int) -> Chosen:
    """One token's choice; what is dropped must weigh nothing and go where the first one goes."""
    found = dict(zip(rows[:top_k].tolist(), weights[:top_k].tolist(), strict=True))
    assert len(found) == top_k
    assert weights[top_k:].tolist() == [0.0] * (len(weights) - top_k)
    assert set(rows[top_k:].tolist()) <= {int(rows[0])}
    return found


def check_form(weights: torch.Tensor, rows: torch.Tensor, shape: tuple[int, int]) -> None:
    assert (weights.dtype, rows.dtype) == (torch.float32, torch.int32)
    assert weights.shape == rows.shape == shape
    assert weights.is_contiguous()
    assert rows.is_contiguous()


def random_logits(tokens: int, width: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_equals_a_model_without_the_other_experts(kind: Kind) -> None:
    """Mixed slots, each with its own mask and top-k, a single expert and the full set included."""
    rng = np.random.default_rng(0)
    masks = [random_kept(kind, rng) for _ in range(10)]
    if kind.groups <= 1:
        masks.append([3])
    variants = [(kept, int(rng.integers(1, min(len(kept), kind.top_k) + 1))) for kept in masks]
    tables = full_tables(kind, variants)
    variants.insert(0, (list(range(kind.experts)), kind.top_k))
    slots = torch.from_numpy(rng.integers(0, len(variants), 200))
    logits = random_logits(200, kind.experts, 1)
    weights, rows = route(
        logits, kind.spec, tables, slots, kind.top_k, mapped=False, remapped=False
    )
    check_form(weights, rows, (200, kind.top_k))
    for token, slot in enumerate(slots.tolist()):
        kept, top_k = variants[slot]
        right = plain_route(kind, logits[token].tolist(), kept, top_k)
        assert chosen(weights[token], rows[token], top_k) == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_one_slot_for_all_tokens_is_the_same_bit_for_bit(kind: Kind) -> None:
    """What shares a variant's batch must not change its answers."""
    rng = np.random.default_rng(3)
    variants = [(random_kept(kind, rng), 1) for _ in range(3)] + [(range(kind.experts), kind.top_k)]
    tables = full_tables(kind, variants)
    logits = random_logits(40, kind.experts, 2)
    for slot, (_, top_k) in enumerate(variants, start=1):
        flags = {"mapped": False, "remapped": False}
        lean = route(logits, kind.spec, tables, slot, top_k, lower=False, **flags)
        check_form(*lean, (40, top_k))
        wide = route(logits, kind.spec, tables, slot, kind.top_k, **flags)
        slots = torch.full((40,), slot)
        mixed = route(logits, kind.spec, tables, slots, kind.top_k, **flags)
        assert torch.equal(wide[0], mixed[0])
        assert torch.equal(wide[1], mixed[1])
        assert torch.equal(lean[0], mixed[0][:, :top_k])
        assert torch.equal(lean[1], mixed[1][:, :top_k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "sigmoid"])
def test_equals_vllms_router_on_the_sliced_gate(name: str, dtype: torch.dtype) -> None:
    """Bit for bit where the order of a sum cannot matter: two weights."""
    kind = KINDS[name]
    rng = np.random.default_rng(4)
    for seed in range(8):
        kept = random_kept(kind, rng)
        if len(kept) < kind.top_k:
            continue
        tables = full_tables(kind, [(kept, kind.top_k)])
        # Distinct in bfloat16 too, or ties could go either way.
        steps = torch.randn(30, kind.experts, generator=torch.Generator().manual_seed(seed))
        logits = (steps.argsort(dim=-1) / 4).to(dtype)
        weights, rows = route(
            logits, kind.spec, tables, 1, kind.top_k, mapped=False, remapped=False
        )
        router = CPURouter(**kind.arguments(kept))
        right, ids = router.select_experts(torch.zeros(30, 1), logits[:, kept], torch.int32)
        right_rows, order = torch.tensor(kept)[ids.long()].sort(dim=-1)
        found_rows, found_order = rows.sort(dim=-1)
        assert torch.equal(found_rows.long(), right_rows)
        found, right = weights.gather(1, found_order), right.gather(1, order)
        if name == "mixtral":
            assert torch.equal(found, right)
        torch.testing.assert_close(found, right, rtol=1e-6, atol=0)


def test_worked_example() -> None:
    """Logits log(1, 2, 4, 8); kept (0, 2, 3), two active: weights 8/12 and 4/12.

    Not renormalised: 8/13 and 4/13, since expert 1 is not in the sum.
    """
    kind = Kind(4, 2)
    logits = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).log()
    tables = full_tables(kind, [([0, 2, 3], 2)])
    flags = {"mapped": False, "remapped": False}
    weights, rows = route(logits, kind.spec, tables, 1, 2, **flags)
    assert rows.tolist() == [[3, 2]]
    assert weights[0].tolist() == pytest.approx([8 / 12, 4 / 12])
    kind = Kind(4, 2, renormalise=False)
    weights, _ = route(logits, kind.spec, tables, 1, 2, **flags)
    assert weights[0].tolist() == pytest.approx([8 / 13, 4 / 13])


def test_kept_experts_whose_scores_underflow_are_selected_all_the_same() -> None:
    logits = torch.tensor([[0.0, -1e4, -2e4, 1e4]]).repeat(1, 2)
    for kind in (
        Kind(8, 2),
        Kind(8, 2, renormalise=False),
        Kind(8, 2, renormalise=False, groups=2, top_groups=1),
    ):
        tables = full_tables(kind, [([1, 2, 5, 6], 2)])
        _, rows = route(logits, kind.spec, tables, 1, 2, mapped=False, remapped=False)
        assert set(rows[0].tolist()) <= {1, 2, 5, 6}
        assert len(set(rows[0].tolist())) == 2


def test_bias_does_not_lift_what_is_not_there() -> None:
    """Biases far above every score, on the experts that are gone."""
    bias = (9.0, 0.0, 0.0, 9.0, 9.0, 0.0, 0.0, 9.0)
    kind = Kind(8, 2, scoring="sigmoid", groups=2, top_groups=1, bias=bias)
    tables = full_tables(kind, [([1, 2, 5, 6], 2)])
    logits = torch.tensor([[5.0, -1.0, -2.0, 5.0, 5.0, 1.0, 2.0, 5.0]])
    _, rows = route(logits, kind.spec, tables, 1, 2, mapped=False, remapped=False)
    assert rows.tolist() == [[6, 5]]


def test_ties_take_different_experts() -> None:
    for kind in (Kind(8, 3), Kind(8, 3, groups=1)):
        tables = full_tables(kind, [([0, 2, 4, 6], 3)])
        weights, rows = route(
            torch.zeros(5, 8), kind.spec, tables, 1, 3, mapped=False, remapped=False
        )
        assert weights.flatten().tolist() == pytest.approx([1 / 3] * 15)
        for row in rows.tolist():
            assert len(set(row)) == 3
            assert set(row) <= {0, 2, 4, 6}


def live_tables(kind: Kind) -> LayerTables:
    """Base, two masks, merged with rows dropped and, where a map can be, merged with one."""
    made = LayerTables(5, kind.experts, 4, kind.top_k, device="cpu")
    made.set_base(0)
    halves = [e for e in range(kind.experts) if e % 4 < 2]
    made.set_kept(1, halves, 1)
    made.set_kept(2, halves, kind.top_k)
    rows = [kind.experts + 1, kind.experts + 3, *halves[2:]]
    made.set_kept(3, halves, kind.top_k, rows)
    if kind.scoring == "softmax" and kind.groups <= 1:
        router_map = torch.rand(4, kind.experts, generator=torch.Generator().manual_seed(0))
        made.set_mapped(4, router_map - 0.2, [kind.experts, 1, 2, kind.experts + 2], 2)
    return made


def check_rows(kind: Kind, logits: torch.Tensor, slots: Sequence[int]) -> None:
    """Only rows that the slots' tables name, which have memory; mixed and alone."""
    tables = live_tables(kind)
    tokens = torch.tensor(slots)
    _, rows = route(logits, kind.spec, tables, tokens, kind.top_k, mapped=True, remapped=True)
    for slot, row in zip(slots, rows.tolist(), strict=True):
        assert set(row) <= tables.needed_rows(slot)
    for slot in set(slots):
        mapped, top_k = tables.mapped[slot], tables.top_ks[slot]
        _, rows = route(
            logits, kind.spec, tables, slot, top_k, mapped=mapped, remapped=True, lower=False
        )
        assert set(rows.flatten().tolist()) <= tables.needed_rows(slot)


def live_slots(kind: Kind) -> list[int]:
    tables = live_tables(kind)
    return [slot for slot in range(5) if tables.top_ks[slot]]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "some",
    [
        lambda count: [math.nan] * count,
        lambda count: [-math.inf] * count,
        lambda count: [math.inf] * count,
        lambda count: [math.inf, math.nan] * (count // 2),
        lambda count: [-math.inf, -math.inf, 0.0, math.nan] * (count // 4),
        lambda count: [-3e38, -math.inf, 3e38, 3e38] * (count // 4),
    ],
    ids=["nan", "-inf", "inf", "inf-nan", "others-nan", "others-huge"],
)
def test_broken_logits_reach_no_rows_of_others(name: str, some: Callable[[int], Any]) -> None:
    kind = KINDS[name]
    slots = live_slots(kind)
    check_rows(kind, torch.tensor(some(kind.experts)).repeat(len(slots), 1), slots)


@pytest.mark.parametrize("name", KINDS)
def test_no_logits_reach_rows_of_others(name: str) -> None:
    """Random logits with ever more broken values among them."""
    kind = KINDS[name]
    slots = live_slots(kind)
    rng = np.random.default_rng(0)
    broken = [math.nan, math.inf, -math.inf, 0.0, 3e38, -3e38, 1e-40]
    for share in np.linspace(0, 1, 20):
        logits = rng.normal(0, 20, (100, kind.experts))
        where = rng.random(logits.shape) < share
        logits[where] = rng.choice(broken, int(where.sum()))
        check_rows(kind, torch.from_numpy(logits).float(), rng.choice(slots, 100).tolist())


@pytest.mark.parametrize("name", ["qwen3", "deepseek-v2", "deepseek-v3"])
def test_rows_that_do_the_work_of_others(name: str) -> None:
    """Merged with rows dropped: selected as its gate row says, done by the spare row."""
    kind = KINDS[name]
    tables = live_tables(kind)
    logits = random_logits(60, kind.experts, 5)
    slots = torch.arange(60) % 2 + 2  # the same mask, with and without other rows
    same = torch.full((60,), 2)
    weights, rows = route(logits, kind.spec, tables, slots, kind.top_k, mapped=False, remapped=True)
    own_weights, own = route(
        logits, kind.spec, tables, same, kind.top_k, mapped=False, remapped=False
    )
    assert torch.equal(weights, own_weights)
    spare = {0: kind.experts + 1, 1: kind.experts + 3}
    expected = [[spare.get(e, e) for e in row] for row in own[1::2].tolist()]
    assert rows[1::2].tolist() == expected
    assert torch.equal(rows[::2], own[::2])
    assert rows.max() >= kind.experts


@pytest.mark.parametrize("renormalise", [True, False])
def test_mapped_equals_the_router_of_merged_checkpoints(*, renormalise: bool) -> None:
    """Same formula, bit for bit, where the variant owns all map rows."""
    kind = Kind(8, 2, renormalise=renormalise)
    tables = LayerTables(3, 8, 3, 2, device="cpu")
    router_map = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) - 0.26
    tables.set_mapped(1, router_map, [9, 4, 10], 2)
    logits = random_logits(50, 8, 6)
    right, ids = eep.route(logits, router_map, 2, renormalise=renormalise)
    for slots in (1, torch.ones(50, dtype=torch.int64)):
        weights, rows = route(logits, kind.spec, tables, slots, 2, mapped=True, remapped=True)
        check_form(weights, rows, (50, 2))
        assert torch.equal(weights, right)
        assert torch.equal(rows, torch.tensor([9, 4, 10])[ids.long()].int())


def test_every_kind_of_variant_in_one_batch() -> None:
    """Base, masks with two top-k, two EEP variants with their own; against plain loops."""
    kind = Kind(8, 3)
    generator = torch.Generator().manual_seed(2)
    maps = [torch.rand(3, 8, generator=generator), torch.rand(2, 8, generator=generator) - 0.1]
    tables = LayerTables(6, 8, 5, 3, device="cpu")
    tables.set_base(0)
    tables.set_kept(1, [0, 1, 5], 3)
    tables.set_kept(2, [4, 6], 1)
    tables.set_mapped(3, maps[0], [8, 9, 10], 2)
    tables.set_mapped(4, maps[1], [11, 3], 1)  # one of them is a base expert
    tables.set_kept(5, [2, 3, 7], 2, [12, 3, 7])
    logits = random_logits(120, 8, 7)
    slots = torch.arange(120) % 6
    weights, rows = route(logits, kind.spec, tables, slots, 3, mapped=True, remapped=True)
    check_form(weights, rows, (120, 3))
    for token, slot in enumerate(slots.tolist()):
        x, top_k = logits[token].tolist(), tables.top_ks[slot]
        if slot in (3, 4):
            places = ([8, 9, 10], [11, 3])[slot - 3]
            found = plain_map(x, maps[slot - 3].tolist(), top_k)
            right = {places[j]: weight for j, weight in found.items()}
        else:
            kept = ([*range(8)], [0, 1, 5], [4, 6], [], [], [2, 3, 7])[slot]
            right = plain_route(kind, x, kept, top_k)
            right = {12 if slot == 5 and e == 2 else e: w for e, w in right.items()}
        assert chosen(weights[token], rows[token], top_k) == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("total", [0.0, 1e-12, -1e-12])
def test_mapped_sums_near_zero_stay_finite(total: float) -> None:
    tables = LayerTables(2, 2, 2, 2, device="cpu")
    tables.set_mapped(1, torch.tensor([[1.0, 1.0], [-1.0, -1.0 + total]]), [2, 3], 2)
    weights, _ = route(torch.zeros(1, 2), Kind(2, 2).spec, tables, 1, 2, mapped=True, remapped=True)
    assert torch.isfinite(weights).all()


def test_mapped_with_a_lower_top_k_divides_by_what_is_left() -> None:
    """p = 1/4 each; scores 1, 1/2, 1/4: of one active expert the weight is 1."""
    tables = LayerTables(2, 4, 3, 3, device="cpu")
    tables.set_mapped(1, torch.ones(3, 4) * torch.tensor([[1.0], [0.5], [0.25]]), [4, 5, 6], 1)
    weights, rows = route(
        torch.zeros(1, 4), Kind(4, 3).spec, tables, 1, 3, mapped=True, remapped=True
    )
    assert weights.tolist() == [[1.0, 0.0, 0.0]]
    assert rows.tolist() == [[4, 4, 4]]


def test_checkpoint_with_a_map_of_its_own() -> None:
    """Gate of 9 rows, 5 experts: the base as its own router, a variant with fewer of them."""
    base_map = torch.rand(5, 9, generator=torch.Generator().manual_seed(3))
    tables = LayerTables(3, 5, 2, 2, base_map=base_map, device="cpu")
    tables.set_base(0)
    tables.set_kept(1, [0, 3, 4], 1)
    logits = random_logits(40, 9, 8)
    slots = torch.arange(40) % 2
    spec = Kind(5, 2).spec
    weights, rows = route(logits, spec, tables, slots, 2, mapped=True, remapped=False)
    right, ids = eep.route(logits, base_map, 2, renormalise=True)
    assert torch.equal(weights[::2], right[::2])
    assert torch.equal(rows[::2], ids[::2])
    for token in range(1, 40, 2):
        found = plain_map(logits[token].tolist(), base_map[[0, 3, 4]].tolist(), 1)
        right_token = {[0, 3, 4][j]: weight for j, weight in found.items()}
        assert chosen(weights[token], rows[token], 1) == pytest.approx(right_token)


@pytest.mark.parametrize(
    "name",
    [
        "custom_routing_function",
        "zero_expert_type",
        "hash_indices_table",
        "bias_vl",
        "num_fused_shared_experts",
    ],
)
def test_what_the_tables_do_not_know_is_refused_by_name(name: str) -> None:
    values = {"num_fused_shared_experts": 1, "hash_indices_table": torch.zeros(2)}
    arguments = {**KINDS["mixtral"].arguments(), name: values.get(name, "something")}
    with pytest.raises(ArchitectureError, match=name):
        RouterSpec.from_arguments(arguments)


def test_unknown_scores_and_a_bias_that_vllm_would_leave_out_are_refused() -> None:
    arguments = KINDS["mixtral"].arguments()
    with pytest.raises(ArchitectureError, match="scoring_func is 'sqrtsoftplus'"):
        RouterSpec.from_arguments({**arguments, "scoring_func": "sqrtsoftplus"})
    with pytest.raises(ArchitectureError, match="e_score_correction_bias"):
        RouterSpec.from_arguments({**arguments, "e_score_correction_bias": torch.zeros(8)})


def test_scale_only_where_vllms_router_applies_it() -> None:
    """Its plain top-k leaves ``routed_scaling_factor`` out."""
    absent = dict.fromkeys(("custom_routing_function", "zero_expert_type", "bias_vl"))
    plain = {**KINDS["qwen2"].arguments(), "routed_scaling_factor": 3.0, **absent}
    assert RouterSpec.from_arguments({**plain, "num_fused_shared_experts": 0}).scale == 1.0
    assert KINDS["deepseek-v2-lite"].spec.scale == 1.5
