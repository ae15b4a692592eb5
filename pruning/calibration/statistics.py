"""What the observer pass leaves: sums per layer and expert from which every score is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from liveprune.pruning.errors import DataError
from liveprune.pruning.files import write_atomic

Values = npt.NDArray[np.float64]
FORMAT = "liveprune-statistics-2"
FIELDS = ("sums", "max_activation", "contribution")
EXTRAS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "outputs": ("output_sums", "output_squares", "gated_sums"),
        "logits": ("logit_products", "together"),
        "dense": ("dense_sums",),
    }
)
"""Further sums of a pass that is asked for them, by the name to ask with."""

SUPER_QUANTILE = 0.995
SUPER_OF_MAXIMUM = 0.1
SUPER_DEPTH = 0.75


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums over the tokens routed to each expert of one layer; padding is never counted.

    For a token t routed to expert j, g is the weight the model's own router gives it
    (renormalised and scaled as the model does) and f the expert's output before that weight.
    """

    sums: Values
    """[experts, 3, 3] float64: entry (j, a, b) = sum over t of g^a * ||f||_2^b."""
    max_activation: Values
    """[experts] float64: largest signed entry of f; -inf for an expert that was never hit."""
    contribution: Values
    """[experts] float64: sum of g * ||f||_2 * max(0, 1 - cos(x, x + y)) with x the residual stream
    before the MoE block and y the routed output (EASY-EP, arXiv:2504.06792)."""

    output_sums: Values | None = None
    """[experts, hidden] float64: sum of f (``outputs``)."""
    output_squares: Values | None = None
    """[experts, hidden] float64: sum of the squares of f's entries (``outputs``)."""
    gated_sums: Values | None = None
    """[experts, hidden] float64: sum of g * f (``outputs``)."""
    logit_products: Values | None = None
    """[experts, experts] float64: sum of z_i * z_j over all tokens, z the gate's logits
    (``logits``)."""
    together: Values | None = None
    """[experts, experts] float64: tokens routed to both experts (``logits``)."""
    dense_sums: Values | None = None
    """[experts, hidden] float64: sum of f over all tokens, also those routed elsewhere
    (``dense``, which computes every expert on every token)."""

    def __post_init__(self) -> None:
        for array in self.arrays().values():
            array.setflags(write=False)

    def arrays(self) -> dict[str, Values]:
        """What is there, by field name."""
        names = [*FIELDS, *(name for fields in EXTRAS.values() for name in fields)]
        found = {name: getattr(self, name) for name in names}
        return {name: array for name, array in found.items() if array is not None}

    def gathered(self, name: str) -> Values:
        """A field that only a pass with extras fills.

        Raises:
            ValueError: the pass was not asked for it.
        """
        array: Values | None = getattr(self, name)
        if array is None:
            raise ValueError(f"statistics: {name} was not gathered; its method must ask for it")
        return array

    @property
    def counts(self) -> Values:
        """[experts] float64: tokens routed to each expert, n_j."""
        return self.sums[:, 0, 0]

    def saliency(self, b: int, alpha: int, beta: int) -> Values:
        """S_j(b, alpha, beta) = n_j^-b * sum over t of g^alpha * ||f||_2^beta, [experts] float64.

        The unified form of arXiv:2606.15716; b is 0 or 1, alpha and beta are 0, 1 or 2. A mean
        over no tokens is undefined and given as -inf: such an expert is pruned first.
        """
        total = self.sums[:, alpha, beta]
        if b == 0:
            return total.copy()
        hit = self.counts > 0
        return np.where(hit, total / np.where(hit, self.counts, 1), -np.inf)


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """The statistics of all layers with experts, and what they were taken from."""

    layers: Mapping[int, LayerStatistics]
    """By decoder layer index, ascending."""
    tokens: int
    """Tokens observed, the same in every layer."""
    calibration: str
    """Digest of the tokenised rows."""
    model: str
    """Fingerprint of the checkpoint."""

    def super_experts(self) -> dict[int, tuple[int, ...]]:
        """Experts whose removal may collapse the model, ascending ids by layer index.

        REAP's rule: the largest activation exceeds both the 99.5th percentile over all experts of
        all layers and a tenth of the global maximum; only the first 75% of the layers count.
        """
        largest = np.concatenate([layer.max_activation for layer in self.layers.values()])
        largest = largest[np.isfinite(largest)]
        if not len(largest):
            return {}
        bound = max(np.quantile(largest, SUPER_QUANTILE), largest.max() * SUPER_OF_MAXIMUM)
        early = list(self.layers.items())[: int(len(self.layers) * SUPER_DEPTH)]
        flagged = {i: np.flatnonzero(layer.max_activation > bound) for i, layer in early}
        return {i: tuple(ids.tolist()) for i, ids in flagged.items() if len(ids)}

    def save(self, path: Path) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        write_atomic(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of such a file."""
        tensors = {
            f"layers.{index}.{name}": np.ascontiguousarray(array)
            for index, layer in self.layers.items()
            for name, array in layer.arrays().items()
        }
        facts = {"tokens": self.tokens, "calibration": self.calibration, "model": self.model}
        return save(tensors, {"format": FORMAT, "facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> RoutingStatistics:
        """Read what ``save`` wrote.

        Raises:
            DataError: not such a file, or of another version.
        """
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise DataError(
                        f"{path}: format is {metadata.get('format')!r}, expected {FORMAT!r}"
                    )
                facts = json.loads(metadata["facts"])
                arrays: dict[int, dict[str, Values]] = {}
                for name in file.keys():  # noqa: SIM118 - not a dict
                    _, index, field = name.split(".")
                    arrays.setdefault(int(index), {})[field] = file.get_tensor(name)
                layers = {i: LayerStatistics(**arrays[i]) for i in sorted(arrays)}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not readable as routing statistics: {error}") from error
        return cls(layers, int(facts["tokens"]), str(facts["calibration"]), str(facts["model"]))
