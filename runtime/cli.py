"""From a typed dataclass to a command line, and from an exception to one line and an exit code."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import tyro
from tqdm import tqdm

Settings = TypeVar("Settings")
Item = TypeVar("Item")


# flags of earlier versions -> today's; an old one is refused in a script that has the new one
RENAMED = (
    ("--rescale", "--guidance-rescale"),
    ("--rescale", "--to-uint8"),
    ("--clip", "--max-grad-norm"),
    ("--most-weight", "--max-loss-weight"),
    ("--blur", "--embedding-noise"),
    ("--keep-norm", "--max-norm"),
    ("--told", "--captions"),
    ("--least", "--min-size"),
    ("--contain", "--background-steps"),
    ("--mnistm-judge", "--mnistm-classifier"),
    ("--svhn-judge", "--svhn-classifier"),
    ("--judge", "--mnistm-classifier"),
    ("--output", "--record"),
)


class BadInput(Exception):
    """Something the user can put right: the message names the file, row or flag, the value, and what to do."""


def check_positive(settings: object, *names: str) -> None:
    """Raises BadInput for the first of these settings that is no finite number above zero."""
    _require(settings, names, lambda value: 0 < value < math.inf, "must be above zero")


def check_not_negative(settings: object, *names: str) -> None:
    """Raises BadInput for the first of these settings that is no finite number from zero on."""
    _require(settings, names, lambda value: 0 <= value < math.inf, "give zero or more")


def check_fractions(settings: object, *names: str) -> None:
    """Raises BadInput for the first of these settings that lies outside of 0 .. 1; None is fine."""
    _require(settings, names, lambda value: value is None or 0 <= value <= 1, "must lie in 0 .. 1")


def _require(settings: object, names: Iterable[str], fine: Callable[[Any], bool], wanted: str) -> None:
    for name in names:
        if not fine(value := getattr(settings, name)):
            raise BadInput(f"--{name.replace('_', '-')} {value}: {wanted}")


def run_script(main: Callable[[Settings], None], settings: type[Settings], description: str | None) -> NoReturn:
    """Reads `settings` from the command line, runs `main` on it and exits: 0 done, 2 bad input, 130 interrupted."""
    message, code = _outcome(main, settings, description)
    # the exception is gone by now, and with it the progress bars that it broke off: the message has a line of its own
    if code:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _outcome(main: Callable[[Settings], None], settings: type[Settings], description: str | None) -> tuple[str, int]:
    """What went wrong, and the exit code."""
    try:
        refuse_renamed_flags(sys.argv[1:], settings)
        main(tyro.cli(settings, description=description, config=(tyro.conf.OmitArgPrefixes,)))
    except BadInput as error:
        return str(error), 2
    except OSError as error:  # disk full, no permission, no such file: the system's own words are clear
        if os.environ.get("DEBUG"):
            raise
        return str(error), 2
    except KeyboardInterrupt:
        return "interrupted", 130
    return "", 0


def refuse_renamed_flags(arguments: Sequence[str], settings: Any) -> None:
    """Raise BadInput for a flag that has another name in this version, with that name."""
    names = flags_of(settings)
    for old, new in RENAMED:
        given = any(argument.split("=")[0].replace("_", "-") == old for argument in arguments)
        if given and new in names and old not in names:
            raise BadInput(f"{old} is now {new}")


def flags_of(settings: Any) -> set[str]:
    """Return the flags of a settings dataclass, of the dataclasses inside it, and of every subcommand of a union."""
    if not is_dataclass(settings):
        return set().union(*map(flags_of, get_args(settings)))
    hints = get_type_hints(settings)
    own = {f"--{field.name.replace('_', '-')}" for field in fields(settings)}
    return own.union(*(flags_of(hints[field.name]) for field in fields(settings)))


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun or accelerate launch started: it speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def log(message: str) -> None:
    """One line for the reader, on stderr beside the progress bars, so that stdout holds results only."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[Item] | None, title: str, **options: object) -> tqdm[Item]:
    """Return a progress bar on stderr; in a log file it is drawn every 20 seconds at most. `options` are tqdm's."""
    interval = 0.1 if sys.stderr.isatty() else 20.0
    options |= {"mininterval": interval, "dynamic_ncols": True, "disable": not is_main_process()}
    return tqdm(items, title, **options)


def progress_bar(total: int, title: str, unit: str = "img") -> tqdm[NoReturn]:
    """Return a progress bar that its user advances by `update`; it vanishes at its end."""
    return progress(None, title, total=total, unit=unit, leave=False)
