"""vLLM with the plugin refuses damaged pruned checkpoints, by name, at the earliest moment."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.e2e.damaged import DAMAGED
from tests.e2e.engine import ENVIRONMENT, PLUGINS, Job, Outcome

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

SERVE = """
import sys
from vllm import LLM

if __name__ == "__main__":
    LLM(sys.argv[1], enforce_eager=True, max_model_len=256, skip_tokenizer_init=True)
"""


@pytest.mark.parametrize("name", DAMAGED)
def test_refused_by_name(name: str, eager: dict[str, Outcome]) -> None:
    damaged, outcome = DAMAGED[name], eager[name]
    assert re.search(damaged.message, outcome.error), outcome.error
    assert (outcome.tensors_read > 0) == damaged.read


def test_refusal_ends_the_process(damaged_job: Job) -> None:
    """As in production: the engine core is a process of its own, its reason must come through."""
    environment = {key: value for key, value in os.environ.items() if key != PLUGINS}
    done = subprocess.run(
        [sys.executable, "-c", SERVE, damaged_job.model],
        env=environment | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert re.search(DAMAGED["missing tensor"].message, done.stdout + done.stderr)
