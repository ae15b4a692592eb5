"""``liveprune prune``: from a model, a method and a budget to a pruned checkpoint or a plan."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from liveprune.pruning.errors import DataError, PlanError
from liveprune.pruning.plan import Plan
from liveprune.server.cli_options import (
    ModelArgument,
    OutputOption,
    budget,
    check_output,
    number_or_list,
    numbers,
    parse_changes,
)

SEARCH = "eep"
ONE_PASS_OPTIONS = (
    *("tau", "nmi", "calibration", "allocate", "skip_layers", "keep_super_experts"),
    *("max_tokens", "device", "statistics_cache", "statistics", "router"),
    *("target_memory", "min_experts", "max_experts", "snap"),
)
EEP_OPTIONS = ("preset", "groups", "merge", "start")
SEARCH_OPTIONS = (
    *EEP_OPTIONS,
    *("train", "dev", "test", "measure", "chat", "search_dir"),
    *("engine", "dtype", "max_answer_tokens", "admin_key_file", "actors", "ray_address"),
)
console = Console()
_PANEL = "Searches (--method eep, --allocate evoesap)"


class GateRows(StrEnum):
    """What methods that merge do with the router."""

    KEEP = "keep"
    DROP = "drop"


class Allocation(StrEnum):
    """How a budget is shared out over the layers."""

    UNIFORM = "uniform"
    GLOBAL = "global"
    EVOESAP = "evoesap"


def prune(
    context: typer.Context,
    model: ModelArgument,
    output: OutputOption,
    method: Annotated[str, typer.Option(help="See docs/methods.md.")],
    experts: Annotated[
        str | None,
        typer.Option(
            help="Kept per layer: a number, a fraction, a list like 4,4,6, ranges of layers like "
            "0-7:4,8-:6, or @FILE."
        ),
    ] = None,
    target_memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Instead of --experts: all weights, e.g. 40GiB."),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(help="moeits, instead of --experts: larger keeps more. See docs/methods.md."),
    ] = None,
    nmi: Annotated[
        str, typer.Option(help="moeits: plain, or a control: shuffled, corrected.")
    ] = "plain",
    top_k: Annotated[str | None, typer.Option(help="Active experts: one number or a list.")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="JSONL rows; repeatable, each file a corpus.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="For methods that draw.")] = 0,
    allocate: Annotated[
        Allocation | None,
        typer.Option(
            help="The same count in all layers, one total by score, or by a search (evoesap); "
            "default: the method's."
        ),
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
    router: Annotated[
        GateRows | None,
        typer.Option(help="Methods that merge: keep all gate rows, or drop; default: theirs."),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any other parameter of the method; repeatable."
        ),
    ] = None,
    skip_layers: Annotated[str, typer.Option(help="Layers to leave whole, e.g. 0,1,2.")] = "",
    keep_super_experts: Annotated[
        bool, typer.Option("--keep-super-experts", help="Never prune outlier experts.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens used of each row.")] = 2048,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows used, of each file.")] = 1024,
    device: Annotated[str, typer.Option(help="Where calibration runs: cpu or cuda.")] = "cpu",
    statistics_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps calibration results for later calls.")
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="In place of --calibration: a file of `liveprune statistics -o`."),
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Write the plan, not a checkpoint.")
    ] = False,
    train: Annotated[
        Path | None,
        typer.Option(help="JSONL rows that candidates are scored on.", rich_help_panel=_PANEL),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option(
            help="Rows the winners are chosen on; default: a part of --train.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(help="Rows scored once, at the end.", rich_help_panel=_PANEL),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="exact (default), contains, choice; without labels esap (default of evoesap), "
            "kl, nll.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Put prompts through the chat template, each as a user's turn.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    preset: Annotated[
        str,
        typer.Option(help="Hyper-parameters: liveprune, released, paper.", rich_help_panel=_PANEL),
    ] = "liveprune",
    groups: Annotated[
        str | None,
        typer.Option(
            help="Runs of layers that share coefficients: a number, or each.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge/--no-merge", help="Merge after pruning.", rich_help_panel=_PANEL),
    ] = True,
    start: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD",
            help="A one-pass method whose pruning, by --train, is tried first; repeatable.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    search_dir: Annotated[
        Path | None,
        typer.Option(
            help="Journal and report; default: OUTPUT.search. The same command goes on from it.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="vllm, transformers, or the URL of a running server's admin API.",
            rich_help_panel=_PANEL,
        ),
    ] = "vllm",
    dtype: Annotated[
        str, typer.Option(help="What the engine computes in.", rich_help_panel=_PANEL)
    ] = "auto",
    max_answer_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer.", rich_help_panel=_PANEL)
    ] = 64,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(help="Key of that server.", rich_help_panel=_PANEL),
    ] = None,
    expert_parallel: Annotated[
        int,
        typer.Option(
            min=1,
            help="Ranks that must be able to share the counts; with --snap, or --method eep.",
            rich_help_panel=_PANEL,
        ),
    ] = 1,
    actors: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="So many engines, each in an actor of Ray; see docs/many-engines.md.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Of a running Ray cluster, HOST:PORT or auto; default: this machine alone.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
) -> None:
    """Choose the experts to keep and write the pruned checkpoint (or, --plan-only, the plan)."""
    from liveprune.pruning.checkpoint.apply import apply_plan
    from liveprune.pruning.plan_io import save_plan
    from liveprune.server.model_path import local_model
    from liveprune.server.progress import progress_bar

    searches = allocate is Allocation.EVOESAP
    _check_options(context, method, searches=searches)
    check_output(output, is_file=plan_only)
    folder = local_model(model)
    named = parse_changes(change or ())
    plan: Plan
    if method == SEARCH or searches:
        from liveprune.server.search_options import SearchOptions, parse_settings

        asker = f"method {method}" if method == SEARCH else "--allocate evoesap"
        if train is None or (experts is None and target_memory is None):
            missing = "--train" if train is None else "--experts"
            raise DataError(f"{missing}: missing, expected for {asker}")
        k = number_or_list("--top-k", top_k)
        if isinstance(k, list) and method == SEARCH:
            raise PlanError(f"--top-k: found {top_k!r}, expected one number for method {SEARCH}")
        options = SearchOptions(
            model=folder,
            folder=search_dir or output.with_name(output.name + ".search"),
            train=train,
            dev=dev,
            test=test,
            experts="" if experts is None else budget(experts, folder),
            measure=measure or ("esap" if searches else "exact"),
            chat=chat,
            top_k=None if isinstance(k, list) else k,
            settings=parse_settings(
                preset,
                () if searches else change or (),
                groups=int(groups) if groups and groups.isdigit() else groups,
                merge=None if merge and not searches else False,
            ),
            starts=tuple(start or ()),
            seed=seed,
            engine=engine,
            admin_key_file=admin_key_file,
            actors=actors,
            ray_address=ray_address,
            dtype=dtype,
            max_rows=max_rows,
            max_answer_tokens=max_answer_tokens,
            expert_parallel=expert_parallel,
            command=shlex.join(["liveprune", *sys.argv[1:]]),
        )
    if method == SEARCH:
        from liveprune.server.search_run import run_search

        plan = run_search(options, console)
    else:
        from liveprune.pruning.model_spec import ModelSpec
        from liveprune.pruning.prune import make_plan
        from liveprune.server.budget_options import allowed_counts
        from liveprune.server.evoesap_run import BUDGET_SETTINGS, evoesap
        from liveprune.server.live_options import parse_bytes

        skipped = numbers("--skip-layers", skip_layers)
        active = number_or_list("--top-k", top_k)
        own = {name: x for name, x in named.items() if not searches or name not in BUDGET_SETTINGS}
        with ExitStack() as stack:
            allocator: Any = None if allocate is None else allocate.value
            if searches:
                settings = {name: x for name, x in named.items() if name not in own}
                allocator = stack.enter_context(evoesap(options, settings))
            with progress_bar(f"{method}: scoring experts") as update:
                plan = make_plan(
                    folder,
                    method=method,
                    experts=None if experts is None else budget(experts, folder),
                    target_memory=(
                        parse_bytes("--target-memory", target_memory) if target_memory else None
                    ),
                    tau=tau,
                    nmi=nmi,
                    top_k=active,
                    calibration=calibration,
                    seed=seed,
                    allocate=allocator,
                    min_experts=min_experts,
                    max_experts=max_experts,
                    allowed_counts=allowed_counts(
                        ModelSpec.from_path(folder), snap, expert_parallel
                    ),
                    options=own,
                    keep_gate_rows=None if router is None else router is GateRows.KEEP,
                    skip_layers=skipped,
                    keep_super_experts=keep_super_experts,
                    max_tokens=max_tokens,
                    max_rows=max_rows,
                    device=device,
                    statistics_cache=statistics_cache,
                    statistics=statistics,
                    progress=update,
                )
    if plan_only:
        save_plan(plan, output)
    else:
        with progress_bar("writing", binary=True) as update:
            apply_plan(folder, plan, output, progress=update)
    kept = sum(layer.kept_experts for layer in plan.layers)
    total = sum(layer.experts for layer in plan.layers)
    console.print(f"plan {plan.digest}: {kept} of {total} experts kept", highlight=False)
    console.print(f"written to {output}", highlight=False, soft_wrap=True)


def _check_options(context: typer.Context, method: str, *, searches: bool) -> None:
    """Refuse options of the other kind of method: ignoring one would mislead.

    A search for budgets (``searches``) has the data and engine of EEP's, not its parameters.
    """
    foreign: tuple[str, ...] = ONE_PASS_OPTIONS if method == SEARCH else SEARCH_OPTIONS
    if searches and method != SEARCH:
        foreign = EEP_OPTIONS
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in foreign and source is not None and source.name == "COMMANDLINE":
            flag = parameter.opts[0]
            raise PlanError(f"{flag}: found with method {method}, which does not have it")
