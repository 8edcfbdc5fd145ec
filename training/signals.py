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
    """Yield the signals received so far: empty = go on, else save and leave. A second SIGINT interrupts at once.

    Under torchrun it doesn't: torchrun passes on the SIGINT that the terminal has sent to this process already.
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
