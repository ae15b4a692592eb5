"""``/v1/models`` says what is served: experts per layer, effective top-k, plan digest, variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from liveprune.patches.admission import installed
from liveprune.patches.compat import Seam
from liveprune.patches.hf_config import LAYERS_ATTRIBUTE
from liveprune.pruning.architectures import ARCHITECTURES
from liveprune.pruning.model_spec import BLOCK_KEY, ModelSpec

SHOW_MODELS = Seam(
    "vllm.entrypoints.openai.models.serving",
    "OpenAIModelRegistry.show_available_models",
    ("self",),
)


def wrap_show_models(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add one ``liveprune`` object to each card of a base model, and a card of each live variant.

    vLLM adds the adapters' cards after these.
    """

    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        details = describe(self.model_config.hf_config)
        if details is not None:
            for card in models.data:
                card.liveprune = details
                card.parent = card.parent or details["base_model"]
        directory = installed()
        if directory is not None:
            models.data += [_variant_card(models.data[0], live) for live in directory.cards()]
        return models

    return show_available_models


def _variant_card(base: Any, live: dict[str, Any]) -> Any:
    """A variant is a plan over the base model's checkpoint: the same root and the same limits."""
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

    return ModelCard(
        id=live["id"],
        parent=live["parent"],
        root=base.root,
        max_model_len=base.max_model_len,
        permission=[ModelPermission()],
        liveprune=live["liveprune"],
    )


def describe(config: Any) -> dict[str, Any] | None:
    """What a served model is made of; None for a family that Liveprune does not know.

    Returns:
        ``base_model`` (None for a base model itself), ``plan`` (digest or None), ``experts`` and
        ``top_k`` as ``{"min", "max"}`` over the layers that have experts.
    """
    raw = config.to_dict()
    if raw.get("model_type") not in ARCHITECTURES:
        return None
    table = getattr(config, LAYERS_ATTRIBUTE, None)
    if table is not None:
        counts = [(experts, top_k) for experts, top_k, *_ in table.values()]
    else:
        counts = [(x.experts, x.top_k) for x in ModelSpec.from_config(raw).layers]
    block = raw.get(BLOCK_KEY) or {}
    return {
        "base_model": block.get("base_model"),
        "plan": block.get("plan"),
        "experts": {"min": min(e for e, _ in counts), "max": max(e for e, _ in counts)},
        "top_k": {"min": min(k for _, k in counts), "max": max(k for _, k in counts)},
    }
