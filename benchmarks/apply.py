"""Speed and memory of ``apply_plan`` against ``cp`` of the bytes it keeps.

    python -m benchmarks.apply [--gigabytes 4] [--rounds 5] [--cold] [--output FILE.json]

Makes a Mixtral-style bfloat16 checkpoint in several shards in a temporary folder, prunes and merges
it from 8 to 4 experts per layer, and copies the pruned result with ``cp``: the same bytes. Rounds
alternate cp, prune, cp, merge; a first round warms up and is dropped. ``apply_plan`` always ends
with its files synced to the disk, so ``cp`` is shown bare and with ``sync`` of its files after it.
Page cache: by default all sources are cached before each run; with ``--cold`` they are evicted.
Outputs are deleted after each run. Before each run an untimed ``cp`` is made and deleted, so that
all runs find free pages equally warm: on a virtual machine the first use of a page can cost ten
times a copy, and whoever comes first would pay. The floor of a run is what it reads and writes,
over the measured bandwidth of ``cp`` (which reads and writes each byte once), synced.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.checkpoint.safetensors_io import INDEX_NAME
from liveprune.pruning.checkpoint.shard_writer import NewTensor, ShardWriter, index_json
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.pruning.plan_io import load_plan, save_plan

HIDDEN, EXPERT, EXPERTS, VOCABULARY = 2048, 7168, 8, 32000
RUNS = ("cp", "cp+sync", "prune 8->4", "merge 8->4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the base model")
    parser.add_argument("--shard-gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after the warm-up")
    parser.add_argument("--cold", action="store_true", help="evict sources before each run")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's)")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    parser.add_argument("--child", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_apply(*arguments.child)))
        return
    with tempfile.TemporaryDirectory(prefix="apply-", dir=arguments.folder) as folder:
        result = _measure(Path(folder), arguments)
    _print(result)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def _measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    base, kept, out = folder / "base", folder / "kept", folder / "out"
    layers = _make_model(base, arguments.gigabytes, arguments.shard_gigabytes)
    plans = {"prune 8->4": folder / "prune.json", "merge 8->4": folder / "merge.json"}
    save_plan(_plan(layers, merged=False), plans["prune 8->4"])
    save_plan(_plan(layers, merged=True), plans["merge 8->4"])
    apply_plan(base, load_plan(plans["prune 8->4"]), kept)
    samples: dict[str, list[dict[str, float]]] = {run: [] for run in RUNS}
    for number in range(arguments.rounds + 1):
        for run in RUNS:
            source = kept if run.startswith("cp") else base
            _copy(kept, out, synced=False)
            shutil.rmtree(out)
            _prepare(source, cold=arguments.cold)
            sample = (
                _copy(source, out, synced=run == "cp+sync")
                if run.startswith("cp")
                else _run_child(base, plans[run], out)
            )
            shutil.rmtree(out)
            if number:
                samples[run].append(sample)
            print(f"round {number} {run}: {sample['wall']:.2f} s", file=sys.stderr)
    return _summary(samples, _size(base), _size(kept), vars(arguments))


def _summary(
    samples: dict[str, list[dict[str, float]]], base: int, kept: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    moved = {"cp": 2 * kept, "cp+sync": 2 * kept, "prune 8->4": 2 * kept}
    # A merge of all 8 experts reads every byte once.
    moved["merge 8->4"] = base + kept
    bandwidth = 2 * kept / statistics.median(x["wall"] for x in samples["cp+sync"])
    runs = {}
    for run, taken in samples.items():
        median = {key: statistics.median(x[key] for x in taken) for key in taken[0]}
        median["floor"] = moved[run] / bandwidth
        median["speed_vs_cp"] = _ratio(samples["cp"], taken)
        median["speed_vs_cp_synced"] = _ratio(samples["cp+sync"], taken)
        runs[run] = median
    settings = {key: str(value) for key, value in arguments.items() if value is not None}
    return {"settings": settings, "base": base, "kept": kept, "runs": runs, "samples": samples}


def _ratio(reference: list[dict[str, float]], taken: list[dict[str, float]]) -> float:
    """Median over the rounds of cp's wall time over the run's."""
    pairs = zip(reference, taken, strict=True)
    return statistics.median(a["wall"] / b["wall"] for a, b in pairs)


def _print(result: dict[str, Any]) -> None:
    print(
        f"base {result['base'] / 1e9:.2f} GB, kept {result['kept'] / 1e9:.2f} GB; medians; speeds "
        f"are medians of the ratio within each round"
    )
    print("| run | wall s | CPU s | floor s | speed / cp | speed / cp+sync | peak MB | anon MB |")
    print("|---|---|---|---|---|---|---|---|")
    for run, x in result["runs"].items():
        memory = [f"{x[key] / 1e6:.0f}" if key in x else "" for key in ("peak", "peak_anonymous")]
        print(
            f"| {run} | {x['wall']:.2f} | {x['cpu']:.2f} | {x['floor']:.2f} "
            f"| {x['speed_vs_cp']:.2f} | {x['speed_vs_cp_synced']:.2f} | {' | '.join(memory)} |"
        )


def _make_model(folder: Path, gigabytes: float, shard_gigabytes: float) -> int:
    """Write a random model of about the wanted size; returns the number of layers."""
    expert = {"w1": (EXPERT, HIDDEN), "w2": (HIDDEN, EXPERT), "w3": (EXPERT, HIDDEN)}
    layer_bytes = EXPERTS * 3 * HIDDEN * EXPERT * 2
    layers = max(1, -(-int(gigabytes * 1e9) // layer_bytes))
    tensors = [NewTensor("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN))]
    for layer in range(layers):
        block = f"model.layers.{layer}.block_sparse_moe"
        tensors.append(NewTensor(f"{block}.gate.weight", "BF16", (EXPERTS, HIDDEN)))
        for index in range(EXPERTS):
            for name, shape in expert.items():
                key = f"{block}.experts.{index}.{name}.weight"
                tensors.append(NewTensor(key, "BF16", shape))
    shards = _split(tensors, int(shard_gigabytes * 1e9))
    folder.mkdir()
    (folder / INDEX_NAME).write_bytes(index_json(shards))
    data = memoryview(torch.randn(1 << 23).bfloat16().view(torch.uint8).numpy())
    with ThreadPoolExecutor(1) as flusher:
        for name, group in shards.items():
            with ShardWriter(folder / name, group, flusher, threading.Event()) as writer:
                for tensor in group:
                    for start in range(0, tensor.size, len(data)):
                        part = data[: min(len(data), tensor.size - start)]
                        writer.write(part, writer.offsets[tensor.name] + start)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": EXPERT,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def _split(tensors: list[NewTensor], limit: int) -> dict[str, list[NewTensor]]:
    groups: list[list[NewTensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(x.size for x in groups[-1]) + tensor.size > limit:
            groups.append([])
        groups[-1].append(tensor)
    count = len(groups)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": x for i, x in enumerate(groups)}


def _plan(layers: int, *, merged: bool) -> Plan:
    generator = np.random.default_rng(0)

    def layer(index: int) -> LayerPlan:
        if not merged:
            return LayerPlan(index, EXPERTS, 2, (0, 2, 5, 7))
        merge, router_map = generator.random((2, 4, EXPERTS), dtype=np.float32)
        return LayerPlan(index, EXPERTS, 2, merge=merge, router_map=router_map)

    return Plan("mixtral", layers, tuple(layer(i) for i in range(layers)), Lineage("benchmark"))


def _prepare(source: Path, *, cold: bool) -> None:
    """Bring the files into the page cache, or (cold) drop them from it."""
    for path in source.glob("*.safetensors"):
        with path.open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def _copy(source: Path, out: Path, *, synced: bool) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, out], check=True)
    if synced:
        subprocess.run(["sync", *out.iterdir()], check=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "cpu": _cpu(after) - _cpu(before)}


def _run_child(model: Path, plan: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.apply", "--child", model, plan, out]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    sample: dict[str, float] = json.loads(printed)
    return sample


def _apply(model: Path, plan: Path, out: Path) -> dict[str, float]:
    """Apply in this process; imports are not timed, their memory counts."""
    loaded = load_plan(plan)
    peaks = {"RssAnon": 0, "RssFile": 0}
    done = threading.Event()
    sampler = threading.Thread(target=_sample, args=(peaks, done))
    sampler.start()
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    apply_plan(model, loaded, out)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    done.set()
    sampler.join()
    return {
        "wall": wall,
        "cpu": _cpu(after) - _cpu(before),
        "peak": after.ru_maxrss * 1024,
        "peak_anonymous": peaks["RssAnon"],
        "peak_file": peaks["RssFile"],
    }


def _sample(peaks: dict[str, int], done: threading.Event) -> None:
    while not done.wait(0.02):
        for line in Path("/proc/self/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in peaks:
                peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
