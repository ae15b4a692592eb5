"""The same pruned weights under other spellings of the counts in config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Rewritten:
    """A change of config.json that must not change what the plan ``counts`` of a model computes."""

    model: str
    change: Callable[[Config], None]

    def write(self, source: Path, target: Path) -> Path:
        """Copy the checkpoint ``source`` with a changed config."""
        shutil.copytree(source, target)
        path = target / "config.json"
        config = json.loads(path.read_text())
        self.change(config)
        path.write_text(json.dumps(config))
        return target


def _rename(old: str, new: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for override in config["per_layer_config"].values():
            if old in override:
                override[new] = override.pop(old)

    return change


def _without_top_k(config: Config) -> None:
    """The layer with one expert keeps the model's top-k of two: it uses what it has."""
    for override in config["per_layer_config"].values():
        override.pop("num_experts_per_tok", None)


def _as_list(key: str, values: Any) -> Callable[[Config], None]:
    """As other tools write them: no ``per_layer_config``, no block of ours, the old scalar."""

    def change(config: Config) -> None:
        del config["per_layer_config"], config["liveprune"]
        config[key] = values

    return change


REWRITTEN = {
    "mixtral alias key": Rewritten("mixtral", _rename("num_local_experts", "num_experts")),
    "qwen3_moe alias key": Rewritten("qwen3_moe", _rename("num_local_experts", "num_experts")),
    "olmoe alias key": Rewritten("olmoe", _rename("num_experts", "num_local_experts")),
    "clamped top-k": Rewritten("qwen2_moe", _without_top_k),
    "num_experts_per_layer": Rewritten("mixtral", _as_list("num_experts_per_layer", [5, 7, 1])),
    "num_experts_by_block": Rewritten(
        "qwen3_moe", _as_list("num_experts_by_block", {"0": 5, "1": 7, "2": 1})
    ),
    # One entry for each decoder layer; the first one is dense.
    "n_routed_experts_per_layer": Rewritten(
        "deepseek_v2", _as_list("n_routed_experts_per_layer", [0, 5, 7, 1])
    ),
}
