"""What experts answer to a sample of users' tokens: their norms, for methods that judge by them.

A step in ``every`` has up to ``size`` of its counted tokens sampled. Routing leaves their hidden
states in buffers at one address; before the next batch each pair of a token and an expert that it
was sent to goes once more through the layer's own kernel, alone and with weight 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from liveprune.patches.routing_tables import LayerTables

SEED = 0
"""All tensor-parallel ranks draw the same tokens: their partial outputs are added up."""


class SampledOutputs:
    """The sample of one worker.

    Attributes:
        sums: float64 [layers, slots, rows, 3, 3]: entry (a, b) is the sum of weight^a * norm^b
            over sampled tokens, each times the tokens of its batch that it stands for.
        largest: float32 [layers, slots, rows]: the largest entry of an output, -inf for none.
    """

    def __init__(
        self,
        layers: Mapping[int, tuple[Any, LayerTables]],
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        static: bool,
        size: int,
        every: int,
    ) -> None:
        """Sample up to ``size`` tokens of one step in ``every``, chosen at random.

        Args:
            layers: by index, vLLM's MoERunner and the routing tables.
            hidden: size of a token's hidden state.
            dtype: of hidden states.
            device: of the buffers.
            static: CUDA graphs are captured; then every step copies ``size`` hidden states.
            size: tokens of a step.
            every: steps.
        """
        self._layers, self._static, self._size, self._every = layers, static, size, every
        tables = [x for _, x in layers.values()]
        width = max(x.rows + len(x.constants) for x in tables)
        shape = (len(tables), tables[0].slots, width)
        self._hidden = torch.zeros(len(tables), size, hidden, dtype=dtype, device=device)
        self._positions = torch.zeros(size, dtype=torch.int64, device=device)
        self.sums = torch.zeros(*shape, 3, 3, dtype=torch.float64, device=device)
        self.largest = torch.full(shape, -torch.inf, device=device)
        self._draw = np.random.default_rng(SEED)
        self._count = 0
        self._stands_for = 0.0

    def choose(self, counted: npt.NDArray[np.bool_]) -> None:
        """Draw the sample of the batch that comes now."""
        self._count = 0
        if self._draw.integers(self._every):
            return
        there = np.flatnonzero(counted)
        chosen = self._draw.permutation(there)[: self._size]
        self._count, self._stands_for = len(chosen), len(there) / len(chosen)
        places = torch.from_numpy(np.sort(chosen))
        if not self._positions.is_cpu:
            places = places.pin_memory()
        self._positions[: len(chosen)].copy_(places, non_blocking=True)

    def record(self, place: int, hidden_states: torch.Tensor) -> None:
        """Keep the sampled tokens' hidden states, [tokens, hidden], of the layer at ``place``."""
        count = self._size if self._static else self._count
        if count:
            # Positions that an earlier, longer batch left are not in the sample: any token will do.
            places = self._positions[:count].clamp_max(len(hidden_states) - 1)
            self._hidden[place, :count] = hidden_states.index_select(0, places)

    @torch.inference_mode()
    def fold(
        self,
        weights: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        top_k: torch.Tensor,
    ) -> None:
        """Compute and add up the sample of the last batch.

        Args:
            weights: float32 [layers, tokens, columns], as routed.
            rows: int32, as many.
            slots: int64 [tokens].
            top_k: int64 [layers, slots].
        """
        if not self._count:
            return
        places = self._positions[: self._count]
        own = slots.index_select(0, places)
        for place, (moe, tables) in enumerate(self._layers.values()):
            columns = tables.base_top_k
            g = weights[place, :, :columns].index_select(0, places).double()
            to = rows[place, :, :columns].index_select(0, places).long()
            taken = tables.ranks < top_k[place].index_select(0, own).unsqueeze(1)
            taken = taken & (to < tables.rows)  # beyond are constants, which nothing computes
            # The kernel sees rows that are there, also in places that do not count.
            stand_in = tables.stand_in.index_select(0, own).unsqueeze(1)
            there = torch.where(to[:, :1] < tables.rows, to[:, :1], stand_in)
            f = expert_outputs(
                moe, self._hidden[place, : self._count], torch.where(taken, to, there)
            )
            self._add(place, own, to, g, f, taken)
        self._count = 0

    def clear(self, slot: int) -> None:
        """Forget what a slot's tokens left."""
        self.sums[:, slot] = 0
        self.largest[:, slot] = -torch.inf

    def read(self, place: int, slot: int) -> tuple[Any, Any]:
        """``sums`` and ``largest`` of a layer and slot, on the host."""
        return self.sums[place, slot].cpu().numpy(), self.largest[place, slot].cpu().numpy()

    def _add(
        self,
        place: int,
        slots: torch.Tensor,
        rows: torch.Tensor,
        g: torch.Tensor,
        f: torch.Tensor,
        taken: torch.Tensor,
    ) -> None:
        norms = torch.linalg.vector_norm(f, dim=-1, dtype=torch.float32).double()
        powers = torch.stack((torch.ones_like(norms), norms, norms * norms), -1)
        gates = torch.stack((torch.ones_like(g), g, g * g), -1)
        products = gates[..., :, None] * powers[..., None, :]
        products = products * (taken.double() * self._stands_for)[..., None, None]
        width = self.largest.shape[-1]
        places = (slots.unsqueeze(1) * width + rows).view(-1)
        self.sums[place].view(-1, 9).index_add_(0, places, products.view(-1, 9))
        maxima = f.amax(-1).float().masked_fill(~taken, -torch.inf).view(-1)
        self.largest[place].view(-1).scatter_reduce_(0, places, maxima, "amax")


def expert_outputs(moe: Any, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Each token through each of its rows, alone.

    Args:
        moe: vLLM's MoERunner.
        hidden: [tokens, hidden], the experts' input.
        rows: int64 [tokens, columns], all of them resident.

    Returns:
        [tokens, columns, hidden], before any weight.
    """
    from vllm.distributed import tensor_model_parallel_all_reduce

    tokens, columns = rows.shape
    experts, method = moe.routed_experts, moe.routed_experts.quant_method
    # Not ``forward_modular``: constants of the last batch are added there.
    output: torch.Tensor = method.apply(
        layer=experts,
        x=hidden.repeat_interleave(columns, 0),
        topk_weights=torch.ones(tokens * columns, 1, device=hidden.device),
        topk_ids=rows.reshape(-1, 1).to(method.topk_indices_dtype or torch.int32),
        shared_experts=None,
        shared_experts_input=None,
    )
    if moe.moe_config.tp_size > 1 and not moe._fused_output_is_reduced:  # noqa: SLF001 - vLLM's own
        output = tensor_model_parallel_all_reduce(output)
    return output.view(tokens, columns, -1)
