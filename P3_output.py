"""The folder that pictures go to: what lies there from before, and whether there is room."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from runtime.cli import BadInput

GRADED = re.compile(r"([^/]+)/(\d+)/source\1_prompt\2_\d+\.png")


def stale_files(output: Path, files: Sequence[Path], graded: bool) -> list[Path]:
    """Pictures of an earlier run: those of `files` that are there; in a graded folder all that have such names, and BadInput for any
    other file, since the grader takes none."""
    if output.is_file():
        raise BadInput(f"output {output}: a file is in the way, name a folder")
    if not graded or not output.is_dir():
        return [path for path in files if path.is_file()]
    found = sorted(path for path in output.rglob("*") if not path.is_dir())
    for path in found:
        if not GRADED.fullmatch(path.relative_to(output).as_posix()):
            raise BadInput(f"{path} does not belong in a graded folder: move it, or name another --output")
    return found


def remove(files: Sequence[Path], output: Path) -> None:
    """Deletes them, and folders in `output` that this leaves empty."""
    for path in files:
        path.unlink()
    folders = {folder for path in files for folder in path.parents if output in folder.parents}
    for folder in sorted(folders, reverse=True):  # the inner ones first
        if not any(folder.iterdir()):
            folder.rmdir()


def check_disk(output: Path, needed: int) -> None:
    """Raises BadInput where so many bytes would not fit."""
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BadInput(f"output {output}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
