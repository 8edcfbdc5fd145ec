"""SIGINT, SIGTERM and SIGUSR1 stop a training after the current step, with its checkpoint written."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from runtime.interrupts import STOP_SIGNALS


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 in the yielded list, instead of ending the process.

    The caller saves and stops once the list is not empty. A further SIGINT raises KeyboardInterrupt.
    Under torchrun it does not: torchrun sends a copy of the SIGINT that the terminal has sent to this process.
    """
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        if received and number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, *STOP_SIGNALS)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
