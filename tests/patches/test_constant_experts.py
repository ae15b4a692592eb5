"""Constants from the router to the layer's output, beside base tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from liveprune.patches.batch_slots import BatchSlots
from liveprune.patches.constant_experts import add_constants
from liveprune.patches.live_router import install
from liveprune.patches.routing_tables import LayerTables
from liveprune.pruning.errors import EngineError
from tests.patches.plain_routing import KINDS, Kind, plain_route

HIDDEN, SPARE = 6, 8
DTYPES = [torch.float32, torch.bfloat16]
SLOTS = [0, 2, 0, 1, 3, 2, 0, 4, 3, 0, 1, 2] * 3


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Experts:
    """One layer's router and experts: each a matrix, multiplied in a plain loop."""

    def __init__(self, kind: Kind, dtype: torch.dtype, *, static: bool, rank: int = 0) -> None:
        """Slots: 0 base, 1 mask, 2 and 3 with constants, 4 merged with rows dropped."""
        count = kind.experts
        self.matrices = random(count + SPARE, HIDDEN, HIDDEN, seed=1).to(dtype)
        self.layer_name = "model.layers.5.mlp.experts"
        self.moe_config = SimpleNamespace(moe_parallel_config=SimpleNamespace(tp_rank=rank))
        self.router = CPURouter(**kind.arguments())
        self.tables = LayerTables(5, count, SPARE, kind.top_k, hidden=HIDDEN, device="cpu")
        self.tables.set_base(0)
        self.vectors = dict(enumerate(random(count, HIDDEN, seed=2)))
        self.pruned: dict[int, list[int]] = {}
        self.batch = BatchSlots(64, torch.device("cpu"), static=static)
        self.routing = install(self.router, kind.spec)
        self.routing.attach(self.tables, self.batch)
        self.seen: set[int] = set()
        add_constants(self, self.routing)

    def prune(self) -> None:
        """Put variants into the slots that have none."""
        count, top_k = self.tables.experts, self.tables.base_top_k
        self.tables.set_kept(1, [e for e in range(count) if e % 4 < 2], 1)
        self.tables.set_kept(4, range(count), top_k, [count + 3, *range(1, count)])

    def prune_with_constants(self) -> None:
        count, top_k = self.tables.experts, self.tables.base_top_k
        for slot, pruned, k in ((2, [0, 1, 4, 6], top_k), (3, [1, 3, 7], 1)):
            kept = [e for e in range(count) if e not in pruned]
            self.tables.set_constant(slot, kept, k, {e: self.vectors[e] for e in pruned})
            self.pruned[slot] = pruned

    def forward_modular(self, x: torch.Tensor, weights: Any, rows: Any) -> Any:
        """Expert by expert and token by token, so that company cannot change a token's sums."""
        self.seen |= set(rows.flatten().tolist())
        output = torch.zeros_like(x, dtype=torch.float32)
        for token, (own, ids) in enumerate(zip(weights, rows.tolist(), strict=True)):
            for weight, row in zip(own, ids, strict=True):
                output[token] += weight * (self.matrices[row] @ x[token]).float()
        return output.to(x.dtype)

    def run(self, x: torch.Tensor, logits: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """One forward pass, a request of one token for each slot."""
        self.batch.fill(slots, np.ones(len(slots), dtype=np.int32))
        weights, rows = self.router.select_experts(x, logits, torch.int32)
        output: torch.Tensor = self.forward_modular(x, weights, rows)
        return output


def inputs(kind: Kind, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = random(len(SLOTS), HIDDEN, seed=3).to(dtype)
    return x, 3 * random(len(SLOTS), kind.experts, seed=4)


ROUTERS = ["mixtral", "qwen2", "deepseek-v2-lite", "deepseek-v3"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", ROUTERS)
def test_others_tokens_are_bit_identical_beside_constants(
    name: str, dtype: torch.dtype, *, static: bool
) -> None:
    kind = KINDS[name]
    x, logits = inputs(kind, dtype)
    layer = Experts(kind, dtype, static=static)
    base = layer.run(x, logits, [0] * len(SLOTS))
    layer.prune()
    # The same batch, but who will have constants is the base yet.
    without = layer.run(x, logits, [slot if slot in (1, 4) else 0 for slot in SLOTS])
    layer.prune_with_constants()
    mixed = layer.run(x, logits, SLOTS)
    slots = torch.tensor(SLOTS)
    assert torch.equal(mixed[slots == 0], base[slots == 0])
    for other in (0, 1, 4):
        assert torch.equal(mixed[slots == other], without[slots == other])
    assert not torch.equal(mixed[slots == 2], base[slots == 2])
    assert not torch.equal(mixed[slots == 3], base[slots == 3])
    assert layer.seen <= set(range(layer.tables.rows)), "the kernel checks no ids"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", ROUTERS)
def test_constants_are_what_a_float64_loop_says(
    name: str, dtype: torch.dtype, *, static: bool
) -> None:
    kind = KINDS[name]
    x, logits = inputs(kind, dtype)
    layer = Experts(kind, dtype, static=static)
    layer.prune()
    layer.prune_with_constants()
    output = layer.run(x, logits, SLOTS)
    constants = layer.routing.constants
    assert constants is not None
    assert constants.dtype == torch.float32
    answered = 0
    for token, slot in enumerate(SLOTS):
        if slot not in layer.pruned:
            assert not constants[token].any()
            continue
        every, pruned = range(kind.experts), layer.pruned[slot]
        chosen = plain_route(kind, logits[token].tolist(), every, layer.tables.top_ks[slot])
        answers, computed = (torch.zeros(HIDDEN, dtype=torch.float64) for _ in range(2))
        for expert, weight in chosen.items():
            if expert in pruned:
                answers += weight * layer.vectors[expert].double()
                answered += 1
            else:
                computed += weight * (layer.matrices[expert].double() @ x[token].double())
        torch.testing.assert_close(constants[token].double(), answers, rtol=1e-5, atol=1e-5)
        step = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
        torch.testing.assert_close(
            output[token].double(), answers + computed, rtol=step, atol=2 * step
        )
    assert answered > 5


def test_by_hand() -> None:
    """Logits log(3, 1, 12, 4), two active. The base: 12/16 of expert 2, 4/16 of expert 3.

    Experts give 1, 2, 3 and 4 times the token; in slot 1 expert 2 answers 100 in its place, and
    in slot 2 both of the chosen are constants, 100 and 1000.
    """
    kind = Kind(4, 2)
    layer = Experts(kind, torch.float32, static=False)
    layer.matrices = torch.eye(HIDDEN) * torch.arange(1.0, 4 + SPARE + 1)[:, None, None]
    logits = torch.tensor([[3.0, 1.0, 12.0, 4.0]]).log().repeat(3, 1)
    hundred, thousand = torch.full((HIDDEN,), 100.0), torch.full((HIDDEN,), 1000.0)
    layer.tables.set_constant(1, [0, 1, 3], 2, {2: hundred})
    layer.tables.set_constant(2, [0, 1], 2, {3: thousand, 2: hundred})
    output = layer.run(torch.ones(3, HIDDEN), logits, [0, 1, 2])
    assert output[:, 0].tolist() == pytest.approx([2.25 + 1, 75 + 1, 75 + 250])
    assert torch.equal(output, output[:, :1].expand(3, HIDDEN))
    assert layer.seen == {2, 3, 0}


def test_the_next_batch_has_no_constants_left_over() -> None:
    kind = KINDS["mixtral"]
    x, logits = inputs(kind, torch.float32)
    layer = Experts(kind, torch.float32, static=False)
    base = layer.run(x, logits, [0] * len(SLOTS))
    assert layer.routing.constants is None
    layer.prune()
    layer.prune_with_constants()
    layer.run(x, logits, [2] * len(SLOTS))
    assert layer.routing.constants is not None
    assert torch.equal(layer.run(x, logits, [0] * len(SLOTS)), base)
    assert layer.routing.constants is None
    layer.run(x, logits, [2, 1] * (len(SLOTS) // 2))
    layer.run(x, logits, [1] * len(SLOTS))
    assert layer.routing.constants is None


def test_one_rank_adds_them() -> None:
    """Outputs of ranks are summed afterwards; half of each expert's columns on either."""
    kind = KINDS["qwen3"]
    x, logits = inputs(kind, torch.float32)
    whole = Experts(kind, torch.float32, static=False)
    ranks = [Experts(kind, torch.float32, static=False, rank=rank) for rank in (0, 1)]
    for layer in (whole, *ranks):
        layer.prune()
        layer.prune_with_constants()
    half = HIDDEN // 2
    ranks[0].matrices[:, :, half:] = 0
    ranks[1].matrices[:, :, :half] = 0
    parts = [layer.run(x, logits, SLOTS) for layer in ranks]
    torch.testing.assert_close(parts[0] + parts[1], whole.run(x, logits, SLOTS))


def test_the_sum_is_rounded_once() -> None:
    """1/256 + 2^-18 added to 1 lies just above the middle of bfloat16's 1 and 1 + 1/128.

    Rounded on its own before, it would be 1/256, the middle itself, and the sum 1.
    """
    layer = SimpleNamespace(
        forward_modular=lambda: torch.ones(1, 1, dtype=torch.bfloat16),
        moe_config=SimpleNamespace(moe_parallel_config=SimpleNamespace(tp_rank=0)),
    )
    add_constants(layer, SimpleNamespace(constants=torch.tensor([[2.0**-8 + 2.0**-18]])))
    found = layer.forward_modular()
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[1 + 1 / 128]]


def test_outputs_that_nothing_can_be_added_to_are_refused() -> None:
    layer = SimpleNamespace(
        layer_name="model.layers.5.mlp.experts",
        forward_modular=lambda: (torch.ones(1, 1), torch.ones(1, 1)),
        moe_config=SimpleNamespace(moe_parallel_config=SimpleNamespace(tp_rank=0)),
    )
    routing = SimpleNamespace(constants=None)
    add_constants(layer, routing)
    assert len(layer.forward_modular()) == 2, "without constants it is the kernel's affair"
    routing.constants = torch.ones(1, 1)
    with pytest.raises(EngineError, match=r"model.layers.5.mlp.experts: the kernel gives tuple"):
        layer.forward_modular()
