from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from liveprune.pruning.demo.tasks import Row
from liveprune.pruning.demo.tokenizer import train_tokenizer
from liveprune.pruning.demo.train import (
    balance_loss,
    encode,
    learning_rate_factor,
    main,
    new_model,
    specialisation_loss,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(seed=0, rows_per_task=200)


def router_logits(choice: Sequence[int]) -> torch.Tensor:
    """Logits of a router that is certain of one expert for each token."""
    return 50 * torch.nn.functional.one_hot(torch.tensor(list(choice)), 8).float()


def test_encode_asks_for_the_answer_and_its_end_only(tokenizer) -> None:
    batch = encode(tokenizer, [Row("sort: 21\n", "12"), Row("sort: 1\n", "1")], [3, 0])
    prompt = tokenizer("sort: 21\n").input_ids
    answer = tokenizer("12", add_special_tokens=False).input_ids
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert batch.ids[0].tolist() == [*prompt, *answer, end]
    assert batch.ids[1, -2:].tolist() == [pad, pad]
    nothing = [-100] * (len(prompt) - 1)
    assert batch.labels[0].tolist() == [*nothing, *answer, end, -100]
    # The beginning of sequence belongs to no task, and neither does padding.
    assert batch.task[0].tolist() == [-1] + [3] * (len(prompt) + 2)
    assert batch.task[1].tolist() == [-1] + [0] * (len(prompt)) + [-1, -1]


def test_specialisation_loss_of_separate_tasks() -> None:
    # Two tasks, three experts each, none shared: H(expert) = ln 6, H(expert | task) = ln 3.
    logits = router_logits([0, 1, 2, 3, 4, 5])
    loss = specialisation_loss([logits, logits], torch.tensor([0, 0, 0, 1, 1, 1]), experts=8)
    assert loss.item() == pytest.approx(math.log(3) - math.log(6), abs=1e-4)


def test_specialisation_loss_of_shared_experts_is_zero() -> None:
    logits = router_logits([0, 1, 2, 0, 1, 2])
    loss = specialisation_loss([logits], torch.tensor([0, 0, 0, 4, 4, 4]), experts=8)
    assert loss.item() == pytest.approx(0.0, abs=1e-4)


def test_specialisation_loss_does_not_reward_one_expert_per_task() -> None:
    # H(expert | task) = 0 counts as ln 2.2; the token of task -1 is not counted.
    logits = router_logits([0, 0, 1, 1, 7])
    loss = specialisation_loss([logits], torch.tensor([0, 0, 1, 1, -1]), experts=8)
    assert loss.item() == pytest.approx(math.log(2.2) - math.log(2), abs=1e-4)


def test_learning_rate_warms_up_and_ends_at_nothing() -> None:
    assert learning_rate_factor(0, 3000) == pytest.approx(0.01)
    assert learning_rate_factor(1500, 3000) == pytest.approx(0.5)
    assert learning_rate_factor(3000, 3000) == pytest.approx(0.0)


def test_training_is_reproducible_and_writes_a_stock_checkpoint(tmp_path, capsys) -> None:
    runs = {"first": "3", "again": "3", "other": "4"}
    for run, seed in runs.items():
        main(["--output", str(tmp_path / run), "--seed", seed, "--steps", "2"])
    assert "step 2/2" in capsys.readouterr().err
    first, again, other = (load_file(tmp_path / run / "model.safetensors") for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "again" / name).read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert model.config.num_experts_per_tok == 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "first")) == model.config.vocab_size


def test_generalist_loss_is_least_when_every_expert_is_used_alike(tokenizer) -> None:
    model = new_model(tokenizer)
    task = torch.zeros(1, 8, dtype=torch.int64)
    even, uneven = (
        balance_loss("generalist", model, [router_logits(choice)], task).item()
        for choice in (range(8), [0] * 8)
    )
    # experts * sum(share of tokens * share of probability), both choices counted: at least top-k.
    assert even == pytest.approx(0.02 * 2, rel=0.2)
    assert uneven > 3 * even


def test_unknown_balance_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path), "--balance", "other"])
    assert "generalist" in capsys.readouterr().err
