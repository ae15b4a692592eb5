from __future__ import annotations

from pathlib import Path

import pytest

from liveprune.pruning.errors import IncompatibleEnvironmentError
from liveprune.server.served_model import ServedModel, free_port


def test_a_server_that_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    with (
        ServedModel(tmp_path / "none", log=tmp_path / "log", name="gone") as server,
        pytest.raises(IncompatibleEnvironmentError, match="gone: the server ended with status"),
    ):
        server.wait_ready()
    assert server.stop() != 0
    assert "none" in server.log_tail()


def test_no_answer_in_time_is_reported(tmp_path: Path) -> None:
    with (
        ServedModel(tmp_path / "none", log=tmp_path / "log") as server,
        pytest.raises(IncompatibleEnvironmentError, match=r"no answer on http://127\.0\.0\.1"),
    ):
        server.wait_ready(timeout=0)


def test_a_free_port_is_a_port() -> None:
    assert 1024 < free_port() < 65536
