"""One layer of a plan: which experts there are after it, and who does the work of the others."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from liveprune.pruning.errors import PlanError

Matrix = npt.NDArray[np.float32]
NeuronMap = npt.NDArray[np.int32]

MATRIX_FIELDS = ("merge", "router_map", "constants", "neuron_map", "neuron_shares")
"""Fields of ``LayerPlan`` that hold arrays; those of a plan stand in a file of their own."""

SMALLEST_SUM = 1e-9
"""Scores under a router map may be negative, so their sum, which divides them, may come near zero:
whoever routes by a map keeps it this far from zero."""


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer of a plan.

    What there is afterwards is told by one of

    * ``kept``: the expert ids that stay, ascending;
    * ``merge``: new experts as linear combinations of the old ones;
    * ``neuron_map`` and ``neuron_shares``: new experts gathered neuron by neuron.

    How tokens reach it is told by one of

    * ``kept``: the gate is sliced to these rows; with a merge they are the gate rows of the new
      experts, in order;
    * ``kept`` and ``constants``: the gate keeps all rows; an expert that is not kept answers with
      its constant vector (MoNE, arXiv:2507.00390);
    * ``router_map``: the gate keeps all rows; new scores are mixtures of the old probabilities
      (EEP, arXiv:2407.00945);
    * ``expert_map``: the gate keeps all rows and chooses among the old experts; each has its work
      done by a new one, two of a token's choices perhaps by the same (HC-SMoE, arXiv:2410.08589).
    """

    layer: int
    """Index among all decoder layers."""
    experts: int
    """Experts of the base model in this layer."""
    top_k: int
    """Active experts per token."""
    kept: tuple[int, ...] = ()
    merge: Matrix | None = None
    """[kept, experts] float32: new expert j = sum over i of merge[j, i] * expert i (EEP, W_EM)."""
    router_map: Matrix | None = None
    """[kept, experts] float32: score j = sum over i of router_map[j, i] * p_i (EEP, W_RM)."""
    expert_map: tuple[int, ...] = ()
    """[experts]: the new expert that does each old expert's work; every new one does some."""
    constants: Matrix | None = None
    """[experts - kept, hidden] float32: what each expert that is not kept returns, ascending."""
    neuron_map: NeuronMap | None = None
    """[experts, ffn] int32: where neuron n of expert i goes: ``j * ffn + m``, neuron m of new
    expert j, or -1, nowhere. A neuron is a row of gate, one of up and a column of down."""
    neuron_shares: Matrix | None = None
    """[experts] float32: a new neuron is the mean of those that go there, weighted by these."""

    def __post_init__(self) -> None:
        where = f"layer {self.layer}"
        for name in ("layer", "experts", "top_k"):
            object.__setattr__(self, name, whole(getattr(self, name), where, name))
        for name in ("kept", "expert_map"):
            ids = tuple(whole(i, where, f"{name} id") for i in getattr(self, name))
            object.__setattr__(self, name, ids)
        for name in ("merge", "router_map"):
            matrix = getattr(self, name)
            if matrix is not None:
                frozen = _frozen(matrix, where, name)
                _check_shape(frozen, (None, self.experts), where, name)
                object.__setattr__(self, name, frozen)
        self._check_neurons(where)
        self._check_routing(where)
        if self.kept:
            self._check_kept(where)
        if self.expert_map:
            self._check_expert_map(where)
        if self.constants is not None:
            self._check_constants(where)
        if self.router_map is not None:
            self._check_router_map(where, self.router_map)
        if not 1 <= self.top_k <= self.candidates:
            raise PlanError(
                f"{where}: top_k is {self.top_k}, expected 1 to {self.candidates} (experts that "
                f"the router chooses from)"
            )

    def _check_neurons(self, where: str) -> None:
        if (self.neuron_map is None) != (self.neuron_shares is None):
            raise PlanError(f"{where}: expected neuron_map and neuron_shares together")
        if self.neuron_map is None or self.neuron_shares is None:
            return
        if self.merge is not None:
            raise PlanError(f"{where}: found both merge and neuron_map; expected one of them")
        targets = np.asarray(self.neuron_map)
        if targets.dtype.kind not in "iu" or targets.ndim != 2 or len(targets) != self.experts:
            raise PlanError(
                f"{where}: neuron_map is {targets.dtype} {targets.shape}, expected whole numbers "
                f"[{self.experts}, ffn]"
            )
        shares = _frozen(self.neuron_shares, where, "neuron_shares")
        _check_shape(shares, (self.experts,), where, "neuron_shares")
        frozen = targets.astype(np.int32)
        frozen.setflags(write=False)
        object.__setattr__(self, "neuron_map", frozen)
        object.__setattr__(self, "neuron_shares", shares)
        if (shares < 0).any():
            raise PlanError(f"{where}: neuron_shares hold {shares.min():g}, expected at least 0")
        end = self.kept_experts * frozen.shape[1]
        if frozen.min() < -1 or frozen.max() >= end:
            raise PlanError(
                f"{where}: neuron_map reaches {frozen.min()} to {frozen.max()}, expected -1 to "
                f"{end - 1}"
            )
        weights = np.broadcast_to(shares[:, None], frozen.shape)
        used = frozen >= 0
        total = np.bincount(frozen[used], weights[used], minlength=end)
        if (total <= 0).any():
            raise PlanError(
                f"{where}: nothing goes to new neuron {int(np.argmin(total))}, expected at least "
                f"one with a share"
            )

    def _check_routing(self, where: str) -> None:
        forms = {
            "a router_map": self.router_map is not None,
            "an expert_map": bool(self.expert_map),
            "kept ids": bool(self.kept),
        }
        found = [name for name, there in forms.items() if there]
        if not found:
            raise PlanError(f"{where}: found no kept experts, expected at least 1")
        if len(found) > 1:
            raise PlanError(f"{where}: found both {' and '.join(found)}; expected one of them")
        if self.expert_map and not self.merges:
            raise PlanError(f"{where}: found an expert_map without merge or neuron_map")

    def _check_kept(self, where: str) -> None:
        bad = [i for i in self.kept if not 0 <= i < self.experts]
        if bad:
            raise PlanError(f"{where}: found kept ids {bad}, expected 0 to {self.experts - 1}")
        if list(self.kept) != sorted(set(self.kept)):
            raise PlanError(
                f"{where}: found kept ids {list(self.kept)}, expected ascending without repeats"
            )
        if self.merge is not None and len(self.kept) != len(self.merge):
            raise PlanError(
                f"{where}: found {len(self.kept)} kept ids for {len(self.merge)} merged experts"
            )

    def _check_expert_map(self, where: str) -> None:
        found = sorted(set(self.expert_map))
        if len(self.expert_map) != self.experts or found != list(range(self.kept_experts)):
            raise PlanError(
                f"{where}: expert_map names {found} for {len(self.expert_map)} experts, expected "
                f"each of 0 to {self.kept_experts - 1} for {self.experts} experts"
            )

    def _check_constants(self, where: str) -> None:
        if self.merges or not 0 < len(self.kept) < self.experts:
            raise PlanError(
                f"{where}: found constants, expected them with some of the {self.experts} ids kept "
                f"and nothing merged"
            )
        frozen = _frozen(self.constants, where, "constants")
        _check_shape(frozen, (self.experts - len(self.kept), None), where, "constants")
        object.__setattr__(self, "constants", frozen)

    def _check_router_map(self, where: str, router_map: Matrix) -> None:
        if self.merge is None:
            raise PlanError(f"{where}: found a router_map without a merge matrix")
        if router_map.shape != self.merge.shape:
            raise PlanError(
                f"{where}: router_map is {router_map.shape}, expected {self.merge.shape} like merge"
            )

    @property
    def kept_experts(self) -> int:
        """Number of experts after the plan."""
        if self.merge is not None:
            return len(self.merge)
        return len(self.kept) or max(self.expert_map, default=-1) + 1

    @property
    def mapping(self) -> str:
        """How the choice of a gate that keeps its rows is mapped onto what there is:
        ``router_map``, ``expert_map`` or ``constants``; "" for a sliced gate.
        """
        if self.router_map is not None:
            return "router_map"
        if self.expert_map:
            return "expert_map"
        return "constants" if self.constants is not None else ""

    @property
    def keeps_gate_rows(self) -> bool:
        """The gate keeps a row per base expert; the choice is mapped onto what there is."""
        return bool(self.mapping)

    @property
    def new_ids(self) -> tuple[int, ...]:
        """[experts]: the new expert that does each old one's work; -1: nobody, or a constant. Of a
        plan that states an expert map or kept ids.
        """
        if self.expert_map:
            return self.expert_map
        places = {old: new for new, old in enumerate(self.kept)}
        return tuple(places.get(i, -1) for i in range(self.experts))

    @property
    def router_width(self) -> int:
        """Gate rows after the plan."""
        return self.experts if self.keeps_gate_rows else self.kept_experts

    @property
    def candidates(self) -> int:
        """What the router takes its top-k of."""
        return self.kept_experts if self.router_map is not None else self.router_width

    @property
    def merges(self) -> bool:
        """New expert weights are computed."""
        return self.merge is not None or self.neuron_map is not None

    @property
    def is_identity(self) -> bool:
        """All experts kept as they are."""
        return not self.merges and len(self.kept) == self.experts

    @property
    def pruned(self) -> tuple[int, ...]:
        """Ids that are not kept, ascending; of a plan that states kept ids."""
        return tuple(sorted(set(range(self.experts)) - set(self.kept)))

    def matrices(self) -> dict[str, Matrix | NeuronMap]:
        """The layer's arrays by tensor name."""
        named = {name: getattr(self, name) for name in MATRIX_FIELDS}
        return {f"layers.{self.layer}.{k}": v for k, v in named.items() if v is not None}


def whole(value: Any, where: str, name: str) -> int:
    """A plain int; NumPy integers are taken, since they would not survive JSON.

    Raises:
        PlanError: it is none.
    """
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise PlanError(f"{where}: {name} is {value!r}, expected a whole number")
    return operator.index(value)


def _frozen(matrix: Any, where: str, name: str) -> Matrix:
    try:
        with np.errstate(over="ignore"):  # becomes infinity, refused below
            array = np.asarray(matrix, dtype=np.float32).copy(order="C")
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where}: {name} is not a matrix of numbers: {error}") from error
    if not np.isfinite(array).all():
        raise PlanError(f"{where}: {name} holds NaN or infinity")
    array.setflags(write=False)
    return array


def _check_shape(matrix: Matrix, expected: tuple[int | None, ...], where: str, name: str) -> None:
    """None stands for any size of at least 1; a merge has at most as many rows as columns."""
    fits = matrix.ndim == len(expected) and all(
        found >= 1 if size is None else found == size
        for found, size in zip(matrix.shape, expected, strict=True)
    )
    if name in ("merge", "router_map"):
        fits = fits and matrix.shape[0] <= matrix.shape[1]
        expected = (f"1..{expected[1]}", expected[1])  # type: ignore[assignment]
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise PlanError(f"{where}: {name} is {matrix.shape}, expected [{sizes}]")
