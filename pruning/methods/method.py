"""What a method is: a ranking of each layer's experts, or a choice of whole layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from liveprune.pruning.calibration.statistics import LayerStatistics, RoutingStatistics
from liveprune.pruning.errors import PlanError
from liveprune.pruning.layer_plan import LayerPlan

if TYPE_CHECKING:
    from liveprune.pruning.budget import LayerBudget
    from liveprune.pruning.calibration.rows import Rows
    from liveprune.pruning.calibration.weights import LayerWeights, Weights
    from liveprune.pruning.methods.moeits_removals import Removals
    from liveprune.pruning.model_spec import ModelSpec, Router

Scores = npt.NDArray[np.float64]
"""[experts] float64, higher = keep; -inf where the score is undefined: pruned first."""

Options = Mapping[str, Any]
"""Values of a method's own parameters, by name."""


@dataclass(frozen=True)
class Folding:
    """One layer whose experts have been ranked and counted: what becomes of those that go?"""

    budget: LayerBudget
    kept: tuple[int, ...]
    """The ids with the highest scores, ascending, as many as the budget allows."""
    scores: Scores
    statistics: LayerStatistics | None
    """Of a calibrated method; with the extras that it asks for."""
    weights: LayerWeights
    router: Router
    keep_gate_rows: bool
    """Route over all old experts, and map the choice (methods.md 6, variant 4b)."""
    options: Options

    @property
    def protected(self) -> tuple[int, ...]:
        """Super experts, which stay as they are; ascending."""
        return tuple(np.flatnonzero(self.scores == np.inf).tolist())

    @property
    def calibrated(self) -> LayerStatistics:
        """The statistics, of a method that asks for them.

        Raises:
            ValueError: there are none.
        """
        if self.statistics is None:
            raise ValueError("found no statistics, expected those of a calibrated method")
        return self.statistics


@dataclass(frozen=True)
class Choosing:
    """Everything that a method which chooses whole layers may ask for."""

    model: Path
    spec: ModelSpec
    budgets: Sequence[LayerBudget]
    """Every layer with experts, in order; what each is to keep unless ``total`` is stated."""
    total: int | None
    """Experts kept in all layers that are not skipped, to be shared out over them."""
    rows: Rows | None
    statistics: RoutingStatistics | None
    """Where the method needs any (``needs``)."""
    weights: Weights
    device: str
    seed: int
    keep_gate_rows: bool
    """See ``Folding``."""
    options: Options
    progress: Callable[[int, int], None] | None


@dataclass(frozen=True)
class Chosen:
    """The layers of a plan, and the numbers that led to them."""

    layers: Mapping[int, LayerPlan]
    """By index; skipped layers may be left out."""
    scores: Mapping[str, Any] = field(default_factory=dict)
    """JSON-like, for the plan's lineage."""


@dataclass(frozen=True)
class Method:
    """How experts are chosen; exactly one source is set.

    Scores are not negative, apart from -inf, so that ``budget`` can compare layers by shares.
    """

    name: str
    title: str
    reference: str
    """arXiv id, or an empty string for what is folklore."""
    formula: str
    from_statistics: Callable[[LayerStatistics], Scores] | None = None
    """Needs calibration rows."""
    from_corpora: Callable[[Sequence[LayerStatistics]], Scores] | None = None
    """Of the statistics of several sets of calibration rows."""
    from_weights: Callable[[LayerWeights], Scores] | None = None
    """Reads the checkpoint, one expert at a time."""
    from_seed: Callable[[int, np.random.Generator], Scores] | None = None
    """Of the number of experts and a seeded generator."""
    from_pairs: Callable[[LayerWeights, str, int, Callable[[], None] | None], Removals] | None = (
        None
    )
    """Compares the experts of a layer two by two: of the weights, an estimator of ``nmi``, a seed,
    and what to call after each pair and matrix. It may decide how many stay, too (``tau``)."""
    choose: Callable[[Choosing], Chosen] | None = None
    """Decides about sets of experts, or about all layers together."""

    fold: Callable[[Folding], LayerPlan] | None = None
    """What becomes of experts that a ranking lets go; None: nothing, they are sliced off."""
    needs: frozenset[str] = frozenset()
    """Extras of the observer pass (``statistics.EXTRAS``)."""
    draws: bool = False
    """``choose`` or ``from_seed`` draws by the seed."""
    reads_rows: bool = False
    """``choose`` needs calibration rows, whatever statistics it needs."""
    comparable: bool = True
    """Scores of several layers can be compared by shares; False: they only order one layer's."""
    allocate: str = "uniform"
    """How its budget is shared out over the layers where nothing is said."""
    leaves_constants: bool = False
    """A pruned expert leaves a vector of the hidden size behind, and the gate keeps its row."""
    keep_gate_rows: bool | None = None
    """Where nothing is said, see ``Folding``; None: the method has no such choice."""
    options: Options = field(default_factory=lambda: MappingProxyType({}))
    """Its own parameters, with their defaults."""
    check: Callable[[Options], None] | None = None
    """Refuses values of its parameters before anything is read: raises PlanError."""

    def __post_init__(self) -> None:
        sources = (self.from_statistics, self.from_corpora, self.from_weights, self.from_seed)
        sources = (*sources, self.from_pairs, self.choose)  # type: ignore[assignment]
        if sum(source is not None for source in sources) != 1:
            raise ValueError(f"method {self.name}: expected exactly one source of scores")

    @property
    def needs_statistics(self) -> bool:
        calibrated = self.from_statistics is not None or self.from_corpora is not None
        return calibrated or bool(self.needs)

    @property
    def needs_calibration(self) -> bool:
        return self.needs_statistics or self.reads_rows

    @property
    def reads_weights(self) -> bool:
        sources = (self.from_weights, self.from_pairs, self.choose, self.fold)
        return any(source is not None for source in sources)

    def with_options(self, given: Mapping[str, Any]) -> Options:
        """Its parameters with those ``given``.

        Raises:
            PlanError: there is no such parameter, or its value is of another kind or range.
        """
        for name, value in given.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise PlanError(f"method {self.name}: found parameter {name!r}, expected {known}")
            default = self.options[name]
            kind = (int, float) if isinstance(default, float) else type(default)
            same = isinstance(value, bool) == isinstance(default, bool)
            if not (isinstance(value, kind) and same):
                raise PlanError(
                    f"method {self.name}: {name} is {value!r}, expected a value like {default!r}"
                )
        options = MappingProxyType({**self.options, **given})
        if self.check is not None:
            self.check(options)
        return options
