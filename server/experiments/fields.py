"""Reading the fields of a JSON object: what is missing, mistyped or unknown is named."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from liveprune.pruning.errors import ExperimentError


class Fields:
    """A JSON object whose fields are taken one by one; ``done`` refuses those left over."""

    def __init__(self, form: object, where: str) -> None:
        """``where`` begins every message.

        Raises:
            ExperimentError: ``form`` is not an object with text keys.
        """
        if not isinstance(form, Mapping) or not all(isinstance(key, str) for key in form):
            raise ExperimentError(f"{where}: found {form!r:.80}, expected an object")
        self.where = where
        self._left: dict[str, Any] = dict(form)
        self._known: list[str] = []

    def names(self) -> list[str]:
        """Of the fields that nobody took yet."""
        return list(self._left)

    def any(self, name: str, default: Any = None) -> Any:
        self._known.append(name)
        return self._left.pop(name, default)

    def text(self, name: str, default: str | None = None) -> str:
        value = self.any(name, default)
        if not isinstance(value, str) or not value:
            raise self.error(name, value, "a text that is not empty")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.any(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def number(
        self,
        name: str,
        default: float | None = None,
        *,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> float:
        """A finite number in [low, high]."""
        value = self.any(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not low <= value <= high
        ):
            raise self.error(name, value, f"a number{_range(low, high)}")
        return value

    def count(self, name: str, default: int | None = None, *, low: int = 0) -> int:
        """A whole number of at least ``low``."""
        value = self.any(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.error(name, value, f"a whole number of at least {low}")
        return value

    def items(self, name: str, default: Collection[Any] | None = None) -> list[Any]:
        value = self.any(name, default)
        if not isinstance(value, list | tuple):
            raise self.error(name, value, "a list")
        return list(value)

    def error(self, name: str, found: object, expected: str) -> ExperimentError:
        return ExperimentError(f"{self.where}: {name}: found {found!r:.80}, expected {expected}")

    def done(self) -> None:
        """Refuse fields that nobody took: a misspelt one must not be ignored.

        Raises:
            ExperimentError: names them and the known ones.
        """
        if self._left:
            raise ExperimentError(
                f"{self.where}: found the unknown field {', '.join(sorted(self._left))}, "
                f"expected some of {', '.join(self._known)}"
            )


def _range(low: float, high: float) -> str:
    if math.isinf(high):
        return "" if math.isinf(low) else f" of at least {low:g}"
    return f" of at most {high:g}" if math.isinf(low) else f" from {low:g} to {high:g}"
