"""What each calibrated method costs beside a plain forward pass of the same rows.

Makes a random model, then runs all sides in fresh processes, A B C A B C, and reports medians:

    python -m benchmarks.calibrate --rows 64 --length 128 --output calibrate.json
    python -m benchmarks.calibrate --methods reap,mone,naee --repeats 3

A method's side is ``make_plan`` for half of the experts, with a cold statistics cache; the methods
that read the statistics of one pass cost the same. ``forward`` counts the decoder layers that the
side ran one by one; ``total`` has all else in it, reading the weights for one. The peak is what
the process's resident memory grew by. ``moe-i2`` runs the model once for each expert: leave it
out, or make the rest small. Run it with OMP_NUM_THREADS set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PLAIN = "plain"
ROWS = "rows.jsonl"
COLUMNS = ("total_s", "total_cpu_s", "forward_s", "forward_cpu_s", "tokens_per_s", "peak_mib")
VOCABULARY = 1024


def main() -> None:
    arguments = _parse()
    if arguments.child:
        print(json.dumps(_measure(arguments)))
        return
    sides = (PLAIN, *_methods(arguments))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        _make_model(model, arguments)
        _make_rows(model / ROWS, arguments)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(arguments.repeats):
            for side in sides:
                runs[side].append(_child(side, model))
                print(f"{side}: {runs[side][-1]['total_s']:.1f} s", file=sys.stderr)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    medians = {
        side: {key: statistics.median(run[key] for run in runs[side]) for key in COLUMNS}
        for side in sides
    }
    ratios = {
        side: {key: medians[side][key] / medians[PLAIN][key] for key in COLUMNS}
        for side in sides[1:]
    }
    _print(medians, ratios, size, arguments)
    if arguments.output:
        form = {
            "settings": {k: v for k, v in vars(arguments).items() if k not in ("output", "child")},
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "checkpoint_bytes": size,
            "medians": medians,
            "ratios": ratios,
            "runs": runs,
        }
        arguments.output.write_text(json.dumps(form, indent=1, default=str) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in {
        "layers": 6,
        "hidden": 512,
        "ffn": 768,
        "experts": 16,
        "top-k": 2,
        "rows": 64,
        "length": 128,
        "repeats": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--methods", help="names with commas between; all that calibrate on one file of rows"
    )
    parser.add_argument("--implementation", help="plain side's experts, e.g. eager; stock default")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _methods(arguments: argparse.Namespace) -> Sequence[str]:
    from liveprune.pruning.methods import METHODS, find_method

    if arguments.methods:
        return [find_method(name).name for name in arguments.methods.split(",")]
    found = METHODS.values()
    return [m.name for m in found if m.needs_calibration and m.from_corpora is None]


def _make_model(folder: Path, arguments: argparse.Namespace) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=arguments.hidden // 8,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        moe_intermediate_size=arguments.ffn,
        intermediate_size=arguments.ffn,
        norm_topk_prob=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def _make_rows(path: Path, arguments: argparse.Namespace) -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    lengths = generator.integers(arguments.length // 2, arguments.length + 1, arguments.rows)
    rows = ({"input_ids": generator.integers(0, VOCABULARY, n).tolist()} for n in lengths)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _child(side: str, model: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.calibrate", *sys.argv[1:]]
    command += ["--child", side, "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import (  # noqa: F401 - loaded before the clock starts
        AutoModel,
        AutoModelForCausalLM,
        Qwen3MoeForCausalLM,
    )

    from liveprune.pruning.calibration import observer  # noqa: F401
    from liveprune.pruning.calibration.rows import load_rows

    rows = load_rows(
        arguments.model / ROWS,
        arguments.model,
        vocab_size=VOCABULARY,
        max_rows=arguments.rows,
        max_tokens=arguments.length,
    )
    run = _plain if arguments.child == PLAIN else _method
    torch.ones(8, 8) @ torch.ones(8, 8)
    before = _resident("VmRSS")
    clock = Clock()
    forward = Clock()
    forward.reset()
    run(arguments, rows, forward)
    total = clock.stop()
    return {
        "total_s": total[0],
        "total_cpu_s": total[1],
        "forward_s": forward.wall,
        "forward_cpu_s": forward.cpu,
        "tokens_per_s": rows.tokens / total[0],
        "peak_mib": _resident("VmHWM") - before,
    }


class Clock:
    """Wall and CPU seconds; ``timed`` adds up the calls of a function."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), time.process_time())
        self.reset()

    def reset(self) -> None:
        self.wall = self.cpu = 0.0

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> Any:
            clock = Clock()
            result = function(*args, **kwargs)
            wall, cpu = clock.stop()
            self.wall += wall
            self.cpu += cpu
            return result

        return call


def _method(arguments: argparse.Namespace, rows: Any, forward: Clock) -> None:
    from liveprune.pruning.calibration.streamed import StreamedModel
    from liveprune.pruning.prune import make_plan

    del rows
    StreamedModel.run = forward.timed(StreamedModel.run)  # type: ignore[method-assign]
    make_plan(
        arguments.model,
        method=arguments.child,
        experts=0.5,
        calibration=arguments.model / ROWS,
        max_rows=arguments.rows,
        max_tokens=arguments.length,
    )


def _plain(arguments: argparse.Namespace, rows: Any, forward: Clock) -> None:
    import torch
    from transformers import AutoModel

    options = (
        {"experts_implementation": arguments.implementation} if arguments.implementation else {}
    )
    stock = AutoModel.from_pretrained(arguments.model, **options).eval()
    run = forward.timed(stock)
    with torch.inference_mode():
        for batch in rows.batches():
            run(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=torch.from_numpy(batch.attention_mask),
                use_cache=False,
            )


def _resident(key: str) -> float:
    """MiB from /proc/self/status: VmRSS now, VmHWM the peak so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _print(
    medians: Mapping[str, Mapping[str, float]],
    ratios: Mapping[str, Mapping[str, float]],
    size: int,
    arguments: argparse.Namespace,
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{arguments.rows} rows of up to {arguments.length} tokens, checkpoint "
        f"{size / 2**20:.0f} MiB in {arguments.layers} layers, {arguments.repeats} repeats"
    )
    table.add_column("")
    for key in COLUMNS:
        table.add_column(key, justify="right")
    for side, values in medians.items():
        table.add_row(side, *(f"{values[key]:.2f}" for key in COLUMNS))
    for side, values in ratios.items():
        table.add_row(f"{side} / {PLAIN}", *(f"{values[key]:.2f}" for key in COLUMNS))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
