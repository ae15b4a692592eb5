"""How soon experiments decide, how often wrongly, and what they cost a request.

    python -m benchmarks.experiments [--runs 200] [--output FILE.json]

Each run draws units one after another and asks ``decide`` at 30 looks until it says other than
HOLD. Half of the units are the treatment arm's. Times are CPU microseconds in one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from liveprune.server.experiments.assignment import allocate, assign, unit_of
from liveprune.server.experiments.contrast import Contrast, MeanContrast, RateContrast, RatePhase
from liveprune.server.experiments.decision import decide
from liveprune.server.experiments.definition import UNIT_CHAIN, Experiment, experiment_from
from liveprune.server.experiments.measurements import Measurements
from liveprune.server.experiments.mismatch import UnitCounts
from liveprune.server.experiments.record import Record, record_of
from liveprune.server.experiments.units import unit_hash

UNITS = 20_000
"""Over both arms, at most."""
CHECKPOINTS = (500, 1000, 2000, 5000, 10_000, 20_000)
LOOKS = sorted({*CHECKPOINTS, *(int(x) for x in np.geomspace(100, UNITS, 25))})
BASE_RATE = 0.01
CALLS = 20_000


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is true in a simulation."""

    name: str
    verdict: str
    gain: float = 0.0
    """Of the primary measure, in standard deviations."""
    rate: float = BASE_RATE
    """Loops in the treatment arm; the control arm has ``BASE_RATE``."""
    margin: float = 0.02
    """Of the guardrail on loops, absolute."""
    share: float = 0.5
    """What the treatment arm truly gets of its half."""


SCENARIOS = (
    Scenario("no gain", "SHIP"),
    *(Scenario(f"gain of {x:g} sd", "SHIP", gain=x) for x in (0.05, 0.1, 0.2, 0.5)),
    *(
        Scenario(f"loops in {x:.0%}, 1% + 1% allowed", "ROLLBACK", rate=x, margin=0.01)
        for x in (0.01, 0.02, 0.03, 0.05, 0.1, 0.3)
    ),
    *(
        Scenario(f"true share {x:.0%}, promised 50%", "INVALID", share=x)
        for x in (0.5, 0.51, 0.52, 0.55, 0.6)
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = [_scenario(scenario, options.runs) for scenario in SCENARIOS]
    form = {
        "machine": describe_machine(),
        "runs": options.runs,
        "looks": LOOKS,
        "scenarios": rows,
        "microseconds": _costs(),
    }
    _print(form)
    if options.output:
        options.output.write_text(json.dumps(form, indent=1) + "\n")


def _experiment(margin: float) -> Experiment:
    return experiment_from(
        {
            "name": "power",
            "model": "m",
            "arms": [
                {"name": "full", "variant": "full", "weight": 0.5},
                {"name": "pruned", "variant": "e4", "weight": 0.5},
            ],
            "control": "full",
            "primary": {"metric": "e2e_seconds"},
            "guardrails": [{"metric": "loop", "margin": margin}],
            "minimum_seconds": 0,
        }
    )


def _scenario(scenario: Scenario, runs: int) -> dict[str, Any]:
    experiment = _experiment(scenario.margin)
    ends = [_run(experiment, scenario, seed) for seed in range(runs)]
    right = [units for verdict, units in ends if verdict == scenario.verdict]
    return dataclasses.asdict(scenario) | {
        "by_units": {n: sum(units <= n for units in right) / runs for n in CHECKPOINTS},
        "median_units": statistics.median(right) if len(right) > runs / 2 else None,
        "verdicts": {
            name: sum(verdict == name for verdict, _ in ends) / runs
            for name in ("SHIP", "ROLLBACK", "INVALID", "HOLD")
        },
    }


def _run(experiment: Experiment, scenario: Scenario, seed: int) -> tuple[str, int]:
    """The first verdict but HOLD, and the units it took."""
    rng = np.random.default_rng(seed)
    treated = rng.random(UNITS) < scenario.share
    seconds = rng.exponential(1.0, UNITS) - scenario.gain * treated
    loops = rng.random(UNITS) < np.where(treated, scenario.rate, BASE_RATE)
    sums = [
        [np.cumsum(values * on) for values in (np.ones(UNITS), seconds, seconds**2, loops)]
        for on in (~treated, treated)
    ]
    for units in LOOKS:
        (a, x, xx, lx), (b, y, yy, ly) = ([float(s[units - 1]) for s in arm] for arm in sums)
        spread = [(s2 / n - (s / n) ** 2) / (n - 1) for n, s, s2 in ((a, x, xx), (b, y, yy))]
        contrasts: dict[str, Contrast | None] = {
            "e2e_seconds": MeanContrast(
                int(a),
                int(b),
                x / a,
                y / b,
                *spread,
                0.0,
                *spread,
                4 / (1 / a + 1 / b),
                experiment.planned_units,
            ),
            "loop": RateContrast((RatePhase(int(a), lx, 1.0, int(b), ly, 1.0),)),
        }
        counts = {"full": int(a), "pruned": int(b)}
        record = Record(
            experiment,
            now=0.0,
            started=0.0,
            phase_started=0.0,
            last_action=None,
            shares=experiment.shares,
            units=counts,
            unit_counts=(UnitCounts(counts, experiment.shares),),
            earlier_mismatch_p=1.0,
            contrasts={"pruned": contrasts},
        )
        verdict = decide(record).verdict
        if verdict != "HOLD":
            return verdict, units
    return "HOLD", UNITS


def _costs() -> dict[str, float]:
    """CPU microseconds of what happens at each request, and of one decision."""
    salt = bytes(32)
    experiment = _experiment(0.01)
    running = [(experiment, allocate([experiment.shares]))]
    measurements = Measurements()
    measurements.begin(experiment.shares)
    values = {
        "ttft_seconds": 0.2,
        "inter_token_seconds": 0.02,
        "e2e_seconds": 1.5,
        "queue_seconds": 0.01,
        "prompt_tokens": 100.0,
        "output_tokens": 200.0,
        "error": 0.0,
        "length": 0.0,
        "empty": 0.0,
        "loop": 0.0,
    }

    def give(i: int) -> None:
        unit = unit_of(UNIT_CHAIN, {}, {"user": f"user-{i % 2000}"}, None, "r")
        found = assign(salt, running, "m", unit)
        if found is None:
            raise RuntimeError("found no arm, expected one for every unit")

    def measure(i: int) -> None:
        unit = unit_hash(salt, "power", f"user-{i % 2000}")
        arm = ("full", "pruned")[i % 2]
        measurements.assigned(0, unit, arm)
        measurements.finished(0, unit, arm, values)

    return {
        "assign": _each(give, CALLS),
        "measure": _each(measure, CALLS),
        "record and decide": _each(
            lambda _: decide(
                record_of(experiment, measurements, now=1.0, started=0.0, phase_started=0.0)
            ),
            20,
        ),
    }


def _each(call: Callable[[int], object], times: int) -> float:
    start = time.process_time()
    for i in range(times):
        call(i)
    return (time.process_time() - start) / times * 1e6


def _print(form: dict[str, Any]) -> None:
    print(
        f"| what is true | verdict | {' | '.join(f'{n:,}' for n in CHECKPOINTS)} | median units |"
    )
    print("|---" * (len(CHECKPOINTS) + 3) + "|")
    for row in form["scenarios"]:
        shares = " | ".join(f"{share:.1%}" for share in row["by_units"].values())
        median = "" if row["median_units"] is None else f"{row['median_units']:,.0f}"
        print(f"| {row['name']} | {row['verdict']} | {shares} | {median} |")
    for name, microseconds in form["microseconds"].items():
        print(f"{name}: {microseconds:.1f} us")


if __name__ == "__main__":
    main()
