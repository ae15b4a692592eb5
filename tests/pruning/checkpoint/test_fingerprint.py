from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file, save_file

from liveprune.pruning.checkpoint.fingerprint import fingerprint_model


def fingerprint(model: Path) -> str:
    return fingerprint_model(model)


def test_a_model_is_known_by_its_config_and_experts(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model("mixtral")
    copy = tmp_path / "elsewhere"
    shutil.copytree(base, copy)
    found = fingerprint(base)
    assert len(bytes.fromhex(found)) == 16
    assert fingerprint(copy) == found

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert fingerprint(copy) != found

    shutil.copy(base / "config.json", copy)
    assert fingerprint(copy) == found
    (shard,) = copy.glob("*.safetensors")
    tensors = load_file(shard)
    name = max(name for name in tensors if "experts" in name)
    tensors[name] = tensors[name] + 1
    save_file(tensors, shard)
    assert fingerprint(copy) != found, "fine-tuned: another model"
