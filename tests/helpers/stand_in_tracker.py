"""A package with what wandb and trackio have in common, which records its calls."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = """
calls = []

def init(**options):
    calls.append(("init", options))

def log(values, step):
    calls.append(("log", step, values))

def finish():
    calls.append(("finish",))
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "wandb", source: str = SOURCE) -> Any:
    """Put the package on the import path for a test and return it; its `calls` are (function, arguments ..)."""
    place = folder / "packages"
    place.mkdir()
    (place / f"{name}.py").write_text(source)
    monkeypatch.setitem(sys.modules, name, None)  # and so it is gone after the test
    del sys.modules[name]
    monkeypatch.syspath_prepend(str(place))
    return importlib.import_module(name)


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a package absent for a test, installed or not."""
    monkeypatch.setitem(sys.modules, name, None)
