"""A checkpoint run one decoder layer at a time, by transformers' own code.

The base model of the family is built on the meta device, where it takes no memory. To run layer
N, its weights are read and all other layers stand aside: the stock ``forward`` then makes the
attention mask and the rotary embeddings and calls layer N, so that attention is right for every
family without a line about it here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig

from liveprune.pruning.calibration.weights import LayerWeights, Weights
from liveprune.pruning.errors import ArchitectureError, CheckpointError
from liveprune.pruning.model_spec import BLOCK_KEY, LIST_KEYS, ModelSpec

BLOCK = "mlp."
"""Every family's MoE or dense block below a transformers decoder layer."""


class StreamedModel:
    """Runs hidden states through a checkpoint, one layer in memory at a time."""

    def __init__(self, model: Path, spec: ModelSpec, device: str = "cpu") -> None:
        """Build the model without weights.

        Raises:
            CheckpointError: the weights are quantised, missing or not safetensors.
            ArchitectureError: the checkpoint has a router map, which only Liveprune's server runs.
        """
        mapped = [x.index for x in spec.layers if x.has_router_map]
        if mapped:
            raise ArchitectureError(
                f"{model}: the layers {mapped} have a router map; expected the base model it was "
                f"made from"
            )
        self.spec = spec
        self.device = torch.device(device)
        self.weights = Weights(model, spec)
        self._config = _base_config(spec)
        self._skeleton = _skeleton(self._config)
        self._layer_class: Any = type(self._skeleton.layers[0])
        for index in range(len(self._skeleton.layers)):
            self._skeleton.layers[index] = _Skipped()
        self._skeleton.norm = nn.Identity()
        # On the meta device its frequencies have no values.
        rotary = type(self._skeleton.rotary_emb)(config=self._config)
        self._skeleton.rotary_emb = rotary.to(self.device)
        self._skeleton.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that layers run in: the config's."""
        dtype: torch.dtype = self._config.dtype
        return dtype

    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Token ids [rows, length] int64 -> hidden states [rows, length, hidden] before layer 0."""
        table = self.weights.tensor("model.embed_tokens.weight")
        return [nn.functional.embedding(ids, table).to(self.dtype) for ids in batches]

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """Put decoder layer ``index`` in place with its weights; it is dropped on leaving.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or too many.
        """
        layer = self._load(index)
        self._skeleton.layers[index] = layer
        try:
            yield layer
        finally:
            self._skeleton.layers[index] = _Skipped()

    def run(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [rows, length, hidden] after the layer in place.

        ``attention_mask`` [rows, length] is 1 for tokens and 0 for padding on the right.
        """
        output: Tensor = self._skeleton(
            inputs_embeds=hidden.to(self.device),
            attention_mask=attention_mask.to(self.device),
            use_cache=False,
        )[0]
        return output

    def advance(self, hidden: Tensor, attention_mask: Tensor, index: int) -> Tensor:
        """Like ``run``; the result is checked and in main memory.

        Raises:
            CheckpointError: after layer ``index`` a token that is not padding has NaN or infinity.
        """
        after = self.run(hidden, attention_mask).cpu()
        if not torch.isfinite(after[attention_mask.bool()]).all():
            raise CheckpointError(
                f"layer {index}: hidden states hold NaN or infinity; expected sound weights, "
                f"in a dtype wide enough for this model"
            )
        return after

    def _load(self, index: int) -> nn.Module:
        config = copy.copy(self._config)
        moe = {x.index: x for x in self.spec.layers}.get(index)
        architecture = self.spec.architecture
        if moe is not None:
            setattr(config, architecture.count_key, moe.experts)
            setattr(config, architecture.top_k_key, moe.top_k)
        with torch.device("meta"), _default_dtype(self.dtype):
            layer = self._layer_class(config, index)
        prefix = f"model.layers.{index}."
        source_block = f"{architecture.block}." if moe is not None else BLOCK
        state = _stacked(self.weights.layers[index], layer.mlp.experts) if moe is not None else {}
        for name, like in layer.state_dict().items():
            if name not in state:
                source = prefix + name.replace(BLOCK, source_block, 1)
                state[name] = _cast(self.weights.tensor(source), like, source)
        layer.load_state_dict(state, assign=True)
        return layer.eval().to(self.device)  # type: ignore[no-any-return]


def expert_output(experts: Any, expert: int, x: Tensor) -> Tensor:
    """What one of a MoE block's experts makes of hidden states [n, hidden], before its weight."""
    gate, up = nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    hidden: Tensor = experts.act_fn(gate) * up
    return nn.functional.linear(hidden, experts.down_proj[expert])


class _Skipped(nn.Module):
    """Stands in for a layer that is not loaded: hidden states pass through."""

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states


def _stacked(layer: LayerWeights, like: Any) -> dict[str, Tensor]:
    """A layer's experts as transformers holds them: all in one tensor per projection.

    [experts, 2 ffn, hidden] for gate and up, [experts, hidden, ffn] for down.
    """
    gate_up = torch.empty(like.gate_up_proj.shape, dtype=like.gate_up_proj.dtype)
    down = torch.empty(like.down_proj.shape, dtype=like.down_proj.dtype)
    for index, matrices in enumerate(layer.experts()):
        gate_up[index], down[index] = matrices
    return {BLOCK + "experts.gate_up_proj": gate_up, BLOCK + "experts.down_proj": down}


def _cast(tensor: Tensor, like: Tensor, name: str) -> Tensor:
    if tensor.shape != like.shape:
        raise CheckpointError(f"{name} is {list(tensor.shape)}, expected {list(like.shape)}")
    # The correction bias decides near-ties between experts: transformers keeps it in float32 too.
    keep = name.endswith("e_score_correction_bias")
    return tensor.to(torch.float32 if keep else like.dtype)


def _base_config(spec: ModelSpec) -> PreTrainedConfig:
    """The config without per-layer counts, which ``_load`` sets layer by layer."""
    dropped = {"per_layer_config", BLOCK_KEY, *LIST_KEYS, *spec.architecture.count_aliases}
    dropped.add("auto_map")  # names code of the checkpoint's own, which is never run
    fields: dict[str, Any] = {k: v for k, v in spec.config.items() if k not in dropped}
    fields[spec.architecture.count_key] = max(layer.experts for layer in spec.layers)
    config = CONFIG_MAPPING[spec.architecture.model_type].from_dict(fields)
    if config.dtype is None:
        config.dtype = torch.float32
    return config


def _skeleton(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=config.dtype)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
