"""What a search cost, what failed, and all that is needed to repeat it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from liveprune.pruning.report.markup import Markup, el, joined, table
from liveprune.pruning.report.numbers import count, runs, seconds, significant
from liveprune.pruning.search.presets import PRESETS

Json = Mapping[str, Any]

_STATES = {"complete": "scored on all train rows", "dropped": "dropped in a race"}


def cost(result: Json) -> Markup:
    """Candidates by stage and fate, then what the engine did, then the failures."""
    spent, curve = result["cost"], result["curve"]
    fates = [*_STATES, "failed"]
    rows = []
    for stage in result["stages"]:
        states = [x["state"] for x in curve if x["stage"] == stage["name"]]
        numbers = [count(states.count(fate)) for fate in fates]
        rows.append([f"{stage['name']} stage", count(len(states)), *numbers])
    wall, cpu = spent["wall_seconds"], spent["cpu_seconds"]
    facts = [
        ["rows scored, of all models together", count(spent["rows"])],
        ["calls of the engine", count(spent["calls"])],
        ["wall time inside these calls", seconds(wall)],
        ["CPU time of this process inside them", seconds(cpu)],
    ]
    for name, time in (("wall", wall), ("CPU", cpu)):
        if time > 0:
            facts.append([f"rows per {name} second", significant(spent["rows"] / time)])
            facts.append([f"candidates per {name} second", significant(len(curve) / time)])
    head = ["stage", "candidates", *_STATES.values(), "failed"]
    return joined(
        table("Candidates", head, rows),
        table("Cost of the engine, the parts before a resume included", ["what", "amount"], facts),
        _failures(result),
    )


def _failures(result: Json) -> Markup:
    """Messages that differ in numbers alone count as one."""
    found: dict[str, list[tuple[str, int]]] = {}
    for x in result["curve"]:
        if x["failure"] is not None:
            key = re.sub(r"\d+", "0", x["failure"])
            found.setdefault(key, []).append((x["failure"], x["index"]))
    lost = [
        f"The {stage['name']} winner could not be scored on {rows}: {score['failure']}"
        for stage in result["stages"]
        for rows, score in stage["scores"].items()
        if score["failure"] is not None
    ]
    if not found and not lost:
        return el("p", "No candidate failed.")
    rows = []
    for group in sorted(found.values(), key=lambda x: (-len(x), x[0][1])):
        alike = " (and alike)" if len({message for message, _ in group}) > 1 else ""
        indices = runs([index for _, index in group], 8)
        rows.append([f"{group[0][0]}{alike}", count(len(group)), indices])
    head = ["message", "failures", "candidates"]
    grouped = table("Failures of candidates on train, by message", head, rows) if rows else None
    return joined(grouped, *(el("p", message, class_="bad") for message in lost))


def reproduction(result: Json) -> Markup:
    """Parameters, digests and versions, and what to do with them."""
    parameters = [[name, _value(value)] for name, value in result["parameters"].items()]
    data = [
        [name, x["measure"], count(x["rows"]), el("code", x["digest"])]
        for name, x in result["data"].items()
    ]
    digests = [
        ["model", result["model"]],
        ["fingerprint of its experts", el("code", result["fingerprint"])],
        *([f"plan of the {x['name']} stage", el("code", x["digest"])] for x in result["stages"]),
        ["method", result["method"]],
        ["seed", str(result["seed"])],
        *([name, version] for name, version in result["versions"].items()),
    ]
    parameters_in_words = _nearest_preset(result["parameters"]) + _starts(result["parameters"])
    again = (
        "To repeat it, search again into an empty folder: the same model (its fingerprint tells), "
        f"rows with these digests, {parameters_in_words}, and seed {result['seed']}. The same "
        "numbers from the engine lead to plans with the same digests. Another device, dtype, "
        "number of threads or version may round otherwise, and a search that meets a tie can then "
        "take another way."
    )
    own = ""
    if "dev" in result["data"] and result["data"]["dev"]["digest"] == _train_digest(result):
        own = " Here dev is a part of the train rows, put aside by the seed."
    command = result.get("command")
    return joined(
        el("p", "The command was ", el("code", command), ".") if command else Markup(""),
        el("p", again),
        table("Model, plans and versions", ["what", "value"], digests),
        table(
            f"Rows, and the digest of the task they come from.{own}",
            ["set", "measure", "rows", "digest"],
            data,
        ),
        table("Parameters", ["parameter", "value"], parameters),
    )


def _starts(parameters: Json) -> str:
    """Prunings that were given."""
    names = ", ".join(parameters["starts"])
    return f", the prunings of {names} as first candidates" if names else ""


def _train_digest(result: Json) -> str:
    return str(result["data"]["train"]["digest"])


def _nearest_preset(parameters: Json) -> str:
    """The preset that differs least, with its changes."""
    changes = {
        name: [
            f"{key} = {_value(parameters[key])}"
            for key, value in dataclasses.asdict(settings).items()
            if key in parameters and parameters[key] != value
        ]
        for name, settings in PRESETS.items()
    }
    name = min(changes, key=lambda x: len(changes[x]))
    asked = [f"{key} = {_value(parameters[key])}" for key in ("experts", "top_k")]
    return f"the preset {name!r} with {', '.join(asked + changes[name])}"


def _value(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
