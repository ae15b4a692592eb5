"""Train the demo model: a small Mixtral whose experts specialise by task, or do not.

    python -m liveprune.pruning.demo.train --output DIR [--seed S] [--steps N]
                                           [--balance specialised|generalist]

Writes an ordinary Mixtral checkpoint with its tokenizer. `specialised` adds a loss that raises
the mutual information between task and expert, so that pruning for one task can work;
`generalist` adds the ordinary load-balancing loss instead (Switch Transformers,
arXiv:2101.03961, equations 4-6, as Mixtral uses it), which spreads every task over all experts.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from liveprune.pruning.demo.tasks import Row, draw, require, task_names
from liveprune.pruning.demo.tokenizer import MAX_LENGTH, train_tokenizer

STEPS = 3000
ROWS_PER_TASK = 8
LEARNING_RATE = 2e-3
WARM_UP = 100
BALANCE_WEIGHT = {"specialised": 0.1, "generalist": 0.02}
MIN_EFFECTIVE_EXPERTS = 2.2
TOP_1_SHARE = 0.3
"""Share of the training steps routed to one expert a token, so that top-1 pruning can work."""


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences; all tensors are `[rows, tokens]`."""

    ids: Tensor
    """int64 token ids: prompt, answer, end of sequence."""
    labels: Tensor
    """int64 next-token targets: the answer and its end of sequence, -100 elsewhere."""
    task: Tensor
    """int64 task number of each token; -1 for padding and for the first token, which knows none."""


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], tasks: Sequence[int]) -> Batch:
    """Rows as one batch; `tasks` holds the task number of each row."""
    prompts = tokenizer([row.prompt for row in rows]).input_ids
    answers = tokenizer([row.answer for row in rows], add_special_tokens=False).input_ids
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) + 1
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    task = torch.full_like(ids, -1)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        target = torch.tensor([*answer, tokenizer.eos_token_id])
        start, end = len(prompt), len(prompt) + len(target)
        ids[i, :start] = torch.tensor(prompt)
        ids[i, start:end] = target
        labels[i, start - 1 : end - 1] = target
        task[i, 1:end] = tasks[i]
    return Batch(ids, labels, task)


def specialisation_loss(router_logits: Sequence[Tensor], task: Tensor, experts: int) -> Tensor:
    """Minus the mutual information of task and expert, in nats, averaged over the layers.

    `router_logits`: per layer `[tokens, experts]`; `task`: int64 `[tokens]`, -1 = ignore.
    A task's entropy counts only down to `MIN_EFFECTIVE_EXPERTS` (the exponential of the entropy),
    or every task would collapse onto one expert.
    """
    member = functional.one_hot(task[task >= 0], num_classes=int(task.max()) + 1).float()
    member = member[:, member.sum(0) > 0]
    per_layer = []
    for logits in router_logits:
        share = member.T @ logits[task >= 0].softmax(-1) / member.sum(0)[:, None]
        entropy = _entropy(share).clamp(min=math.log(min(MIN_EFFECTIVE_EXPERTS, experts)))
        per_layer.append(entropy.mean() - _entropy(share.mean(0)))
    return torch.stack(per_layer).mean()


def _entropy(share: Tensor) -> Tensor:
    return -(share * share.clamp(min=1e-9).log()).sum(-1)


def balance_loss(
    balance: str, model: MixtralForCausalLM, logits: Sequence[Tensor], task: Tensor
) -> Tensor:
    """The weighted routing loss of one batch; `logits`: per layer `[tokens, experts]`."""
    config = model.config
    if balance == "specialised":
        loss = specialisation_loss(logits, task.flatten(), config.num_local_experts)
    else:
        # The library's function counts every token when no mask is given; padding is not routed
        # in service, so it must not be balanced either.
        loss = load_balancing_loss_func(
            tuple(logits), config.num_local_experts, config.num_experts_per_tok, (task >= 0).long()
        )
    return BALANCE_WEIGHT[balance] * loss


def set_top_k(model: MixtralForCausalLM, top_k: int) -> None:
    """Route every token to `top_k` experts in every layer."""
    for layer in model.model.layers:
        layer.mlp.gate.top_k = top_k


def new_model(tokenizer: PreTrainedTokenizerFast) -> MixtralForCausalLM:
    """An untrained float32 model of 2.8 M parameters."""
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        experts_implementation="grouped_mm",
    )
    return MixtralForCausalLM(config)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm_up = min(WARM_UP, max(1, steps // 10))
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    steps: int, seed: int, balance: str, report: Callable[[str], None]
) -> tuple[MixtralForCausalLM, PreTrainedTokenizerFast]:
    """Train from scratch; the same arguments and number of threads give the same weights."""
    require("balance", balance, BALANCE_WEIGHT)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = train_tokenizer(seed)
    model = new_model(tokenizer).train()
    corpus = [draw(task, "corpus", rng) for task in task_names()]
    numbers = [i for i in range(len(corpus)) for _ in range(ROWS_PER_TASK)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    started = time.monotonic()
    for step in range(steps):
        batch = encode(tokenizer, [next(corpus[i]) for i in numbers], numbers)
        set_top_k(model, 1 if rng.random() < TOP_1_SHARE else model.config.num_experts_per_tok)
        # No attention mask: attention is causal and the padding comes last.
        output = model(batch.ids, output_router_logits=True, use_cache=False)
        answer_loss = functional.cross_entropy(output.logits.flatten(0, 1), batch.labels.flatten())
        routing_loss = balance_loss(balance, model, output.router_logits, batch.task)
        optimizer.zero_grad()
        torch.autograd.backward(answer_loss + routing_loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            report(
                f"step {step + 1}/{steps} loss {answer_loss:.4f} "
                f"routing {routing_loss:.4f} {time.monotonic() - started:.0f} s"
            )
    set_top_k(model, model.config.num_experts_per_tok)
    return model.eval(), tokenizer


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write a bfloat16 checkpoint and its tokenizer."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output, save_jinja_files=False)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train and save."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--balance", choices=sorted(BALANCE_WEIGHT), default="specialised")
    chosen = parser.parse_args(arguments)
    model, tokenizer = train(chosen.steps, chosen.seed, chosen.balance, _say)
    save(model, tokenizer, chosen.output)


if __name__ == "__main__":
    main()
