"""What every test of the server begins with."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def logging_as_new() -> None:
    """Libraries that were used by tests before leave the global state of logging changed."""
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("liveprune", *logging.root.manager.loggerDict):
        if name.partition(".")[0] == "liveprune":
            logger = logging.getLogger(name)
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)
