"""The observer pass: every statistic of every expert from one run over the calibration rows.

Each expert is computed only on the tokens that the model's own router sends to it, once, and the
same numbers serve the layer's output and the statistics. So the pass costs little more than
running the model, and is right for every router: softmax, sigmoid, bias-corrected, group-limited.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liveprune.pruning.calibration.rows import BATCH_TOKENS, Batch, Rows
from liveprune.pruning.calibration.statistics import (
    EXTRAS,
    LayerStatistics,
    RoutingStatistics,
)
from liveprune.pruning.calibration.streamed import StreamedModel, expert_output
from liveprune.pruning.checkpoint.fingerprint import fingerprint_model
from liveprune.pruning.model_spec import ModelSpec

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@torch.inference_mode()
def observe(
    model: Path,
    rows: Rows,
    *,
    batch_tokens: int = BATCH_TOKENS,
    device: str = "cpu",
    extras: Collection[str] = (),
    progress: Progress | None = None,
) -> RoutingStatistics:
    """Run ``rows`` through ``model`` and gather statistics of every expert.

    ``extras`` names further sums, see ``statistics.EXTRAS``.

    Memory: the weights of one decoder layer, the hidden states of all rows
    (tokens with padding * hidden size * bytes of the model's dtype, in main memory), and the
    working set of one batch; the model as a whole is never loaded. Progress counts one step per
    layer and batch, up to the last layer with experts.

    Raises:
        CheckpointError: weights are missing, quantised, of the wrong shape, or give NaN.
        ArchitectureError: the family or one of its features is not supported.
    """
    spec = ModelSpec.from_path(model)
    stream = StreamedModel(model, spec, device)
    batches = rows.batches(batch_tokens)
    hidden = stream.embed([torch.from_numpy(batch.input_ids) for batch in batches])
    experts = {layer.index: layer.experts for layer in spec.layers}
    depth = spec.layers[-1].index + 1
    layers = {}
    for index in range(depth):

        def step(batch: int, index: int = index) -> None:
            if progress is not None:
                progress(index * len(batches) + batch + 1, depth * len(batches))

        found = _observe_layer(stream, index, experts.get(index), extras, batches, hidden, step)
        if found is not None:
            layers[index] = found
    return RoutingStatistics(
        layers, rows.tokens, rows.digest, fingerprint_model(stream.weights.model)
    )


def _observe_layer(
    stream: StreamedModel,
    index: int,
    experts: int | None,
    extras: Collection[str],
    batches: Sequence[Batch],
    hidden: list[Tensor],
    step: Callable[[int], None],
) -> LayerStatistics | None:
    """Take all batches through one layer, in place in ``hidden``; None if it has no experts."""
    with stream.layer(index) as layer:
        watch = LayerWatch(layer, experts, extras) if experts is not None else None
        for i, batch in enumerate(batches):
            mask = torch.from_numpy(batch.attention_mask)
            if watch is not None:
                watch.real = mask.reshape(-1).bool()
            hidden[i] = stream.advance(hidden[i], mask, index)
            step(i)
        return watch.statistics() if watch is not None else None


class LayerWatch:
    """Takes the place of a decoder layer's experts: computes them and counts."""

    def __init__(self, layer: Any, experts: int, extras: Collection[str] = ()) -> None:
        """Watch ``layer``, a transformers decoder layer whose ``mlp`` is a MoE block."""
        self.extras = frozenset(extras)
        self.real: Tensor | None = None
        """[tokens] bool, true for tokens that are not padding; set before each batch."""
        device = layer.mlp.experts.down_proj.device
        self._sums = torch.zeros(3, 3, experts, dtype=torch.float64, device=device)
        self._contribution = torch.zeros(experts, dtype=torch.float64, device=device)
        self._largest = torch.full((experts,), -torch.inf, device=device)
        self._residual: Tensor | None = None
        hidden = layer.mlp.experts.down_proj.shape[1]
        self._extra = {
            name: torch.zeros(
                experts,
                experts if extra == "logits" else hidden,
                dtype=torch.float64,
                device=device,
            )
            for extra in self.extras
            for name in EXTRAS[extra]
        }
        self._experts = layer.mlp.experts
        # Every family adds the MoE block's output to what enters this norm.
        norm = layer.post_attention_layernorm
        self._hooks = [norm.register_forward_pre_hook(self._keep_residual)]
        if "logits" in self.extras:
            self._hooks.append(layer.mlp.gate.register_forward_hook(self._add_logits))
        layer.mlp.experts = _WatchedExperts(self._experts, self)

    def remove(self, layer: Any) -> None:
        """Give the watched layer its own experts back."""
        layer.mlp.experts = self._experts
        for hook in self._hooks:
            hook.remove()

    def statistics(self) -> LayerStatistics:
        return LayerStatistics(
            sums=self._sums.permute(2, 0, 1).contiguous().cpu().numpy(),
            max_activation=self._largest.double().cpu().numpy(),
            contribution=self._contribution.cpu().numpy(),
            **{name: total.cpu().numpy() for name, total in self._extra.items()},
        )

    def _keep_residual(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._residual = inputs[0].flatten(0, 1)

    def _add_logits(self, _: nn.Module, __: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _weights, ids = output
        real = slice(None) if self.real is None else self.real.to(logits.device)
        z = logits[real].double()
        chosen = torch.zeros_like(z).scatter_(1, ids[real], 1.0)
        self._extra["logit_products"] += z.T @ z
        self._extra["together"] += chosen.T @ chosen

    def add_outputs(self, expert: int, f: Tensor, g: Tensor) -> None:
        """Add outputs [n, hidden] of the tokens routed to an expert, gate weights [n]."""
        if "outputs" in self.extras:
            # Sums of a batch in float32 and of batches in float64: exact enough, and no copy of f
            # in float64.
            wide = f.float()
            self._extra["output_sums"][expert] += wide.sum(0)
            self._extra["output_squares"][expert] += wide.square().sum(0)
            self._extra["gated_sums"][expert] += g.float() @ wide

    def add_dense(self, expert: int, f: Tensor) -> None:
        """Add an expert's outputs [tokens, hidden] for all tokens."""
        self._extra["dense_sums"][expert] += f.float().sum(0)

    def largest(self, expert: int, value: Tensor) -> None:
        self._largest[expert] = torch.maximum(self._largest[expert], value)

    def add(
        self, experts: Tensor, tokens: Tensor, g: Tensor, norms: Tensor, routed: Tensor
    ) -> None:
        """Add n pairs of a token and an expert it was routed to.

        ``experts``, ``tokens`` [n] int64, gate weights ``g`` and output ``norms`` [n] float;
        ``routed`` [tokens, hidden] is the sum of weighted expert outputs per token.
        """
        g, norms = g.double(), norms.double()
        weights = torch.stack([torch.ones_like(g), g, g * g])
        powers = torch.stack([torch.ones_like(norms), norms, norms * norms])
        products = weights[:, None, :] * powers[None, :, :]
        self._sums.index_add_(2, experts, products)
        if self._residual is None:
            raise RuntimeError("the decoder layer ran its experts before its post-attention norm")
        x = self._residual.float()
        change = 1 - torch.cosine_similarity(x, x + routed.float(), dim=-1).double()
        self._contribution.index_add_(0, experts, g * norms * change.clamp_min(0)[tokens])


class _WatchedExperts(nn.Module):
    """The experts of transformers' MoE blocks, reporting to a ``LayerWatch``."""

    def __init__(self, experts: Any, watch: LayerWatch) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.act_fn = experts.act_fn
        self._watch = watch

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], [tokens, k] int64, [tokens, k] -> routed output [tokens, hidden].

        Padded tokens are not routed: their output is zero, and no real token ever sees it.
        """
        real = self._watch.real
        kept = torch.arange(len(hidden_states), device=hidden_states.device)
        if real is not None:
            kept = kept[real.to(kept.device)]
        k = top_k_index.shape[1]
        # Pairs of token and expert, grouped by expert; stable, so that sums have one order.
        experts, order = torch.sort(top_k_index[kept].reshape(-1), stable=True)
        tokens = kept[order // k]
        weights = top_k_weights[kept].reshape(-1)[order]
        counts = torch.bincount(experts, minlength=len(self.down_proj)).tolist()
        output = torch.zeros_like(hidden_states)
        norms = []
        start = 0
        dense = "dense" in self._watch.extras
        for expert, count in enumerate(counts):
            if dense:
                self._watch.add_dense(expert, expert_output(self, expert, hidden_states[kept]))
            if not count:
                continue
            part = slice(start, start + count)
            start += count
            f = expert_output(self, expert, hidden_states.index_select(0, tokens[part]))
            self._watch.add_outputs(expert, f, weights[part])
            norms.append(torch.linalg.vector_norm(f, dim=-1, dtype=torch.float32))
            self._watch.largest(expert, f.max().float())
            output.index_add_(0, tokens[part], (f * weights[part, None]).to(output.dtype))
        self._watch.add(experts, tokens, weights, torch.cat(norms), output)
        return output
