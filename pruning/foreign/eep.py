"""EEP's coefficient files (``searched_coeff/TASK_budget_B.pth``) as plans.

A file is a dict of matrices [kept, experts]: expert merging (W_EM) under ``layers.3``,
``layers.[0-7]`` or ``others``, router mapping (W_RM) under ``transfer.3``, ``transfer.[0-7]`` or
``others_transfer``. Source: arXiv:2407.00945 and its repository's loader, as described in
methods.md, sections 2.2 and 2.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from liveprune.pruning.errors import PlanError
from liveprune.pruning.foreign.layers import active_experts, plan_over
from liveprune.pruning.model_spec import ModelSpec, MoELayer
from liveprune.pruning.plan import LayerPlan, Lineage, Matrix, Plan

EEP_FORM = "eep-coefficients"
_OTHERS = ("others", "others_transfer")
_SPAN = re.compile(r"\[(\d+)-(\d+)\]")


@dataclass(frozen=True, eq=False)
class Coefficients:
    """One matrix of a coefficient file."""

    key: str
    """As in the file: ``layers.3``, ``transfer.[0-7]``, ``others``, ..."""
    matrix: Matrix
    """[kept, experts] float32; row j is new expert j."""

    @property
    def is_router_map(self) -> bool:
        """W_RM if true, W_EM otherwise."""
        return "transfer" in self.key

    @property
    def one_hot(self) -> tuple[int, ...] | None:
        """The expert that each row picks; None unless every row is exactly one-hot."""
        ones = self.matrix == 1
        if not (ones.sum(axis=1) == 1).all() or np.count_nonzero(self.matrix) != len(ones):
            return None
        return tuple(int(i) for i in ones.argmax(axis=1))


@dataclass(frozen=True, eq=False)
class CoefficientFile:
    """The content of a coefficient file, in its own order; says nothing about the model."""

    groups: tuple[Coefficients, ...]
    score: Mapping[str, float]
    """Metric and value that the search wrote beside the coefficients; empty if published."""


def read_coefficients(path: Path) -> CoefficientFile:
    """Read a coefficient file: torch archive (``weights_only``) or safetensors of the same keys.

    Raises:
        PlanError: the file is unreadable, a placeholder, or holds something else.
    """
    content = _load(path)
    score: dict[str, float] = {}
    if isinstance(content, tuple):  # what the search writes: (coefficients, (metric, value))
        try:
            content, (metric, value) = content
            score = {str(metric): float(value)}
        except (TypeError, ValueError):
            raise PlanError(
                f"{path}: found a tuple, expected (coefficients, (metric, value))"
            ) from None
    if isinstance(content, list):
        raise PlanError(
            f"{path}: found a list of {len(content)}, the placeholder that an EEP search writes "
            "before it has coefficients; expected a dict of matrices"
        )
    if not isinstance(content, dict) or not content:
        raise PlanError(f"{path}: found {type(content).__name__}, expected a dict of matrices")
    groups = tuple(_coefficients(path, key, value) for key, value in content.items())
    return CoefficientFile(groups, score)


def eep_plan(file: CoefficientFile, spec: ModelSpec, top_k: int | None, lineage: Lineage) -> Plan:
    """Apply a coefficient file to a model.

    Where merge and router map are the same distinct one-hot rows and the router renormalises, a
    layer is an ordinary pruning, exactly (methods.md, section 1.2); the order of its rows is
    dropped, which changes nothing. Otherwise both matrices are kept as they are, in float32 (the
    reference rounds the router map to the gate's dtype first).

    Raises:
        PlanError: a layer has no coefficients, a key fits no layer, or shapes do not fit.
    """
    merges = [group for group in file.groups if not group.is_router_map]
    maps = [group for group in file.groups if group.is_router_map]
    # The reference matches full tensor names; what follows ".experts" is the same for all.
    tensors = [f"{spec.architecture.block_prefix(x.index)}experts" for x in spec.layers]
    transfers = [f"transfer.{x.index}" for x in spec.layers]
    _check_used(merges, tensors)
    _check_used(maps, transfers)
    layers = []
    for base, tensor, transfer in zip(spec.layers, tensors, transfers, strict=True):
        merge = _find(merges, tensor, "others", base)
        router_map = _find(maps, transfer, "others_transfer", base)
        layers.append(_layer_plan(base, merge, router_map, spec, top_k))
    return plan_over(spec, layers, lineage)


def matches(pattern: str, name: str) -> bool:
    """Whether the dotted components of ``pattern`` equal consecutive components of ``name``.

    ``*`` stands for any component, ``[a-b]`` for a number in the inclusive range; so ``layers.3``
    does not match layer 31.
    """
    wanted, parts = pattern.split("."), name.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(_component_matches, wanted, parts[i:])) for i in starts)


def _component_matches(pattern: str, text: str) -> bool:
    span = _SPAN.fullmatch(pattern)
    if span:
        return text.isdecimal() and int(span[1]) <= int(text) <= int(span[2])
    return pattern in ("*", text)


def _load(path: Path) -> Any:
    import torch
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:
            magic = file.read(9)
        if magic[8:9] == b"{":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise PlanError(f"{path}: not readable as safetensors: {error}") from error
    except Exception as error:  # torch's unpickler fails on damaged input with errors of any type
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise PlanError(f"{path}: not readable as EEP coefficients: {reason}") from error


def _coefficients(path: Path, key: Any, value: Any) -> Coefficients:
    import torch

    known = isinstance(key, str) and (key in _OTHERS or "." in key)
    if not known or not isinstance(value, torch.Tensor) or value.ndim != 2:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise PlanError(
            f"{path}: {key!r} is {found}, expected matrices [kept, experts] named 'layers.N', "
            "'layers.[A-B]' or 'others', and 'transfer.N', 'transfer.[A-B]' or 'others_transfer'"
        )
    matrix: Matrix = value.detach().to(torch.float32).numpy()
    if not np.isfinite(matrix).all():
        raise PlanError(f"{path}: {key!r} holds NaN or infinity")
    return Coefficients(key, matrix)


def _check_used(groups: Iterable[Coefficients], names: list[str]) -> None:
    for group in groups:
        if group.key not in _OTHERS and not any(matches(group.key, name) for name in names):
            raise PlanError(
                f"{group.key!r} matches no layer with experts, expected e.g. {names[0]!r} to "
                f"{names[-1]!r} to contain it (EEP's own loader would ignore it silently)"
            )


def _find(groups: list[Coefficients], name: str, others: str, base: MoELayer) -> Coefficients:
    """The first group whose key matches, else the one for the other layers."""
    keyed = [group for group in groups if group.key not in _OTHERS and matches(group.key, name)]
    found = keyed or [group for group in groups if group.key == others]
    if not found:
        raise PlanError(
            f"layer {base.index}: found no coefficients, expected a key matching {name!r}, "
            f"or {others!r}"
        )
    if found[0].matrix.shape[1] != base.experts:
        raise PlanError(
            f"layer {base.index}: {found[0].key!r} is {found[0].matrix.shape}, expected "
            f"[kept, {base.experts}]"
        )
    return found[0]


def _layer_plan(
    base: MoELayer,
    merge: Coefficients,
    router_map: Coefficients,
    spec: ModelSpec,
    top_k: int | None,
) -> LayerPlan:
    active = active_experts(base, len(merge.matrix), top_k)
    rows = merge.one_hot
    pruned = rows is not None and len(set(rows)) == len(rows) and rows == router_map.one_hot
    if rows is not None and pruned and spec.router.renormalise:
        return LayerPlan(base.index, base.experts, active, kept=tuple(sorted(rows)))
    return LayerPlan(
        base.index,
        base.experts,
        active,
        merge=merge.matrix,
        router_map=router_map.matrix,
    )
