"""What a decision changes: the shares, or the experiment's end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from liveprune.server.experiments.decision import Decision
from liveprune.server.experiments.definition import Experiment


@dataclass(frozen=True)
class Outcome:
    """What follows from a decision beside a line in the log."""

    shares: Mapping[str, int] | None = None
    """Arm to millionths; None: they stay."""
    state: Literal["rolled_back", "shipped"] | None = None
    """How the experiment ends; None: it goes on."""
    promote: str | None = None
    """Tag of the variant that the alias shall be swapped to."""

    @property
    def acts(self) -> bool:
        """Whether anything changes."""
        return self.shares is not None or self.state is not None


def outcome_of(experiment: Experiment, shares: Mapping[str, int], decision: Decision) -> Outcome:
    """What to do now.

    Args:
        experiment: that was decided on.
        shares: arm to millionths, now.
        decision: its ``actions`` are carried out.
    """
    if "rollback" in decision.actions and decision.arm is not None:
        moved = {**shares, decision.arm: 0}
        moved[experiment.control] += shares[decision.arm]
        left = any(moved[arm.name] for arm in experiment.treatments)
        return Outcome(moved, None if left else "rolled_back")
    if "promote" in decision.actions and decision.arm is not None:
        variants = {arm.name: arm.variant for arm in experiment.arms}
        return Outcome(state="shipped", promote=variants[decision.arm])
    if "ramp" in decision.actions:
        treated = sum(shares[arm.name] for arm in experiment.treatments)
        step = next(step for step in experiment.ramp if step > treated)
        return Outcome(present(experiment, shares).ramped(step))
    return Outcome()


def present(experiment: Experiment, shares: Mapping[str, int]) -> Experiment:
    """The experiment with the shares of now: a ramp keeps their proportions."""
    arms = tuple(dataclasses.replace(arm, ppm=shares[arm.name]) for arm in experiment.arms)
    return dataclasses.replace(experiment, arms=arms)
