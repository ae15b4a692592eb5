"""What pruning does to the demo model: accuracy by task, full and pruned.

    python -m liveprune.pruning.demo.report [--model DIR] [--rows N]

Experts are ranked by how often the router chooses them on a task's train rows; accuracy is the
share of held-out test rows answered exactly under greedy decoding.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerFast

from liveprune.pruning.demo import model_path, rows_path, task_names
from liveprune.pruning.demo.rows import read_rows
from liveprune.pruning.demo.tasks import Row
from liveprune.pruning.demo.train import Batch, encode, set_top_k

RANDOM_SEEDS = 5

Kept = list[list[int]]
"""Per layer the kept experts, ascending."""


def load(path: Path) -> tuple[MixtralForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer of a demo checkpoint, in the dtype it was saved in."""
    model = MixtralForCausalLM.from_pretrained(path, experts_implementation="grouped_mm")
    return model.eval(), AutoTokenizer.from_pretrained(path)


@torch.inference_mode()
def exact_share(model: MixtralForCausalLM, batch: Batch) -> float:
    """Share of rows whose whole answer, end of sequence included, greedy decoding would give.

    One forward pass over prompt and answer: decoding greedily gives the answer exactly when
    every one of its tokens is the argmax after those before it.
    """
    predicted = model(batch.ids, use_cache=False).logits.argmax(-1)
    right = (predicted == batch.labels) | (batch.labels == -100)
    return float(right.all(-1).float().mean())


@torch.inference_mode()
def routing_counts(model: MixtralForCausalLM, batch: Batch) -> np.ndarray:
    """How many tokens chose each expert, int64 `[layers, experts]`; padding is not counted."""
    experts = model.config.num_local_experts
    with _chosen_experts(model) as chosen:
        model(batch.ids, use_cache=False)
    counted = (batch.task >= 0).flatten()
    return torch.stack([c[counted].flatten().bincount(minlength=experts) for c in chosen]).numpy()


@contextmanager
def _chosen_experts(model: MixtralForCausalLM) -> Iterator[list[Tensor]]:
    """Collects the chosen experts of each layer, int64 `[tokens, top_k]`, in layer order."""
    chosen: list[Tensor] = []

    def keep(_gate: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen.append(output[2])

    hooks = [layer.mlp.gate.register_forward_hook(keep) for layer in model.model.layers]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def most_used(counts: np.ndarray, experts: int) -> Kept:
    """The most chosen experts of each layer; ties go to the lower number."""
    order = np.argsort(-counts, axis=1, kind="stable")
    return [sorted(row[:experts].tolist()) for row in order]


def random_experts(counts: np.ndarray, experts: int, seed: int) -> Kept:
    """As many experts per layer, drawn uniformly."""
    rng = np.random.default_rng(seed)
    layers, total = counts.shape
    return [sorted(rng.choice(total, experts, replace=False).tolist()) for _ in range(layers)]


def pruned(model: MixtralForCausalLM, kept: Kept, top_k: int) -> MixtralForCausalLM:
    """A copy with only the kept experts, `top_k` of them chosen for each token."""
    smaller = copy.deepcopy(model)
    set_top_k(smaller, top_k)
    for layer, experts in zip(smaller.model.layers, kept, strict=True):
        gate, bank = layer.mlp.gate, layer.mlp.experts
        gate.num_experts = bank.num_experts = len(experts)
        gate.weight = nn.Parameter(gate.weight[experts])
        bank.gate_up_proj = nn.Parameter(bank.gate_up_proj[experts])
        bank.down_proj = nn.Parameter(bank.down_proj[experts])
    return smaller


Recipe = Callable[[np.ndarray], Iterable[tuple[Kept, int]]]
"""Routing counts of a task -> the (kept experts, top-k) whose accuracies are averaged."""


def _all_experts(top_k: int, counts: np.ndarray) -> Iterable[tuple[Kept, int]]:
    yield most_used(counts, counts.shape[1]), top_k


def _by_use(experts: int, top_k: int, counts: np.ndarray) -> Iterable[tuple[Kept, int]]:
    yield most_used(counts, experts), top_k


def _at_random(experts: int, top_k: int, counts: np.ndarray) -> Iterable[tuple[Kept, int]]:
    for seed in range(RANDOM_SEEDS):
        yield random_experts(counts, experts, seed), top_k


RECIPES: dict[str, Recipe] = {
    "full (8, top-2)": partial(_all_experts, 2),
    "8, top-1": partial(_all_experts, 1),
    "4 most used, top-2": partial(_by_use, 4, 2),
    "4 most used, top-1": partial(_by_use, 4, 1),
    "2 most used, top-2": partial(_by_use, 2, 2),
    "2 most used, top-1": partial(_by_use, 2, 1),
    f"4 random, top-2 (mean of {RANDOM_SEEDS})": partial(_at_random, 4, 2),
    f"4 random, top-1 (mean of {RANDOM_SEEDS})": partial(_at_random, 4, 1),
}


def measure(path: Path, rows: int | None = None) -> dict[str, dict[str, float]]:
    """Exact share by recipe and task; `rows`: only the first so many test rows of each task."""
    model, tokenizer = load(path)
    table: dict[str, dict[str, float]] = {name: {} for name in RECIPES}
    for number, task in enumerate(task_names()):

        def batch(found: Sequence[Row], number: int = number) -> Batch:
            return encode(tokenizer, found, [number] * len(found))

        counts = routing_counts(model, batch(read_rows(rows_path(task, "train"))))
        test = batch(read_rows(rows_path(task, "test"))[:rows])
        for name, recipe in RECIPES.items():
            shares = [exact_share(pruned(model, *variant), test) for variant in recipe(counts)]
            table[name][task] = float(np.mean(shares))
    return table


def as_markdown(table: dict[str, dict[str, float]]) -> str:
    """The table in percent, a row per recipe, with the mean over the tasks."""
    tasks = task_names()
    lines = ["| experts kept | " + " | ".join(tasks) + " | mean |", "|---" * (len(tasks) + 2) + "|"]
    for name, shares in table.items():
        values = [shares[task] for task in tasks]
        cells = (f"{100 * value:.1f}" for value in (*values, float(np.mean(values))))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: print the table."""
    parser = argparse.ArgumentParser(description="Accuracy of the demo model, full and pruned.")
    parser.add_argument("--model", type=Path, default=model_path(), help="a demo checkpoint")
    parser.add_argument("--rows", type=int, help="test rows of each task (default: all)")
    chosen = parser.parse_args(arguments)
    sys.stdout.write(as_markdown(measure(chosen.model, chosen.rows)) + "\n")


if __name__ == "__main__":
    main()
