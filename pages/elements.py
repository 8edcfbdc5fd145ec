"""The elements of the page: sections, and the figures, tables and scores that they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.steps import Step


@dataclass(frozen=True)
class Figure:
    """Images under one caption; several are laid out as a gallery, row by row."""

    caption: str
    paths: tuple[Path, ...]
    labels: tuple[str, ...] = ()
    """A text below each image."""
    columns: int = 0
    """Images in a row of the gallery. In a narrow window, labelled images get fewer. 0 = as many as fit."""
    half: bool = False
    """Takes half of a wide window, next to another half figure."""
    plot: bool = False
    """Is a diagram on white, whose colours are inverted in dark mode."""


@dataclass(frozen=True)
class Strip:
    """Images for the top of the page, with an arrow between those of `before` and of `paths`."""

    title: str
    paths: tuple[Path, ...]
    before: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head of column titles."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    settings: bool = False
    """Belongs to the settings at the end of the page."""


@dataclass(frozen=True)
class Score:
    """A number for the table at the top of the page and the last lines of the demo; `bar` is the value to reach."""

    what: str
    value: str
    bar: str = ""
    row: str = ""
    """Row of docs/results.md with the published value of the same quantity."""
    quoted: str = ""
    """That published value."""


Element = Figure | Strip | Table | Score


@dataclass(frozen=True)
class Section:
    """A heading of the page with the steps behind it."""

    name: str
    problem: str
    title: str
    text: str
    inputs: str
    """Weights and data in use, for the reader."""
    shipped: bool
    """Whether these all come with the repository."""
    steps: tuple[Step, ...]
    elements: Callable[[], list[Element]]
    """Function that reads the steps' results and returns what the section shows."""
    question: str = ""
    """Question of the homework's report that the section answers."""
    hint: str = ""
    """How to get the section with the course's files."""
    fallback: Section | None = None
    """Section to add after this one if one of the steps fails."""


def percent(value: float) -> str:
    """Return a share 0..1 as a percentage: 0.98765 -> "98.8 %"."""
    return f"{100 * value:.1f} %"


def plain(value: Any) -> str:
    """Return a value as text: six significant digits, yes or no, items joined by commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(each)}" for name, each in value.items())
    return ", ".join(map(plain, value)) if isinstance(value, list | tuple) else str(value)


def settings_table(caption: str, values: Mapping[str, Any]) -> Table:
    """Return a table of names and values without the empty ones, for the settings at the end of the page."""
    rows = tuple((name, plain(value)) for name, value in values.items() if value not in (None, "", [], {}))
    return Table(caption, ("setting", "value"), rows, settings=True)
