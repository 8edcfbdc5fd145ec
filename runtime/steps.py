"""Steps of the report: commands that run once, are kept while nothing that they read changes, and say why where they fail."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runtime.cli import log
from runtime.files import ROOT, atomic, output_folder, write_json

State = Literal["done", "kept", "failed", "lacking"]
LONGEST_REASON = 12  # lines


@dataclass(frozen=True)
class Step:
    """Commands (arguments of python, run in the repository) that leave their results in a folder of the step's name."""

    name: str
    title: str
    commands: tuple[tuple[str, ...], ...]
    reads: tuple[Path, ...] = ()
    """Files and folders, not from other steps, whose change has it run again."""
    after: tuple[str, ...] = ()
    """Steps whose results it needs."""
    files: tuple[tuple[Path, Any], ...] = ()
    """JSON files that it starts from, and what goes into them."""
    prepare: Callable[[], None] | None = None
    """Writes what has to be made from results of the steps before."""


@dataclass(frozen=True)
class Outcome:
    """How a step went; `reason` says why there is nothing, where there is nothing."""

    state: State
    key: str
    seconds: float = 0.0
    reason: str = ""

    @property
    def there(self) -> bool:
        """Whether its results can be shown."""
        return self.state in ("done", "kept")


class Runner:
    """Runs steps in turn below one folder; a step that was done by the same command, code and input is kept."""

    def __init__(self, folder: Path, total: int, fresh: bool = False):
        self.folder, self.total, self.fresh = output_folder(folder), total, fresh
        self.outcomes: dict[str, Outcome] = {}

    def run(self, step: Step) -> Outcome:
        """Runs it, or finds it done, or says what it lacks; never raises for a step that fails."""
        start = time.perf_counter()
        log(f"== {len(self.outcomes) + 1}/{self.total} {step.title}")
        outcome = self.outcomes[step.name] = self._outcome(step)
        seconds = time.perf_counter() - start
        how = {"kept": "kept from before", "done": f"{seconds:.0f} s"}.get(outcome.state, outcome.state)
        log(f"   {how}" + (f": {outcome.reason}" if outcome.reason else ""))
        return outcome

    def _outcome(self, step: Step) -> Outcome:
        key = self._key(step)
        missing = [name for name in step.after if not self.outcomes[name].there]
        if missing:
            return Outcome("lacking", key, reason=f"it needs {', '.join(missing)}, of which there is no result")
        mark = self.folder / step.name / "step.json"
        known = json.loads(mark.read_text()) if mark.is_file() and not self.fresh else {}
        if known.get("key") == key and known["done"]:
            return Outcome("kept", key, known["seconds"])
        if known.get("key") != key:  # else it was interrupted: what can go on from there does
            shutil.rmtree(mark.parent, ignore_errors=True)
        write_json(mark, {"key": key, "done": False})
        for path, content in step.files:
            write_json(path, content)
        if step.prepare:
            step.prepare()
        start = time.perf_counter()
        reason = self._commands(step, mark.parent / "log.txt")
        seconds = round(time.perf_counter() - start, 1)
        if not reason:
            write_json(mark, {"key": key, "done": True, "seconds": seconds})
        return Outcome("failed" if reason else "done", key, seconds, reason)

    def _key(self, step: Step) -> str:
        """Everything that its results depend on."""
        before = [self.outcomes[name].key for name in step.after]
        return digest([code_of(step.commands), step.commands, str(step.files), before, facts(step.reads)])

    def _commands(self, step: Step, log_file: Path) -> str:
        """Runs them in turn; why the first of them failed, or nothing."""
        for command in step.commands:
            log(f"   {shown(command)}")
            code, output = tee([sys.executable, *map(short, command)])
            with log_file.open("a") as file:
                file.write(f"$ {shown(command)}\n{output}\n")
            if code < 0:
                return f"ended by {signal.Signals(-code).name}"
            if code:
                return reason_of(output) or f"exit code {code}"
        return ""


def code_of(commands: Sequence[Sequence[str]]) -> list[tuple[str, int, int]]:
    """Return facts about the code behind commands: their scripts, and every package."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    return facts(
        [ROOT / script for script, *_ in commands] + [file for folder in packages for file in folder.rglob("*.py")]
    )


def digest(values: Any) -> str:
    """A hash of anything that json can write."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:24]


def facts(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of every file, and of every file below every folder."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [
        (str(path), info.st_size, info.st_mtime_ns)
        for path in sorted(set(files))
        if path.is_file() and "__pycache__" not in path.parts and (info := path.stat())
    ]


def tee(command: Sequence[str]) -> tuple[int, str]:
    """(exit code, all that it said), which is shown on stderr as it comes. Ctrl-C reaches the command as well, which is waited for."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
    said = bytearray()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        assert process.stdout
        while part := os.read(process.stdout.fileno(), 65536):
            said += part
            sys.stderr.write(part.decode(errors="replace"))
            sys.stderr.flush()
    return process.returncode, said.decode(errors="replace")


def reason_of(output: str) -> str:
    """What a script said last: from its line "error: ..", else its last line of words (tyro frames what it says)."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in output.strip().splitlines()]
    starts = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    worded = [line for line in lines if any(map(str.isalpha, line))]
    found = lines[starts[-1] :] if starts else (worded or lines)[-1:]
    return "\n".join(found[:LONGEST_REASON]).removeprefix("error: ")


def shown(command: Sequence[str]) -> str:
    """As a reader would type it in the repository."""
    return shlex.join(["python", *(short(word) for word in command)])


def short(word: str | Path) -> str:
    """A path below the repository as seen from there, where the commands run; anything else as it is."""
    return str(word).removeprefix(f"{ROOT}{os.sep}")


def write_text(path: Path, text: str) -> None:
    """UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
