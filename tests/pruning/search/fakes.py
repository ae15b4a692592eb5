"""A task without an engine: fitness is a plain function of plan and row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.search.candidate import Candidate
from liveprune.pruning.search.genome import Genome, Space

Fitness = Callable[[Plan | None, int], float]


class FakeTask:
    """``binary`` values are drawn, the same always, with the fitness as their chance."""

    measure = "choice"

    def __init__(
        self, fitness: Fitness, size: int = 40, name: str = "train", *, binary: bool = False
    ) -> None:
        self.fitness = fitness
        self.size = size
        self.binary = binary
        self.digest = hashlib.blake2b(f"{name}{size}".encode(), digest_size=16).hexdigest()
        self.calls: list[tuple[list[str], list[int]]] = []
        self.before: Callable[[Sequence[Plan | None]], None] = lambda plans: None

    def values(
        self, engine: Any, plans: Sequence[Plan | None], rows: Sequence[int] | None = None
    ) -> np.ndarray:
        rows = range(self.size) if rows is None else rows
        names = ["full" if plan is None else plan.digest for plan in plans]
        self.calls.append((names, list(rows)))
        self.before(plans)
        values = np.array([[self.fitness(plan, row) for row in rows] for plan in plans])
        if not self.binary:
            return values
        chance = [[self._chance(name, row) for row in rows] for name in names]
        return np.where(np.isnan(values), np.nan, chance < values)

    def _chance(self, name: str, row: int) -> float:
        key = f"{name}{self.digest}{row}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest()) / 2**48


def spec_of(
    experts: int = 4, layers: int = 2, top_k: int = 1, family: str = "mixtral", **changes: Any
) -> ModelSpec:
    counts = {
        "mixtral": {"num_local_experts": experts, "intermediate_size": 32},
        "qwen2_moe": {"num_experts": experts, "moe_intermediate_size": 32},
        "deepseek_v3": {
            "n_routed_experts": experts,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_shared_experts": 1,
        },
    }
    config = {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": 64,
        "num_experts_per_tok": top_k,
        **counts[family],
    }
    architectures = {
        "mixtral": "MixtralForCausalLM",
        "qwen2_moe": "Qwen2MoeForCausalLM",
        "deepseek_v3": "DeepseekV3ForCausalLM",
    }
    config["architectures"] = [architectures[family]]
    return ModelSpec.from_config(config | changes)


def candidate(
    space: Space, genome: Genome, index: int, mean: float, rows: int = 4, **state: Any
) -> Candidate:
    return Candidate(
        index, "prune", genome, space.plan(genome), values=np.full(rows, mean), **state
    )
