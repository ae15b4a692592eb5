"""Refuse to start where vLLM is not the one that the patches were written for.

Each patched function is named here with its parameters. A vLLM whose version or signatures differ
is refused at start with a clear message: a silent mismatch would serve wrong answers.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from liveprune.pruning.errors import IncompatibleEnvironmentError

SUPPORTED = "0.32."
"""Prefix of the vLLM versions that the patches fit."""


@dataclass(frozen=True)
class Seam:
    """One patched function of vLLM, with the parameter names it had when the patch was written."""

    module: str
    qualname: str
    parameters: tuple[str, ...]

    def resolve(self) -> Any:
        """Return the function as it is now."""
        target: Any = importlib.import_module(self.module)
        for name in self.qualname.split("."):
            target = getattr(target, name)
        return target

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}"


def check_version(version: str) -> None:
    """Raise IncompatibleEnvironmentError unless ``version`` is one the patches were written for."""
    if not version.startswith(SUPPORTED):
        raise IncompatibleEnvironmentError(
            f"vLLM {version} is installed; this release of Liveprune patches vLLM {SUPPORTED}* "
            f"(install it, or uninstall liveprune to use this vLLM alone)"
        )


def check_seam(seam: Seam) -> None:
    """Raise IncompatibleEnvironmentError if the function is gone or takes other parameters."""
    try:
        function = seam.resolve()
    except (ImportError, AttributeError) as error:
        raise IncompatibleEnvironmentError(f"{seam}: not found in this vLLM: {error}") from error
    found = tuple(inspect.signature(inspect.unwrap(function)).parameters)
    if found != seam.parameters:
        raise IncompatibleEnvironmentError(
            f"{seam}: found the parameters {found}, expected {seam.parameters}"
        )
