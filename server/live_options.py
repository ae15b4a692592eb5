"""The flags of ``liveprune serve`` that are about live variants, and what follows from them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from liveprune.patches.live_config import LiveConfig
from liveprune.pruning.checkpoint.layer_tensors import layer_tensors
from liveprune.pruning.checkpoint.safetensors_io import read_checkpoint
from liveprune.pruning.errors import PlanError, VariantError
from liveprune.pruning.files import write_atomic
from liveprune.pruning.foreign import read_any_plan
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from liveprune.pruning.plan_guards import check_plan
from liveprune.server.state_folder import SavedState, StateFolder
from liveprune.server.store.store import KEEP_JOBS
from liveprune.server.variant import FULL, check_tag

RESIDENT_FILE = "resident"
"""In the state folder of a model: what ``--resident`` said at the last start."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * i) for i, unit in enumerate("KMGT", start=1)}


@dataclass(frozen=True)
class StatisticsOptions:
    """How live traffic is counted."""

    on: bool = True
    sample: int = 16
    """Tokens of a sampled step whose experts' outputs are measured."""
    every: int = 64
    """One step in so many is sampled."""
    interval: float = 60.0
    """Seconds between two looks at the engine's counts."""
    half_life: float = 86400.0
    """Seconds in which a count loses half its weight."""


@dataclass(frozen=True)
class PromptOptions:
    """Which of the users' prompts are kept."""

    share: float = 0.0
    """Of the requests to the alias; 0: none."""
    most: int = 1000
    days: float = 7.0
    redact: Sequence[re.Pattern[str]] = ()


@dataclass(frozen=True)
class LiveOptions:
    """As given on the command line."""

    state: Path
    """State folder: keys, audit log, and one folder for each base model."""
    variants: Sequence[str] = ()
    """``TAG=PLAN``."""
    resident: str | None = None
    memory_target: int | None = None
    """Bytes."""
    spare_rows: int | None = None
    max_variants: int = 16
    plan_roots: Sequence[Path] = field(default_factory=tuple)
    canary_prompts: Path | None = None
    admin_host: str = "127.0.0.1"
    admin_port: int = 8001
    admin_key_file: Path | None = None
    store: str | None = None
    """URL of the database; None: SQLite in the state folder."""
    store_files: Path | None = None
    """Folder of plans and jobs; None: the state folder. Replicas share it."""
    store_quota: int = 10 * 2**30
    """Bytes of those files; 0: no bound."""
    keep_jobs: int = KEEP_JOBS
    """Ended jobs that keep their folders."""
    replica: str | None = None
    """Name of this server among those that share the database; None: the host's."""
    experiment_interval: float = 10.0
    """Seconds between two looks at the experiments."""
    statistics: StatisticsOptions = StatisticsOptions()
    prompts: PromptOptions = PromptOptions()

    @property
    def insists(self) -> bool:
        """Variants were asked for by name: serving without them would be wrong."""
        return bool(self.variants or self.resident)


def model_state(state: Path, base: Path) -> Path:
    """The folder of one base model below the state folder."""
    resolved = base.resolve()
    digest = hashlib.blake2b(str(resolved).encode(), digest_size=4).hexdigest()
    return state / f"{resolved.name}-{digest}"


def read_variants(variants: Sequence[str], spec: ModelSpec) -> dict[str, Plan]:
    """Read and check the plans of ``--variant TAG=PLAN``, by tag.

    Raises:
        VariantError: not of that form, or a tag twice.
        PlanError: a plan is unreadable or does not fit the model.
    """
    plans: dict[str, Plan] = {}
    for text in variants:
        tag, equals, path = text.partition("=")
        if not equals or not path:
            raise VariantError(f"--variant: found {text!r}, expected TAG=PLAN")
        check_tag(tag)
        if tag in plans:
            raise VariantError(f"--variant: found the tag {tag!r} twice, expected it once")
        if not Path(path).exists():
            raise PlanError(f"--variant {tag}: {path} not found, expected a plan file")
        try:
            plans[tag] = read_any_plan(Path(path), spec)
            check_plan(plans[tag], spec)
        except PlanError as error:
            raise PlanError(f"--variant {tag}={path}: {error}") from error
    return plans


def note_variants(folder: StateFolder, plans: dict[str, Plan], resident: str | None) -> str | None:
    """Add the command line's variants to those of the state folder.

    ``resident`` decides at the first start that names it; after that the state folder does, so that
    a restart by the same command line comes back to what was swapped in since.

    Returns:
        The tag that the engine starts compact with; None: it starts whole.

    Raises:
        VariantError: ``resident`` names no variant.
    """
    saved = folder.state
    for plan in plans.values():
        folder.store_plan(plan)
    known = {**saved.variants, **{tag: plan.digest for tag, plan in plans.items()}}
    if resident is not None and resident not in (FULL, *known):
        raise VariantError(
            f"--resident: found {resident!r}, expected one of {', '.join((FULL, *sorted(known)))}"
        )
    live = {*saved.live, *plans}
    alias = saved.alias
    if resident is not None and resident != _resident_before(folder):
        # Whoever starts compact wants the memory: what was live with the whole model is not.
        live = {resident, *plans}
        alias = resident
    # Written only when the engine is up: a start that is refused changes nothing.
    folder.state = SavedState(known, tuple(sorted(live)), alias, saved.previous, saved.published)
    return None if FULL in live else alias


def remember_resident(folder: StateFolder, resident: str | None) -> None:
    """Note what ``--resident`` said, once the engine has come up with it."""
    write_atomic(folder.path / RESIDENT_FILE, (resident or "").encode())


def _resident_before(folder: StateFolder) -> str | None:
    """``--resident`` of the last start."""
    path = folder.path / RESIDENT_FILE
    return path.read_text(encoding="utf-8") if path.exists() else None


def make_config(
    base: Path, spec: ModelSpec, options: LiveOptions, resident_plan: Path | None
) -> LiveConfig:
    """What the engine's processes are told."""
    blocks = layer_tensors(read_checkpoint(base).tensors, spec)
    spare = options.spare_rows
    return LiveConfig(
        checkpoint=str(base),
        slots=options.max_variants + 1,
        spare_rows=max(x.experts for x in spec.layers) if spare is None else spare,
        # Twice: the engine may compute in float32 what the checkpoint holds in 16 bits. These are
        # addresses; what is used is bounded by --memory-target.
        kv_extra_bytes=2 * sum(block.expert_bytes for block in blocks),
        resident_slot=0 if resident_plan is None else 1,
        resident_plan=None if resident_plan is None else str(resident_plan),
        statistics=options.statistics.on,
        sample_tokens=options.statistics.sample,
        sample_every=options.statistics.every,
        required=options.insists,
    )


def parse_bytes(option: str, text: str) -> int:
    """``40GiB``, ``1.5G``, ``1000000``: a number of bytes.

    Raises:
        VariantError: not of that form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", text.strip())
    if found is None or float(found[1]) <= 0:
        raise VariantError(f"{option}: found {text!r}, expected bytes such as 40GiB or 8000000000")
    return int(float(found[1]) * _UNITS[found[2] or ""])
