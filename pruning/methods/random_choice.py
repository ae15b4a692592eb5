"""Random choice: the baseline that every method has to beat."""

from __future__ import annotations

from liveprune.pruning.methods.method import Method

RANDOM = Method(
    name="random",
    title="Random choice, seeded",
    reference="",
    formula="S_j ~ U(0, 1)",
    draws=True,
    from_seed=lambda experts, generator: generator.random(experts),
)
