"""What sets of experts do to a layer's output, for any number of sets from one pass.

Under a kept set C a token's routed output changes by the sum over e of (w_C[e] - w[e]) f_e, w the
weights of the whole layer and f_e the outputs of its experts. The square of its norm is a^T G a
with a = w_C - w and the Gram matrix G[i, j] = f_i . f_j. So every expert is computed once on every
token, and sets are then scored from logits and Gram matrices; no output is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from liveprune.pruning.calibration.routing import sliced_routing
from liveprune.pruning.calibration.rows import Batch
from liveprune.pruning.calibration.streamed import StreamedModel, expert_output
from liveprune.pruning.errors import CheckpointError
from liveprune.pruning.model_spec import ModelSpec, MoELayer, Router

GRAM_BYTES = 1 << 30
"""Bound on a layer's Gram matrices, tokens * experts^2 * 4 bytes: 4.2 million tokens of 8 experts,
75 thousand of 60, 16 thousand of 128. Of more tokens, evenly spaced ones are taken."""
OUTPUT_BYTES = 1 << 27
"""Bound on the outputs of all experts that are held at once."""
SCORING_BYTES = 1 << 27
"""Bound on the weights of all experts under all sets that are held at once."""


@dataclass(frozen=True, eq=False)
class LayerOutputs:
    """The outputs of one layer's experts, as far as their sums' norms need them."""

    logits: Tensor
    """[tokens, experts] float32, of the gate."""
    grams: Tensor
    """[tokens, n, n] float32: dot products of the experts' outputs; n = experts, or one more where
    the token's drift (see ``OutputWatch.add``) is the last vector."""
    batches: tuple[int, ...]
    """Tokens of each batch, in order."""
    router: Router
    top_k: int
    """Of the base model."""
    bias: Tensor | None
    """[experts], the router's correction bias."""

    @property
    def experts(self) -> int:
        return self.logits.shape[1]

    @torch.inference_mode()
    def losses(self, kept: Tensor, top_k: int) -> npt.NDArray[np.float64]:
        """How far each set moves the layer's output: sum over batches of Frobenius norms.

        Args:
            kept: [sets, experts] bool, see ``sliced_routing``.
            top_k: Active experts under the sets.

        Returns:
            [sets] float64. Squared norms are summed within a batch, then their roots over batches
            (arXiv:2402.14800), so that it depends on what a batch is.
        """
        kept = kept.to(self.logits.device)
        total = torch.zeros(len(kept), dtype=torch.float64, device=self.logits.device)
        size = max(1, SCORING_BYTES // (4 * len(kept) * self.grams.shape[1]))
        start = 0
        for count in self.batches:
            squares = torch.zeros_like(total)
            for first in range(start, start + count, size):
                part = slice(first, min(first + size, start + count))
                squares += self._squares(part, kept, top_k)
            total += squares.sqrt()
            start += count
        return total.cpu().numpy()

    def _squares(self, part: slice, kept: Tensor, top_k: int) -> Tensor:
        """[sets] float64: squared norms summed over some tokens."""
        whole = torch.ones(self.experts, dtype=torch.bool, device=kept.device)
        before = sliced_routing(self.logits[part], whole, self.router, self.top_k, self.bias)
        after = sliced_routing(self.logits[part], kept, self.router, top_k, self.bias)
        change = (after - before).transpose(0, 1)  # [tokens, sets, experts]
        if self.grams.shape[1] > self.experts:
            change = nn.functional.pad(change, (0, 1), value=-1.0)
        squares = ((change @ self.grams[part]) * change).sum(-1)
        # Rounding may carry the square of next to nothing below 0.
        return squares.clamp_min(0).double().sum(0)


def observe_outputs(
    stream: StreamedModel,
    layer: Any,
    moe: MoELayer,
    batches: Sequence[Batch],
    hidden: list[Tensor],
    pruned: Sequence[Tensor] | None = None,
) -> LayerOutputs:
    """Take all batches through ``layer``, in place in ``stream``, and watch its experts.

    Args:
        stream: Has ``layer`` in place.
        layer: A decoder layer with experts.
        moe: Its counts.
        batches: Calibration rows.
        hidden: Of each batch [rows, length, hidden] before the layer; afterwards those after it.
        pruned: What reaches the layer in a model whose layers before it are pruned, if that is to
            be judged: experts are computed on this, the outputs to come close to stay the base
            model's.

    Raises:
        CheckpointError: hidden states or experts' outputs are not finite.
    """
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    watch = OutputWatch(layer, moe, stream.spec, tokens, drift=pruned is not None)
    for i, batch in enumerate(batches):
        mask = torch.from_numpy(batch.attention_mask)
        hidden[i] = stream.advance(hidden[i], mask, moe.index)
        target = None
        if pruned is not None:
            target = watch.block_output
            stream.run(pruned[i], mask)
        watch.add(mask.reshape(-1).bool(), target)
    return watch.outputs()


class OutputWatch:
    """Stands beside a decoder layer's MoE block and takes the Gram matrices of its experts."""

    def __init__(
        self, layer: Any, moe: MoELayer, spec: ModelSpec, tokens: int, *, drift: bool = False
    ) -> None:
        """Watch ``layer``, a transformers decoder layer whose ``mlp`` is a MoE block.

        ``tokens`` is how many will come, padding left out; with ``drift`` targets will come too.
        Memory: ``GRAM_BYTES``, and for a batch the outputs of all experts (``OUTPUT_BYTES``).
        """
        self._experts = layer.mlp.experts
        self._moe = moe
        self._router = spec.router
        self._bias: Tensor | None = getattr(layer.mlp.gate, "e_score_correction_bias", None)
        self._vectors = moe.experts + drift
        self._stride = max(1, math.ceil(tokens * self._vectors**2 * 4 / GRAM_BYTES))
        taken = math.ceil(tokens / self._stride)
        device = self._experts.down_proj.device
        self._logits = torch.empty(taken, moe.experts, device=device)
        self._grams = torch.empty(taken, self._vectors, self._vectors, device=device)
        self._seen = 0
        self._batches: list[int] = []
        self._input = self._gate = torch.empty(0)
        self.block_output = torch.empty(0)
        """[tokens, hidden], what the block gave last, shared experts included."""
        self._experts.register_forward_pre_hook(self._keep_input)
        layer.mlp.gate.register_forward_hook(self._keep_logits)
        layer.mlp.register_forward_hook(self._keep_output)

    def add(self, real: Tensor, target: Tensor | None = None) -> None:
        """Take the batch that just ran.

        Args:
            real: [tokens] bool, false for padding.
            target: [tokens, hidden], what the block should have given. Its difference from what
                the whole block gave is the token's drift: part of the loss under every set.

        Raises:
            CheckpointError: an expert's output is NaN or infinite, perhaps on a token that the
                router never gives it.
        """
        positions = real.to(self._grams.device).nonzero()[:, 0]
        chosen = positions[-self._seen % self._stride :: self._stride]
        self._seen += len(positions)
        start = sum(self._batches)
        self._batches.append(len(chosen))
        self._logits[start : start + len(chosen)] = self._gate[chosen].float()
        size = max(1, OUTPUT_BYTES // (4 * self._vectors * self._input.shape[1]))
        for first in range(0, len(chosen), size):
            ids = chosen[first : first + size]
            x = self._input[ids]
            f = torch.empty(len(ids), self._vectors, x.shape[1], device=x.device)
            for expert in range(self._moe.experts):
                f[:, expert] = expert_output(self._experts, expert, x)
            if target is not None:
                f[:, -1] = target[ids].float() - self.block_output[ids].float()
            at = start + first
            grams = torch.bmm(f, f.transpose(1, 2), out=self._grams[at : at + len(ids)])
            if not torch.isfinite(grams.diagonal(dim1=1, dim2=2)).all():
                raise CheckpointError(
                    f"layer {self._moe.index}: experts' outputs over all tokens hold NaN or "
                    f"infinity; expected finite ones, in a dtype wide enough for this model"
                )

    def outputs(self) -> LayerOutputs:
        return LayerOutputs(
            logits=self._logits,
            grams=self._grams,
            batches=tuple(self._batches),
            router=self._router,
            top_k=self._moe.top_k,
            bias=self._bias,
        )

    def _keep_input(self, _: nn.Module, inputs: Sequence[Tensor]) -> None:
        self._input = inputs[0]

    def _keep_logits(self, _: nn.Module, __: object, output: Sequence[Tensor]) -> None:
        self._gate = output[0]

    def _keep_output(self, _: nn.Module, __: object, output: Tensor) -> None:
        self.block_output = output.flatten(0, -2)
