"""One-pass pruning methods, one a file (docs/methods.md, docs/adding-a-method.md)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from liveprune.pruning.errors import PlanError
from liveprune.pruning.methods.aimer import AIMER
from liveprune.pruning.methods.dern import DERN
from liveprune.pruning.methods.ean import EAN
from liveprune.pruning.methods.easy_ep import EASY_EP
from liveprune.pruning.methods.frequency import FREQUENCY
from liveprune.pruning.methods.gate_norm import GATE_NORM
from liveprune.pruning.methods.hc_smoe import HC_SMOE
from liveprune.pruning.methods.m_smoe import M_SMOE
from liveprune.pruning.methods.man import MAN
from liveprune.pruning.methods.method import Method
from liveprune.pruning.methods.moe_i2 import MOE_I2
from liveprune.pruning.methods.moeits import MOEITS
from liveprune.pruning.methods.mone import MONE
from liveprune.pruning.methods.msan import MSAN
from liveprune.pruning.methods.naee import NAEE
from liveprune.pruning.methods.random_choice import RANDOM
from liveprune.pruning.methods.ream import REAM
from liveprune.pruning.methods.reap import REAP
from liveprune.pruning.methods.soft import SOFT
from liveprune.pruning.methods.stun import STUN, STUN_COACTIVATION
from liveprune.pruning.methods.tb_coverage import TB_COVERAGE
from liveprune.pruning.methods.weight_norm import WEIGHT_NORM
from liveprune.pruning.methods.weighted_ean import WEIGHTED_EAN

__all__ = ["METHODS", "Method", "find_method"]

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            RANDOM,
            FREQUENCY,
            SOFT,
            EAN,
            WEIGHTED_EAN,
            MAN,
            MSAN,
            REAP,
            EASY_EP,
            MONE,
            NAEE,
            MOE_I2,
            M_SMOE,
            HC_SMOE,
            REAM,
            DERN,
            AIMER,
            MOEITS,
            TB_COVERAGE,
            STUN,
            STUN_COACTIVATION,
            WEIGHT_NORM,
            GATE_NORM,
        )
    }
)


def find_method(name: str) -> Method:
    """Look up a method by name.

    Raises:
        PlanError: there is no such method; names those that there are.
    """
    method = METHODS.get(name)
    if method is None:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"method is {name!r}, expected one of {', '.join(METHODS)}{hint}")
    return method
