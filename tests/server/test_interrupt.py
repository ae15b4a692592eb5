from __future__ import annotations

import os
import signal

import pytest

from liveprune.server.interrupt import stop_on_interrupt


def test_the_first_interrupt_asks_to_stop_and_the_second_interrupts() -> None:
    with stop_on_interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
