"""Commands about experiments in a running server."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from liveprune.pruning.errors import ExperimentError
from liveprune.server.cli_experiment_form import definition_of, parse_weights
from liveprune.server.cli_experiment_show import show
from liveprune.server.cli_live import (
    DEFAULT_URL,
    JsonOption,
    KeyFileOption,
    UrlOption,
    connect,
    console,
    print_json,
)

experiments_app = typer.Typer(
    help="Split the traffic of a running server over variants, and decide.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Of the experiment.")]
FileArgument = Annotated[
    str | None,
    typer.Argument(metavar="FILE", help="The definition as JSON; - reads standard input."),
]
NameOption = Annotated[str | None, typer.Option(help="Of the experiment; never used again.")]
ArmOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME:]TAG=SHARE", help="A variant and its share, e.g. pruned:e4k1=0.1; each arm."
    ),
]
ControlOption = Annotated[
    str | None, typer.Option(help="Arm that the others are compared with; default: the first.")
]
PrimaryOption = Annotated[
    str | None, typer.Option(metavar="METRIC[:STATISTIC]", help="Shall get better.")
]
GuardrailOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METRIC[:STATISTIC]:MARGIN",
        help="Must not get worse by more; 5% is of the control arm's value. Repeatable.",
    ),
]
ActionOption = Annotated[
    list[str] | None,
    typer.Option(help="Done by itself: notify, rollback, ramp, promote. Repeatable."),
]
RampOption = Annotated[
    str | None, typer.Option(metavar="SHARES", help="Of all but the control arm, e.g. 0.25,0.5.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any other field; repeatable."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Decide, and do nothing.")]


def register(app: typer.Typer) -> None:
    """Add all commands of this file to the main app."""
    app.add_typer(experiments_app, name="experiments")


@experiments_app.command("start")
def start_experiment(
    file: FileArgument = None,
    name: NameOption = None,
    arm: ArmOption = None,
    control: ControlOption = None,
    primary: PrimaryOption = None,
    guardrail: GuardrailOption = None,
    action: ActionOption = None,
    ramp: RampOption = None,
    change: SetOption = None,
    dry_run: DryRunOption = False,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start an experiment, from FILE or from options, which come on top of FILE."""
    definition = definition_of(
        _read(file),
        name=name,
        arms=arm,
        control=control,
        primary=primary,
        guardrails=guardrail,
        actions=action,
        ramp=ramp,
        changes=change,
        dry_run=dry_run,
    )
    with connect(admin_url, admin_key_file) as client:
        _show(client.start_experiment(definition), as_json)


@experiments_app.command("check")
def check_experiment(
    file: FileArgument = None,
    name: NameOption = None,
    arm: ArmOption = None,
    control: ControlOption = None,
    primary: PrimaryOption = None,
    guardrail: GuardrailOption = None,
    action: ActionOption = None,
    ramp: RampOption = None,
    change: SetOption = None,
    dry_run: DryRunOption = False,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
) -> None:
    """Print what `start` would start, with all defaults, as JSON; start nothing."""
    definition = definition_of(
        _read(file),
        name=name,
        arms=arm,
        control=control,
        primary=primary,
        guardrails=guardrail,
        actions=action,
        ramp=ramp,
        changes=change,
        dry_run=dry_run,
    )
    with connect(admin_url, admin_key_file) as client:
        print_json(client.check_experiment(definition))


@experiments_app.command("list")
def list_experiments(
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the experiments, the newest first."""
    with connect(admin_url, admin_key_file) as client:
        found = client.experiments()
    if as_json:
        print_json(found)
        return
    table = Table(Column("name", no_wrap=True), "model", "state", "shares", "units", "verdict")
    for experiment in found:
        decision = experiment["decision"]
        table.add_row(
            experiment["name"],
            experiment["definition"]["model"],
            experiment["state"],
            ", ".join(f"{arm['name']} {100 * arm['share']:g}%" for arm in experiment["arms"]),
            ", ".join(f"{arm['units']:,}" for arm in experiment["arms"]),
            decision["verdict"] if decision else "",
        )
    console.print(table)


@experiments_app.command("show")
def show_experiment(
    name: NameArgument,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one experiment: its arms, what is proven, and the verdict with its reasons."""
    with connect(admin_url, admin_key_file) as client:
        _show(client.experiment(name), as_json)


@experiments_app.command("stop")
def stop_experiment(
    name: NameArgument,
    reason: Annotated[str, typer.Option(help="For the record.")] = "",
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """End an experiment; its units get what the alias serves."""
    with connect(admin_url, admin_key_file) as client:
        _show(client.stop_experiment(name, reason), as_json)


@experiments_app.command("weights")
def set_weights(
    name: NameArgument,
    weights: Annotated[
        list[str], typer.Argument(metavar="ARM=SHARE", help="Of every arm; they sum to 1.")
    ],
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change the shares; as few units as possible move."""
    shares = parse_weights(weights)
    with connect(admin_url, admin_key_file) as client:
        _show(client.set_weights(name, shares), as_json)


@experiments_app.command("decisions")
def list_decisions(
    name: NameArgument,
    number: Annotated[
        int | None, typer.Option("--id", help="Print this one as JSON, with all its numbers.")
    ] = None,
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was decided, the oldest first; looks that said nothing new are thinned out."""
    with connect(admin_url, admin_key_file) as client:
        if number is not None:
            print_json(client.decision(name, number))
            return
        found = client.decisions(name)
    if as_json:
        print_json(found)
        return
    table = Table("id", Column("time (UTC)", no_wrap=True), "verdict", "arm", "actions", "reasons")
    for decision in found:
        withheld = [f"({action} withheld)" for action in decision["withheld"]]
        table.add_row(
            str(decision["id"]),
            f"{datetime.fromtimestamp(decision['time'], UTC):%Y-%m-%d %H:%M:%S}",
            decision["verdict"],
            decision["arm"] or "",
            ", ".join([*decision["actions"], *withheld]),
            "\n".join(decision["reasons"]),
        )
    console.print(table)


@experiments_app.command("feedback")
def give_feedback(
    response_id: Annotated[str, typer.Argument(help="`id` of the answer.")],
    score: Annotated[float, typer.Argument(help="From 0 to 1, which is best.")],
    admin_url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score an answer, once."""
    with connect(admin_url, admin_key_file) as client:
        found = client.feedback(response_id, score)
    if as_json:
        print_json(found)
    else:
        console.print(f"counted for arm {found['arm']} of experiment {found['experiment']}")


def _read(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    where = "standard input" if file == "-" else file
    text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ExperimentError(f"{where}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ExperimentError(f"{where}: found {type(found).__name__}, expected a JSON object")
    return found


def _show(experiment: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(experiment)
    else:
        show(experiment, console)
