"""One forward pass over many whole texts, beside vLLM's scheduler and runner state.

The texts are packed back to back, each under its own slot's routing, with KV blocks of their own
that the caller has reserved. Nothing of the requests in the engine is read or changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from liveprune.patches.batch_slots import BatchSlots
from liveprune.pruning.errors import EngineError

Tokens = npt.NDArray[np.int32]


class PackedForward:
    """Runs a model runner's model (V1 or V2) on packed texts.

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
        self.on_cpu = runner.device.type == "cpu"
        self._layer_names = groups[0].layer_names
        self.max_tokens = len(batch.slots)
        self.block_size = int(groups[0].kv_cache_spec.block_size)

    def blocks_needed(self, tokens: int) -> int:
        """KV blocks of a text of so many tokens."""
        return -(-tokens // self.block_size)

    @torch.inference_mode()
    def __call__(
        self, texts: Sequence[Tokens], slots: Sequence[int], blocks: Sequence[int]
    ) -> torch.Tensor:
        """Return the hidden states [tokens, hidden] of all texts, one after another.

        Args:
            texts: token ids of each; together at most ``max_tokens``.
            slots: of each text.
            blocks: ids of KV blocks that nobody else uses; enough for all texts.
        """
        from vllm.forward_context import set_forward_context

        lengths = np.array([len(text) for text in texts], np.int32)
        self._batch.fill(slots, lengths)
        positions, common = self._metadata(lengths, np.asarray(blocks, np.int32))
        metadata = {
            name: built
            for group in self._runner.attn_groups[0]
            for built in [group.build_metadata(common)]
            for name in group.layer_names
        }
        with set_forward_context(
            metadata,
            self._runner.vllm_config,
            num_tokens=len(positions),
            slot_mapping=dict.fromkeys(self._layer_names, common.slot_mapping),
        ):
            hidden: torch.Tensor = self._model(
                input_ids=self._to_device(np.concatenate(texts)), positions=positions
            )
            return hidden

    def _metadata(self, lengths: npt.NDArray[np.int32], blocks: npt.NDArray[np.int32]) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        starts = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        positions = np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[:-1], lengths)
        needed = -(-lengths // self.block_size)
        table = np.zeros((len(lengths), needed.max()), np.int32)
        table[np.arange(table.shape[1]) < needed[:, None]] = blocks[: needed.sum()]
        text_of_token = np.repeat(np.arange(len(lengths)), lengths)
        block_of_token = table[text_of_token, positions // self.block_size].astype(np.int64)
        places = block_of_token * self.block_size + positions % self.block_size
        longest = int(lengths.max())
        on_device = self._to_device(positions)
        return on_device, CommonAttentionMetadata(
            query_start_loc=self._to_device(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=self._to_device(lengths),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
            num_reqs=len(lengths),
            num_actual_tokens=len(positions),
            max_query_len=longest,
            max_seq_len=longest,
            block_table_tensor=self._to_device(table),
            slot_mapping=self._to_device(places),
            causal=True,
            is_prefilling=torch.ones(len(lengths), dtype=torch.bool),
            positions=on_device,
        )

    def _to_device(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)
