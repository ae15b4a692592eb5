"""The subprocess of ``engine.run_jobs``: reads jobs, writes what each engine answered."""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_SIZE = 32
"""Tokens in a KV block: small, so that short prompts fill some and the prefix cache has hits."""

_tensors_read = 0


def main(question: str, answer: str) -> None:
    _count_tensors()
    collect = gc.collect
    # Each engine asks for seven full collections, two thirds of its time here; one must do.
    gc.collect = lambda generation=2: 0
    outcomes = {}
    for job in json.loads(Path(question).read_text()):
        print("job", job["name"], flush=True)
        outcomes[job["name"]] = _run(job)
        collect()
    Path(answer).write_text(json.dumps(outcomes))


def _run(job: dict[str, Any]) -> dict[str, Any]:
    global _tensors_read  # noqa: PLW0603 - counted by a wrapper inside vLLM
    _tensors_read = 0
    outcome: dict[str, Any] = {
        "cold": [],
        "warm": [],
        "cached": [],
        "logprobs": [],
        "layers": None,
        "classes": {},
        "error": "",
    }
    try:
        outcome |= _serve(job)
    except Exception as error:  # noqa: BLE001 - whatever refuses a model is the outcome
        traceback.print_exc()
        outcome["error"] = f"{type(error).__name__}: {error}"
    return outcome | {"tensors_read": _tensors_read}


def _serve(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["model"],
        enforce_eager=not job["compiled"],
        max_model_len=256,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=128,
        dtype="float32",
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        seed=0,
        **job["options"],
    )
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in job["prompts"]]
    plain = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False
    )
    scored = plain.clone()
    scored.prompt_logprobs = 0  # the prompt's own tokens only; such requests skip cache reads
    cold = llm.generate(prompts, scored, use_tqdm=False)
    warm = llm.generate(prompts, plain, use_tqdm=False)
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    return {
        "cold": [list(request.outputs[0].token_ids) for request in cold],
        "warm": [list(request.outputs[0].token_ids) for request in warm],
        "cached": [request.num_cached_tokens or 0 for request in warm],
        "logprobs": [_prompt_logprobs(request) for request in cold],
        "layers": getattr(llm.model_config.hf_config, "liveprune_layers", None),
        "classes": _classes(model),
    }


def _prompt_logprobs(request: Any) -> list[float]:
    pairs = zip(request.prompt_token_ids, request.prompt_logprobs, strict=True)
    return [entry[token].logprob for token, entry in list(pairs)[1:]]


def _classes(model: Any) -> dict[str, str]:
    found = {}
    for name, module in model.named_modules():
        found[name] = f"{type(module).__module__}.{type(module).__qualname__}"
        router = getattr(module, "router", None)
        if router is not None:
            found[f"{name}.router"] = f"{type(router).__module__}.{type(router).__qualname__}"
    return found


def _count_tensors() -> None:
    """Count the tensors that vLLM's loader reads from files."""
    from vllm.model_executor.model_loader import default_loader

    original = default_loader.safetensors_weights_iterator

    def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        global _tensors_read  # noqa: PLW0603
        for item in original(*args, **kwargs):
            _tensors_read += 1
            yield item

    default_loader.safetensors_weights_iterator = counted


if __name__ == "__main__":
    main(*sys.argv[1:])
