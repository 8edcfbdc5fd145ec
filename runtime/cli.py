"""Command lines from typed dataclasses, and exceptions as one line with an exit code."""

from __future__ import annotations

import difflib
import io
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_type_hints

import tyro
from tqdm import tqdm

from runtime.interrupts import raise_from_now_on
from runtime.seeds import LARGEST_SEED

Settings = TypeVar("Settings")
Item = TypeVar("Item")
Seed = Annotated[int, tyro.conf.arg(metavar=f"0..{LARGEST_SEED}")]  # run_script checks every setting called seed

# (flag of an earlier version, its present name): the old flag is refused in a script that has the present one
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
    ("--precision", "--precisions"),
)

# (pattern of a message in tyro's frame, our message)
PARSER_MESSAGES = (
    (r"^Missing value for argument '(.*)'\..*", r"\1: its value is missing"),
    (r"^Unrecognized options: ([^,]*).*", r"\1: no flag takes this value"),
    (r"^Unrecognized or misplaced options: (\S+) \(applied to (.*?)\).*", r"\1: \2 has no such flag"),
)
HINTS = ("For full", "Argument help", "Arguments similar", "Perhaps")  # rows that begin tyro's hints
WAIT_FOR_MAIN = 20.0  # seconds
LIKE = "--like"
LIKE_HELP = f"{LIKE} RECORD takes a record.json's settings; flags win."
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
    """Return the seed; raise BadInput outside of 0 .. 2^32 - 1, since torch's CPU generator ignores all higher bits."""
    if not 0 <= seed <= LARGEST_SEED:
        raise BadInput(f"{flag} {seed}: a seed has 32 bits, give 0 .. {LARGEST_SEED}")
    return seed


def _check_seeds(settings: object) -> None:
    for name in ("seed", "seeds"):
        value = getattr(settings, name, ())
        for seed in value if isinstance(value, tuple) else (value,):
            if isinstance(seed, int):
                check_seed(seed, f"--{name}")


def _require(settings: object, names: Iterable[str], valid: Callable[[Any], bool], advice: str) -> None:
    for name in names:
        if not valid(value := getattr(settings, name)):
            raise BadInput(f"--{name.replace('_', '-')} {value}: {advice}")


def run_script(main: Callable[[Settings], None], settings: type[Settings], description: str | None) -> NoReturn:
    """Parse `settings` from the command line, run `main` on it and exit: 0 done, 2 bad input, 130 interrupted.

    Of several processes only the first one reports an error that all of them have.
    """
    raise_from_now_on()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal's encoding lacks must not end a run
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
    """Parse the command line and run the script; return its error message ("" = none) and its exit code.

    The codes are those of `run_script`. Errors that the user can't correct are raised. With DEBUG set, system errors are raised too.
    """
    try:
        arguments, like = split_like(sys.argv[1:])
        refuse_renamed_flags(arguments, settings)
        refuse_files_called_none(arguments)
        default = None
        if like:
            from runtime.like import settings_like  # imports torch

            default = settings_like(settings, like)
        try:
            options = _parse(settings, f"{description or ''}\n\n{LIKE_HELP}", arguments, default)
        except SystemExit:  # tyro has printed the help
            return "", 0
        if default is not None and type(options) is not type(default):
            raise BadInput(
                f"{LIKE} {like} is a record of another subcommand, with the settings of {type(default).__name__}"
            )
        refuse_empty_paths(options, arguments)
        if default is None:  # with --like, a flag without values empties the record's list
            refuse_empty_lists(options, arguments)
        _check_seeds(options)
        main(options)
    except BadInput as error:
        return str(error), 2
    except OSError as error:  # disk full, no permission, no such file: the system's own words are clear
        if os.environ.get("DEBUG"):
            raise
        return str(error), 2
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("Symlink loop"):  # of Path.resolve
            return (
                f"{str(error).removeprefix('Symlink loop from ')} is a link that leads to itself: name another place",
                2,
            )
        from runtime.batches import is_out_of_memory, is_overflow  # which import torch

        if (is_out_of_memory(error) or is_overflow(error)) and not os.environ.get("DEBUG"):
            return (
                f"out of memory: give a smaller --batch, fewer or smaller pictures ({(str(error) or 'Python').splitlines()[0][:200]})",
                2,
            )
        if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc") and not os.environ.get("DEBUG"):
            return f"torch.compile fails for this network ({str(error).strip().splitlines()[0]}): give --compile off", 2
        if os.environ.get("WORLD_SIZE", "1") == "1" or not CONNECTION_LOST.search(str(error)):
            raise
        time.sleep(WAIT_FOR_MAIN)  # torch.distributed's error after another process ended, which reports why
        return "another process of this run ended", 2
    except KeyboardInterrupt:
        return "interrupted", 130
    return "", 0


def split_like(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return the arguments without --like RECORD, and RECORD or None. Raise BadInput for --like without a file."""
    others, record = [], None
    words = iter(arguments)
    for word in words:
        flag, _, value = word.partition("=")
        if flag != LIKE:
            others.append(word)
        elif not (value := value or next(words, "")) or value.startswith("--"):
            raise BadInput(f"{LIKE}: its value is missing, name the record.json of a run")
        else:
            record = Path(value)
    return others, record


def _parse(settings: type[Settings], description: str, arguments: Sequence[str], default: Settings | None) -> Settings:
    """Return the settings from the command line; raise BadInput for bad flags, SystemExit once the help is printed.

    `default` holds the settings of --like; None = the script's own.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    box, silent = io.StringIO(), nullcontext() if is_main_process() else redirect_stdout(io.StringIO())
    try:
        with redirect_stderr(box), silent, _wide(not {"-h", "--help"} & set(sys.argv)):
            config = (tyro.conf.OmitArgPrefixes,)
            parsed: Settings = tyro.cli(settings, args=arguments, description=description, config=config, **options)
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
    raise BadInput(_refusal(box.getvalue(), arguments, flags_of(settings) | {LIKE}))


@contextmanager
def _wide(active: bool) -> Iterator[None]:
    """Make tyro write its messages in one line each, if `active`."""
    before = os.environ.get("COLUMNS")
    if active:
        os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        if active:
            os.environ.pop("COLUMNS")
            os.environ.update({} if before is None else {"COLUMNS": before})


def _refusal(box: str, arguments: Sequence[str], flags: set[str]) -> str:
    """Return tyro's framed message as one line: the flag, the value, and the choices, the type or the closest flag."""
    rows = [row.strip(" │") for row in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()]
    rows = [row for row in rows if row and not re.fullmatch("[╭╰]?[─-]{5,}╯?", row)][1:]  # the first is the title
    text = " ".join(itertools.takewhile(lambda row: not row.startswith(HINTS), rows))

    possible = flags | {flag.replace("--", "--no-", 1) for flag in flags}
    names = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    if unknown := next((name for name in names if name.replace("_", "-") not in possible), ""):
        closest = difflib.get_close_matches(unknown, sorted(flags), 1)
        return f"{unknown}: there is no such flag" + (f", the closest is {closest[0]}" if closest else "")
    if commands := re.search("Available subcommands: (.*)", text):
        return f"{arguments[0]}: name a command first, one of {commands[1]}"
    if choice := re.match(r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)", text):
        return f"{choice[2]} {choice[1]}: choose one of {choice[3]}".replace("'", "")
    if (value := re.match(r"Error parsing (\S+): ", text)) and "Argument helptext:" in rows:
        kind = rows[rows.index("Argument helptext:") + 1].removeprefix(value[1]).strip()
        for name, words in (("{None}|", "None or "), ("INT", "a whole number"), ("FLOAT", "a number")):
            kind = kind.replace(name, words)
        return f"{value[1]} {_value(value[1], arguments)}: must be {kind}"
    for pattern, message in PARSER_MESSAGES:
        text = re.sub(pattern, message, text)
    return text


def _value(flag: str, arguments: Sequence[str]) -> str:
    """Return the words between the last occurrence of a flag and the next flag; "" if there are none."""
    words = [
        word for argument in arguments for word in (argument.split("=", 1) if argument[:2] == "--" else [argument])
    ]
    starts = [index for index, word in enumerate(words) if word.replace("_", "-") == flag]
    return " ".join(itertools.takewhile(lambda word: word[:2] != "--", words[starts[-1] + 1 :])) if starts else ""


def refuse_renamed_flags(arguments: Sequence[str], settings: Any) -> None:
    """Raise BadInput for a flag of an earlier version, with its present name."""
    names, used = flags_of(settings), _names(arguments)
    for old, new in RENAMED:
        if old in used and new in names and old not in names:
            raise BadInput(f"{old} is now {new}")


def refuse_files_called_none(arguments: Sequence[str]) -> None:
    """Raise BadInput if a value is None and a file or folder called None exists: tyro would read the flag as not set."""
    if os.path.lexists("None") and any(argument.split("=")[-1] == "None" for argument in arguments):
        raise BadInput("None means that a flag is not set; name the file or folder called None as ./None")


def refuse_empty_paths(settings: Any, arguments: Sequence[str]) -> None:
    """Raise BadInput for a path given as "", such as from an unset shell variable: it would mean the current folder."""
    for field in fields(settings):
        flag = f"--{field.name.replace('_', '-')}"
        if getattr(settings, field.name) == Path() and flag in _names(arguments) and not _value(flag, arguments):
            raise BadInput(f"{flag} is empty: name a file or folder (. for the current one)")


def refuse_empty_lists(settings: Any, arguments: Sequence[str]) -> None:
    """Raise BadInput for a list flag given without values whose default is empty: it would have no effect."""
    for field in fields(settings):
        flag = f"--{field.name.replace('_', '-')}"
        if field.default == getattr(settings, field.name) == () and flag in _names(arguments):
            raise BadInput(f"{flag}: its value is missing")


def _names(arguments: Sequence[str]) -> list[str]:
    """Return the flags on the command line, without their values."""
    return [argument.split("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]


def flags_of(settings: Any) -> set[str]:
    """Return the flags of a settings dataclass, of the dataclasses inside it, and of every subcommand of a union."""
    if not (isinstance(settings, type) and is_dataclass(settings)):
        return set().union(*map(flags_of, get_args(settings)))
    hints = get_type_hints(settings, include_extras=True)
    named = [field for field in fields(settings) if tyro.conf.Positional not in _metadata(hints[field.name])]
    own = {f"--{field.name.replace('_', '-')}" for field in named}
    for hint in hints.values():
        own.update(*(getattr(extra, "aliases", None) or () for extra in _metadata(hint)))
    return own.union(*(flags_of(hints[field.name]) for field in fields(settings)))


def _metadata(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def default_hint(text: str) -> Any:
    """Return a tyro annotation that makes a flag's help show `text` as its default, instead of None."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


def is_main_process() -> bool:
    """Return whether this is the only process, or rank 0 of those that torchrun or accelerate launch started. Only it prints."""
    return os.environ.get("RANK", "0") == "0"


def log(message: str) -> None:
    """Print one line to stderr, from the main process only; stdout holds results."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[Item] | None, title: str, **options: object) -> tqdm[Item]:
    """Return a progress bar on stderr; in a log file it is printed at most once in 20 seconds. `options` are tqdm's."""
    interval = 0.1 if sys.stderr.isatty() else 20.0
    options |= {"mininterval": interval, "dynamic_ncols": True, "disable": not is_main_process()}
    return tqdm(items, title, **options)


def progress_bar(total: int, title: str, unit: str = "img") -> tqdm[NoReturn]:
    """Return a bar of `total` units that the caller advances by `update`; it disappears at its end."""
    return progress(None, title, total=total, unit=unit, leave=False)
