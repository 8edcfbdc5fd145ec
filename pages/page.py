"""The page itself: one self-contained HTML file, rendered by jinja2."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pages.elements import Element, Figure, Score, Section, Strip, Table, plain
from runtime.device import detect
from runtime.files import ROOT, atomic, read_json
from runtime.record import git_revision, versions
from runtime.steps import Outcome, Step, command_line

TEMPLATES = Path(__file__).resolve().parent / "templates"
PROBLEMS = {
    "P1": "P1: digits on demand",
    "P2": "P2: faces from given noise",
    "P3": "P3: words and images",
}
TITLE = "Conditional diffusion, DDIM and personalization"
RECORD_FACTS = ("seed", "device", "started", "revision")  # shown before the settings of a record


@dataclass(frozen=True)
class RenderedSection:
    """A section with its elements, or with the reason why there are none ("" = no reason)."""

    section: Section
    steps: list[tuple[Step, Outcome, list[dict[str, Any]]]]
    """Each step with its outcome and with its records in the form of `record_of`."""
    elements: list[Element]
    reason: str
    pending: bool = False
    """Whether its steps have yet to run."""

    @property
    def scores(self) -> list[Score]:
        """Numbers for the table at the top of the page."""
        return [element for element in self.elements if isinstance(element, Score)]

    @property
    def strips(self) -> list[Strip]:
        """Images for the top of the page."""
        return [element for element in self.elements if isinstance(element, Strip)]

    @property
    def settings(self) -> list[Table]:
        """Tables for the settings at the end of the page."""
        return [element for element in self.elements if isinstance(element, Table) and element.settings]

    @property
    def body(self) -> list[Figure | Table]:
        """Figures and the other tables, for the section itself."""
        settings = self.settings
        return [one for one in self.elements if isinstance(one, Figure | Table) and one not in settings]


def pending_section(section: Section) -> RenderedSection:
    """Return a section whose steps have yet to run."""
    return RenderedSection(section, [], [], "", pending=True)


def render_section(section: Section, folder: Path, outcomes: Mapping[str, Outcome]) -> RenderedSection:
    """Return a section with the results that its steps left in `folder`.

    If a step failed or a result can't be read, it has a reason instead. Nothing is raised.
    """
    steps, reasons = [], []
    for step in section.steps:
        outcome = outcomes[step.name]
        records = [] if outcome.reason else sorted((folder / step.name).glob("record*.json"))
        steps.append((step, outcome, [record_of(path) for path in records]))
        reasons += [f"{step.title}: {outcome.reason}"] if outcome.reason else []
    elements: list[Element] = []
    if not reasons:
        try:
            elements = section.elements()
        except Exception as error:  # a file of another version may hold anything; the other sections are still useful
            reasons = [f"Its results can't be read ({type(error).__name__}: {error})."]
    return RenderedSection(section, steps, elements, "\n".join(reasons))


def record_of(path: Path) -> dict[str, Any]:
    """Return {"title", "rows"} of a record.json. Rows are (name, text): seed, device, start and revision, then the settings."""
    record = read_json(path)
    rows = {name: plain(record[name]) for name in RECORD_FACTS if record.get(name) is not None}
    rows |= setting_rows(record["settings"])
    return {"title": f"{record['script']}, settings and seed", "rows": list(rows.items())}


def setting_rows(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return {name: text} of the settings that are not empty. Nested settings have the names of their flags: config.inject."""
    rows: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows |= setting_rows(value, f"{prefix}{name}.")
        elif value not in (None, "", []):
            rows[f"{prefix}{name}"] = plain(value).replace(f"{ROOT}{os.sep}", "")
    return rows


@cache
def embedded(path: Path) -> dict[str, Any]:
    """Return {"uri", "width", "height"} of a PNG, JPEG or WebP file; the URI holds its content."""
    with Image.open(path) as image:
        kind, (width, height) = str(image.format).lower(), image.size
    content = base64.b64encode(path.read_bytes()).decode()
    return {"uri": f"data:image/{kind};base64,{content}", "width": width, "height": height}


def write_page(path: Path, rendered: Sequence[RenderedSection], command: str, minutes: str = "") -> None:
    """Write the page atomically. It shows the `command` that makes it and, while sections are pending, how many `minutes` that takes."""
    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, **options)
    steps = {step.name for one in rendered for step, *_ in one.steps}
    present = sum(not (one.reason or one.pending) for one in rendered)
    html = environment.get_template("page.html").render(
        title=TITLE,
        problems={key: name for key, name in PROBLEMS.items() if any(one.section.problem == key for one in rendered)},
        rendered=rendered,
        embedded=embedded,
        command_line=command_line,
        minutes=minutes,
        style=Markup((TEMPLATES / "style.css").read_text()),
        script=Markup((TEMPLATES / "enlarge.js").read_text()),
        date=time.strftime("%d %B %Y, %H:%M"),
        machine=detect("auto").name,
        revision=git_revision(),
        summary=f"{present} of {len(rendered)} sections have results, made by {len(steps)} steps.",
        waiting=sum(one.pending for one in rendered),
        strips=[(one.section, strip) for one in rendered for strip in one.strips],
        command=command,
        versions=versions(),
    )
    with atomic(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
