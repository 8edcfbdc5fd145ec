"""Values from the tables of docs/results.md, which the page quotes by the name of their row."""

from __future__ import annotations

import re
from functools import cache

from runtime.files import ROOT

RESULTS = ROOT / "docs" / "results.md"


@cache
def rows() -> dict[str, list[str]]:
    """Return {name: cells} of every row. The first three cells: what was measured, value, bar (the value to reach)."""
    lines = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", RESULTS.read_text(encoding="utf-8"), re.M)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in lines}


def quoted(row: str, index: int = 0) -> str:
    """Return a row's value as text: "0.72". `index` selects one of several. Raises KeyError for a row that does not exist."""
    return rows()[row][1].split(";")[index].strip().replace("+-", "±")


def quoted_percent(row: str, index: int = 0) -> str:
    """Return a row's value, a share 0..1, in percent: "99.3 ± 0.1 %". Text stays unchanged: "not measured"."""
    value = quoted(row, index)
    try:
        return " ± ".join(f"{100 * float(part):.1f}" for part in value.split(" ± ")) + " %"
    except ValueError:
        return value


def bar(row: str) -> str:
    """Return the bar of a row of docs/results.md, by name: the value to reach, in percent, as "95 %"."""
    text = rows()[row][2]
    return text if text.endswith("%") else f"{100 * float(text):g} %"
