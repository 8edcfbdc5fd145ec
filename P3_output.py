"""The folder that pictures go to: what lies there from before, and whether there is room."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from runtime.cli import BadInput
from runtime.files import require_folder_place

GRADED = re.compile(r"([^/]+)/(\d+)/source\1_prompt\2_\d+\.png")


def stale_files(output: Path, files: Sequence[Path], graded: bool) -> list[Path]:
    """Pictures of an earlier run: those of `files` that are there; in a graded folder all that have such names, and BadInput for any
    other file, since the grader takes none."""
    require_folder_place(output)
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
