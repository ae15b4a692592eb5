"""One expert of one rank, read from the checkpoint straight into memory that is already there.

Reads by byte range and never maps a file: pages of a mapping count as resident memory. Slicing
follows vLLM's ``RoutedExperts._load_w13`` and ``_load_w2``: rows of gate and up, columns of down.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from liveprune.pruning.checkpoint.layer_tensors import LayerTensors, layer_tensors
from liveprune.pruning.checkpoint.safetensors_io import (
    TensorEntry,
    item_bits,
    read_checkpoint,
    read_into,
)
from liveprune.pruning.checkpoint.verify import check_finite
from liveprune.pruning.errors import CheckpointError, EngineError
from liveprune.pruning.model_spec import ModelSpec

CHUNK_BYTES = 1 << 20
"""Read at a time: still in the core's cache when it is checked and converted."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Matrix:
    """One projection of one expert in its file, [rows, columns]."""

    entry: TensorEntry
    start: int
    """First byte, counted from the start of the file."""
    columns: int

    @property
    def row_bytes(self) -> int:
        return self.columns * item_bits(self.entry.dtype) // 8


class ExpertReader:
    """Reads single experts as vLLM would load them; any number of threads at once.

    Attributes:
        spec: of the checkpoint.
        dtype: element type of what is read.
        first: the rank's first neuron of each expert.
    """

    def __init__(
        self, checkpoint: Path, spec: ModelSpec, *, dtype: torch.dtype, tp_rank: int, tp_size: int
    ) -> None:
        """Open the weight files and check that every expert is there.

        Args:
            checkpoint: folder of the model.
            spec: what its config says.
            dtype: element type that the engine computes in.
            tp_rank: which slice of the intermediate size, 0 to ``tp_size - 1``.
            tp_size: equal slices.

        Raises:
            CheckpointError: experts are missing, misshapen or quantised.
            EngineError: the intermediate size has no such slices.
        """
        if spec.expert_size % tp_size or not 0 <= tp_rank < tp_size:
            raise EngineError(
                f"expert slices: found rank {tp_rank} of {tp_size} for {spec.expert_size} "
                f"intermediate columns, expected a rank of a number that divides them"
            )
        self.spec = spec
        self.dtype = dtype
        self._size = spec.expert_size // tp_size
        self.first = tp_rank * self._size
        tensors = read_checkpoint(checkpoint).tensors
        self._blocks = {block.layer.index: block for block in layer_tensors(tensors, spec)}
        for block in self._blocks.values():
            quantised = block.quantised(spec.architecture)
            if quantised is not None:
                raise CheckpointError(
                    f"{quantised}: found a quantised expert, expected plain "
                    f"{', '.join(_DTYPES)} matrices"
                )
        self._files: dict[Path, tuple[int, tuple[int, int]]] = {}
        for path in {e.path for block in self._blocks.values() for e in block.expert_tensors()}:
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                self.close()
                raise CheckpointError(f"{path}: cannot be opened: {error}") from error
            self._files[path] = (file, _version(file))

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """Of ``w13`` [2 * size, hidden] and ``w2`` [hidden, size]."""
        return (2 * self._size, self.spec.hidden_size), (self.spec.hidden_size, self._size)

    def experts(self, layer: int) -> int:
        """Experts of a layer; KeyError if it has none."""
        return self._blocks[layer].layer.experts

    def where(self, layer: int, expert: int) -> str:
        """File and tensor that an expert's first bytes come from, for messages."""
        entry = self._matrices(layer, expert)[0].entry
        return f"{entry.path.name}: {entry.name}"

    def read(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read one expert into new tensors; see ``read_into``."""
        shape13, shape2 = self.shapes
        w13 = torch.empty(shape13, dtype=self.dtype)
        w2 = torch.empty(shape2, dtype=self.dtype)
        self.read_into(layer, expert, w13, w2)
        return w13, w2

    def read_into(self, layer: int, expert: int, w13: torch.Tensor, w2: torch.Tensor) -> None:
        """Read one expert.

        Args:
            layer: index among all decoder layers.
            expert: id within the layer.
            w13: contiguous [2 * size, hidden] on the CPU: the rank's gate rows, then its up rows.
            w2: contiguous [hidden, size] on the CPU: the rank's columns of down.

        Raises:
            CheckpointError: the file cannot be read, has changed since it was opened, or holds NaN
                or infinity; names the tensor.
        """
        self._read_into(layer, expert, w13, w2, self.first)

    def read_whole(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read one expert, also what belongs to other ranks, into new tensors.

        Returns:
            [2 * intermediate size, hidden] and [hidden, intermediate size].

        Raises:
            CheckpointError: as ``read_into``.
        """
        hidden, size = self.spec.hidden_size, self.spec.expert_size
        w13 = torch.empty(2 * size, hidden, dtype=self.dtype)
        w2 = torch.empty(hidden, size, dtype=self.dtype)
        self._read_into(layer, expert, w13, w2, 0)
        return w13, w2

    def _read_into(
        self, layer: int, expert: int, w13: torch.Tensor, w2: torch.Tensor, neuron: int
    ) -> None:
        """Fill both from the expert's neurons, from ``neuron`` on."""
        gate, up, down = self._matrices(layer, expert)
        size = len(w13) // 2
        parts = (
            (gate, w13[:size], neuron, 0),
            (up, w13[size:], neuron, 0),
            (down, w2, 0, neuron),
        )
        for matrix, part, row, _ in parts:
            self._announce(matrix, len(part), row)
        for matrix, part, row, column in parts:
            self._read(matrix, part, row, column)
        for path in {matrix.entry.path for matrix, *_ in parts}:
            file, version = self._files[path]
            if _version(file) != version:
                raise CheckpointError(
                    f"{path}: written to since it was opened, expected the file that the engine "
                    f"started with"
                )

    def close(self) -> None:
        """Close the files; nothing can be read after."""
        while self._files:
            os.close(self._files.popitem()[1][0])

    def _matrices(self, layer: int, expert: int) -> tuple[_Matrix, _Matrix, _Matrix]:
        """Gate, up and down."""
        block, names = self._blocks[layer], self.spec.architecture
        hidden, size = self.spec.hidden_size, self.spec.expert_size
        if not 0 <= expert < block.layer.experts:
            raise EngineError(
                f"layer {layer}: expert {expert}, expected 0 to {block.layer.experts - 1}"
            )
        if not block.fused:
            tensors = block.experts[expert]
            gate, up, down = (tensors[f"{name}.weight"] for name in names.experts)
            return (
                _Matrix(gate, gate.start, hidden),
                _Matrix(up, up.start, hidden),
                _Matrix(down, down.start, size),
            )
        return self._slices(block, expert)

    def _slices(self, block: LayerTensors, expert: int) -> tuple[_Matrix, _Matrix, _Matrix]:
        """Transformers' fused layout: [experts, 2 * size, hidden] and [experts, hidden, size]."""
        names, experts = self.spec.architecture, block.layer.experts
        both, down = block.fused[names.fused_gate_up], block.fused[names.fused_down]
        half = both.size // experts // 2
        first = both.start + 2 * expert * half
        return (
            _Matrix(both, first, self.spec.hidden_size),
            _Matrix(both, first + half, self.spec.hidden_size),
            _Matrix(down, down.start + expert * (down.size // experts), self.spec.expert_size),
        )

    def _announce(self, matrix: _Matrix, rows: int, row: int) -> None:
        """Let the disk work ahead on rows that are read next."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            file, start = self._files[matrix.entry.path][0], matrix.start + row * matrix.row_bytes
            os.posix_fadvise(file, start, rows * matrix.row_bytes, os.POSIX_FADV_WILLNEED)

    def _read(self, matrix: _Matrix, target: torch.Tensor, row: int, column: int) -> None:
        """Fill ``target`` from the part of ``matrix`` whose first element is [row, column]."""
        entry, dtype = matrix.entry, _DTYPES[matrix.entry.dtype]
        name = entry.name if dtype == target.dtype else f"{entry.name} as {target.dtype}"
        step = max(1, CHUNK_BYTES // matrix.row_bytes)
        as_stored = dtype == target.dtype and matrix.columns == target.shape[1]
        buffer = target[:0] if as_stored else torch.empty(step, matrix.columns, dtype=dtype)
        for first in range(0, len(target), step):
            part = target[first : first + step]
            chunk = part if as_stored else buffer[: len(part)]
            self._read_bytes(matrix, chunk, row + first)
            if not as_stored:
                part.copy_(chunk[:, column : column + target.shape[1]])
            # After conversion: what the engine's type cannot hold has become infinite.
            check_finite(name, part)

    def _read_bytes(self, matrix: _Matrix, chunk: torch.Tensor, row: int) -> None:
        """Fill ``chunk`` with whole rows of ``matrix``, from ``row`` on."""
        view = chunk.reshape(-1).view(torch.uint8).numpy().data
        path = matrix.entry.path
        try:
            read_into(self._files[path][0], view, matrix.start + row * matrix.row_bytes)
        except (OSError, CheckpointError) as error:
            raise CheckpointError(f"{path}: {matrix.entry.name}: {error}") from error


def _version(file: int) -> tuple[int, int]:
    """Changes when an open file is written to: its size and time of modification."""
    state = os.fstat(file)
    return state.st_size, state.st_mtime_ns
