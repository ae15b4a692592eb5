"""Reading a checkpoint's tensors one at a time, and the weights of one layer by their meaning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from liveprune.pruning.architectures import Architecture
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import ModelSpec, MoELayer

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAMPLE_BYTES = 4096


class Weights:
    """Tensors of a safetensors checkpoint by name; one shard is open at a time."""

    def __init__(self, model: Path) -> None:
        """Find out which file holds which tensor.

        Raises:
            CheckpointError: there are no safetensors files, or the index is not readable.
        """
        self.model = model
        self._files = _files(model)
        self._open: tuple[str, Any] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in the checkpoint's dtype.

        Raises:
            CheckpointError: there is no such tensor, or its file is damaged.
        """
        return self._read(name, lambda handle: handle.get_tensor(name))

    def row(self, name: str, index: int) -> Tensor:
        """``tensor(name)[index]`` without reading the rest."""
        return self._read(name, lambda handle: handle.get_slice(name)[index])

    def close(self) -> None:
        """Let go of the open shard and its mapped pages."""
        self._open = None

    def fingerprint(self) -> str:
        """Digest of config, tensor names, dtypes, shapes and the first 4 KiB of each tensor.

        Tells apart models in practice, fine-tunes of one base included, without reading all
        bytes; it is no protection against forgery.
        """
        state = hashlib.blake2b((self.model / "config.json").read_bytes(), digest_size=16)
        for file in sorted(set(self._files.values())):
            with (self.model / file).open("rb") as data:
                size = int.from_bytes(data.read(8), "little")
                header = data.read(size)
                state.update(header)
                for name, entry in sorted(json.loads(header).items()):
                    if name != "__metadata__":
                        start, end = entry["data_offsets"]
                        data.seek(8 + size + start)
                        state.update(data.read(min(SAMPLE_BYTES, end - start)))
        return state.hexdigest()

    def _read(self, name: str, read: Any) -> Tensor:
        try:
            tensor: Tensor = read(self._handle(name))
        except SafetensorError as error:
            raise CheckpointError(f"{self.model / self._files[name]}: {name}: {error}") from error
        return tensor

    def _handle(self, name: str) -> Any:
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(f"{self.model}: tensor {name} is missing")
        if self._open is None or self._open[0] != file:
            try:
                self._open = (file, safe_open(self.model / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.model / file}: not readable as safetensors: {error}"
                ) from error
        return self._open[1]


@dataclass(frozen=True)
class LayerWeights:
    """The gate and the experts of one layer, whichever way the checkpoint names them."""

    weights: Weights
    architecture: Architecture
    layer: MoELayer

    @property
    def prefix(self) -> str:
        return self.architecture.block_prefix(self.layer.index)

    @property
    def is_fused(self) -> bool:
        """Experts stored as 3-D tensors [experts, ...] under transformers' names."""
        return self.prefix + self.architecture.fused_gate_up in self.weights

    def gate(self) -> Tensor:
        """Gate weight [router width, hidden], in the checkpoint's dtype."""
        return self.weights.tensor(self.prefix + self.architecture.gate)

    def experts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Gate, up [ffn, hidden] and down [hidden, ffn] of each expert, one expert at a time."""
        for index in range(self.layer.experts):
            yield self.expert(index)

    def expert(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down of one expert."""
        if self.is_fused:
            both = self.weights.row(self.prefix + self.architecture.fused_gate_up, index)
            gate, up = both.chunk(2)
            return gate, up, self.weights.row(self.prefix + self.architecture.fused_down, index)
        names = self.architecture.experts
        at = f"{self.prefix}experts.{index}."
        gate, up, down = (self.weights.tensor(f"{at}{name}.weight") for name in names)
        return gate, up, down


def refuse_quantised(spec: ModelSpec, purpose: str) -> None:
    """Refuse a checkpoint whose tensors are not plain numbers.

    Raises:
        CheckpointError: naming the quantisation method.
    """
    quantisation = spec.config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown")
        raise CheckpointError(
            f"config.json: found quantization_config ({method}); {purpose} expects unquantised "
            f"weights (bfloat16, float16 or float32). A plan made from those fits this model too"
        )


def _files(model: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    index = model / INDEX
    try:
        if index.exists():
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        with safe_open(model / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except FileNotFoundError:
        raise CheckpointError(f"{model}: found neither {SINGLE} nor {INDEX}") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{model}: weights not readable as safetensors: {error}") from error
