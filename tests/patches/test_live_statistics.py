"""Live statistics against a loop over tokens, and what must not be counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from liveprune.patches.batch_slots import BatchSlots
from liveprune.patches.live_counts import VariantCounts, parse_counts
from liveprune.patches.live_router import LiveRouting, install
from liveprune.patches.live_statistics import LiveStatistics, columns_of
from liveprune.patches.routing import RouterSpec
from liveprune.patches.routing_tables import LayerTables
from liveprune.patches.sampled_outputs import SampledOutputs
from liveprune.pruning.plan import LayerPlan
from tests.patches.test_live_router import EXPERTS, PLAIN, SPARE, TOP_K

HIDDEN = 5
LAYERS = (1, 3)
SLOTS = 5
PRUNED = [2, 5]
BATCHES = (
    ([0, 1, 0, 2], [3, 2, 1, 4], [True, True, False, True]),
    ([1, 1], [1, 2], [True, False]),
    ([3], [6], [True]),
    ([0, 4, 3], [9, 1, 1], [False, False, False]),
    ([4, 0, 2, 3], [2, 5, 1, 3], [True, True, True, True]),
)
"""Slots, tokens and whether counted, of each request."""
Sums = dict[tuple[int, int, int], np.ndarray[Any, Any]]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Moe:
    """One layer: vLLM's router, and experts that are matrices."""

    def __init__(self, index: int, batch: BatchSlots) -> None:
        """Slots: 0 base, 1 mask with a lower top-k, 2 constants, 3 merged rows, 4 EEP."""
        self.router = CPURouter(**PLAIN)
        tables = LayerTables(SLOTS, EXPERTS, SPARE, TOP_K, hidden=HIDDEN, device="cpu")
        tables.set_base(0)
        tables.set_kept(1, [0, 1, 4, 5 + index % 2], 2)
        kept = [e for e in range(EXPERTS) if e not in PRUNED]
        tables.set_constant(2, kept, TOP_K, {e: random(HIDDEN, seed=e) for e in PRUNED})
        tables.set_kept(3, range(EXPERTS), 2, [8, 8, 2, 9, 4, 9, 6, 7])
        tables.set_mapped(4, random(3, EXPERTS, seed=7).abs(), [10, 11, 2], 1)
        self.tables = tables
        self.routing: LiveRouting = install(self.router, RouterSpec.from_arguments(PLAIN))
        self.routing.attach(tables, batch)
        self.matrices = random(EXPERTS + SPARE, HIDDEN, HIDDEN, seed=index)
        self.routed_experts = SimpleNamespace(quant_method=self)
        self.topk_indices_dtype = torch.int64
        self.moe_config = SimpleNamespace(tp_size=1)

    def apply(self, *, x: Any, topk_weights: Any, topk_ids: Any, **_: Any) -> torch.Tensor:
        """As vLLM's kernel."""
        assert topk_weights.unique().tolist() == [1.0]
        assert int(topk_ids.max()) < len(self.matrices), "kernels check no ids"
        return torch.stack(
            [self.matrices[row] @ one for one, row in zip(x, topk_ids[:, 0], strict=True)]
        )


class World:
    """Layers whose routing is counted, and the same sums by a loop."""

    def __init__(self, *, static: bool = False, size: int = 0, every: int = 1) -> None:
        cpu = torch.device("cpu")
        self.batch = BatchSlots(32, cpu, static=static)
        self.layers = {index: Moe(index, self.batch) for index in LAYERS}
        outputs = None
        if size:
            outputs = SampledOutputs(
                {index: (moe, moe.tables) for index, moe in self.layers.items()},
                HIDDEN,
                torch.float32,
                cpu,
                static=static,
                size=size,
                every=every,
            )
        self.outputs = outputs
        tables = {index: moe.tables for index, moe in self.layers.items()}
        self.statistics = LiveStatistics(tables, self.batch, cpu, outputs=outputs)
        for index, moe in self.layers.items():
            moe.routing.record = self.statistics.recorder(index)
        self.sums: Sums = {}
        self.norms: Sums = {}
        self.largest: dict[tuple[int, int, int], float] = {}

    def step(self, seed: int, slots: list[int], tokens: list[int], counted: list[bool]) -> None:
        """One forward pass, with two tokens of padding."""
        self.batch.fill(slots, np.array(tokens), counted)
        of_token = [
            (s, c) for s, n, c in zip(slots, tokens, counted, strict=True) for _ in range(n)
        ]
        for index, moe in self.layers.items():
            hidden = random(len(of_token) + 2, HIDDEN, seed=100 * seed + index)
            logits = 2 * random(len(of_token) + 2, EXPERTS, seed=200 * seed + index)
            weights, rows = moe.router.select_experts(hidden, logits, torch.int32)
            own_weights, own_ids = CPURouter(**PLAIN).select_experts(hidden, logits, torch.int32)
            for t, (slot, is_counted) in enumerate(of_token):
                if not is_counted:
                    continue
                for k in range(moe.tables.top_ks[slot]):
                    w, row = float(weights[t, k]), int(rows[t, k])
                    if slot == 2:  # routed as the base is; the kernel does not see constants
                        w, row = float(own_weights[t, k]), int(own_ids[t, k])
                        if row in PRUNED:
                            row = int(moe.tables.row_of[2, row])
                    key = (index, slot, row)
                    self.sums[key] = self.sums.get(key, np.zeros(3)) + np.array([1, w, w * w])
                    if row < len(moe.matrices):
                        f = moe.matrices[row] @ hidden[t]
                        n = float(f.norm())
                        part = np.outer([1, w, w * w], [1, n, n * n])
                        self.norms[key] = self.norms.get(key, np.zeros((3, 3))) + part
                        highest = max(self.largest.get(key, -np.inf), float(f.max()))
                        self.largest[key] = highest

    def check(self) -> None:
        """The sums are those of the loop, and nothing else is there."""
        self.statistics.fold()
        right = np.zeros(self.statistics.sums.shape)
        for (index, slot, row), values in self.sums.items():
            right[LAYERS.index(index), slot, row] = values
        found = self.statistics.sums.numpy()
        assert np.array_equal(found[..., 0], right[..., 0])
        np.testing.assert_allclose(found, right, rtol=1e-6)

    def check_outputs(self) -> None:
        assert self.outputs is not None
        norms = np.zeros(self.outputs.sums.shape)
        largest = np.full(self.outputs.largest.shape, -np.inf)
        for (index, slot, row), values in self.norms.items():
            norms[LAYERS.index(index), slot, row] = values
            largest[LAYERS.index(index), slot, row] = self.largest[index, slot, row]
        np.testing.assert_allclose(self.outputs.sums.numpy(), norms, rtol=1e-5)
        np.testing.assert_allclose(self.outputs.largest.numpy(), largest, rtol=1e-5)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "graphs"])
def test_sums_are_those_of_a_loop_over_counted_tokens(
    monkeypatch: pytest.MonkeyPatch, *, static: bool
) -> None:
    world = World(static=static)
    for seed, batch in enumerate(BATCHES):
        world.step(seed, *batch)
        world.check()
    assert {slot for _, slot, _ in world.sums} == set(range(SLOTS))
    monkeypatch.setattr("liveprune.patches.live_statistics.CHUNK", 1)
    again = World(static=static)
    for seed, batch in enumerate(BATCHES):
        again.step(seed, *batch)
    again.check()


@pytest.mark.parametrize("static", [False, True], ids=["eager", "graphs"])
def test_outputs_of_every_token_are_those_of_a_loop(*, static: bool) -> None:
    world = World(static=static, size=32)
    for seed, batch in enumerate(BATCHES):
        world.step(seed, *batch)
    world.check()
    world.check_outputs()


def test_a_sample_stands_for_its_batch() -> None:
    """Whatever is drawn: as many choices as all tokens made, by few tokens' outputs."""
    world = World(size=2)
    for seed, tokens in enumerate((5, 9, 1, 12)):
        world.step(seed, [0, 1], [tokens, 2], [True, False])
    world.check()
    assert world.outputs is not None
    sampled = world.outputs.sums[:, 0, :, 0, 0].numpy()
    assert sampled.sum(1) == pytest.approx([27 * TOP_K] * 2)
    pairs = world.outputs.sums[..., 0, 0].count_nonzero()
    assert 0 < pairs <= 2 * 4 * 2 * TOP_K
    for place, index in enumerate(LAYERS):  # each of them is the output of some token
        for row in np.flatnonzero(sampled[place]):
            assert world.outputs.largest[place, 0, row] <= world.largest[index, 0, row] + 1e-5


def test_one_step_in_so_many_is_sampled() -> None:
    world = World(size=32, every=8)
    for seed in range(64):
        world.step(seed, [0], [1], [True])
    world.statistics.fold()
    assert world.outputs is not None
    steps = float(world.outputs.sums[0, 0, :, 0, 0].sum()) / TOP_K
    assert 1 <= steps <= 24
    assert float(world.statistics.sums[0, 0, :, 0].sum()) == 64 * TOP_K


def test_dummy_runs_and_batches_of_nobody_are_not_counted() -> None:
    world = World(static=True, size=32)
    world.step(0, [0, 1], [2, 2], [True, True])
    world.batch.reset()
    for moe in world.layers.values():  # a dummy run
        moe.router.select_experts(random(8, HIDDEN, seed=1), random(8, EXPERTS, seed=2), None)
    world.step(1, [0, 1], [4, 4], [False, False])
    world.batch.fill([1], np.array([3]))
    for moe in world.layers.values():
        moe.router.select_experts(random(3, HIDDEN, seed=1), random(3, EXPERTS, seed=2), None)
    world.check()
    world.check_outputs()
    assert world.statistics.read({0: ("base", rows_of(world, 0, None))})["base"]["tokens"] == 2


def read(world: World, live: Any, scale: float = 1.0) -> dict[str, VariantCounts]:
    variants = world.statistics.read(live)
    return parse_counts({"gate_scales": dict.fromkeys(LAYERS, scale), "variants": variants})


def rows_of(world: World, slot: int, plan: LayerPlan | None) -> dict[int, list[int]]:
    rows = range(EXPERTS) if plan is None else plan.kept
    return {i: columns_of(plan, x.tables, slot, rows) for i, x in world.layers.items()}


def test_read_by_variant_over_slots_that_others_take() -> None:
    world = World(size=32)
    for seed, batch in enumerate(BATCHES):
        world.step(seed, *batch)
    base, masked = ("base", rows_of(world, 0, None)), ("mask", rows_of(world, 1, None))
    before = read(world, {0: base, 1: masked})
    world.statistics.leave(1, *masked)
    assert read(world, {0: base})["mask"].tokens == before["mask"].tokens == 3
    world.step(9, [1, 0], [4, 1], [True, True])  # the slot is another variant's now
    other = ("other", masked[1])
    found = read(world, {0: base, 1: other})
    assert {key: x.tokens for key, x in found.items()} == {
        "base": before["base"].tokens + 1,
        "mask": 3,
        "other": 4,
    }
    assert np.array_equal(found["mask"].layers[1].gates, before["mask"].layers[1].gates)
    world.statistics.leave(1, *other)
    world.step(10, [1], [2], [True])
    again = read(world, {1: masked})["mask"]
    assert again.tokens == 5
    assert again.layers[3].gates[:, 0].sum() == 5 * 2
    was, now = before["mask"].layers[3].largest, again.layers[3].largest
    assert was is not None
    assert now is not None
    assert now.max() >= was.max()
    sampled, gates = again.layers[1].sampled, again.layers[1].gates
    assert sampled is not None
    np.testing.assert_allclose(sampled[..., 0], gates, rtol=1e-6)  # every token was in the sample


def test_gates_are_scaled_as_the_model_scales_them() -> None:
    world = World(size=32)
    world.step(0, [0], [6], [True])
    plain = read(world, {0: ("base", rows_of(world, 0, None))})["base"].layers[1]
    scaled = read(world, {0: ("base", rows_of(world, 0, None))}, 2.5)["base"].layers[1]
    np.testing.assert_allclose(scaled.gates, plain.gates * [1, 2.5, 6.25])
    assert plain.sampled is not None
    assert scaled.sampled is not None
    np.testing.assert_allclose(scaled.sampled[:, 2, 1], plain.sampled[:, 2, 1] * 6.25)
    np.testing.assert_allclose(scaled.sampled[:, 0, 2], plain.sampled[:, 0, 2])


def test_columns_are_base_experts_or_merged_ones() -> None:
    world = World()
    tables = world.layers[1].tables
    kept = tuple(e for e in range(EXPERTS) if e not in PRUNED)
    plan = LayerPlan(layer=1, experts=EXPERTS, kept=(0, 4), top_k=1)
    assert columns_of(plan, tables, 1, [0, 4]) == [0, -1, -1, -1, 4, -1, -1, -1]
    vectors = np.zeros((2, HIDDEN), np.float32)
    plan = LayerPlan(layer=1, experts=EXPERTS, kept=kept, top_k=1, constants=vectors)
    found = columns_of(plan, tables, 2, kept)
    assert [found[e] for e in kept] == list(kept)
    assert sorted(found[e] for e in PRUNED) == [EXPERTS + SPARE, EXPERTS + SPARE + 1]
    assert columns_of(None, tables, 0, range(EXPERTS)) == list(range(EXPERTS))


def test_nothing_reads_data_back_under_graphs() -> None:
    world = World(static=True, size=4)
    world.batch.fill([0, 1], np.array([3, 2]), [True, False])
    moe = world.layers[1]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(8, EXPERTS)
        moe.router.select_experts(torch.zeros(8, HIDDEN), fake, torch.int32)
