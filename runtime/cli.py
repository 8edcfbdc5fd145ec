"""From a typed dataclass to a command line, and from an exception to one line and an exit code."""

from __future__ import annotations

import io
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_type_hints

import tyro
from tqdm import tqdm

from runtime.interrupts import raise_from_now_on
from runtime.seeds import LARGEST_SEED

Settings = TypeVar("Settings")
Item = TypeVar("Item")
Seed = Annotated[int, tyro.conf.arg(metavar=f"0..{LARGEST_SEED}")]  # run_script checks every setting called seed

# (flag of an earlier version, its name now): an old flag is refused in a script that has the new one
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
    ("--checkpoint", "--model"),
    ("--solver", "--sampler"),
    ("--embeddings", "--features"),
    ("--judge", "--mnistm-classifier"),
    ("--output", "--record"),
)

WAIT_FOR_MAIN = 20.0  # seconds
CONNECTION_LOST = re.compile("gloo|NCCL|[Cc]onnection (closed|reset)|[Bb]roken pipe")


class BadInput(Exception):
    """An error that the user can correct: the message names the file, row or flag, the value, and what to do."""


def check_positive(settings: object, *names: str) -> None:
    """Raise BadInput for the first of these settings that is not a finite number above zero."""
    _require(settings, names, lambda value: 0 < value < math.inf, "must be above zero")


def check_not_negative(settings: object, *names: str) -> None:
    """Raise BadInput for the first of these settings that is not a finite number from zero on."""
    _require(settings, names, lambda value: 0 <= value < math.inf, "give zero or more")


def check_fractions(settings: object, *names: str) -> None:
    """Raise BadInput for the first of these settings that lies outside of 0 .. 1; None is allowed."""
    _require(settings, names, lambda value: value is None or 0 <= value <= 1, "must lie in 0 .. 1")


def check_seed(seed: int, flag: str = "--seed") -> int:
    """Return the seed; raise BadInput outside of the 32 bits by which torch's CPU generator draws: wider ones repeat its noise."""
    if not 0 <= seed <= LARGEST_SEED:
        raise BadInput(f"{flag} {seed}: a seed has 32 bits, give 0 .. {LARGEST_SEED}")
    return seed


def _require(settings: object, names: Iterable[str], valid: Callable[[Any], bool], advice: str) -> None:
    for name in names:
        if not valid(value := getattr(settings, name)):
            raise BadInput(f"--{name.replace('_', '-')} {value}: {advice}")


def run_script(main: Callable[[Settings], None], settings: type[Settings], description: str | None) -> NoReturn:
    """Parse `settings` from the command line, run `main` on it and exit: 0 done, 2 bad input, 130 interrupted.

    Of several processes only the first one reports an error that all of them have.
    """
    raise_from_now_on()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks ends no finished run
        sys.stdout.reconfigure(errors="backslashreplace")
    message, code = _outcome(main, settings, description)
    if code == 2 and not is_main_process():
        time.sleep(WAIT_FOR_MAIN)  # the launcher ends this process once the main one has reported the same error
        message = message and f"process {os.environ['RANK']}: {message}"
    # the exception is gone by now, and with it any unfinished progress bar, which would share the message's line
    if message and (code == 2 or is_main_process()):
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _outcome(main: Callable[[Settings], None], settings: type[Settings], description: str | None) -> tuple[str, int]:
    """Return the error message and the exit code."""
    try:
        refuse_renamed_flags(sys.argv[1:], settings)
        refuse_files_called_none(sys.argv[1:])
        try:
            with nullcontext() if is_main_process() else redirect_stderr(io.StringIO()):
                options = tyro.cli(settings, description=description, config=(tyro.conf.OmitArgPrefixes,))
        except SystemExit as stop:  # tyro has printed its message, or the help
            return "", int(stop.code or 0)
        for flag in ("seed", "seeds"):
            value = getattr(options, flag, ())
            for seed in value if isinstance(value, tuple) else (value,):
                if isinstance(seed, int):
                    check_seed(seed, f"--{flag}")
        main(options)
    except BadInput as error:
        return str(error), 2
    except OSError as error:  # disk full, no permission, no such file: the system's own words are clear
        if os.environ.get("DEBUG"):
            raise
        return str(error), 2
    except RuntimeError as error:  # torch.distributed's, when another process ended: that one reports why
        if os.environ.get("WORLD_SIZE", "1") == "1" or not CONNECTION_LOST.search(str(error)):
            raise
        time.sleep(WAIT_FOR_MAIN)
        return "another process of this run ended", 2
    except KeyboardInterrupt:
        return "interrupted", 130
    return "", 0


def refuse_renamed_flags(arguments: Sequence[str], settings: Any) -> None:
    """Raise BadInput for a flag that has another name in this version, with that name."""
    names = flags_of(settings)
    for old, new in RENAMED:
        used = any(argument.split("=")[0].replace("_", "-") == old for argument in arguments)
        if used and new in names and old not in names:
            raise BadInput(f"{old} is now {new}")


def refuse_files_called_none(arguments: Sequence[str]) -> None:
    """Raise BadInput for the value None where a file or folder has that name: the flag would be read as not set."""
    if os.path.lexists("None") and any(argument.split("=")[-1] == "None" for argument in arguments):
        raise BadInput("None means that a flag is not set; name the file or folder called None as ./None")


def flags_of(settings: Any) -> set[str]:
    """Return the flags of a settings dataclass, of the dataclasses inside it, and of every subcommand of a union."""
    if not (isinstance(settings, type) and is_dataclass(settings)):
        return set().union(*map(flags_of, get_args(settings)))
    hints = get_type_hints(settings, include_extras=True)
    own = {f"--{field.name.replace('_', '-')}" for field in fields(settings)}
    for hint in hints.values():
        own.update(*(getattr(extra, "aliases", None) or () for extra in getattr(hint, "__metadata__", ())))
    return own.union(*(flags_of(hints[field.name]) for field in fields(settings)))


def default_hint(text: str) -> Any:
    """Return the annotation for a flag whose help shows `text` as its default, in the place of None."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


def is_main_process() -> bool:
    """Return whether this is the only process, or the first that torchrun or accelerate launch started: only it prints."""
    return os.environ.get("RANK", "0") == "0"


def log(message: str) -> None:
    """Print one line to stderr, from the main process only; stdout holds results."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[Item] | None, title: str, **options: object) -> tqdm[Item]:
    """Return a progress bar on stderr; in a log file it is printed every 20 seconds at most. `options` are tqdm's."""
    interval = 0.1 if sys.stderr.isatty() else 20.0
    options |= {"mininterval": interval, "dynamic_ncols": True, "disable": not is_main_process()}
    return tqdm(items, title, **options)


def progress_bar(total: int, title: str, unit: str = "img") -> tqdm[NoReturn]:
    """Return a progress bar that its user advances by `update`; it vanishes at its end."""
    return progress(None, title, total=total, unit=unit, leave=False)
