"""``liveprune jobs start``: a background pruning run, as the admin API wants it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from liveprune.pruning.errors import DataError
from liveprune.server.cli_live import DEFAULT_URL, JsonOption, KeyFileOption, UrlOption, connect
from liveprune.server.cli_options import number_or_list, numbers, parse_changes
from liveprune.server.cli_prune import Allocation, GateRows
from liveprune.server.job_views import show, wait_for
from liveprune.server.live_options import parse_bytes

LIVE, KEPT = "live", "kept"


class JobEngine(StrEnum):
    """What scores a job's plans."""

    LIVE = "live"
    TRANSFORMERS = "transformers"
    VLLM = "vllm"


def start_job(
    method: Annotated[str, typer.Option(help="See docs/methods.md; or eep, which searches.")],
    name: Annotated[str, typer.Option(help="Tag of the variant that it becomes.")],
    experts: Annotated[
        str | None, typer.Option(help="Kept per layer: a number, a fraction, or a list.")
    ] = None,
    target_memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Instead of --experts: all weights, e.g. 40GiB."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Learn from JSONL rows, on the server's disk.")
    ] = None,
    statistics: Annotated[
        bool, typer.Option("--live-statistics", help="Learn from what the server counted.")
    ] = False,
    prompts: Annotated[
        bool, typer.Option("--kept-prompts", help="Learn from prompts that the server kept.")
    ] = False,
    top_k: Annotated[str | None, typer.Option(help="Active experts: one number or a list.")] = None,
    allocate: Annotated[
        Allocation | None,
        typer.Option(help="One-pass methods: share one total out, search (evoesap), or not."),
    ] = None,
    min_experts: Annotated[
        int | None, typer.Option(min=1, help="Fewest that a layer is left with by one total.")
    ] = None,
    max_experts: Annotated[
        int | None, typer.Option(min=1, help="Most that a layer keeps of one total.")
    ] = None,
    snap: Annotated[
        str | None,
        typer.Option(help="Lower counts to servable ones, tuned ones, or multiples of a number."),
    ] = None,
    expert_parallel: Annotated[
        int, typer.Option(min=1, help="Ranks that must be able to share the counts; with --snap.")
    ] = 1,
    router: Annotated[
        GateRows | None,
        typer.Option(help="Methods that merge: keep all gate rows, or drop; default: theirs."),
    ] = None,
    skip_layers: Annotated[str, typer.Option(help="Layers to leave whole, e.g. 0,1,2.")] = "",
    keep_super_experts: Annotated[
        bool, typer.Option("--keep-super-experts", help="Never prune outlier experts.")
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the method; repeatable."),
    ] = None,
    preset: Annotated[str, typer.Option(help="eep: liveprune, released, paper.")] = "liveprune",
    measure: Annotated[
        str | None, typer.Option(help="exact, contains, choice; without labels esap, kl, nll.")
    ] = None,
    dev: Annotated[
        Path | None, typer.Option(help="Rows to choose on; default: a part of the source's.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Rows scored once, at the end.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts through the chat template.")
    ] = False,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows used, of each file.")] = 1024,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    engine: Annotated[
        JobEngine, typer.Option(help="What scores plans: the serving engine, or its own.")
    ] = JobEngine.LIVE,
    actors: Annotated[
        int | None, typer.Option(min=1, help="So many engines, each in an actor of Ray.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster, as the server reaches it.")
    ] = None,
    make_live: Annotated[
        bool, typer.Option("--make-live", help="Make the variant live when it is found.")
    ] = False,
    share: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Of the serving engine's time, at most.")
    ] = 0.5,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end.")] = False,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Queue a background pruning run; what it finds becomes a variant of the server."""
    source: dict[str, str] = {}
    if data is not None:
        source["data"] = _on_server(data)
    if statistics:
        source["statistics"] = LIVE
    if prompts:
        source["prompts"] = KEPT
    if len(source) != 1:
        raise DataError(
            f"found {' and '.join(source) or 'no source'}, expected one of --data, "
            "--live-statistics and --kept-prompts"
        )
    request = {
        "method": method,
        "source": source,
        "tag": name,
        "experts": experts,
        "target_memory": parse_bytes("--target-memory", target_memory) if target_memory else None,
        "top_k": number_or_list("--top-k", top_k),
        "allocate": None if allocate is None else allocate.value,
        "min_experts": min_experts,
        "max_experts": max_experts,
        "snap": snap,
        "expert_parallel": expert_parallel,
        "router": None if router is None else router.value,
        "skip_layers": numbers("--skip-layers", skip_layers),
        "keep_super_experts": keep_super_experts,
        "seed": seed,
        "settings": parse_changes(change or ()),
        "preset": preset,
        "measure": measure,
        "dev": None if dev is None else _on_server(dev),
        "test": None if test is None else _on_server(test),
        "chat": chat,
        "max_rows": max_rows,
        "max_answer_tokens": max_answer_tokens,
        "engine": engine.value,
        "actors": actors,
        "ray_address": ray_address,
        "make_live": make_live,
        "share": share,
    }
    with connect(admin_url, admin_key_file) as client:
        job = client.start_job(request)
        if wait:
            job = wait_for(client, job)
    show(job, as_json)
    if wait and job["state"] != "done":
        raise typer.Exit(1)


def _on_server(path: Path) -> str:
    """As the server is to find it; what is not there may be on the server's own disk."""
    return str(path.absolute()) if path.exists() else str(path)
