from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from liveprune.patches.batch_slots import BatchSlots
from liveprune.patches.live_router import LiveRouting, install
from liveprune.patches.router_map import RouterMapRouter
from liveprune.patches.routing import RouterSpec, route
from liveprune.patches.routing_tables import LayerTables
from liveprune.pruning.errors import EngineError

EXPERTS, TOP_K, SPARE = 8, 3, 4
PLAIN = {
    "top_k": TOP_K,
    "global_num_experts": EXPERTS,
    "renormalize": True,
    "use_grouped_topk": False,
    "num_expert_group": None,
    "topk_group": None,
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "e_score_correction_bias": None,
}
GROUPED = {
    **PLAIN,
    "use_grouped_topk": True,
    "num_expert_group": 2,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "e_score_correction_bias": torch.linspace(-0.5, 0.5, EXPERTS),
}


class CudaLikeRouter(BaseRouter):  # type: ignore[misc]
    """Ids in the type that the kernel asks for, as vLLM's CUDA routers give them."""

    @property
    def routing_method_type(self) -> Any:
        return RoutingMethodType.Renormalize

    def _compute_routing(
        self, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
    ) -> Any:
        values, ids = torch.topk(router_logits.float(), self.top_k, dim=-1)
        return torch.softmax(values, dim=-1), ids.to(indices_type or torch.int32)


@dataclasses.dataclass
class Layer:
    """A router that live variants are installed on, and an equal one that they are not."""

    router: Any
    untouched: Any
    routing: LiveRouting
    tables: LayerTables
    batch: BatchSlots

    def serve(self, logits: torch.Tensor, slots: list[int], dtype: Any = torch.int32) -> Any:
        """One forward pass, a request of one token for each slot; the rest is padding."""
        self.batch.fill(slots, np.ones(len(slots), dtype=np.int32))
        return self.router.select_experts(torch.zeros(len(logits), 1), logits, dtype)

    def own(self, logits: torch.Tensor, dtype: Any = torch.int32) -> Any:
        return self.untouched.select_experts(torch.zeros(len(logits), 1), logits, dtype)


def make_layer(
    arguments: dict[str, Any] = PLAIN,
    *,
    cls: Any = CPURouter,
    static: bool = False,
    device: str = "cpu",
) -> Layer:
    """Slots: 0 base, 1 and 2 masks, 3 merged with rows dropped, 4 EEP, 5 free."""
    if cls is CPURouter:
        router, untouched = cls(**arguments), cls(**arguments)
    else:
        router, untouched = cls(TOP_K, EXPERTS), cls(TOP_K, EXPERTS)
    tables = LayerTables(6, EXPERTS, SPARE, TOP_K, device=device)
    batch = BatchSlots(64, torch.device(device), static=static)
    tables.set_base(0)
    tables.set_kept(1, [0, 1, 4, 5], 2)
    tables.set_kept(2, [1, 2, 3, 5, 6, 7], TOP_K)
    tables.set_kept(3, [0, 3, 4, 7], 2, [8, 3, 9, 7])
    if not arguments["use_grouped_topk"]:
        router_map = torch.rand(3, EXPERTS, generator=torch.Generator().manual_seed(0))
        tables.set_mapped(4, router_map, [10, 11, 2], 1)
    routing = install(router, RouterSpec.from_arguments(arguments))
    routing.attach(tables, batch)
    return Layer(router, untouched, routing, tables, batch)


def random_logits(tokens: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_vllms_own_until_attached() -> None:
    router = CPURouter(**PLAIN)
    routing = install(router, RouterSpec.from_arguments(PLAIN))
    assert routing.tables is routing.batch is None
    assert type(router)._compute_routing is CPURouter._compute_routing
    logits = random_logits(5)
    found = router.select_experts(torch.zeros(5, 1), logits, torch.int32)
    right = CPURouter(**PLAIN).select_experts(torch.zeros(5, 1), logits, torch.int32)
    assert equal(found, right)


@pytest.mark.parametrize("arguments", [PLAIN, GROUPED], ids=["plain", "grouped"])
def test_the_base_alone_is_vllms_own(arguments: dict[str, Any]) -> None:
    layer = make_layer(arguments)
    logits = random_logits(9)
    assert equal(layer.serve(logits, [0] * 9), layer.own(logits))


@pytest.mark.parametrize("arguments", [PLAIN, GROUPED], ids=["plain", "grouped"])
def test_the_bases_tokens_are_bit_identical_in_a_mixed_batch(arguments: dict[str, Any]) -> None:
    layer = make_layer(arguments)
    slots = [0, 1, 0, 2, 3, 0, 0, 1, 2]
    logits = random_logits(len(slots))
    weights, rows = layer.serve(logits, slots)
    own_weights, own_rows = layer.own(logits)
    base = torch.tensor(slots) == 0
    assert torch.equal(weights[base], own_weights[base])
    assert torch.equal(rows[base], own_rows[base])
    assert not torch.equal(rows[~base], own_rows[~base])


@pytest.mark.parametrize("arguments", [PLAIN, GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("static", [False, True], ids=["eager", "graphs"])
def test_company_changes_nobodys_routing(arguments: dict[str, Any], *, static: bool) -> None:
    """Each variant in a mixed batch as it is alone, but for dropped columns at the end."""
    layer = make_layer(arguments, static=static)
    live = [slot for slot in range(5) if layer.tables.top_ks[slot]]
    slots = live * 6
    logits = random_logits(len(slots))
    weights, rows = layer.serve(logits, slots)
    assert weights.shape == rows.shape == (len(slots), TOP_K)
    assert weights.is_contiguous()
    assert rows.is_contiguous()
    layer.batch.static = False
    for slot in live:
        mine = torch.tensor(slots) == slot
        own_weights, own_rows = layer.serve(logits, [slot] * len(slots))
        columns = layer.tables.top_ks[slot]
        assert own_weights.shape == own_rows.shape == (len(slots), columns)
        own_weights, own_rows = own_weights[mine], own_rows[mine]
        assert torch.equal(weights[mine][:, :columns], own_weights)
        assert torch.equal(rows[mine][:, :columns], own_rows)
        assert not weights[mine][:, columns:].any()
        dropped = rows[mine][:, columns:]
        assert torch.equal(dropped, own_rows[:, :1].expand_as(dropped))
        assert set(rows[mine].flatten().tolist()) <= layer.tables.needed_rows(slot)


def test_a_mixed_batch_has_no_more_columns_than_its_variants_need() -> None:
    layer = make_layer()
    weights, rows = layer.serve(random_logits(4), [1, 3, 3, 4])
    assert weights.shape == rows.shape == (4, 2)


def test_padding_takes_the_default_slot() -> None:
    """Two tokens filled, five run: the rest routes by what is live, not by what was there."""
    layer = make_layer()
    layer.tables.clear(0)
    layer.batch.default = 2
    layer.serve(random_logits(5), [1] * 5)
    logits = random_logits(5, 1)
    weights, rows = layer.serve(logits, [1, 1])
    expected = layer.serve(logits, [2] * 5)
    assert torch.equal(weights[2:], expected[0][2:])
    assert torch.equal(rows[2:], expected[1][2:])
    layer.batch.reset()
    assert equal(layer.router.select_experts(torch.zeros(5, 1), logits, torch.int32), expected)


@pytest.mark.parametrize("slots", [[5], [0, 5], [1, 5, 5]])
def test_tokens_of_a_free_slot_are_an_error(slots: list[int]) -> None:
    layer = make_layer()
    with pytest.raises(EngineError, match=r"found tokens of the slots \[5\]"):
        layer.serve(random_logits(len(slots)), slots)


def test_a_base_that_is_not_live_is_an_error_too() -> None:
    layer = make_layer()
    layer.tables.clear(0)
    with pytest.raises(EngineError, match=r"found tokens of the slots \[0\]"):
        layer.serve(random_logits(2), [0, 0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, None])
@pytest.mark.parametrize("slots", [[0, 0, 0], [1, 1, 1], [0, 1, 4]])
@pytest.mark.parametrize("static", [False, True], ids=["eager", "graphs"])
def test_ids_have_the_type_that_the_kernel_asks_for(
    slots: list[int], dtype: Any, *, static: bool
) -> None:
    layer = make_layer(cls=CudaLikeRouter, static=static)
    logits = random_logits(3)
    weights, rows = layer.serve(logits, slots, dtype)
    assert rows.dtype == (dtype or torch.int32)
    assert weights.dtype == torch.float32
    own_weights, own_rows = layer.own(logits, dtype)
    assert torch.equal(weights[0], own_weights[0]) == (slots[0] == 0)
    assert torch.equal(rows[0], own_rows[0]) == (slots[0] == 0)


def test_a_published_variant_is_seen_by_the_next_batch() -> None:
    layer = make_layer(static=True)
    logits = random_logits(4)
    layer.tables.set_kept(5, [6], 1)
    _, rows = layer.serve(logits, [5, 0, 5, 1])
    assert rows[[0, 2]].tolist() == [[6] * TOP_K] * 2
    layer.tables.set_kept(5, [2], 1)
    _, rows = layer.serve(logits, [5, 0, 5, 1])
    assert rows[[0, 2]].tolist() == [[2] * TOP_K] * 2


def test_the_graph_path_reads_no_data_back() -> None:
    """Tensors without values cannot be branched on: what runs on them can be captured."""
    layer = make_layer(static=True, cls=CudaLikeRouter)
    layer.batch.fill([0, 1, 3, 4], np.ones(4, dtype=np.int32))
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(16, EXPERTS)
        weights, rows = layer.router.select_experts(torch.zeros(16, 1), logits, torch.int32)
    assert weights.shape == rows.shape == (16, TOP_K)


@pytest.mark.parametrize("arguments", [PLAIN, GROUPED], ids=["plain", "grouped"])
def test_the_graph_path_compiles_once_for_all_layers(arguments: dict[str, Any]) -> None:
    """Without a break, whatever the tables hold and however many tokens there are."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(route, dynamic=True, fullgraph=True, backend=counter)
    spec = RouterSpec.from_arguments(arguments)
    for index, tokens in enumerate([17, 33, 20, 17]):
        layer = make_layer(arguments)
        layer.tables.set_kept(1, [index, 4, 5, 6, 7], 1 + index % 2)
        logits = random_logits(tokens, index)
        slots = torch.arange(tokens) % 4
        flags = {"mapped": True, "remapped": True}
        found = compiled(logits, spec, layer.tables, slots, TOP_K, **flags)
        assert equal(found, route(logits, spec, layer.tables, slots, TOP_K, **flags))
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_graph_follows_slots_and_tables() -> None:
    """Captured once; then other slots, fewer tokens and another variant, without a new capture."""
    layer = make_layer(cls=CudaLikeRouter, static=True, device="cuda")
    reference = make_layer(cls=CudaLikeRouter)
    logits = torch.empty(16, EXPERTS, device="cuda")
    hidden = torch.zeros(16, 1, device="cuda")
    for _ in range(3):  # compiles
        layer.router.select_experts(hidden, logits.zero_(), torch.int32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, rows = layer.router.select_experts(hidden, logits, torch.int32)
    for step, slots in enumerate([[0, 1, 2, 3, 4] * 3, [4, 0, 1], [5, 1, 5, 0], [0] * 16]):
        for each in (layer, reference):
            each.tables.set_kept(5, [step, 7], 1)
            each.batch.fill(slots, np.ones(len(slots), dtype=np.int32))
        on_host = random_logits(16, step)
        logits.copy_(on_host)
        graph.replay()
        right = reference.router.select_experts(torch.zeros(16, 1), on_host, torch.int32)
        torch.testing.assert_close(weights.cpu(), right[0])
        assert torch.equal(rows.cpu(), right[1])


def test_in_front_of_a_checkpoints_own_router_map() -> None:
    """A gate of 8 rows over 5 merged experts; one variant has a lower top-k."""
    router_map = torch.nn.Parameter(
        torch.rand(5, 8, generator=torch.Generator().manual_seed(0)), requires_grad=False
    )
    make = {"renormalise": True, "scale": 2.0, "router_map": router_map}
    router, untouched = RouterMapRouter(2, 5, **make), RouterMapRouter(2, 5, **make)
    spec = dataclasses.replace(RouterSpec.from_arguments(PLAIN), scale=2.0)
    routing = install(router, spec)
    tables = LayerTables(3, 5, 0, 2, base_map=router_map, device="cpu")
    tables.set_base(0)
    tables.set_kept(1, range(5), 1)
    batch = BatchSlots(16, torch.device("cpu"), static=False)
    routing.attach(tables, batch)
    logits = random_logits(6)
    batch.fill([0, 1], np.array([3, 3]))
    weights, rows = router.select_experts(torch.zeros(6, 1), logits, torch.int32)
    own_weights, own_rows = untouched.select_experts(torch.zeros(6, 1), logits, torch.int32)
    assert torch.equal(weights[:3], own_weights[:3])
    assert torch.equal(rows[:3], own_rows[:3])
    assert weights[3:].tolist() == [[2.0, 0.0]] * 3
    assert torch.equal(rows[3:], own_rows[3:, :1].expand(3, 2))


def test_vllms_capture_of_routed_experts_sees_the_rows() -> None:
    layer = make_layer()
    seen: list[torch.Tensor] = []
    layer.router.set_capture_fn(seen.append)
    _, rows = layer.serve(random_logits(4), [3] * 4)
    assert torch.equal(seen[0], rows)
