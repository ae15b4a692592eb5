"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"
_SPACE = "\N{NO-BREAK SPACE}"


def decimals_for(intervals: Iterable[Mapping[str, Any]]) -> int:
    """Decimals of per cents that show the narrowest of the intervals (``low`` and ``high``)."""
    widths = [100 * (x["high"] - x["low"]) for x in intervals if x["low"] is not None]
    narrowest = min((x for x in widths if x > 0), default=1.0)
    return 1 if narrowest >= 1 else 2 if narrowest >= 0.1 else 3


def fixed(value: float, decimals: int, *, signed: bool = False) -> str:
    """With a real minus sign, and none at all before a rounded 0."""
    text = f"{abs(value):,.{decimals}f}"
    if not text.strip("0.,"):
        return text
    return (MINUS if value < 0 else "+" if signed else "") + text


def percent(value: float, decimals: int) -> str:
    """A part of 1 in per cent."""
    return f"{fixed(100 * value, decimals)}{_SPACE}%"


def points(value: float, decimals: int) -> str:
    """A difference of parts of 1 in percentage points."""
    return f"{fixed(100 * value, decimals, signed=True)}{_SPACE}points"


def between(interval: Mapping[str, Any], decimals: int, *, signed: bool = False) -> str:
    """The ends of an interval, in per cent without the sign."""
    low, high = (fixed(100 * interval[x], decimals, signed=signed) for x in ("low", "high"))
    return f"{low} to {high}"


def count(number: int, thing: str = "", things: str = "") -> str:
    """``1 row``, ``2 rows``; ``things`` is the plural where it is irregular."""
    name = thing if number == 1 else things or f"{thing}s"
    return f"{number:,}{_SPACE}{name}" if thing else f"{number:,}"


def significant(value: float) -> str:
    """Three significant digits, whole numbers in full."""
    return fixed(value, max(0, 2 - _magnitude(value)))


def size(number: int) -> str:
    """Bytes in decimal units, as memory and disks are sold."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if number >= 10**power:
            return f"{significant(number / 10**power)}{_SPACE}{unit}"
    return f"{number}{_SPACE}B"


def times(value: float) -> str:
    """A ratio, with the sign of multiplication."""
    return f"{fixed(value, 2)}\N{MULTIPLICATION SIGN}"


def seconds(value: float) -> str:
    """In the two largest units."""
    whole = round(value)
    if whole < 60:
        return f"{significant(value)}{_SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{_SPACE}min {whole % 60}{_SPACE}s"
    return f"{whole // 3600:,}{_SPACE}h {whole % 3600 // 60}{_SPACE}min"


def runs(numbers: Sequence[int], most: int | None = None) -> str:
    """Ascending numbers, of runs the ends; after ``most`` parts the rest is counted."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    shown = parts[:most]
    text = ", ".join(
        f"{x[0]}\N{EN DASH}{x[-1]}" if len(x) > 2 else ", ".join(map(str, x)) for x in shown
    )
    left = len(numbers) - sum(map(len, shown))
    return f"{text} and {left} more" if left else text


def span(numbers: Iterable[int]) -> str:
    """``2``, or ``2 to 6`` where they differ."""
    found = list(numbers)
    low, high = min(found), max(found)
    return str(low) if low == high else f"{low} to {high}"


def _magnitude(value: float) -> int:
    """Power of ten of the first digit, after rounding to three."""
    return int(f"{value:.2e}".partition("e")[2])
