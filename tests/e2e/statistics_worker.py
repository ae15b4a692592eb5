"""A subprocess of ``engine.run_script``: live statistics of real engines, in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from live_worker import LiveJob


def main(question: str, answer: str) -> None:
    outcomes = {}
    for job in json.loads(Path(question).read_text()):
        print("job", job["name"], flush=True)
        outcomes[job["name"]] = StatisticsJob(job).run()
    Path(answer).write_text(json.dumps(outcomes))


class StatisticsJob(LiveJob):
    """One engine whose statistics are read at several points."""

    def run(self) -> dict[str, Any]:
        outcome: dict[str, Any] = {"start": self.statistics()}
        tags = list(self.job["plans"])
        for tag in tags:
            self.make_live(tag)
        prompts = self.job["prompts"]
        # The base's users beside requests that nobody counts: of other variants and of the base.
        others = [(tag, prompt, False) for tag in ("base", *tags) for prompt in reversed(prompts)]
        self.serve(_mixed([("base", prompt, True) for prompt in prompts], others))
        outcome["base"] = self.statistics()
        self.serve([("base", prompt, False) for prompt in prompts])
        self.score_candidates(tags)
        outcome["after candidates"] = self.statistics()
        self.serve([(tag, prompt, True) for prompt in prompts for tag in tags])
        outcome["variants"] = self.statistics()
        for tag in tags:
            self.retire(tag)
        self.release()
        outcome["retired"] = self.statistics()
        return outcome

    def serve(self, requests: Sequence[tuple[str, list[int], bool]]) -> None:
        """One token each, so that what is computed is the prompt and nothing else."""
        from vllm import SamplingParams

        params = []
        for number, (tag, _, counted) in enumerate(requests):
            sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
            sampling.detokenize = False
            # A salt of its own: nothing may come from the prefix cache.
            own = {"slot": self.slots[tag], "salt": f"{tag}-{number}-{id(requests)}"}
            sampling.extra_args = {"liveprune": {**own, "count": True} if counted else own}
            params.append(sampling)
        questions = [{"prompt_token_ids": list(prompt)} for _, prompt, _ in requests]
        self.llm.generate(questions, params, use_tqdm=False)

    def score_candidates(self, tags: Sequence[str]) -> None:
        """A search's path past the scheduler."""
        from liveprune.pruning.evaluation.engine import TokenRow
        from liveprune.pruning.plan_io import load_plan

        if self.job.get("ranks", 1) > 1:
            return
        plan = load_plan(Path(self.job["plans"][tags[0]]))
        slots = self.call("stage", plans=[None, plan])
        rows = [TokenRow(tuple(self.job["prompts"][0][:5]), (7, 8))]
        self.call("score", slots=slots, rows=rows, against_full=False)
        self.call("unstage")

    def statistics(self) -> dict[str, Any]:
        from liveprune.patches.live_counts import parse_counts

        return {
            key: {
                "tokens": found.tokens,
                "layers": {
                    index: {
                        name: None if values is None else values.tolist()
                        for name, values in vars(layer).items()
                    }
                    for index, layer in found.layers.items()
                },
            }
            for key, found in parse_counts(self.call("statistics")).items()
        }


def _mixed(one: list[Any], other: list[Any]) -> list[Any]:
    """The first among the others, evenly."""
    step = max(len(other) // len(one), 1)
    mixed = list(other)
    for number, item in enumerate(one):
        mixed.insert(number * (step + 1), item)
    return mixed


if __name__ == "__main__":
    main(*sys.argv[1:])
