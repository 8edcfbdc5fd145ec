"""What a reader sees on the report's page: tables by their caption, figures by theirs; and records as the scripts write them."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from pages.elements import Section
from pages.inputs import DIGITS, Inputs
from pages.page import render_section, write_page
from runtime.steps import Outcome

Row = tuple[str, ...]


class PageReader(HTMLParser):
    """The texts of a page: `tables` caption -> rows (head first), `marks` the cells in green and red, `figures` caption -> widths.

    `labels` caption -> texts below the images of a figure; `strips` title -> widths of the images at the top.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[Row]] = {}
        self.marks: list[tuple[str, str]] = []
        self.figures: dict[str, tuple[int, ...]] = {}
        self.labels: dict[str, list[str]] = {}
        self.strips: dict[str, tuple[int, ...]] = {}
        self.texts: list[str] = []
        self.in_strip = False
        self.text = ""
        self.open: list[str] = []
        self.row: list[str] = []
        self.rows: list[Row] = []
        self.mark = ""
        self.caption = ""
        self.widths: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "table":
            self.rows = self.tables.setdefault(values["aria-label"], [])
        elif tag == "tr":
            self.row = []
        elif tag in ("td", "th"):
            self.row.append("")
            self.mark = values.get("class", "")
        elif tag == "figure":
            self.widths, self.caption, self.texts = [], "", []
        elif tag in ("div", "p"):
            self.in_strip = values.get("class") == "strip"
        elif tag == "a" and self.in_strip:
            self.widths, self.texts = [], []
        elif tag == "span" and values.get("class", "").startswith("label"):
            self.texts.append("")
        elif tag == "img" and values.get("src", "").startswith("data:image/"):
            with Image.open(io.BytesIO(base64.b64decode(values["src"].split(",", 1)[1]))) as image:
                self.widths.append(image.width)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass
        if tag == "tr":
            self.rows.append(tuple(" ".join(cell.split()) for cell in self.row))
        elif tag in ("td", "th") and self.mark in ("pass", "fail"):
            self.marks.append((self.mark, self.row[-1]))
        elif tag == "figure":
            self.figures[self.caption], self.labels[self.caption] = tuple(self.widths), self.texts
        elif tag == "a" and self.in_strip:
            self.strips["".join(self.texts)] = tuple(self.widths)

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.row[-1] += data
        elif "figcaption" in self.open:
            self.caption += data
        elif self.texts and self.open[-1:] == ["span"]:
            self.texts[-1] += data

    @property
    def scores(self) -> dict[str, tuple[str, str]]:
        """what -> (measured, bar) of the table at the top."""
        return {what: (measured, bar) for _, what, measured, bar, *_ in self.tables["Scores"][1:]}

    @property
    def quoted(self) -> dict[str, str]:
        """what -> value and name of the row of docs/results.md in the table at the top."""
        return {what: row for _, what, _, _, row, _ in self.tables["Scores"][1:] if row}

    def pairs(self, caption: str) -> dict[str, str]:
        """First column -> second column of a table without its head."""
        return {row[0]: row[1] for row in self.tables[caption][1:]}


def read_page(path: Path) -> PageReader:
    reader = PageReader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def rendered(section: Section, steps: Path) -> PageReader:
    """Render one section as if its steps had just ended, and read the page."""
    outcomes = {step.name: Outcome("done", "key", 1.0) for step in section.steps}
    one = render_section(section, steps, outcomes)
    assert one.reason == ""
    path = steps / "page.html"
    write_page(path, [one], "python report.py")
    return read_page(path)


def inputs_of(steps: Path, **changes: Any) -> Inputs:
    """Return inputs without any of the course's files."""
    nothing = dict.fromkeys(("mnistm_classifier", "unet", "noise", "reference", "photographs", "model"))
    defaults = {"steps": steps, "digits": DIGITS, "textual_inversion": steps, "clip": "clip", "device": "cpu"}
    return Inputs(**{**nothing, **defaults, "quick": False, **changes})


def section_named(sections: list[Section], name: str) -> Section:
    (section,) = (section for section in sections if section.name == name)
    return section


def write_record(folder: Path, metrics: dict[str, Any], **more: Any) -> None:
    """Write a script's record.json with these metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"script": "script.py", "settings": {}, "metrics": metrics, "timings_s": {}, **more}
    (folder / "record.json").write_text(json.dumps(record))


def write_image(path: Path, width: int) -> None:
    """Write an image that its width tells from the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, 3)).save(path)


def commands_of(section: Section, step: str) -> list[list[str]]:
    """Return the commands of a step, word by word."""
    (match,) = (one for one in section.steps if one.name == step)
    return [[str(word) for word in command] for command in match.commands]


def flag(command: list[str], name: str, count: int = 1) -> Any:
    """Return the value after a flag, `count` = 0 for all words up to the next flag."""
    start = command.index(name) + 1
    if count:
        return command[start]
    end = next((n for n in range(start, len(command)) if command[n].startswith("--")), len(command))
    return command[start:end]
