"""The first import of every script: Ctrl-C during its imports, which take seconds, ends it with one line, not a traceback."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType

# what ends a job on a cluster; SLURM sends SIGUSR1 some time before it ends the job (slurm/); Windows has no SIGUSR1
STOP_SIGNALS = tuple(number for number in signal.Signals if number.name in ("SIGTERM", "SIGUSR1"))


def end(_: int, __: FrameType | None) -> None:
    """Exit at once with code 130, since nothing is open yet. Of several processes only the first one prints."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"error: interrupted\n")
    os._exit(130)


def raise_from_now_on() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, so that `finally` blocks run; in a single process, SIGTERM and SIGUSR1 too.

    With several processes SIGTERM still ends one at once: after a failure the launcher sends it to all that are left.
    """
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for number in STOP_SIGNALS:
        if _is_ours and alone and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, partial(_raise, os.getpid()))


def _raise(process: int, number: int, frame: FrameType | None) -> None:
    if os.getpid() != process:  # a worker that inherited this handler: its pool ends it by SIGTERM
        os._exit(128 + number)
    signal.default_int_handler(number, frame)


# only in a process that runs one of this repository's scripts, not where a test imports one
_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
_is_ours = Path(__file__).resolve().parents[1] in _script.parents[:2]
if _is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
