"""One record.json for every run of a script: settings, versions, machine, timings and metrics."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runtime.cli import BadInput, log
from runtime.device import Machine
from runtime.files import WEIGHTS, check_writable_file, write_json
from runtime.images import SUFFIXES

PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "timm",
    "open_clip_torch",
    "transformers",
    "numpy",
    "pillow",
)


@dataclass
class Record:
    """The facts of a run, which `save` writes. `settings` is the script's dataclass.

    A place that --record names is checked at once: BadInput. The default place is a courtesy, and only a warning where it can't be written.
    """

    settings: Any
    machine: Machine
    timings: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    def __post_init__(self) -> None:
        place = getattr(self.settings, "record", None)
        if place and not self._is_default(place):
            check_writable_file(place, "--record")
            if place.suffix.lower() in SUFFIXES | WEIGHTS or place.is_file() and not _is_record(place):
                raise BadInput(f"--record {place} is the name of another file, not of a record: name a new .json file")

    def _is_default(self, path: Path) -> bool:
        return bool(path == getattr(type(self.settings), "record", None))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `timings[name]`, also if it fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start

    def add_repeats(self, values: Mapping[str, Sequence[float]]) -> None:
        """Add measurements, {name with its unit: a number per repeat}, to `metrics["repeats"]` for benchmarks/table.py."""
        self.metrics.setdefault("repeats", {}).update(values)

    def save(self, path: Path, name_it: bool = False) -> None:
        """Write the record, atomically, and log its place if `name_it`; for the default place of --record an error is a line."""
        settings = asdict(self.settings)
        values = {
            "script": Path(sys.argv[0]).name,
            "command": sys.argv,
            "started": self.started,
            "settings": settings,
            "seed": settings.get("seed"),
            "device": str(self.machine.device),
            "machine": self.machine.name,
            "versions": versions(),
            "revision": git_revision(),
            "timings_s": {k: round(v, 3) for k, v in self.timings.items()},
            "metrics": self.metrics,
        }
        try:
            write_json(path, values)
        except OSError as error:
            if not self._is_default(path):
                raise
            log(f"warning: no record of this run, {error}")
        else:
            if name_it:
                log(f"record: {path}")


def _is_record(path: Path) -> bool:
    """Return whether the file is empty or a record of an earlier run, which a new one may replace."""
    try:
        text = path.read_text(encoding="utf-8")
        return not text or "script" in json.loads(text)
    except (ValueError, TypeError):
        return False


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages among PACKAGES."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def git_revision() -> str | None:
    """Return the commit of this code, with "+changes" if the tree differs from it; None outside git."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
