"""Figures of docs/results.md, which the page quotes by the names of their rows."""

from __future__ import annotations

import re
from functools import cache

from runtime.files import ROOT

RESULTS = ROOT / "docs" / "results.md"


@cache
def rows() -> dict[str, list[str]]:
    """Return every row by its name: what, value, bar, and the rest of its cells."""
    lines = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", RESULTS.read_text(encoding="utf-8"), re.M)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in lines}


def quoted(row: str, index: int = 0) -> str:
    """Return a row's value, of several the one at `index`: "0.72". Raises KeyError for a row that does not exist."""
    return rows()[row][1].split(";")[index].strip().replace("+-", "±")


def quoted_percent(row: str, index: int = 0) -> str:
    """Return a row's share in percent: "99.3 ± 0.1 %". A value of another kind stays as it is: "not measured"."""
    value = quoted(row, index)
    try:
        return " ± ".join(f"{100 * float(part):.1f}" for part in value.split(" ± ")) + " %"
    except ValueError:
        return value


def bar(row: str) -> str:
    """Return a row's bar in percent: "95 %"."""
    text = rows()[row][2]
    return text if text.endswith("%") else f"{100 * float(text):g} %"
