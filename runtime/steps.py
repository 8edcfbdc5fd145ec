"""Steps: commands that run once. Their results are kept as long as commands, inputs and code stay the same."""

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.cli import log
from runtime.files import ROOT, output_folder, write_json

Command = tuple[str | Path, ...]
LONGEST_REASON = 12  # lines


@dataclass(frozen=True)
class Step:
    """Commands (arguments of python, run in the repository) that leave their results in a folder of the step's name."""

    name: str
    title: str
    commands: tuple[Command, ...]
    inputs: tuple[Path, ...] = ()
    """Files and folders, not from other steps. The step runs again when one of them changes."""
    after: tuple[str, ...] = ()
    """Names of the steps whose results it needs."""
    files: Mapping[Path, Any] = field(default_factory=dict)
    """JSON files to write before the commands: {path: content, or a function that returns it once the steps in `after` are done}."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended. `reason` says why it has no result, and is empty if it has one.

    `state` is done, kept (results of an earlier run), failed, or lacking (a step in Step.after has no result).
    """

    state: Literal["done", "kept", "failed", "lacking"]
    key: str
    seconds: float = 0.0
    reason: str = ""


class Runner:
    """Runner of steps, each in its own subfolder of `folder`. `total` is only shown; `fresh` ignores kept results."""

    def __init__(self, folder: Path, total: int, fresh: bool = False):
        self.folder, self.total, self.fresh = output_folder(folder), total, fresh
        self.outcomes: dict[str, Outcome] = {}
        self.keys: dict[str, str] = {}

    def is_kept(self, step: Step) -> bool:
        """Return whether the results of a step exist and are up to date. Call it first for the steps that the step comes `after`."""
        last = self._last(step)
        return bool(last.get("key") == self._key(step) and last["done"])

    def run(self, step: Step, limit: float | None = None) -> Outcome:
        """Run a step for at most `limit` seconds, or keep its results. Run those in `after` before. Failures are returned, not raised."""
        log(f"== {len(self.outcomes) + 1}/{self.total} {step.title}")
        outcome = self.outcomes[step.name] = self._outcome(step, limit)
        how = {"kept": "kept from before", "done": f"{outcome.seconds:.0f} s"}.get(outcome.state, outcome.state)
        log(f"   {how}" + (f": {outcome.reason}" if outcome.reason else ""))
        return outcome

    def _key(self, step: Step) -> str:
        """Return and remember a digest of what decides a step's results."""
        code = [ROOT / script for script, *_ in step.commands] + [init.parent for init in ROOT.glob("*/__init__.py")]
        contents = [(path, content) for path, content in step.files.items() if not callable(content)]
        before = [self.keys[name] for name in step.after]
        facts = json.dumps([file_facts([*code, *step.inputs]), step.commands, contents, before], default=str)
        self.keys[step.name] = hashlib.sha256(facts.encode()).hexdigest()[:24]
        return self.keys[step.name]

    def _last(self, step: Step) -> dict[str, Any]:
        """Return the content of the step.json that the step's last run wrote; {} without one, or if `fresh`."""
        mark = self.folder / step.name / "step.json"
        last: dict[str, Any] = json.loads(mark.read_text()) if mark.is_file() and not self.fresh else {}
        return last

    def _outcome(self, step: Step, limit: float | None) -> Outcome:
        key = self._key(step)
        if missing := [name for name in step.after if self.outcomes[name].reason]:
            return Outcome("lacking", key, reason=f"it needs {', '.join(missing)}, of which there is no result")

        mark, last = self.folder / step.name / "step.json", self._last(step)
        if last.get("key") == key and last["done"]:
            return Outcome("kept", key, last["seconds"])
        if last.get("key") != key:  # else it was interrupted, and its commands may continue
            shutil.rmtree(mark.parent, ignore_errors=True)
        write_json(mark, {"key": key, "done": False})
        for path, content in step.files.items():
            write_json(path, content() if callable(content) else content)

        start = time.perf_counter()
        for command in step.commands:
            log(f"   {command_line(command)}")
            left = limit and max(1.0, limit - time.perf_counter() + start)
            status, output = run_command([sys.executable, *map(relative, command)], left)
            with (mark.parent / "log.txt").open("a") as file:
                file.write(f"$ {command_line(command)}\n{output}\n")
            if status:
                reason = failure_reason(output) or f"exit code {status}"
                reason = f"ended by {signal.Signals(-status).name}" if status < 0 else reason
                if limit and time.perf_counter() - start >= limit:
                    reason = f"stopped at its limit of {limit:.0f} s"
                return Outcome("failed", key, reason=reason)
        seconds = round(time.perf_counter() - start, 1)
        write_json(mark, {"key": key, "done": True, "seconds": seconds})
        return Outcome("done", key, seconds)


def run_command(command: Sequence[str], limit: float | None = None) -> tuple[int, str]:
    """Run a command in the repository with its output shown on stderr; return its exit code and output.

    After `limit` seconds it is interrupted as by Ctrl-C, ten seconds later killed.
    """
    if limit:
        command = ["timeout", "--foreground", "--signal=INT", "--kill-after=10", f"{limit:.1f}", *command]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
    output = bytearray()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        assert process.stdout
        while part := os.read(process.stdout.fileno(), 65536):
            output += part
            sys.stderr.write(part.decode(errors="replace"))
            sys.stderr.flush()
    return process.returncode, output.decode(errors="replace")


def failure_reason(output: str) -> str:
    """Return why a command failed: its output from the last line "error: .." on, else the last line with letters."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in output.strip().splitlines()]
    starts = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    worded = [line for line in lines if any(map(str.isalpha, line))]
    reason = lines[starts[-1] :] if starts else (worded or lines)[-1:]
    return "\n".join(reason[:LONGEST_REASON]).removeprefix("error: ")


def file_facts(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and time of change of every file, and of every file below every folder."""
    files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])}
    return [
        (str(path), info.st_size, info.st_mtime_ns)
        for path in sorted(files)
        if path.is_file() and "__pycache__" not in path.parts and (info := path.stat())
    ]


def command_line(command: Iterable[str | Path]) -> str:
    """Return a command as a reader types it in the repository."""
    return shlex.join(["python", *map(relative, command)])


def relative(path: str | Path) -> str:
    """Return a path below the repository relative to it, where commands run; return anything else unchanged."""
    return str(path).removeprefix(f"{ROOT}{os.sep}")
