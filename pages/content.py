"""What a part of the page is: the steps that make it, and the figures, tables and scores that it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.steps import Step


@dataclass(frozen=True)
class Figure:
    """A picture, and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Many pictures under one caption."""

    paths: tuple[Path, ...]
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Score:
    """A number for the table at the top and for the end of the demo."""

    what: str
    value: str
    wanted: str = ""


@dataclass
class Shown:
    """All that a part shows when its steps are done."""

    scores: list[Score] = field(default_factory=list)
    figures: list[Figure | Gallery] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A heading of the page. `real` says whether the course's own files are in use, `source` which ones are; `instead` is run
    as well where a step fails."""

    name: str
    problem: str
    title: str
    text: str
    source: str
    real: bool
    steps: tuple[Step, ...]
    show: Callable[[Path], Shown]
    hint: str = ""
    """How to have it with the course's files."""
    instead: Part | None = None


def percent(value: float) -> str:
    """0.98765 -> 98.8 %."""
    return f"{100 * value:.1f} %"


def facts_table(caption: str, values: dict[str, Any]) -> Table:
    """Names and values, those that are not set left out."""
    rows = tuple((name, plain(value)) for name, value in values.items() if value not in (None, "", [], {}))
    return Table(caption, ("setting", "value"), rows)


def plain(value: Any) -> str:
    """A value as a reader wants it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)
