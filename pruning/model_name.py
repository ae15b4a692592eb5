"""How people know a model: a name that means the same on another machine."""

from __future__ import annotations

from pathlib import Path

_HUB_CACHE = "models--"
"""The hub's cache keeps ORG/NAME in a folder models--ORG--NAME/snapshots/REVISION."""


def model_name(model: str | Path) -> str:
    """Cut a path down to a name: the hub's ORG/NAME where the path has it, else the folder's.

    A relative name with at most one slash is taken for a hub name and returned as it is.
    """
    path = Path(model)
    if isinstance(model, str) and not path.is_absolute() and len(path.parts) <= 2:
        return model
    for part in path.absolute().parts:
        if part.startswith(_HUB_CACHE):
            return part.removeprefix(_HUB_CACHE).replace("--", "/")
    return path.absolute().name
