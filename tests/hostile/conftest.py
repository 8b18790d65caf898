"""Every case here ends by itself, or its test fails after some seconds."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

MOST_SECONDS = 180  # a case takes milliseconds, and the first one that loads a model seconds


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TimeoutError("the case hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
