"""SIGINT and SIGTERM stop a training after the current step, with its checkpoint written."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from runtime.cli import log


class StopSignals:
    """`with StopSignals() as stop: ... if stop.asked: save and leave`. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopSignals:
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_stopped(step: int, checkpoint: Path) -> NoReturn:
    """Says from where a stopped training goes on, and ends with exit code 130."""
    log(f"stopped at step {step:,}; the same command goes on from {checkpoint}")
    raise SystemExit(130)
