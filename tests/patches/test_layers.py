from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from liveprune.patches import layers
from liveprune.patches.layers import wrap_create_router, wrap_gate_init, wrap_make_layers
from liveprune.patches.router_map import RouterMapRouter
from liveprune.pruning.errors import IncompatibleEnvironmentError

TABLE = {"1": [5, 2, 0, ""], "2": [4, 1, 8, "router_map"], "3": [8, 2, 8, "router_map"]}
"""Layer 0 is dense; layer 3 has a square router map."""


def engine(table: Any, **parallel: Any) -> SimpleNamespace:
    """The parts of vLLM's config that are looked at; uniform config of eight experts, top-2."""
    config = SimpleNamespace(
        model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, hidden_size=64
    )
    if table is not None:
        config.liveprune_layers = table
    names = ("tensor_parallel_size", "data_parallel_size", "prefill_context_parallel_size")
    sizes = dict.fromkeys(names, 1)
    switches = {"enable_eplb": False, "enable_expert_parallel": False}
    return SimpleNamespace(
        additional_config={},
        model_config=SimpleNamespace(hf_text_config=config),
        parallel_config=SimpleNamespace(**{**sizes, **switches, **parallel}),
        speculative_config=None,
    )


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[SimpleNamespace], Any]:
    def set_current(vllm_config: SimpleNamespace) -> Any:
        monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: vllm_config)
        return vllm_config.model_config.hf_text_config

    return set_current


def original(num_hidden_layers: int, layer_fn: Callable[..., Any], prefix: str) -> list[Any]:
    return [layer_fn(prefix=f"{prefix}.{i}") for i in range(num_hidden_layers)]


class Gate(torch.nn.Module):
    def __init__(self, input_size: int, output_size: int, *, prefix: str = "") -> None:
        super().__init__()
        self.rows = output_size


def create_router(**kwargs: Any) -> str:
    return "vLLM's own"


def builder(config: Any) -> Callable[..., Any]:
    """A layer that reads the config as vLLM's models do, with a gate and a router."""
    gate_init = wrap_gate_init(Gate.__init__)
    make_router = wrap_create_router(create_router)

    def layer_fn(prefix: str) -> Any:
        layer = torch.nn.Module()
        layer.block_sparse_moe = block = torch.nn.Module()
        block.seen = (config.num_local_experts, config.num_experts_per_tok)
        block.gate = Gate.__new__(Gate)
        gate_init(block.gate, 64, config.num_local_experts, prefix=f"{prefix}.gate")
        block.router = make_router(
            top_k=config.num_experts_per_tok,
            global_num_experts=config.num_local_experts,
            renormalize=True,
            routed_scaling_factor=1.0,
        )
        return layer

    return layer_fn


def test_without_a_table_the_original_gets_exactly_what_was_passed(
    use: Callable[[SimpleNamespace], Any],
) -> None:
    use(engine(None))
    seen = []

    def spy(*args: Any) -> str:
        seen.append(args)
        return "layers"

    def layer_fn(prefix: str) -> None: ...

    assert wrap_make_layers(spy)(4, layer_fn, "model.layers") == "layers"
    assert seen == [(4, layer_fn, "model.layers")]
    assert seen[0][1] is layer_fn


def test_each_layer_is_built_with_its_own_counts(use: Callable[[SimpleNamespace], Any]) -> None:
    config = use(engine(TABLE))
    built = wrap_make_layers(original)(4, builder(config), "model.layers")
    blocks = [layer.block_sparse_moe for layer in built]
    assert [block.seen for block in blocks] == [(8, 2), (5, 2), (4, 1), (8, 2)]
    assert [block.gate.rows for block in blocks] == [8, 5, 8, 8]
    assert [type(block.router) for block in blocks] == [str, str, RouterMapRouter, RouterMapRouter]
    # As vLLM's loader looks for it, and the very tensor that the router reads.
    for block, shape in zip(blocks[2:], [(4, 8), (8, 8)], strict=True):
        assert dict(block.named_parameters()).keys() == {"router_map"}
        assert block.router_map.shape == shape
        assert block.router_map is block.router.router_map
    assert not any(True for block in blocks[:2] for _ in block.parameters())


def test_the_config_is_uniform_again_afterwards(use: Callable[[SimpleNamespace], Any]) -> None:
    config = use(engine(TABLE))
    before = dict(vars(config))

    def failing(prefix: str) -> None:
        raise ValueError(prefix)

    wrap_make_layers(original)(4, builder(config), "model.layers")
    assert vars(config) == before
    with pytest.raises(ValueError, match="layers"):
        wrap_make_layers(lambda n, build, prefix: build(prefix="layers.1"))(1, failing, "layers")
    assert vars(config) == before
    # And nothing built later is taken for a part of that layer.
    gate = Gate.__new__(Gate)
    wrap_gate_init(Gate.__init__)(gate, 64, 4)
    assert gate.rows == 4
    assert wrap_create_router(create_router)(top_k=2) == "vLLM's own"


def test_other_gates_of_a_mapped_layer_keep_their_rows() -> None:
    config = SimpleNamespace(num_local_experts=8, num_experts_per_tok=2, hidden_size=64)
    architecture = layers.architecture_of({"model_type": "mixtral"})
    with layers._layer_counts(config, architecture, 4, 2, 8, "router_map"):
        gate = Gate.__new__(Gate)
        wrap_gate_init(Gate.__init__)(gate, 64, 1)
        assert gate.rows == 1
        wrap_gate_init(Gate.__init__)(gate, 64, output_size=4)
        assert gate.rows == 8


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"enable_eplb": True}, r"--enable-eplb: .* one expert count .* \[4, 5, 8\]"),
        (
            {"enable_expert_parallel": True, "tensor_parallel_size": 2},
            "layer 1: 5 experts, expected a multiple of the 2 expert-parallel ranks",
        ),
        (
            {
                "enable_expert_parallel": True,
                "tensor_parallel_size": 1,
                "data_parallel_size": 5,
            },
            "layer 2: 4 experts, expected a multiple of the 5 expert-parallel ranks",
        ),
    ],
)
def test_parallel_layouts_that_need_one_count_are_refused_before_building(
    parallel: dict[str, Any], message: str, use: Callable[[SimpleNamespace], Any]
) -> None:
    use(engine(TABLE, **parallel))
    with pytest.raises(IncompatibleEnvironmentError, match=message):
        wrap_make_layers(original)(4, pytest.fail, "model.layers")


def test_expert_parallel_ranks_that_divide_every_layer_are_fine(
    use: Callable[[SimpleNamespace], Any],
) -> None:
    table = {"0": [4, 2, 0, ""], "1": [6, 2, 0, ""]}
    config = use(engine(table, enable_expert_parallel=True, tensor_parallel_size=2))
    assert len(wrap_make_layers(original)(2, builder(config), "model.layers")) == 2


@pytest.mark.parametrize("table", [TABLE, None])
def test_drafting_with_layers_of_another_count_is_refused(
    table: Any, use: Callable[[SimpleNamespace], Any]
) -> None:
    """Also where all pruned layers agree: the draft layers still hold the base model's experts."""
    current = engine(table)
    current.speculative_config = SimpleNamespace(method="mtp")
    use(current).liveprune = {"version": 1, "mtp_experts": 16}
    message = r"--speculative-config: .* layers have 16 experts, and vLLM would build them with 8"
    with pytest.raises(IncompatibleEnvironmentError, match=message):
        wrap_make_layers(original)(4, pytest.fail, "model.layers")


@pytest.mark.parametrize(("method", "drafts"), [("mtp", 8), ("mtp", None), ("ngram", 16)])
def test_other_drafting_is_left_alone(
    method: str, drafts: int | None, use: Callable[[SimpleNamespace], Any]
) -> None:
    current = engine(None)
    current.speculative_config = SimpleNamespace(method=method)
    config = use(current)
    if drafts is not None:
        config.liveprune = {"version": 1, "mtp_experts": drafts}
    assert len(wrap_make_layers(original)(4, builder(config), "model.layers")) == 4
