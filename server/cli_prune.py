"""``liveprune prune``: from a model, a method and a budget to a pruned checkpoint or a plan."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

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
)

SEARCH = "eep"
ONE_PASS_OPTIONS = (
    *("tau", "nmi", "calibration", "allocate", "skip_layers", "keep_super_experts"),
    *("max_tokens", "device", "statistics_cache"),
)
SEARCH_OPTIONS = (
    *(
        "train",
        "dev",
        "test",
        "measure",
        "preset",
        "groups",
        "merge",
        "start",
        "change",
        "search_dir",
    ),
    *("engine", "dtype", "max_answer_tokens", "admin_key_file", "expert_parallel"),
    *("actors", "ray_address"),
)
console = Console()
_PANEL = "EEP search (--method eep)"


class Allocation(StrEnum):
    """How a budget is shared out over the layers."""

    UNIFORM = "uniform"
    GLOBAL = "global"


def prune(
    context: typer.Context,
    model: ModelArgument,
    output: OutputOption,
    method: Annotated[str, typer.Option(help="See docs/methods.md.")],
    experts: Annotated[
        str | None,
        typer.Option(help="Kept per layer: a number, a fraction, a list like 4,4,6, or @FILE."),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(help="moeits, instead of --experts: larger keeps more. See docs/methods.md."),
    ] = None,
    nmi: Annotated[
        str, typer.Option(help="moeits: plain, or a control: shuffled, corrected.")
    ] = "plain",
    top_k: Annotated[str | None, typer.Option(help="Active experts: one number or a list.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="JSONL rows.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="For methods that draw.")] = 0,
    allocate: Annotated[
        Allocation, typer.Option(help="The same count in all layers, or one total shared out.")
    ] = Allocation.UNIFORM,
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
        str,
        typer.Option(
            help="exact, contains, choice; without labels esap, kl, nll.", rich_help_panel=_PANEL
        ),
    ] = "exact",
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
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other hyper-parameter; repeatable.",
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
            help="Refuse counts that so many expert-parallel ranks cannot share.",
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

    _check_options(context, method)
    check_output(output, is_file=plan_only)
    folder = local_model(model)
    if method == SEARCH:
        from liveprune.server.search_options import SearchOptions, parse_settings
        from liveprune.server.search_run import run_search

        if experts is None or train is None:
            missing = "--experts" if experts is None else "--train"
            raise DataError(f"{missing}: missing, expected for method {SEARCH}")
        k = number_or_list("--top-k", top_k)
        if isinstance(k, list):
            raise PlanError(f"--top-k: found {top_k!r}, expected one number for method {SEARCH}")
        options = SearchOptions(
            model=folder,
            folder=search_dir or output.with_name(output.name + ".search"),
            train=train,
            dev=dev,
            test=test,
            experts=budget(experts, folder),
            measure=measure,
            chat=chat,
            top_k=k,
            settings=parse_settings(
                preset,
                change or (),
                groups=int(groups) if groups and groups.isdigit() else groups,
                merge=None if merge else False,
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
        plan: Plan = run_search(options, console)
    else:
        from liveprune.pruning.prune import make_plan

        with progress_bar(f"{method}: scoring experts") as update:
            plan = make_plan(
                folder,
                method=method,
                experts=None if experts is None else budget(experts, folder),
                tau=tau,
                nmi=nmi,
                top_k=number_or_list("--top-k", top_k),
                calibration=calibration,
                seed=seed,
                allocate=allocate.value,
                skip_layers=numbers("--skip-layers", skip_layers),
                keep_super_experts=keep_super_experts,
                max_tokens=max_tokens,
                max_rows=max_rows,
                device=device,
                statistics_cache=statistics_cache,
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


def _check_options(context: typer.Context, method: str) -> None:
    """Refuse options of the other kind of method: ignoring one would mislead."""
    foreign = ONE_PASS_OPTIONS if method == SEARCH else SEARCH_OPTIONS
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in foreign and source is not None and source.name == "COMMANDLINE":
            flag = parameter.opts[0]
            raise PlanError(f"{flag}: found with method {method}, which does not have it")
