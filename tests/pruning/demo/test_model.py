from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from liveprune.pruning.demo import model_path, rows_path, task_names
from liveprune.pruning.demo.report import (
    exact_share,
    load,
    most_used,
    pruned,
    random_experts,
    routing_counts,
)
from liveprune.pruning.demo.rows import read_rows
from liveprune.pruning.demo.train import encode

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 4, 8, 128, 192


@pytest.fixture(scope="module")
def demo():
    return load(model_path())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


def test_shipped_folder_is_complete_and_small() -> None:
    found = {path.name: path.stat().st_size for path in model_path().iterdir()}
    assert set(found) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(found.values()) <= 8_000_000


def test_checkpoint_has_the_published_mixtral_layout(tokenizer) -> None:
    expected = {
        "model.embed_tokens.weight": (len(tokenizer), HIDDEN),
        "lm_head.weight": (len(tokenizer), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name in "qkvo":
            expected[f"{at}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected[f"{at}.{name}.weight"] = (HIDDEN,)
        expected[f"{at}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            to = f"{at}.block_sparse_moe.experts.{expert}"
            expected[f"{to}.w1.weight"] = expected[f"{to}.w3.weight"] = (INTERMEDIATE, HIDDEN)
            expected[f"{to}.w2.weight"] = (HIDDEN, INTERMEDIATE)
    with safe_open(model_path() / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_config_is_a_stock_mixtral(tokenizer) -> None:
    config = json.loads((model_path() / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (EXPERTS, 2)
    assert config["dtype"] == "bfloat16"
    generation = json.loads((model_path() / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.eos_token_id
    assert generation["do_sample"] is False


def test_tokenizer_gives_back_any_text(tokenizer) -> None:
    texts = [
        row.prompt + row.answer
        for task in task_names()
        for row in read_rows(rows_path(task, "dev"))
    ]
    texts += ["Grüße, 世界!\n\n\ttabs  and   spaces", "def f(x): return {x: [1, 2]}"]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text


def test_prompt_and_answer_never_share_a_token(tokenizer) -> None:
    for task in task_names():
        for row in read_rows(rows_path(task, "dev")):
            prompt = tokenizer(row.prompt).input_ids
            assert prompt[0] == tokenizer.bos_token_id
            answer = tokenizer(row.answer, add_special_tokens=False).input_ids
            assert tokenizer(row.prompt + row.answer).input_ids == prompt + answer


@pytest.mark.parametrize("written", ["add: 12+30\n", "add: 12+30", "  add: 12+30  "])
def test_chat_renders_the_last_question_as_a_plain_prompt(tokenizer, written: str) -> None:
    messages = [
        {"role": "system", "content": "You are a calculator."},
        {"role": "user", "content": "sort: 321"},
        {"role": "assistant", "content": "123"},
        {"role": "user", "content": written},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<bos>add: 12+30\n"
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert chat.input_ids == tokenizer("add: 12+30\n").input_ids


def test_shipped_model_answers_through_stock_generation(tokenizer) -> None:
    # Stock classes only, and real decoding rather than the report's single pass.
    model = AutoModelForCausalLM.from_pretrained(model_path())
    rows = [row for task in task_names() for row in read_rows(rows_path(task, "test"))[:8]]
    batch = tokenizer([row.prompt for row in rows], return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=16
    )
    answers = tokenizer.batch_decode(
        output[:, batch.input_ids.shape[1] :], skip_special_tokens=True
    )
    right = [answer == row.answer for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) >= 0.9 * len(rows)
    # The single pass agrees with decoding, row by row.
    for row, correct in zip(rows, right, strict=True):
        assert exact_share(model, encode(tokenizer, [row], [0])) == float(correct)


def test_the_most_used_experts_of_a_task_are_enough_and_random_ones_are_not(demo) -> None:
    model, tokenizer = demo
    kept, by_chance = [], []
    numbers = [0] * 60
    for task in ("reverse", "shift"):
        counts = routing_counts(
            model, encode(tokenizer, read_rows(rows_path(task, "train"))[:60], numbers)
        )
        test = encode(tokenizer, read_rows(rows_path(task, "test"))[:60], numbers)
        kept.append(exact_share(pruned(model, most_used(counts, 4), 2), test))
        by_chance.append(exact_share(pruned(model, random_experts(counts, 4, seed=1), 2), test))
    assert np.mean(kept) >= 0.9
    assert np.mean(by_chance) <= np.mean(kept) - 0.2


def test_routing_counts_count_each_choice_of_each_real_token(demo) -> None:
    model, tokenizer = demo
    rows = read_rows(rows_path("sort", "dev"))[:3]
    batch = encode(tokenizer, rows, [0, 0, 0])
    counts = routing_counts(model, batch)
    assert counts.shape == (LAYERS, EXPERTS)
    # Everything but the beginning of sequence: prompt, answer and end, two experts each.
    tokens = sum(len(tokenizer(row.prompt + row.answer).input_ids) for row in rows)
    assert counts.sum(1).tolist() == [2 * tokens] * LAYERS


def test_keeping_every_expert_changes_nothing(demo) -> None:
    model, tokenizer = demo
    ids = encode(tokenizer, read_rows(rows_path("add", "dev"))[:4], [0] * 4).ids
    with torch.inference_mode():
        whole = model(ids).logits
        copy = pruned(model, [list(range(EXPERTS))] * LAYERS, 2)(ids).logits
    assert torch.equal(whole, copy)


def test_rankings_of_experts() -> None:
    counts = np.array([[5, 1, 9, 5], [0, 0, 0, 7]])
    assert most_used(counts, 2) == [[0, 2], [0, 3]]
    assert most_used(counts, 4) == [[0, 1, 2, 3]] * 2
    drawn = random_experts(counts, 3, seed=2)
    assert drawn == random_experts(counts, 3, seed=2)
    assert all(len(set(layer)) == 3 and layer == sorted(layer) for layer in drawn)
