"""A server of the benchmarks with live variants, and one hand on its admin API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.streams import NAME
from liveprune.server.admin_client import AdminClient
from liveprune.server.admin_key import KEY_FILE
from liveprune.server.served_model import ServedModel

FLAGS = ["--enforce-eager", "--max-model-len", "512", "--disable-log-stats"]
POLL = 0.1
"""Seconds between looks at an operation."""
Json = dict[str, Any]


class Served:
    """A server with live variants, and one hand on its admin API."""

    def __init__(
        self, model: Path, dtype: str, *, flags: Sequence[str] = (), name: str = "live"
    ) -> None:
        """``flags``: further ones; ``name``: of the log and the state folder."""
        folder = model.parent
        self.state = folder / f"state-{model.name}-{name}"
        self.server = ServedModel(
            model,
            log=folder / f"{name}-{model.name}.log",
            flags=[*FLAGS, "--dtype", dtype, "--plan-root", str(folder), *flags],
            name=NAME,
            state=self.state,
        )
        self.server.wait_ready()
        key = (self.state / KEY_FILE).read_text().split()[-1]
        self.admin = AdminClient(self.server.admin_url, key)
        children = psutil.Process(self.server.pid).children(recursive=True)
        self.worker = max(children, key=lambda x: int(x.memory_info().rss))

    def follow(self, operation: Json, states: list[tuple[float, str]] | None = None) -> Json:
        """Wait for an operation's end; ``states`` gets what was seen when."""
        while operation["finished"] is None:
            time.sleep(POLL)
            operation = self.admin.operation(operation["id"])
            if states is not None:
                states.append((time.monotonic(), operation["state"]))
        return operation

    def swap(self, tag: str) -> Json:
        """Must work; for what is not measured."""
        operation = self.follow(self.admin.swap(tag))
        if operation["state"] != "done":
            raise RuntimeError(f"swap to {tag}: {operation}")
        return operation

    def resident(self) -> int:
        return int(self.worker.memory_info().rss)


def write_tokenizer(model: Path, vocabulary: int) -> None:
    """One word a token, so that equal texts are equal tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, "t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(model)
