"""One record.json for every run of a script: settings, versions, machine, timings and metrics."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from runtime.cli import LIKE, BadInput, log, split_like
from runtime.device import Machine
from runtime.files import ROOT, WEIGHTS, check_writable_file, file_fingerprint, visible, write_json
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
# names of settings, of all scripts, that name files or folders which the run reads
INPUTS = {
    "backgrounds", "classifier", "classifiers", "clip", "concepts", "data", "distill", "embeddings", "ends", "folder", "images", "init",
    "input", "invert", "judge", "labels", "layout", "mnistm_classifier", "model", "noise", "parts", "pictures", "prompts",
    "reference", "references", "svhn_classifier", "unet", "weights",
}  # fmt: skip
FEW_FILES = 200  # of a folder, at most, are read in part; with more files only names and sizes count


@dataclass
class Record:
    """The facts of a run, which `save` writes as JSON. `settings` is the script's dataclass.

    Raise BadInput at once if the file that --record names can't be written or is no record. For the default file, `save` only warns.
    With --like, log what differs from that record.
    """

    settings: Any
    machine: Machine
    timings: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    inputs: dict[str, str] = field(default_factory=dict)
    """{setting: fingerprint of the files that it names}."""

    def __post_init__(self) -> None:
        place = getattr(self.settings, "record", None)
        if place and not self._is_default(place):
            check_writable_file(place, "--record")
            if place.suffix.lower() in SUFFIXES | WEIGHTS or place.is_file() and not _is_record(place):
                raise BadInput(f"--record {place} is the name of another file, not of a record: name a new .json file")
        self.inputs |= inputs_of(self.settings)
        if like := split_like(sys.argv[1:])[1]:
            from runtime.like import differences, read_record  # pydantic is slow to import

            now = self.facts() | {"settings": asdict(self.settings)}
            lines = differences(read_record(like), now) or ["the same versions, device and data"]
            for line in lines:
                log(f"{LIKE} {like}: {line}")

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
        """Add {name with its unit: one number per repeat} to `metrics["repeats"]`, which benchmarks/table.py reads."""
        self.metrics.setdefault("repeats", {}).update(values)

    def facts(self) -> dict[str, Any]:
        """Return what a run depends on besides its settings: machine, versions, and fingerprints of what it reads."""
        return {
            "device": str(self.machine.device),
            "machine": self.machine.name,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "revision": git_revision(),
            "root": str(ROOT),
            "inputs": self.inputs,
        }

    def save(self, path: Path, name_it: bool = False) -> None:
        """Write the record to `path`, atomically; log the path if `name_it`. At --record's default path, an error is only a warning."""
        settings = asdict(self.settings)
        values = {
            "script": Path(sys.argv[0]).name,
            "command": sys.argv,
            "started": self.started,
            "settings": settings,
            "seed": settings.get("seed"),
            **self.facts(),
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


def inputs_of(settings: Any) -> dict[str, str]:
    """Return {setting: fingerprint} for the settings among INPUTS that name existing files or folders."""
    fingerprints = {}
    for name in (each.name for each in fields(settings) if each.name in INPUTS):
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else (value,)
        paths = [Path(str(each).removeprefix("local-dir:")) for each in values if isinstance(each, Path | str)]
        with suppress(OSError):  # no permission to read a file: the script itself reports it
            if marks := [path_fingerprint(path) for path in paths if path.is_file() or path.is_dir()]:
                fingerprints[name] = "-".join(marks)
    return fingerprints


def path_fingerprint(path: Path) -> str:
    """Return the fingerprint of a file, or of names and files below a folder; of names and sizes for more than FEW_FILES files."""
    if path.is_file():
        return file_fingerprint(path)
    files = list(_files_below(path))
    marks = [file_fingerprint(file) if len(files) <= FEW_FILES else str(file.stat().st_size) for file in files]
    names = [file.relative_to(path).as_posix() for file in files]
    return hashlib.blake2b(json.dumps([names, marks]).encode(), digest_size=12).hexdigest()


def _files_below(folder: Path) -> Iterator[Path]:
    for path in visible(folder):
        if path.is_dir() and not path.is_symlink():  # a link may lead back
            yield from _files_below(path)
        elif path.is_file():
            yield path


def _is_record(path: Path) -> bool:
    """Return whether a new record may replace the file: it is empty, or a record of an earlier run."""
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
    """Return the short commit hash of this code, with "+changes" if tracked files differ from it; None outside git."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
