"""Experts gathered neuron by neuron into packed rows, against loops that gather them by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm._custom_ops import cpu_prepack_moe_weight

from liveprune.patches.expert_packing import Packing
from liveprune.patches.expert_reader import ExpertReader
from liveprune.patches.neuron_merge import NeuronMerge
from liveprune.patches.row_assignment import Assignment, assign_rows
from liveprune.patches.row_filler import MergeJob, RowJob
from liveprune.pruning.errors import EngineError
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import LayerPlan
from tests.checkpoints import edited, fused, tensors
from tests.forms import form_plan, random_neurons
from tests.patches.filler_world import EXPERTS, SPARE, TIMEOUT, Setup, packed

Models = Callable[..., Path]
Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def model(tiny_model: Models) -> Path:
    """Mixtral, 3 layers of 8 experts, 48 neurons each: padded to 64."""
    return tiny_model("mixtral")


def neuron_plan(layer: int, count: int = 4, *, size: int = 48, seed: int = 0) -> LayerPlan:
    """New expert 0 is an old one; the others are gathered from all over."""
    rng = np.random.default_rng(seed)
    neuron_map = random_neurons(rng, EXPERTS, count, size)
    shares = rng.uniform(0.5, 2, EXPERTS)
    kept = tuple(range(count))
    return LayerPlan(layer, EXPERTS, 2, kept, neuron_map=neuron_map, neuron_shares=shares)


def gathered(model: Path, plan: LayerPlan, new: int, dtype: torch.dtype) -> Matrices:
    """Gate, up and down of a new expert in float64: one neuron after the other."""
    assert plan.neuron_map is not None
    assert plan.neuron_shares is not None
    spec, held = ModelSpec.from_path(model), tensors(model)
    prefix = f"{spec.architecture.block_prefix(plan.layer)}experts."
    size = spec.expert_size
    gate, up = (torch.zeros(size, spec.hidden_size, dtype=torch.float64) for _ in range(2))
    down = torch.zeros(spec.hidden_size, size, dtype=torch.float64)
    total = [0.0] * size
    for expert in range(EXPERTS):
        share = float(plan.neuron_shares[expert])
        gate_name, up_name, down_name = (
            f"{prefix}{expert}.{name}.weight" for name in spec.architecture.experts
        )
        old_gate, old_up, old_down = (
            held[name].to(dtype).double() for name in (gate_name, up_name, down_name)
        )
        for neuron in range(size):
            target = int(plan.neuron_map[expert, neuron])
            if target < 0 or target // size != new:
                continue
            target %= size
            gate[target] += share * old_gate[neuron]
            up[target] += share * old_up[neuron]
            down[:, target] += share * old_down[:, neuron]
            total[target] += share
    divisor = torch.tensor(total, dtype=torch.float64)
    return gate / divisor[:, None], up / divisor[:, None], down / divisor


def packed_row(
    matrices: Matrices, dtype: torch.dtype, rank: int, ranks: int, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slice, pad and pack one expert, as vLLM does for a rank."""
    gate, up = (x.chunk(ranks, dim=0)[rank].to(dtype) for x in matrices[:2])
    down = matrices[2].chunk(ranks, dim=1)[rank].to(dtype)
    if layout != "vec":
        halves = (up, gate) if layout == "up first" else (gate, up)
        return torch.cat(halves), down
    pad = -len(gate) % 32
    halves = tuple(torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (gate, up))
    down = torch.nn.functional.pad(down, (0, pad)).contiguous()
    w13 = torch.cat(halves)[None]
    return (
        cpu_prepack_moe_weight(w13, "vec")[0],
        cpu_prepack_moe_weight(down[None], "vec")[0],
    )


def assigned(plan: LayerPlan, free: range = range(EXPERTS, EXPERTS + SPARE)) -> Assignment:
    return assign_rows(plan, EXPERTS, free)


def merge_of(plan: LayerPlan) -> NeuronMerge:
    found = assigned(plan).neurons
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("layout", "ranks"), [("vec", 1), ("vec", 2), ("vec", 3), ("as read", 2), ("up first", 2)]
)
@pytest.mark.parametrize("form", ["neurons+kept", "neurons+map"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_hold_the_neurons_that_a_loop_gathers(
    dtype: torch.dtype, form: str, layout: str, ranks: int, model: Path
) -> None:
    """Of every rank; a rank's new neurons come from other ranks' old ones, too."""
    plans = [layer for layer in form_plan(model, form).layers if layer.layer != 1]
    exact = {(x.layer, new): gathered(model, x, new, dtype) for x in plans for new in range(4)}
    copies = {x.layer: assigned(x).rows[0] for x in plans}
    size = 48 // ranks
    packing = None if layout == "vec" else Packing(64, size, size, up_first=layout == "up first")
    for rank in range(ranks):
        setup = Setup(model, dtype, rank, ranks, packing=packing)
        fills = [RowJob(layer, row, row) for layer, row in copies.items()]
        task = setup.filler.start(fills, gathers=[merge_of(x) for x in plans])
        assert task.wait(TIMEOUT).phase == "ready"
        for plan in plans:
            rows = setup.rows[plan.layer]
            assert rows.resident == rows.written == {copies[plan.layer], 8, 9, 10}
            for new, row in enumerate(assigned(plan).rows):
                right = packed_row(exact[plan.layer, new], dtype, rank, ranks, layout)
                for found, expected in zip((rows.w13[row], rows.w2[row]), right, strict=True):
                    step = torch.finfo(dtype).eps
                    torch.testing.assert_close(found, expected, rtol=step, atol=1e-7)
                    if new == 0:
                        assert torch.equal(found, expected), "one old expert as it is"


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_ranks_slices_are_those_of_the_whole_bit_for_bit(family: str, tiny_model: Models) -> None:
    model = tiny_model(family)
    size = ModelSpec.from_path(model).expert_size
    plan = neuron_plan(1, size=size)
    parts = []
    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        setup = Setup(
            model, rank=rank, ranks=ranks, packing=Packing(64, size // ranks, size // ranks)
        )
        assert setup.filler.start([], gathers=[merge_of(plan)]).wait(TIMEOUT).phase == "ready"
        rows = setup.rows[1]
        parts.append((*rows.w13[8:11].chunk(2, dim=1), rows.w2[8:11]))
    whole, first, second = parts
    for one, left, right, dim in zip(whole, first, second, (1, 1, 2), strict=True):
        assert torch.equal(one, torch.cat([left, right], dim=dim))


def test_by_hand(model: Path, tmp_path: Path) -> None:
    """Gate row n of expert i is all 100 i + n, its up row the negative, its down column half.

    New expert 1 is expert 2 but for three neurons: 5 is the mean, weighted 1 to 3, of neuron 5
    and of expert 6's neuron 47; 30 changes places with 31.
    """

    def numbered(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for expert in range(EXPERTS):
            rows = 100.0 * expert + torch.arange(48.0)
            prefix = f"model.layers.1.block_sparse_moe.experts.{expert}"
            held[f"{prefix}.w1.weight"] = rows[:, None].repeat(1, 64)
            held[f"{prefix}.w3.weight"] = -rows[:, None].repeat(1, 64)
            held[f"{prefix}.w2.weight"] = rows.repeat(64, 1) / 2
        return held

    neuron_map = np.full((EXPERTS, 48), -1)
    neuron_map[0] = np.arange(48)
    neuron_map[2] = 48 + np.arange(48)
    neuron_map[2, [30, 31]] = 48 + np.array([31, 30])
    neuron_map[6, 47] = 48 + 5
    shares = np.array([1, 1, 1, 1, 1, 1, 3, 1])
    plan = LayerPlan(1, EXPERTS, 2, (0, 2), neuron_map=neuron_map, neuron_shares=shares)
    copy = edited(model, tmp_path / "numbered", numbered)
    expected = 200.0 + torch.arange(48.0)
    expected[5] = (205 + 3 * 647) / 4
    expected[30], expected[31] = 231.0, 230.0
    for rank in range(2):
        setup = Setup(copy, rank=rank, ranks=2, packing=Packing(64, 24, 24))
        assert assigned(plan).rows == (0, 8)
        assert setup.filler.start([], gathers=[merge_of(plan)]).wait(TIMEOUT).phase == "ready"
        rows, mine = setup.rows[1], expected[24 * rank : 24 * (rank + 1)]
        assert torch.equal(rows.w13[8, :24], mine[:, None].expand(24, 64))
        assert torch.equal(rows.w13[8, 24:], -mine[:, None].expand(24, 64))
        assert torch.equal(rows.w2[8], mine.expand(64, 24) / 2)


def test_the_fused_layout_is_gathered_from_too(model: Path, tmp_path: Path) -> None:
    spec, plan = ModelSpec.from_path(model), neuron_plan(2)
    made = []
    for read in (model, edited(model, tmp_path / "fused", lambda held: fused(held, spec))):
        setup = Setup(read)
        assert setup.filler.start([], gathers=[merge_of(plan)]).wait(TIMEOUT).phase == "ready"
        made.append((setup.rows[2].w13[8:11], setup.rows[2].w2[8:11]))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])


def test_beside_other_work_of_the_same_layer(model: Path) -> None:
    """Gathers read the checkpoint: the old experts get no memory for it, those of merges do."""
    setup, gather = Setup(model), merge_of(neuron_plan(1, 3))
    assert gather.rows == (8, 9)
    coefficients = np.zeros((1, EXPERTS), np.float32)
    coefficients[0, [2, 5]] = 0.5
    task = setup.filler.start(
        [RowJob(1, 1, 1)], [MergeJob(1, (11,), coefficients)], [(1, 7)], [gather]
    )
    found = task.wait(TIMEOUT)
    assert found.phase == "ready"
    rows = setup.rows[1]
    assert rows.resident == rows.written == {1, 7, 8, 9, 11}
    assert rows.most == 7, "experts 2 and 5 while they were merged"
    row = (2 * 64 * 64 + 64 * 64) * 4
    assert (found.bytes_done, found.bytes_total) == (7 * row, 7 * row)
    right13, right2 = packed(model, 1, torch.float32)
    assert torch.equal(rows.w13[7], right13[7])
    torch.testing.assert_close(rows.w2[11], (right2[2] + right2[5]) / 2)
    for each in (8, 9):
        assert setup.filler.checks.expected(1, each) == setup.filler.checks.measure(rows, each)
    again = setup.filler.start([], gathers=[gather]).wait(TIMEOUT)
    assert again.error == "layer 1: rows [8, 9] are in use, expected free spare rows"


def test_gathered_rows_that_are_needed_later_must_be_as_they_were(model: Path) -> None:
    setup = Setup(model)
    assert setup.filler.start([], gathers=[merge_of(neuron_plan(0))]).wait(TIMEOUT).phase == "ready"
    assert setup.run([], [], [(0, 8), (0, 10)]) == "ready"
    setup.rows[0].w13[10, 3, 3] += 1
    assert setup.run([], [], [(0, 8), (0, 10)]).startswith("layer 0, row 10: checksum is ")


class Damaged(ExpertReader):
    """Cannot read expert 5 of layer 1."""

    def read_whole(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        if (layer, expert) == (1, 5):
            raise OSError(5, "Input/output error")
        return super().read_whole(layer, expert)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_source_that_cannot_be_read_releases_all(threads: int, model: Path) -> None:
    setup = Setup(model, reader=Damaged, threads=threads)
    gathers = [merge_of(neuron_plan(0)), merge_of(neuron_plan(1))]
    found = setup.filler.start([RowJob(2, 3, 3)], gathers=gathers).wait(TIMEOUT)
    assert found.phase == "failed"
    assert found.error.startswith("layer 1, row ")
    assert found.error.endswith(": OSError: [Errno 5] Input/output error")
    assert setup.resident() == setup.written() == [set(), set(), set()]
    assert setup.filler.claimed(0) == frozenset()
    assert setup.filler.checks.expected(0, 8) is None


def test_experts_without_a_share_are_not_read(model: Path) -> None:
    """Expert 5's neurons go to new expert 1 beside expert 4's, but weigh nothing."""
    neuron_map = np.full((EXPERTS, 48), -1)
    neuron_map[0] = np.arange(48)
    neuron_map[5] = 48 + np.arange(48)
    neuron_map[4] = 48 + np.arange(48)[::-1]
    shares = np.ones(EXPERTS)
    shares[5] = 0
    plan = LayerPlan(1, EXPERTS, 2, (0, 1), neuron_map=neuron_map, neuron_shares=shares)
    setup = Setup(model, reader=Damaged, packing=Packing(64, 48, 48))
    assert setup.filler.start([], gathers=[merge_of(plan)]).wait(TIMEOUT).phase == "ready"
    w13, w2 = setup.reader.read(1, 4)
    assert torch.equal(setup.rows[1].w13[8], torch.cat([w13[:48].flip(0), w13[48:].flip(0)]))
    assert torch.equal(setup.rows[1].w2[8], w2.flip(1))


def test_a_map_of_other_experts_is_refused(model: Path) -> None:
    setup = Setup(model)
    found = setup.filler.start([], gathers=[merge_of(neuron_plan(1, size=32))]).wait(TIMEOUT)
    assert found.phase == "failed"
    assert found.error.endswith("layer 1: the neuron map is not of this model's experts")
    assert setup.resident() == [set(), set(), set()]


def on_rows(layer: int, *rows: int) -> NeuronMerge:
    return NeuronMerge(neuron_plan(layer), rows, tuple(range(1, 1 + len(rows))))


@pytest.mark.parametrize(
    ("jobs", "gathers", "message"),
    [
        ([], [on_rows(7, 8)], r"found layers \[7\], expected some of \[0, 1, 2\]"),
        ([], [on_rows(1, 12)], r"layer 1: found rows \[12\], expected 0 to 11"),
        ([], [on_rows(1, 3)], r"layer 1: found merges into rows \[3\], expected spare rows, 8"),
        ([], [on_rows(1, 8, 8)], r"layer 1: found rows \[8\] twice"),
        ([], [on_rows(1, 8), on_rows(1, 8)], r"layer 1: found rows \[8\] twice"),
        ([RowJob(1, 9, 0)], [on_rows(1, 8, 9)], r"layer 1: found rows \[9\] twice"),
    ],
)
def test_impossible_gathers_are_refused_at_once(
    jobs: Any, gathers: Any, message: str, model: Path
) -> None:
    setup = Setup(model)
    with pytest.raises(EngineError, match=message):
        setup.filler.start(jobs, gathers=gathers)
    assert setup.run([RowJob(0, 1, 1)]) == "ready"
