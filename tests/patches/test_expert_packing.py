from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn; pytest makes errors of warnings
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.layers.quantization.utils.flashinfer_utils import swap_w13_to_w31
    from vllm.platforms import current_platform

from liveprune.patches.expert_packing import Packing
from liveprune.pruning.errors import EngineError

HIDDEN, EXPERTS = 64, 5


def fake_layer(size: int = 48, **changes: Any) -> SimpleNamespace:
    """vLLM's RoutedExperts as far as it is looked at; parameters on the meta device."""
    method = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
    method.experts_cls = changes.pop("kernel", cpu_moe.CPUUnquantizedExperts)
    method.unquantized_backend = changes.pop("backend", UnquantizedMoeBackend.CPU)
    parallel = SimpleNamespace(use_ep=changes.pop("use_ep", False))
    config = SimpleNamespace(
        hidden_dim=HIDDEN,
        hidden_dim_unpadded=HIDDEN,
        intermediate_size_per_partition=size,
        intermediate_size_per_partition_unpadded=size,
        activation=MoEActivation.SILU,
        is_act_and_mul=True,
        has_bias=False,
        tp_shard_with_padding=False,
        moe_parallel_config=parallel,
    )
    vars(config).update(changes)
    w13, w2 = (
        torch.empty(EXPERTS, *shape, device="meta")
        for shape in ((2 * size, HIDDEN), (HIDDEN, size))
    )
    return SimpleNamespace(
        layer_name="model.layers.3.mlp.experts",
        quant_method=method,
        moe_config=config,
        w13_weight=w13,
        w2_weight=w2,
        activation=MoEActivation.SILU,
    )


def experts(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return tuple(  # type: ignore[return-value]
        torch.randn(EXPERTS, *shape, generator=generator).to(dtype)
        for shape in ((2 * size, HIDDEN), (HIDDEN, size))
    )


def packed_by_vllm(
    w13: torch.Tensor, w2: torch.Tensor, kernel_class: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole layer through vLLM's own process_weights_after_loading."""
    layer = torch.nn.Module()
    layer.w13_weight = torch.nn.Parameter(w13.clone(), requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(w2.clone(), requires_grad=False)
    kernel = kernel_class.__new__(kernel_class)
    kernel.moe_config = fake_layer(w2.shape[2]).moe_config
    kernel.process_weights_after_loading(layer)
    return layer.w13_weight.data, layer.w2_weight.data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [32, 48, 64])
def test_packing_one_expert_gives_its_row_of_the_packed_layer(
    size: int, dtype: torch.dtype
) -> None:
    w13, w2 = experts(size, dtype)
    right13, right2 = packed_by_vllm(w13, w2, cpu_moe.CPUUnquantizedExperts)
    packing = Packing.of(fake_layer(size))
    assert packing.row_shapes() == (tuple(right13.shape[1:]), tuple(right2.shape[1:]))
    assert packing.expert_shapes() == (tuple(w13.shape[1:]), tuple(w2.shape[1:]))
    assert not packing.is_identity
    assert not torch.equal(right13.reshape(-1)[: w13.numel()], w13.reshape(-1)), "packing moves"
    rows = torch.full_like(right13, 7.0), torch.full_like(right2, 7.0)
    for expert in range(EXPERTS):
        row13, row2 = packing.pack(w13[expert], w2[expert])
        assert torch.equal(row13, right13[expert])
        assert torch.equal(row2, right2[expert])
        if expert != 3:
            packing.pack_into(w13[expert], w2[expert], rows[0][expert], rows[1][expert])
    others = [0, 1, 2, 4]
    assert torch.equal(rows[0][others], right13[others])
    assert torch.equal(rows[1][others], right2[others])
    assert bool((rows[0][3] == 7.0).all() and (rows[1][3] == 7.0).all()), "neighbours untouched"


def test_merging_packed_rows_gives_the_packed_merged_expert() -> None:
    w13, w2 = experts(48, torch.float32)
    packing = Packing.of(fake_layer(48))
    merged = packing.pack(w13[0] * 0.3 - w13[4] * 1.7, w2[0] * 0.3 - w2[4] * 1.7)
    rows = packing.pack(w13[0], w2[0]), packing.pack(w13[4], w2[4])
    for found, first, last in zip(merged, *rows, strict=True):
        assert torch.equal(found, first * 0.3 - last * 1.7)


def test_subclasses_pack_for_their_instruction_set() -> None:
    packing = Packing.of(fake_layer(48, kernel=cpu_moe.X86CPUUnquantizedExperts))
    assert (packing.isa, packing.padded) == ("amx", 64)
    packing = Packing.of(fake_layer(48, kernel=cpu_moe.PowerCPUUnquantizedExperts))
    assert (packing.isa, packing.padded) == ("vsx", 48), "aligned to 16, not to 32"


def test_zentorch_takes_experts_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_moe, "is_zentorch_moe_supported", lambda layer: True)
    packing = Packing.of(fake_layer(48))
    w13, w2 = experts(48, torch.bfloat16)
    assert packing.is_identity
    assert all(
        torch.equal(a, b) for a, b in zip(packing.pack(w13[2], w2[2]), (w13[2], w2[2]), strict=True)
    )


def test_cuda_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    w13, w2 = experts(48, torch.bfloat16)
    triton = Packing.of(fake_layer(48, backend=UnquantizedMoeBackend.TRITON, kernel=object))
    assert triton.is_identity
    assert triton.row_shapes() == triton.expert_shapes() == ((96, 64), (64, 48))
    cutlass = Packing.of(
        fake_layer(48, backend=UnquantizedMoeBackend.FLASHINFER_CUTLASS, kernel=object)
    )
    row13, row2 = cutlass.pack(w13[1], w2[1])
    assert torch.equal(row13, swap_w13_to_w31(w13)[1])
    assert torch.equal(row2, w2[1])


class _OtherPacking(cpu_moe.CPUUnquantizedExperts):  # type: ignore[misc]
    def process_weights_after_loading(self, layer: Any) -> None:
        """Something that nobody here knows."""


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"has_bias": True}, "experts with biases"),
        ({"is_act_and_mul": False}, "experts without a gate projection"),
        ({"use_ep": True}, "expert parallelism"),
        ({"hidden_dim": 128}, "a hidden size of 64 padded to 128"),
        ({"intermediate_size_per_partition": 128}, "an intermediate size padded at creation"),
        ({"tp_shard_with_padding": True}, "slices padded to blocks"),
        ({"kernel": _OtherPacking}, r"the layout of CPU \(_OtherPacking\)"),
        ({"kernel": object, "backend": UnquantizedMoeBackend.FLASHINFER_TRTLLM}, "FlashInfer TRTL"),
        ({"kernel": None, "backend": UnquantizedMoeBackend.OOT}, r"OOT \(no kernel\)"),
        # On a platform that is not CUDA.
        ({"kernel": object, "backend": UnquantizedMoeBackend.TRITON}, r"TRITON \(object\)"),
    ],
)
def test_unknown_layouts_are_refused_by_name(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(EngineError, match=found) as caught:
        Packing.of(fake_layer(48, **changes))
    assert str(caught.value).startswith("model.layers.3.mlp.experts: found ")
    assert "expected plain gated experts without biases, run by a CPU kernel" in str(caught.value)


def test_quantised_methods_are_refused() -> None:
    layer = fake_layer(48)
    layer.quant_method = SimpleNamespace()
    with pytest.raises(EngineError, match="found experts run by SimpleNamespace"):
        Packing.of(layer)


ENGINE = """
import json, sys
from pathlib import Path
import torch
from vllm import LLM
from liveprune.patches.expert_packing import Packing
from liveprune.patches.expert_reader import ExpertReader
from liveprune.pruning.model_spec import ModelSpec

model, dtype, answer = sys.argv[1:]
llm = LLM(model, enforce_eager=True, max_model_len=64, num_gpu_blocks_override=16, dtype=dtype,
          skip_tokenizer_init=True, disable_log_stats=True)
loaded = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
spec = ModelSpec.from_path(Path(model))
reader = ExpertReader(Path(model), spec, dtype=getattr(torch, dtype), tp_rank=0, tp_size=1)
found = {}
for layer in spec.layers:
    experts = loaded.model.layers[layer.index].mlp.experts.routed_experts
    packing = Packing.of(experts)
    found[layer.index] = [
        all(torch.equal(a.view(torch.uint8), b.data.view(torch.uint8)) for a, b in
            zip(packing.pack(*reader.read(layer.index, expert)),
                (experts.w13_weight[expert], experts.w2_weight[expert]), strict=True))
        for expert in range(layer.experts)
    ]
Path(answer).write_text(json.dumps(found))
"""


@pytest.mark.engine
def test_equals_the_tensors_of_a_loaded_engine(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """float32 weights served in bfloat16, an intermediate size that the kernel pads."""
    from tests.e2e.engine import ENVIRONMENT, PLUGINS

    model = tiny_model(
        "qwen2_moe", num_attention_heads=2, num_key_value_heads=1, moe_intermediate_size=48
    )
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, str(model), "bfloat16", str(tmp_path / "answer.json")],
        env=os.environ | ENVIRONMENT | {PLUGINS: ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "answer.json").read_text())
    assert found == {str(layer): [True] * 8 for layer in range(3)}
