"""Figures that the page quotes are those of docs/results.md, by the names of their rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_reader import inputs_of

from pages import inversion, p1, p2, zeroshot
from pages.results import bar, quoted, quoted_percent, rows
from runtime.files import ROOT


def test_a_row_is_quoted_as_it_stands_or_in_percent() -> None:
    table = (ROOT / "docs" / "results.md").read_text()
    for name, value in {
        "p1-accuracy-mean": quoted_percent("p1-accuracy-mean"),
        "p2-noise-halfway": quoted("p2-noise-halfway", 1),
    }.items():
        (line,) = (line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        assert line.split(" | ")[2] == {"99.1 ± 0.1 %": "0.991 +- 0.001", "1.00": "0.72; 1.00"}[value]
    assert rows()["p1-accuracy-mean"][0].startswith("accuracy of the first try")
    assert bar("miniature-clip-held-out") == "95 %"
    assert bar("zeroshot-course") == "58.6 %"
    assert quoted_percent("zeroshot-course") == "not measured"


def test_an_unknown_row_is_an_error() -> None:
    with pytest.raises(KeyError, match="no-such-row"):
        quoted("no-such-row")


@pytest.mark.parametrize("quick", [True, False])
def test_the_pages_own_texts_hold_no_measured_figure(quick: bool, tmp_path: Path) -> None:
    """Percentages, dB and times come from records and from rows; what stands in a text is a setting."""
    inputs = inputs_of(tmp_path, quick=quick)
    template = re.sub(r"{%.*?%}|{{.*?}}", "", (ROOT / "pages" / "templates" / "page.html").read_text(), flags=re.S)
    texts = [section.text for module in (p1, p2, zeroshot, inversion) for section in module.sections(inputs)]
    texts += [
        *p1.FIGURES.values(),
        *p2.FIGURES.values(),
        inversion.LEVELS,
        template,
    ]
    for text in texts:
        assert not re.findall(r"\d+(?:\.\d+)?\s?(?:%|dB\b|seconds|minutes|s\b)", text)
