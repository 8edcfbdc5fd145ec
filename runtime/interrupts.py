"""The first import of every script: Ctrl-C during the imports, which take seconds, ends it in one line and not in a traceback."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType

# what ends a job on a cluster; SLURM sends SIGUSR1 some time before its own end (slurm/), and Windows has none
STOP_SIGNALS = tuple(number for number in signal.Signals if number.name in ("SIGTERM", "SIGUSR1"))


def end(_: int, __: FrameType | None) -> None:
    """Leave at once with exit code 130; nothing is open yet. Of several processes the first one prints."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"error: interrupted\n")
    os._exit(130)


def raise_from_now_on() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, and SIGTERM and SIGUSR1 too: it cleans up after the work, such as a hidden folder.

    Of several processes the launcher ends those that are left by SIGTERM, which must not wait for another's share.
    """
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for number in STOP_SIGNALS:
        if _is_ours and alone and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, partial(_raise, os.getpid()))


def _raise(process: int, number: int, frame: FrameType | None) -> None:
    if os.getpid() != process:  # a worker that inherited this: its pool ends it so
        os._exit(128 + number)
    signal.default_int_handler(number, frame)


# only in a process that runs one of this repository's scripts, not where a test imports one
_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
_is_ours = Path(__file__).resolve().parents[1] in _script.parents[:2]
if _is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
