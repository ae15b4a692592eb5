"""What ``benchmarks.methods`` finds, and its tables as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MIX = "mix"
BEGIN = "<!-- tables: written by python -m benchmarks.methods --table -->"
END = "<!-- end of tables -->"


@dataclass(frozen=True)
class Row:
    """One plan on the rows of one task."""

    model: str
    """``specialised`` or ``generalist``."""
    calibrated: str
    """The task whose train rows the plan is made from, or ``mix``."""
    task: str
    method: str
    experts: int
    top_k: int
    seed: int
    dev: float
    test: float
    extra_bytes: int
    """Of what a plan keeps beside as many experts as any other: gate rows, constants."""
    seconds: float
    """CPU seconds to make the plan."""
    failure: str = ""


def tables(rows: Sequence[Row]) -> str:
    """Mean test scores in per cent, one table per model and kind of calibration."""
    parts = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        full = [row for row in mine if row.method == "full"]
        for title, chosen in (
            ("each task by its own rows", [x for x in mine if x.calibrated == x.task]),
            ("all tasks by mixed rows", [x for x in mine if x.calibrated == MIX and x.task]),
        ):
            failed = [x for x in mine if x.failure and (x.calibrated == MIX) == ("mixed" in title)]
            if chosen:
                parts.append(f"### {model.capitalize()} model, {title}\n")
                parts.append(_table([*full, *chosen], failed))
    return "\n".join(parts)


def write_tables(rows: Sequence[Row], page: Path) -> None:
    """Put the tables between the marks of a page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: found no {BEGIN!r} and {END!r} after it")
    page.write_text(f"{before}{BEGIN}\n\n{tables(rows)}\n{END}{after}")


def _table(rows: Sequence[Row], failed: Sequence[Row]) -> str:
    tasks = sorted({row.task for row in rows})
    lines = [f"| experts | method | {' | '.join(tasks)} | mean | extra bytes | CPU s |"]
    lines.append("|---" * (len(tasks) + 5) + "|")
    budgets = dict.fromkeys((row.experts, row.top_k) for row in rows)
    for experts, top_k in budgets:
        of_budget = [row for row in rows if (row.experts, row.top_k) == (experts, top_k)]
        for method in _best_first(of_budget):
            mine = [row for row in of_budget if row.method == method]
            cells = [_cell([row for row in mine if row.task == task]) for task in tasks]
            # Of some tasks only it would not compare with the others'.
            complete = {row.task for row in mine} == set(tasks)
            mean = f"{statistics.mean(100 * row.test for row in mine):.1f}" if complete else ""
            extra = max(row.extra_bytes for row in mine)
            seconds = statistics.median(row.seconds for row in mine)
            lines.append(
                f"| {experts}, top-{top_k} | {method} | {' | '.join(cells)} | {mean} | "
                f"{extra:,} | {seconds:.1f} |"
            )
    reasons = dict.fromkeys(
        f"- {row.method}, {row.experts} experts, top-{row.top_k}: {row.failure}" for row in failed
    )
    return "\n".join([*lines, "", *reasons, ""])


def _best_first(rows: Iterable[Row]) -> list[str]:
    tests: dict[str, list[float]] = {}
    for row in rows:
        tests.setdefault(row.method, []).append(row.test)
    return sorted(tests, key=lambda method: (-statistics.mean(tests[method]), method))


def _cell(rows: Sequence[Row]) -> str:
    """Mean over the seeds and, where there are several, standard deviation."""
    values = [100 * row.test for row in rows]
    if not values:
        return ""
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.1f}"
