"""``liveprune pareto``: methods and budgets side by side, by quality, bytes and speed."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from liveprune.pruning.errors import DataError, PlanError
from liveprune.server.cli_options import ModelArgument, OutputOption, budget, numbers

if TYPE_CHECKING:
    from liveprune.pruning.pareto.grid import Budget

console = Console()
_SEARCH = "Methods that search (eep)"
_SPEED = "Speed"
PRESET = "liveprune"
_LABEL = re.compile(r"[A-Za-z0-9._-]+")


def pareto(
    model: ModelArgument,
    output: OutputOption,
    methods: Annotated[str, typer.Option(help="By commas; see docs/methods.md, and eep.")],
    experts: Annotated[
        str, typer.Option(help="Budgets by commas: numbers, fractions, @FILEs of counts.")
    ],
    data: Annotated[
        list[Path], typer.Option(help="JSONL rows that plans are scored on; repeatable.")
    ],
    top_k: Annotated[
        str | None, typer.Option(help="Active experts by commas; default: the model's.")
    ] = None,
    calibration: Annotated[list[Path] | None, typer.Option(help="JSONL rows; repeatable.")] = None,
    measure: Annotated[
        str, typer.Option(help="exact, contains, choice; without labels esap, kl, nll.")
    ] = "exact",
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put prompts through the chat template."),
    ] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Plans of each combination, of methods that draw.")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls/--no-controls", help="Add random and frequency to every combination."
        ),
    ] = True,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows used, of each file; default: all of --data.")
    ] = None,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    device: Annotated[str, typer.Option(help="Where calibration runs: cpu or cuda.")] = "cpu",
    engine: Annotated[
        str,
        typer.Option(help="vllm, transformers, or the URL of a running server's admin API."),
    ] = "vllm",
    dtype: Annotated[str, typer.Option(help="What the engine computes in.")] = "auto",
    admin_key_file: Annotated[Path | None, typer.Option(help="Key of that server.")] = None,
    rounds: Annotated[
        int,
        typer.Option(min=0, help="Timed for each plan; 0 times nothing.", rich_help_panel=_SPEED),
    ] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.", rich_help_panel=_SPEED)] = 8,
    prompt_tokens: Annotated[
        int, typer.Option(min=9, help="Of each.", rich_help_panel=_SPEED)
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Decoded after each.", rich_help_panel=_SPEED)
    ] = 33,
    actors: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="So many engines, each in an actor of Ray; times nothing. See "
            "docs/many-engines.md.",
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Of a running Ray cluster, HOST:PORT or auto; default: this machine alone."
        ),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(help="JSONL rows that candidates are scored on.", rich_help_panel=_SEARCH),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option(
            help="Rows the winners are chosen on; default: a part of --train.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="Hyper-parameters: liveprune, released, paper.", rich_help_panel=_SEARCH),
    ] = PRESET,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other hyper-parameter; repeatable.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
) -> None:
    """Make plans by several METHODS and budgets, score and time them, and report the best.

    The folder OUTPUT holds the plans, a report and a journal: the same command goes on from it.
    """
    from liveprune.server.model_path import local_model
    from liveprune.server.pareto_options import SEARCH, ParetoOptions
    from liveprune.server.pareto_run import compare
    from liveprune.server.search_options import parse_settings

    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output}: found a file, expected a folder")
    names = _parts("--methods", methods)
    for flag, given in (
        ("--train", train is not None),
        ("--dev", dev is not None),
        ("--preset", preset != PRESET),
        ("--set", bool(change)),
    ):
        if given and SEARCH not in names:
            raise DataError(f"{flag}: found without the method {SEARCH}, expected with it")
    folder = local_model(model)
    compare(
        ParetoOptions(
            model=folder,
            folder=output,
            methods=names,
            budgets=_budgets(experts, folder),
            top_ks=(None,) if top_k is None else tuple(numbers("--top-k", top_k)),
            data=data,
            calibration=tuple(calibration or ()),
            train=train,
            dev=dev,
            settings=parse_settings(preset, change or ()),
            measure=measure,
            chat=chat,
            seeds=seeds,
            seed=seed,
            controls=controls,
            engine=engine,
            admin_key_file=admin_key_file,
            actors=actors,
            ray_address=ray_address,
            dtype=dtype,
            device=device,
            max_rows=max_rows,
            max_answer_tokens=max_answer_tokens,
            rounds=rounds,
            batch=batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            command=shlex.join(["liveprune", *sys.argv[1:]]),
        ),
        console,
    )


def _budgets(text: str, model: Path) -> dict[str, Budget]:
    """By label: what was typed, or the stem of a file's name."""
    found: dict[str, Budget] = {}
    for part in _parts("--experts", text):
        label = Path(part[1:]).stem if part.startswith("@") else part
        if not _LABEL.fullmatch(label):
            raise PlanError(
                f"--experts {part}: found {label!r} for the names of plans, expected letters, "
                f"digits, dots, underscores and hyphens alone"
            )
        read = budget(part, model)
        if label in found:
            raise PlanError(f"--experts: found {label!r} twice, expected each budget once")
        found[label] = read if isinstance(read, str) else tuple(read)
    return found


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise PlanError(f"{option}: found {text!r}, expected at least one, by commas")
    return parts
