"""The ``liveprune`` command."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from liveprune.pruning.errors import LiveprunError, VariantError
from liveprune.server import cli_experiments, cli_jobs, cli_live
from liveprune.server.admin_key import STATE_VARIABLE, STORE_VARIABLE
from liveprune.server.cli_options import ModelArgument, OutputOption, check_output
from liveprune.server.cli_pareto import pareto
from liveprune.server.cli_prune import prune
from liveprune.server.cli_statistics import statistics
from liveprune.server.cli_store import store_app

app = typer.Typer(
    help="Prune a sparse mixture-of-experts model and serve it on vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(prune)
app.command()(pareto)
app.command()(statistics)
cli_live.register(app)
cli_jobs.register(app)
cli_experiments.register(app)
app.add_typer(store_app, name="store")
console = Console()

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RatioOption = Annotated[
    float | None, typer.Option(help="Share pruned, for plan files that only rank experts.")
]


def main() -> None:
    """Run the command; an error made on purpose, or by the disk, is one line and exit status 2."""
    try:
        app()
    except (LiveprunError, OSError) as error:
        Console(stderr=True, markup=False, emoji=False).print(
            f"liveprune: {error}", style="red", highlight=False, soft_wrap=True
        )
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"liveprune {metadata.version('liveprune')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """Options before the command."""


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(
    context: typer.Context,
    model: ModelArgument,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="TAG=PLAN", help="A variant to be live from the start; repeatable."),
    ] = None,
    resident: Annotated[
        str | None,
        typer.Option(metavar="TAG", help="Load only this variant's experts, and serve it."),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live/--no-live", help="Live variants, and the admin API for them.")
    ] = True,
    memory_target: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Bound of weights and KV cache together, e.g. 40GiB."),
    ] = None,
    spare_rows: Annotated[
        int | None,
        typer.Option(min=0, help="Merged experts a layer can hold; default: its experts."),
    ] = None,
    max_variants: Annotated[
        int, typer.Option(min=1, max=256, help="Live at once, beside the base model.")
    ] = 16,
    state_dir: Annotated[
        Path | None,
        typer.Option(envvar=STATE_VARIABLE, help="Variants, jobs, audit log and admin key."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar=STORE_VARIABLE,
            help="PostgreSQL that replicas share; default: SQLite in the state folder.",
        ),
    ] = None,
    store_files: Annotated[
        Path | None, typer.Option(help="Folder that replicas share; default: the state folder.")
    ] = None,
    store_quota: Annotated[
        str, typer.Option(metavar="BYTES", help="Bound of those files.")
    ] = "10GiB",
    keep_jobs: Annotated[
        int, typer.Option(min=0, help="Ended jobs that keep their journals and logs.")
    ] = 50,
    replica: Annotated[
        str | None, typer.Option(help="Name of this server among them; default: the host's.")
    ] = None,
    plan_root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that plans added while serving may lie in; repeatable."),
    ] = None,
    canary_prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL rows with a prompt each, asked at every swap beside our own."),
    ] = None,
    admin_host: Annotated[str, typer.Option(help="Address of the admin API.")] = "127.0.0.1",
    admin_port: Annotated[int, typer.Option(min=0, max=65535)] = 8001,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="Admin keys, one a line; default: in the state folder.")
    ] = None,
    experiment_interval: Annotated[
        float, typer.Option(min=1, help="Seconds between two decisions on an experiment.")
    ] = 10,
    live_statistics: Annotated[
        bool,
        typer.Option(
            "--live-statistics/--no-live-statistics", help="Count which experts requests use."
        ),
    ] = True,
    statistics_sample: Annotated[
        int, typer.Option(min=0, help="Tokens of a sampled step whose experts are measured.")
    ] = 16,
    statistics_every: Annotated[
        int, typer.Option(min=1, help="One step in so many is sampled.")
    ] = 64,
    statistics_interval: Annotated[
        float, typer.Option(min=1, help="Seconds between two looks at the counts.")
    ] = 60,
    statistics_half_life: Annotated[
        float, typer.Option(min=0.01, help="Hours in which a count loses half its weight.")
    ] = 24,
    keep_prompts: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests whose text is kept; default 0.")
    ] = 0,
    keep_prompts_max: Annotated[int, typer.Option(min=1, help="Most of them; old ones go.")] = 1000,
    keep_prompts_days: Annotated[
        float, typer.Option(min=0.01, help="Days after which they are deleted.")
    ] = 7,
    redact: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Replaced in kept text by [redacted]; repeatable."),
    ] = None,
) -> None:
    """Serve MODEL behind vLLM's OpenAI API; every `vllm serve` flag is passed through.

    Further flags are those of `vllm serve --help=all`, e.g. --port, --served-model-name,
    --max-model-len, --tensor-parallel-size, --api-key.
    """
    from liveprune.server.admin_key import default_state_folder
    from liveprune.server.kept_prompts import redactions
    from liveprune.server.live_options import (
        LiveOptions,
        PromptOptions,
        StatisticsOptions,
        parse_bytes,
    )
    from liveprune.server.serve import check_model, check_plugin_enabled
    from liveprune.server.serve import serve as run

    check_plugin_enabled()
    options = LiveOptions(
        state=state_dir or default_state_folder(),
        variants=tuple(variant or ()),
        resident=resident,
        memory_target=parse_bytes("--memory-target", memory_target) if memory_target else None,
        spare_rows=spare_rows,
        max_variants=max_variants,
        plan_roots=tuple(plan_root or ()),
        canary_prompts=canary_prompts,
        admin_host=admin_host,
        admin_port=admin_port,
        admin_key_file=admin_key_file,
        store=store,
        store_files=store_files,
        store_quota=parse_bytes("--store-quota", store_quota),
        keep_jobs=keep_jobs,
        replica=replica,
        experiment_interval=experiment_interval,
        statistics=StatisticsOptions(
            on=live_statistics,
            sample=statistics_sample,
            every=statistics_every,
            interval=statistics_interval,
            half_life=3600 * statistics_half_life,
        ),
        prompts=PromptOptions(
            keep_prompts, keep_prompts_max, keep_prompts_days, redactions(redact or ())
        ),
    )
    if options.insists and not live:
        raise VariantError("--no-live: found together with --variant or --resident, expected one")
    note = Console(stderr=True)
    note.print(f"liveprune: serving {check_model(model)}", highlight=False, soft_wrap=True)
    try:
        run(model, context.args, options if live else None)
    finally:
        note.print("liveprune: server stopped", highlight=False)


@app.command()
def apply(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="A plan file, ours or a foreign one.")],
    output: OutputOption,
    ratio: RatioOption = None,
    top_k: Annotated[int | None, typer.Option(help="For plan files that do not state it.")] = None,
) -> None:
    """Carry out a plan: write the pruned or merged checkpoint, streaming."""
    from liveprune.pruning.checkpoint.apply import apply_plan
    from liveprune.pruning.foreign import read_any_plan
    from liveprune.pruning.model_spec import ModelSpec
    from liveprune.server.model_path import local_model
    from liveprune.server.progress import progress_bar

    check_output(output, is_file=False)
    folder = local_model(model)
    recipe = read_any_plan(plan, ModelSpec.from_path(folder), ratio=ratio, top_k=top_k)
    with progress_bar("writing", binary=True) as update:
        apply_plan(folder, recipe, output, progress=update)
    console.print(f"plan {recipe.digest} written to {output}", highlight=False, soft_wrap=True)


@app.command()
def export(
    plan: Annotated[Path, typer.Argument(help="A plan file, or a pruned checkpoint.")],
    output: OutputOption,
) -> None:
    """Write a plan as llm-compressor's JSON report: kept expert ids by layer name."""
    from liveprune.pruning.foreign import write_llm_compressor_report
    from liveprune.pruning.plan_io import load_plan

    check_output(output, is_file=True)
    write_llm_compressor_report(load_plan(plan), output)
    console.print(f"written to {output}", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="MODEL_OR_PLAN", help="A model or a plan file.")],
    as_json: JsonOption = False,
    model: Annotated[
        str | None, typer.Option(help="The base model, for plan files that do not state it.")
    ] = None,
) -> None:
    """Show experts, top-k and bytes per layer of a model (by its headers) or a plan."""
    from liveprune.pruning.checkpoint.inspect import inspect as look
    from liveprune.pruning.model_spec import ModelSpec
    from liveprune.server.model_path import local_model

    spec = ModelSpec.from_path(local_model(model)) if model else None
    found = look(Path(path) if Path(path).exists() else local_model(path), spec)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
        return
    title = f"{found.kind} of {found.architecture}"
    if found.digest:
        title += f", plan {found.digest}"
    table = Table("layer", "experts", "kept", "top-k", "bytes", "mapping", title=title)
    mappings = {"router_map": "router map", "expert_map": "mapped"}
    for layer in found.layers:
        size = "" if layer.bytes is None else f"{layer.bytes:,}"
        counts = (str(x) for x in (layer.layer, layer.experts, layer.kept, layer.top_k))
        table.add_row(*counts, size, mappings.get(layer.mapping, layer.mapping))
    console.print(table)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say whether this environment can serve, and how to mend it."""
    from liveprune.server.doctor import diagnose, worst

    findings = diagnose()
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        colours = {"ok": "green", "warning": "yellow", "error": "red"}
        table = Table("check", "status", "found", "how to mend it")
        for finding in findings:
            status = f"[{colours[finding.status]}]{finding.status}[/]"
            table.add_row(finding.check, status, finding.found, finding.mend)
        console.print(table)
    raise typer.Exit(1 if worst(findings) == "error" else 0)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where results go.")] = Path(
        "build/demo"
    ),
    task: Annotated[str, typer.Option(help="The task to prune for.")] = "sort",
    rows: Annotated[int, typer.Option(min=1, max=300, help="Test rows per task.")] = 40,
) -> None:
    """Prune the shipped model from 8 to 4 experts for one task, serve both, compare."""
    from liveprune.server.demo import run_demo

    run_demo(output, task=task, rows=rows, console=console)
