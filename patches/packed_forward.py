"""One forward pass over many pieces of text, beside vLLM's scheduler and runner state.

The pieces are packed back to back, each under its own slot's routing, with KV blocks that the
caller has reserved. Nothing of the requests in the engine is read or changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from liveprune.patches.batch_slots import BatchSlots
from liveprune.pruning.errors import EngineError


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a text."""

    slot: int
    """Routing tables."""
    tokens: tuple[int, ...]
    start: int
    """Tokens of the text before these; their keys and values are in ``blocks`` already."""
    blocks: tuple[int, ...]
    """KV blocks of the text from its first token on."""

    @property
    def end(self) -> int:
        """Tokens of the text up to the last of these."""
        return self.start + len(self.tokens)


class PackedForward:
    """Runs a model runner's model (V1 or V2) on packed pieces.

    Attributes:
        max_tokens: tokens of one pass.
        block_size: tokens of a KV block.
        on_cpu: where a pass of a few hundred tokens keeps the machine busy already.
    """

    def __init__(self, runner: Any, batch: BatchSlots) -> None:
        """``runner``: vLLM's, its KV cache allocated; ``batch``: the slots of its tokens.

        Raises:
            EngineError: the model has several groups of KV blocks.
        """
        groups = runner.kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise EngineError(
                f"scoring: the model has {len(groups)} groups of KV blocks, expected 1"
            )
        self._runner, self._batch = runner, batch
        self._model = runner.get_model()
        self._device = runner.device
        self._layer_names = groups[0].layer_names
        self.max_tokens = len(batch.slots)
        self.block_size = int(groups[0].kv_cache_spec.block_size)
        self.on_cpu = runner.device.type == "cpu"

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Return the hidden states [tokens, hidden] of all pieces, one after another.

        Args:
            pieces: together at most ``max_tokens`` tokens.
        """
        from vllm.forward_context import set_forward_context

        lengths = np.array([len(piece.tokens) for piece in pieces], np.int32)
        self._batch.fill([piece.slot for piece in pieces], lengths)
        tokens = np.concatenate([np.array(piece.tokens, np.int32) for piece in pieces])
        positions, common = self._metadata(pieces, lengths)
        metadata = {
            name: built
            for group in self._runner.attn_groups[0]
            for built in [group.build_metadata(common)]
            for name in group.layer_names
        }
        with set_forward_context(
            metadata,
            self._runner.vllm_config,
            num_tokens=len(tokens),
            slot_mapping=dict.fromkeys(self._layer_names, common.slot_mapping),
        ):
            hidden: torch.Tensor = self._model(
                input_ids=self._to_device(tokens), positions=positions
            )
            return hidden

    @torch.inference_mode()
    def copy_block(self, source: int, targets: Sequence[int]) -> None:
        """Copy a whole KV block, in all layers."""
        blocks = self._runner.kv_cache_config.num_blocks
        layers = self._runner.vllm_config.compilation_config.static_forward_context
        places = self._to_device(np.array(targets, np.int64))
        for name in self._layer_names:
            # A kernel may see a block as several smaller ones, neighbours of each other.
            whole = layers[name].kv_cache.unflatten(0, (blocks, -1))
            whole[places] = whole[source].clone()

    def blocks(self, tokens: int) -> int:
        """KV blocks that so many tokens take."""
        return -(-tokens // self.block_size)

    def blocks_added(self, piece: Piece) -> int:
        """Further KV blocks that the piece needs."""
        return self.blocks(piece.end) - len(piece.blocks)

    def _metadata(
        self, pieces: Sequence[Piece], lengths: npt.NDArray[np.int32]
    ) -> tuple[torch.Tensor, Any]:
        """Positions, and vLLM's attention metadata."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        first = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=first[1:])
        offsets = np.array([piece.start for piece in pieces], np.int64) - first[:-1]
        positions = np.arange(first[-1], dtype=np.int64) + np.repeat(offsets, lengths)
        ends = np.array([piece.end for piece in pieces], np.int32)
        table = np.zeros((len(pieces), max(len(piece.blocks) for piece in pieces)), np.int32)
        for row, piece in zip(table, pieces, strict=True):
            row[: len(piece.blocks)] = piece.blocks
        block = table[np.repeat(np.arange(len(pieces)), lengths), positions // self.block_size]
        places = block.astype(np.int64) * self.block_size + positions % self.block_size
        on_device = self._to_device(positions)
        return on_device, CommonAttentionMetadata(
            query_start_loc=self._to_device(first),
            query_start_loc_cpu=torch.from_numpy(first),
            seq_lens=self._to_device(ends),
            seq_lens_cpu_upper_bound=torch.from_numpy(ends),
            num_reqs=len(pieces),
            num_actual_tokens=len(positions),
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=self._to_device(table),
            slot_mapping=self._to_device(places),
            causal=True,
            is_prefilling=torch.ones(len(pieces), dtype=torch.bool),
            positions=on_device,
        )

    def _to_device(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)
