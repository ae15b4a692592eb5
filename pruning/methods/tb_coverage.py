"""TB-Coverage: corpora take turns in naming the experts that they need most.

arXiv:2607.01710, known from its abstract only (methods.md 5.4, marked [p]): utilities per corpus,
round-robin protection of each corpus' best experts under a fixed budget. What a utility is could
not be read there; here it is the gate-weighted output norm, summed (``weighted-ean``), which is
what the corpus' own tokens would lose.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from liveprune.pruning.calibration.statistics import LayerStatistics
from liveprune.pruning.methods.method import Method, Scores


def _score(corpora: Sequence[LayerStatistics]) -> Scores:
    """Experts in the order in which they are named: the first has the highest score, E.

    Corpora take turns in the order given; each names its best expert that none has named yet, of
    equal ones the first.
    """
    wishes = [np.argsort(-x.saliency(0, 1, 1), kind="stable").tolist() for x in corpora]
    experts = len(wishes[0])
    named: list[int] = []
    while len(named) < experts:
        wish = wishes[len(named) % len(wishes)]
        named.append(next(i for i in wish if i not in named))
    scores = np.empty(experts)
    scores[named] = np.arange(experts, 0, -1)
    return scores


TB_COVERAGE = Method(
    name="tb-coverage",
    title="Round-robin coverage of several corpora (TB-Coverage)",
    reference="arXiv:2607.01710",
    formula="S_j = E - place of j, when corpora in turn name their best by sum_t g_j(t) ||f_j(t)||",
    from_corpora=_score,
    comparable=False,
)
