"""The repository's Python files, without what a run wrote or installed."""

from __future__ import annotations

from runtime.files import ROOT

PYTHON_FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "runs", "out", "demo", "report"} & set(path.relative_to(ROOT).parts)
)
