"""A subprocess of ``engine.run_script``: live variants in real engines, in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLOCK_SIZE = 32
SLOTS = 16
FREE = 13
"""The first slot that no plan takes; from here on they are for refusals."""


def main(question: str, answer: str) -> None:
    outcomes = {}
    for job in json.loads(Path(question).read_text()):
        print("job", job["name"], flush=True)
        outcomes[job["name"]] = LiveJob(job).run()
    Path(answer).write_text(json.dumps(outcomes))


class LiveJob:
    """One engine: variants mixed in its batches, then compact, then whole again."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        from liveprune.patches.live_config import LiveConfig

        self.job = job
        config = LiveConfig(
            checkpoint=job["model"],
            slots=SLOTS,
            spare_rows=job["spare"],
            kv_extra_bytes=0,
            resident_slot=1 if job.get("resident") else 0,
            resident_plan=job["plans"][job["resident"]] if job.get("resident") else None,
            required=True,
            **job.get("config", {}),
        )
        self.llm = LLM(
            job["model"],
            enforce_eager=not job["compiled"],
            max_model_len=256,
            block_size=BLOCK_SIZE,
            num_gpu_blocks_override=256,
            dtype="float32",
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            seed=0,
            tensor_parallel_size=job.get("ranks", 1),
            additional_config=config.to_additional_config(),
            **job.get("options", {}),
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.slots = {"base": 0} if not job.get("resident") else {job["resident"]: 1}

    def call(self, operation: str, **arguments: Any) -> Any:
        reply = self.core.liveprune(operation, arguments)
        if reply.get("error"):
            raise RuntimeError(f"{operation}: {reply['error']}")
        return reply["value"]

    def make_live(self, tag: str) -> None:
        taken = set(self.slots.values())
        slot = 0 if tag == "base" else next(i for i in range(1, SLOTS) if i not in taken)
        self.call("prepare", slot=slot, plan=None if tag == "base" else self.job["plans"][tag])
        while True:
            progress = self.call("progress", slot=slot)
            if progress["phase"] == "ready":
                break
            if progress["phase"] == "failed":
                raise RuntimeError(progress["error"])
        self.call("publish", slot=slot)
        self.slots[tag] = slot

    def retire(self, tag: str) -> None:
        assert self.call("retire", slot=self.slots.pop(tag))

    def release(self) -> int:
        freed = 0
        while part := self.call("release"):
            freed += part
        return freed

    def run(self) -> dict[str, Any]:
        job = self.job
        tags = [tag for tag in job["plans"] if tag not in self.slots]
        outcome: dict[str, Any] = {}
        if not job.get("resident"):
            # Before any variant is there: the base as it was.
            outcome["alone"] = self.generate(["base"])["base"]
        else:
            outcome["start"] = self.generate([job["resident"]])
            outcome["start_memory"] = self.call("memory")
        for tag in tags:
            self.make_live(tag)
        outcome["mixed"] = self.generate(list(self.slots))
        outcome["warm"] = self.generate(list(self.slots), score=False)
        outcome["memory"] = self.call("memory")
        outcome["before"] = {
            tag: self.call("checksums", slot=slot) for tag, slot in self.slots.items()
        }
        if job.get("refusals"):
            outcome["refusals"] = self.refusals()
        outcome["compact"], outcome["freed"] = {}, {}
        for tag in job["compact"]:
            if tag not in self.slots:
                self.make_live(tag)
            for other in [other for other in self.slots if other != tag]:
                self.retire(other)
            outcome["freed"][tag] = self.release()
            outcome["compact"][tag] = self.generate([tag])[tag]
            outcome["compact"][f"{tag} memory"] = self.call("memory")
        for tag in ("base", *job["plans"]):
            if tag not in self.slots:
                self.make_live(tag)
        outcome["whole"] = self.generate(list(self.slots))
        outcome["after"] = {
            tag: self.call("checksums", slot=slot) for tag, slot in self.slots.items()
        }
        return outcome

    def refusals(self) -> dict[str, str]:
        """What each wrong operation is answered with; none of them may change anything."""
        plans, worker = self.job["plans"], self.core.model_executor.driver_worker.worker
        layer = worker.liveprune_worker.layers[0]
        live = self.slots["uniform"]
        found = {
            "unknown slot": self.error("publish", slot=FREE),
            "taken slot": self.error("prepare", slot=live, plan=plans["uniform"]),
            "live slot cancelled": self.error("cancel", slot=live),
            "no such plan": self.error("prepare", slot=FREE, plan="missing.json"),
        }
        # Merges that need more spare rows than are left.
        for slot in range(FREE, SLOTS):
            found[f"spare {slot}"] = self.error("prepare", slot=slot, plan=plans["router_map"])
            while not found[f"spare {slot}"]:
                if self.call("progress", slot=slot)["phase"] in ("ready", "failed"):
                    break
        for slot in range(FREE, SLOTS):
            self.error("cancel", slot=slot)
        # A row that is taken away behind its back must not become part of a live table.
        self.call("prepare", slot=FREE, plan=plans["counts"])
        while self.call("progress", slot=FREE)["phase"] != "ready":
            pass
        row = min(worker.liveprune_worker._slots[FREE].assignments[0].needed)
        layer.rows._resident -= {row}
        found["row not resident"] = self.error("publish", slot=FREE)
        layer.rows._resident |= {row}
        self.call("cancel", slot=FREE)
        return found

    def error(self, operation: str, **arguments: Any) -> str:
        return self.core.liveprune(operation, arguments).get("error", "")

    def generate(self, tags: Sequence[str], *, score: bool = True) -> dict[str, Any]:
        """All prompts under all variants in one call, so that they share batches."""
        from vllm import SamplingParams

        prompts, params = [], []
        for prompt in self.job["prompts"]:
            for tag in tags:
                sampling = SamplingParams(
                    temperature=0,
                    max_tokens=self.job["tokens"],
                    ignore_eos=True,
                    detokenize=False,
                    prompt_logprobs=0 if score else None,
                )
                slot = self.slots[tag]
                salt = None if tag == "base" else tag
                sampling.extra_args = {"liveprune": {"slot": slot, "salt": salt}}
                prompts.append({"prompt_token_ids": list(prompt)})
                params.append(sampling)
        answers = self.llm.generate(prompts, params, use_tqdm=False)
        found: dict[str, Any] = {tag: {"tokens": [], "logprobs": [], "cached": []} for tag in tags}
        for i, answer in enumerate(answers):
            mine = found[tags[i % len(tags)]]
            mine["tokens"].append(list(answer.outputs[0].token_ids))
            mine["cached"].append(answer.num_cached_tokens or 0)
            if score:
                pairs = zip(answer.prompt_token_ids, answer.prompt_logprobs, strict=True)
                mine["logprobs"].append([e[t].logprob for t, e in list(pairs)[1:]])
        return found


if __name__ == "__main__":
    main(*sys.argv[1:])
