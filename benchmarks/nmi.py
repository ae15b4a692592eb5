"""Mutual information of all pairs of experts against NumPy's histograms pair by pair.

    OMP_NUM_THREADS=1 python -m benchmarks.nmi --output nmi.json

One matrix of each of 60 experts of Qwen1.5-MoE's shape. ``plain`` is the published way: for every
pair both histograms with ``auto`` bins, then ``histogram2d``; ``grid`` has bins and entropies of
each matrix for nothing and pays for ``histogram2d`` only. Both do a sample of the pairs, ours does
all, digitising included. Floors of a pair: ``bytes``, reading the two rows of codes at the speed
of a copy; ``count``, one pass of counting over a joint index that is there already. Shares are
floors over our time, digitising included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.machine import describe_machine
from benchmarks.rounds import alternate, speed, spread
from liveprune.pruning.nmi import Digitised, digitise, pairwise_nmi

Matrix = npt.NDArray[np.float32]
Run = dict[str, Any]
TOLERANCE = 1e-12
COPIED = 512 << 20
"""Bytes, far above any cache."""


def main() -> None:
    arguments = _parse()
    before = os.getloadavg()
    form: dict[str, Any] = {
        "settings": {k: v for k, v in vars(arguments).items() if k != "output"},
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "machine": describe_machine() | {"numpy": np.__version__},
        "draws": {draw: _measure(draw, arguments) for draw in arguments.draws},
        "load_average": {"before": before, "after": os.getloadavg()},
    }
    _print(form)
    if arguments.output:
        arguments.output.write_text(json.dumps(form, indent=1, default=str) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in {
        "rows": 1408,
        "columns": 2048,
        "experts": 60,
        "sample": 6,
        "rounds": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--draws", nargs="+", default=["normal", "t4"], choices=["normal", "t4"])
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _measure(draw: str, arguments: argparse.Namespace) -> dict[str, Any]:
    matrices = _matrices(draw, arguments)
    pairs = list(itertools.combinations(range(arguments.experts), 2))
    chosen = np.random.default_rng(1).choice(
        len(pairs), min(arguments.sample, len(pairs)), replace=False
    )
    sample = [pairs[i] for i in chosen]
    ready = {i: _histogram(matrices[i]) for i in set(itertools.chain(*sample))}
    codes = [digitise(matrices[i]) for i in sample[0]]
    taken = alternate(
        {
            "plain": lambda: _sampled(lambda i: _histogram(matrices[i]), matrices, sample),
            "grid": lambda: _sampled(ready.__getitem__, matrices, sample),
            "ours": lambda: _ours(matrices, len(pairs)),
            "floor": lambda: _floors(codes),
        },
        arguments.rounds,
    )
    differences = [
        abs(run["matrix"][pair] - value)
        for run, plain in zip(taken["ours"], taken["plain"], strict=True)
        for pair, value in zip(sample, plain["values"], strict=True)
    ]
    if max(differences) > TOLERANCE:
        raise SystemExit(f"{draw}: NMI differs from NumPy's by {max(differences)}")
    result: dict[str, Any] = {
        "pairs": len(pairs),
        "largest_difference": max(differences),
        "nmi": spread(taken["plain"][0]["values"]),
        "bins_numpy": [len(ready[i][1]) - 1 for i in sample[0]],
        "bins_filled": [item.bins for item in codes],
    }
    for clock in ("wall", "cpu"):
        ours = [run[clock] for run in taken["ours"]]
        result[clock] = {
            "plain": spread([run[clock] for run in taken["plain"]]),
            "grid": spread([run[clock] for run in taken["grid"]]),
            "ours": spread(ours),
            "ours_digitise": spread([run[f"digitise_{clock}"] for run in taken["ours"]]),
            "speed_plain": speed([run[clock] for run in taken["plain"]], ours),
            "speed_grid": speed([run[clock] for run in taken["grid"]], ours),
            "floor_bytes": spread([run["bytes"][clock] for run in taken["floor"]]),
            "floor_count": spread([run["count"][clock] for run in taken["floor"]]),
        }
    return result


def _matrices(draw: str, arguments: argparse.Namespace) -> list[Matrix]:
    """Experts that have 0.3 of their variance in common, as those of an upcycled model may."""
    rng = np.random.default_rng(0)
    shape = (arguments.rows, arguments.columns)

    def sample() -> npt.NDArray[np.float64]:
        return rng.standard_normal(shape) if draw == "normal" else rng.standard_t(4, shape)

    base = sample()
    return [
        (0.02 * (math.sqrt(0.3) * base + math.sqrt(0.7) * sample())).astype(np.float32)
        for _ in range(arguments.experts)
    ]


def _histogram(matrix: Matrix) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    return np.histogram(matrix, bins="auto")


def _sampled(
    histogram: Callable[[int], tuple[npt.NDArray[Any], npt.NDArray[np.float32]]],
    matrices: Sequence[Matrix],
    sample: Sequence[tuple[int, int]],
) -> Run:
    """Seconds a pair."""
    values = []
    start = _now()
    for i, j in sample:
        (counts_a, edges_a), (counts_b, edges_b) = histogram(i), histogram(j)
        joint = np.histogram2d(matrices[i].ravel(), matrices[j].ravel(), bins=[edges_a, edges_b])
        h_a, h_b, h_ab = (_entropy(counts) for counts in (counts_a, counts_b, joint[0]))
        values.append((h_a + h_b - h_ab) / math.sqrt(h_a * h_b))
    return {"values": values} | _since(start, len(sample))


def _entropy(counts: npt.NDArray[Any]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _ours(matrices: Sequence[Matrix], pairs: int) -> Run:
    start = _now()
    codes = [digitise(matrix) for matrix in matrices]
    digitised = _since(start, pairs)
    matrix = pairwise_nmi(codes)
    taken = _since(start, pairs)
    return {"matrix": matrix} | taken | {f"digitise_{k}": v for k, v in digitised.items()}


def _floors(codes: Sequence[Digitised]) -> Run:
    import torch

    a, b = codes
    source = np.ones(COPIED, np.uint8)
    target = np.ones(COPIED, np.uint8)
    start = _now()
    np.copyto(target, source)
    # A copy reads and writes each byte; the pair only reads.
    share = (a.codes.nbytes + b.codes.nbytes) / (2 * COPIED)
    copied = {key: value * share for key, value in _since(start, 1).items()}
    index = torch.from_numpy(a.codes.astype(np.int32) * np.int32(b.bins) + b.codes)
    start = _now()
    for _ in range(8):
        torch.bincount(index)
    return {"bytes": copied, "count": _since(start, 8)}


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float], pairs: int) -> dict[str, float]:
    wall, cpu = (now - then for now, then in zip(_now(), start, strict=True))
    return {"wall": wall / pairs, "cpu": cpu / pairs}


def _print(form: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="ms a pair and matrix, medians")
    columns = ("plain", "grid", "ours", "ours_digitise", "floor_bytes", "floor_count")
    speeds = ("speed_plain", "speed_grid")
    floors = ("floor_bytes", "floor_count")
    shares = [f"{name} / ours" for name in floors]
    for name in ("draw", "clock", *columns, *speeds, *shares):
        table.add_column(name, justify="right")
    for draw, result in form["draws"].items():
        for clock in ("cpu", "wall"):
            found = result[clock]
            table.add_row(
                draw,
                clock,
                *(f"{1000 * found[name]['median']:.2f}" for name in columns),
                *(f"{found[name]['median']:.1f}" for name in speeds),
                *(f"{found[name]['median'] / found['ours']['median']:.0%}" for name in floors),
            )
        print(f"{draw}: largest difference {result['largest_difference']:.1e}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
