"""Model families as data: tensor names, config keys, router kinds.

A new family is one entry of ``ARCHITECTURES`` (docs/adding-an-architecture.md). Names are those of
the published Hugging Face checkpoints; transformers' fused 3-D names are read as well. Source of
the table: the checkpoints' own indexes and transformers' modelling code (methods.md, section 10).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from liveprune.pruning.errors import ArchitectureError


@dataclass(frozen=True)
class ExpertNames:
    """The three matrices of one expert, ``FFN(x) = down(act(gate(x)) * up(x))``."""

    gate: str
    up: str
    down: str

    def __iter__(self) -> Iterator[str]:
        return iter((self.gate, self.up, self.down))


@dataclass(frozen=True)
class DenseLayers:
    """Config keys that say which layers have no experts (each ``None`` where unused)."""

    first_k: str | None = None
    """Layers below this index are dense."""
    every: str | None = None
    """A layer has experts where ``layer % every == 0`` (or ``(layer + offset) % every``)."""
    every_offset: int = 0
    listed: str | None = None
    """A list of dense layer indices."""


@dataclass(frozen=True)
class Architecture:
    """What Liveprune needs to know about one model family."""

    model_type: str
    classes: tuple[str, ...]
    block: str
    """MoE block below ``model.layers.N.``."""
    experts: ExpertNames
    """Projection names below ``block.experts.E.``, without ``.weight``."""
    count_key: str
    """Canonical config key of the expert count: the attribute that transformers stores."""
    count_aliases: tuple[str, ...] = ()
    renormalise: bool | None = None
    """Top-k weights divided by their sum: always, never, or by ``norm_topk_prob`` (None)."""
    renormalise_default: bool = False
    scoring: str = "softmax"
    """``softmax`` or ``sigmoid`` unless config's ``scoring_func`` says otherwise."""
    side_tensors: tuple[str, ...] = ()
    """Tensors of the block with one entry per expert beside the gate, e.g. a correction bias."""
    grouped: bool = False
    """The router may pick groups of experts first (``n_group``, ``topk_group``)."""
    dense: DenseLayers = DenseLayers()
    shared: str | None = None
    """Shared expert below ``block``; never pruned."""
    expert_size_key: str = "moe_intermediate_size"
    mtp_key: str | None = None
    """Number of multi-token-prediction layers after the decoder layers."""
    required: tuple[str, ...] = ()
    """Keys that a config must state, because transformers' default for them is not "off"."""

    top_k_key: str = "num_experts_per_tok"
    gate: str = "gate.weight"
    router_map: str = "router_map"
    """Liveprune's own tensor: the EEP router map of a layer, [kept, experts] float32."""
    expert_map: str = "expert_map"
    """Ours: the new expert that does each old one's work, [experts] int32; -1: a constant does."""
    constants: str = "constants"
    """Ours: what the experts return that the map gives as -1, [their number, hidden] float32."""
    fused_gate_up: str = "experts.gate_up_proj"
    fused_down: str = "experts.down_proj"

    def block_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.block}."


_QWEN_NAMES = ExpertNames("gate_proj", "up_proj", "down_proj")
_QWEN_DENSE = DenseLayers(every="decoder_sparse_step", every_offset=1, listed="mlp_only_layers")
_DEEPSEEK_DENSE = DenseLayers(first_k="first_k_dense_replace", every="moe_layer_freq")

_TABLE = (
    Architecture(
        model_type="mixtral",
        classes=("MixtralForCausalLM",),
        block="block_sparse_moe",
        experts=ExpertNames("w1", "w3", "w2"),
        count_key="num_local_experts",
        count_aliases=("num_experts",),
        renormalise=True,
        expert_size_key="intermediate_size",
    ),
    Architecture(
        model_type="qwen2_moe",
        classes=("Qwen2MoeForCausalLM",),
        block="mlp",
        experts=_QWEN_NAMES,
        count_key="num_experts",
        dense=_QWEN_DENSE,
        shared="shared_expert",
    ),
    Architecture(
        model_type="qwen3_moe",
        classes=("Qwen3MoeForCausalLM",),
        block="mlp",
        experts=_QWEN_NAMES,
        count_key="num_local_experts",
        count_aliases=("num_experts",),
        dense=_QWEN_DENSE,
    ),
    Architecture(
        model_type="olmoe",
        classes=("OlmoeForCausalLM",),
        block="mlp",
        experts=_QWEN_NAMES,
        count_key="num_experts",
        count_aliases=("num_local_experts",),
        expert_size_key="intermediate_size",
    ),
    Architecture(
        model_type="deepseek_v2",
        classes=("DeepseekV2ForCausalLM",),
        block="mlp",
        experts=_QWEN_NAMES,
        count_key="n_routed_experts",
        count_aliases=("num_experts",),
        grouped=True,
        dense=_DEEPSEEK_DENSE,
        shared="shared_experts",
    ),
    Architecture(
        model_type="deepseek_v3",
        classes=("DeepseekV3ForCausalLM",),
        block="mlp",
        experts=_QWEN_NAMES,
        count_key="n_routed_experts",
        count_aliases=("num_local_experts",),
        renormalise_default=True,
        scoring="sigmoid",
        side_tensors=("gate.e_score_correction_bias",),
        grouped=True,
        dense=_DEEPSEEK_DENSE,
        shared="shared_experts",
        mtp_key="num_nextn_predict_layers",
        required=("first_k_dense_replace", "n_group", "topk_group"),
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({a.model_type: a for a in _TABLE})


def architecture_of(config: Mapping[str, object]) -> Architecture:
    """Find the family of a checkpoint by its config's ``model_type``.

    Raises:
        ArchitectureError: the family is not in the table.
    """
    model_type = config.get("model_type")
    found = ARCHITECTURES.get(str(model_type))
    if found is None:
        raise ArchitectureError(
            f"config.json: model_type is {model_type!r}; Liveprune knows "
            f"{', '.join(sorted(ARCHITECTURES))} (docs/adding-an-architecture.md)"
        )
    return found
