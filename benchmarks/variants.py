"""What live variants cost: vLLM with the plugin against stock vLLM, the same requests.

    python -m benchmarks.variants [--modes eager compiled] [--rounds 7] [--output FILE.json]

Three engines stay loaded: stock vLLM (no plugin), stock vLLM once more, whose distance from the
first is what a ratio here can be wrong by, and ours. Each round runs all sides once:

* idle: live variants are possible, none is there;
* one: all requests on one variant, 4 of 8 experts;
* mixed: four variants in the same batch: 4 of 8 experts top-2 and top-1, and two merged ones of 4
  experts under router maps;
* alike: four variants in the same batch that keep all experts, so that the work is the base's and
  the difference is the mechanism alone;
* beside: base requests only, while those four are live.

A figure is stock's CPU seconds over the side's, paired within a round, median over the rounds: the
throughput as a share of stock's. Above 1: the variants hit fewer experts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import BASE_SLOT, Batch, Engine, Sample
from benchmarks.machine import describe_machine
from benchmarks.models import (
    ModelShape,
    add_shape_arguments,
    describe,
    expected_rows,
    merge_plan,
    prune_plan,
    write_model,
)
from benchmarks.rounds import agreement, alternate, speed, spread
from liveprune.patches.live_config import LiveConfig
from liveprune.pruning.plan_io import save_plan

SIDES = ("stock again", "idle", "one", "mixed", "alike", "beside")
KEPT = 4
MIXED = ["pruned", "top-1", "merged", "merged again"]
WORK = {
    # prompt tokens, new tokens, repeats by batch size: about a second each
    "prefill": {1: (128, 4, 8), 8: (128, 4, 2), 32: (64, 4, 1)},
    "decode": {1: (16, 32, 4), 8: (16, 64, 1), 32: (16, 32, 1)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_shape_arguments(parser, hidden=512, intermediate=1024, layers=6)
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds after the warm-up")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    shape = ModelShape.from_arguments(arguments)
    result: dict[str, Any] = {"machine": describe_machine(), "model": describe(shape)}
    with tempfile.TemporaryDirectory(prefix="variants-") as folder:
        bench = Bench(Path(folder), shape, arguments.rounds)
        result["modes"] = {mode: bench.run(mode) for mode in arguments.modes}
    _print(result)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


class Bench:
    """The model, its plans, and the rounds."""

    def __init__(self, folder: Path, shape: ModelShape, rounds: int) -> None:
        self._folder, self._shape, self._rounds = folder, shape, rounds
        self._model = folder / "model"
        write_model(self._model, shape)
        self._recipes = {
            "pruned": prune_plan(shape, KEPT, 2),
            "top-1": prune_plan(shape, KEPT, 1, seed=1),
            "merged": merge_plan(shape, KEPT, 2),
            "merged again": merge_plan(shape, KEPT, 2, seed=1),
            "all": prune_plan(shape, shape.experts, 2),
        }
        self._plans = {name: folder / f"{name}.json" for name in self._recipes}
        for name, plan in self._recipes.items():
            save_plan(plan, self._plans[name])
        self._live: list[Path] = []

    def run(self, mode: str) -> list[dict[str, Any]]:
        live = LiveConfig(
            checkpoint=str(self._model),
            slots=8,
            spare_rows=2 * KEPT,
            kv_extra_bytes=0,
            required=True,
        )

        def start(name: str, config: LiveConfig | None = None) -> Engine:
            return Engine(
                name,
                self._model,
                self._folder / f"{mode}-{name}.log",
                compiled=mode == "compiled",
                dtype=self._shape.dtype,
                live=config,
            )

        self._live = []
        with start("stock") as stock, start("again") as again, start("ours", live) as ours:
            return [
                self._measure(mode, kind, size, (stock, again, ours))
                for kind, sizes in WORK.items()
                for size in sizes
            ]

    def _measure(
        self, mode: str, kind: str, size: int, engines: tuple[Engine, Engine, Engine]
    ) -> dict[str, Any]:
        stock, again, ours = engines
        prompt, new, repeats = WORK[kind][size]
        batch = Batch.random(size, prompt, self._shape.vocabulary, new, repeats)

        def side(names: Sequence[str], slots: Sequence[int]) -> Callable[[], Sample]:
            def run() -> Sample:
                self._set(ours, [self._plans[name] for name in names])
                return ours.generate(batch, slots)

            return run

        taken = alternate(
            {
                "stock": lambda: stock.generate(batch),
                "stock again": lambda: again.generate(batch),
                "idle": side([], [BASE_SLOT]),
                "one": side(["pruned"], [1]),
                "mixed": side(MIXED, [1, 2, 3, 4]),
                "alike": side(["all"] * 4, [1, 2, 3, 4]),
                "beside": side(["all"] * 4, [BASE_SLOT]),
            },
            self._rounds,
        )
        agreed = {
            name: agreement(taken["stock"][0].tokens, taken[name][0].tokens)
            for name in ("stock again", "idle", "alike", "beside")
        }
        if mode == "eager" and agreed["idle"] < 1:
            raise RuntimeError(f"{kind}, batch {size}: idle and stock tokens differ: {agreed}")
        cpu = {name: [x.prefill_cpu + x.decode_cpu for x in runs] for name, runs in taken.items()}
        wall = {
            name: [x.prefill_wall + x.decode_wall for x in runs] for name, runs in taken.items()
        }
        return {
            "work": kind,
            "batch": size,
            "experts_hit": self._experts_hit(size),
            "tokens_as_stock": agreed,
            "stock_cpu_seconds": spread(cpu["stock"]),
            "cpu_ratio": {name: speed(cpu["stock"], cpu[name]) for name in SIDES},
            "wall_ratio": {name: speed(wall["stock"], wall[name]) for name in SIDES},
            "cpu": cpu,
            "wall": wall,
        }

    def _experts_hit(self, size: int) -> dict[str, float]:
        """Of a layer, by one step of decoding, if all experts are equally likely."""
        sides = {"stock": ["all"], "one": ["pruned"]}
        if size >= len(MIXED):
            sides["mixed"] = MIXED
        return {
            side: expected_rows([self._recipes[name] for name in names], size // len(names))
            for side, names in sides.items()
        }

    def _set(self, ours: Engine, plans: list[Path]) -> None:
        """Make just these plans live, in slots 1, 2, ...; the base is always."""
        if plans == self._live:
            return
        for slot in range(1, len(self._live) + 1):
            ours.retire(slot)
        ours.release()
        for slot, plan in enumerate(plans, start=1):
            ours.make_live(slot, plan)
        self._live = plans


def _print(result: dict[str, Any]) -> None:
    print("throughput / stock's (CPU seconds; median, lowest-highest of the rounds)")
    print(f"| mode | work | batch | {' | '.join(SIDES)} | tokens of idle as stock's |")
    print("|---" * (len(SIDES) + 4) + "|")
    for mode, rows in result["modes"].items():
        for row in rows:
            cells = [
                "{median:.3f} ({min:.2f}-{max:.2f})".format(**row["cpu_ratio"][side])
                for side in SIDES
            ]
            print(
                f"| {mode} | {row['work']} | {row['batch']} | {' | '.join(cells)} "
                f"| {row['tokens_as_stock']['idle']:.0%} |"
            )


if __name__ == "__main__":
    main()
