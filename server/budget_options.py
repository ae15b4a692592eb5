"""What ``liveprune prune`` is told about budgets beside ``--experts``."""

from __future__ import annotations

from collections.abc import Collection

from liveprune.patches.tuned_kernels import config_names, this_gpu, tuned_counts
from liveprune.pruning.errors import PlanError
from liveprune.pruning.model_spec import ModelSpec


def allowed_counts(
    spec: ModelSpec, snap: str | None, expert_parallel: int
) -> Collection[int] | None:
    """The counts that a pruned layer may have; None: any.

    Args:
        spec: of the model.
        snap: ``servable``: what ``expert_parallel`` ranks can share; ``tuned``: what vLLM ships a
            tuned kernel for, and they can share; a number: its multiples, and they can share.
        expert_parallel: ranks that each hold as many experts.

    Raises:
        PlanError: ``snap`` is none of these or missing where ranks are stated, there is no tuned
            kernel for such experts, or no count that the ranks can share.
    """
    if snap is None:
        if expert_parallel > 1:
            # Counts by layer are known after calibration or a search only: too late to refuse them.
            raise PlanError(
                f"--expert-parallel {expert_parallel}: found without --snap, expected --snap "
                f"servable, tuned or a number such as 8"
            )
        return None
    most = max(layer.experts for layer in spec.layers)
    if snap == "servable":
        counts = frozenset(range(1, most + 1))
    elif snap == "tuned":
        gpu = this_gpu()
        counts = tuned_counts(config_names(), spec.expert_size, gpu)
        if not any(count < most for count in counts):
            raise PlanError(
                f"--snap tuned: vLLM has no tuned kernel for fewer than {most} experts of size "
                f"{spec.expert_size} on {gpu or 'any GPU'}; expected servable or a number"
            )
    elif snap.isdecimal() and int(snap) >= 1:
        counts = frozenset(range(int(snap), most + 1, int(snap)))
    else:
        raise PlanError(f"--snap: found {snap!r}, expected servable, tuned or a number such as 8")
    shared = frozenset(x for x in counts if x % expert_parallel == 0)
    if not shared:
        ranks = f" that {expert_parallel} ranks can share" if expert_parallel > 1 else ""
        raise PlanError(f"--snap {snap}: found no count{ranks}, expected some up to {most}")
    return shared
