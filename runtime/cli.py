"""From a typed dataclass to a command line, and from an exception to one line and an exit code."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar

import tyro
from tqdm import tqdm

Settings = TypeVar("Settings")
Item = TypeVar("Item")


class BadInput(Exception):
    """Something the user can put right: the message names the file, row or flag, the value, and what to do."""


def require_positive(settings: object, *names: str) -> None:
    """Raises BadInput for the first of these settings that is not above zero."""
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be above zero")


def require_shares(settings: object, *names: str) -> None:
    """Raises BadInput for the first of these settings that lies outside of 0 .. 1; None is fine."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 <= value <= 1:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must lie in 0 .. 1")


def run_script(main: Callable[[Settings], None], settings: type[Settings], description: str | None) -> NoReturn:
    """Reads `settings` from the command line, runs `main` on it and exits: 0 done, 2 bad input, 130 interrupted."""
    try:
        values = tyro.cli(settings, description=description, config=(tyro.conf.OmitArgPrefixes,))
        main(values)
    except BadInput as error:
        _fail(str(error), 2)
    except OSError as error:  # disk full, no permission, no such file: the system's own words are clear
        if os.environ.get("DEBUG"):
            raise
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def leads() -> bool:
    """Whether this is the only process, or the first of those that torchrun or accelerate launch started: it speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def note(message: str) -> None:
    """One line for the reader, on stderr beside the progress bars, so that stdout holds results only."""
    if leads():
        print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[Item], title: str, **options: object) -> tqdm[Item]:
    """A progress bar on stderr, drawn rarely where nobody watches (a log file)."""
    interval = 0.1 if sys.stderr.isatty() else 20.0
    return tqdm(items, title, mininterval=interval, dynamic_ncols=True, disable=not leads(), **options)
