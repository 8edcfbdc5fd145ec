"""The page itself: one HTML file with everything in it, made by jinja2 from what the parts show."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pages.content import Part, Shown, plain
from runtime.device import detect
from runtime.files import read_json
from runtime.record import git_revision, versions
from runtime.steps import Outcome, short, shown, write_text

TEMPLATES = Path(__file__).resolve().parent / "templates"
PROBLEMS = {
    "P1": "P1: digits on demand",
    "P2": "P2: faces from given noise",
    "P3": "P3: words and pictures",
}
TITLE = "Conditional diffusion, DDIM and personalization"
TOLD = ("seed", "device", "started", "revision")  # of a record, before its settings


@dataclass(frozen=True)
class Embedded:
    """A picture as a part of the page."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Made:
    """A step as the page tells it."""

    title: str
    state: str
    commands: list[str]
    records: list[dict[str, Any]]


@dataclass
class View:
    """A part with what there is to show, or why there is nothing."""

    part: Part
    shown: Shown = field(default_factory=Shown)
    reason: str = ""
    made: list[Made] = field(default_factory=list)


def view_of(part: Part, folder: Path, outcomes: dict[str, Outcome]) -> View:
    """What a part's steps left in `folder`; a result that can't be read is a reason, not an error."""
    view = View(part, made=[made_of(step.name, step.title, step.commands, folder, outcomes) for step in part.steps])
    gone = [(step, outcomes[step.name]) for step in part.steps if not outcomes[step.name].there]
    if gone:
        view.reason = "\n".join(f"{step.title}: {outcome.reason}" for step, outcome in gone)
        return view
    try:
        view.shown = part.show(folder)
    except Exception as error:  # whatever a file of another version holds: the rest of the page is worth having
        view.reason = f"Its results can't be read ({type(error).__name__}: {error})."
    return view


def made_of(
    name: str, title: str, commands: Sequence[Sequence[str]], folder: Path, outcomes: dict[str, Outcome]
) -> Made:
    """Commands, time and the records that they left."""
    outcome = outcomes[name]
    took = f"{outcome.seconds:.0f} s" if outcome.there else outcome.state
    records = [record_of(path) for path in sorted((folder / name).glob("record*.json"))] if outcome.there else []
    return Made(title, took, [shown(command) for command in commands], records)


def record_of(path: Path) -> dict[str, Any]:
    """A record.json as rows of texts: who, when, and every setting that is set."""
    record = read_json(path)
    rows = [(name, plain(record[name])) for name in TOLD if record.get(name) is not None]
    rows += [(name, short(plain(value))) for name, value in record["settings"].items() if value not in (None, "", [])]
    return {"title": f"{record['script']}, settings and seed", "rows": list(dict(rows).items())}


@cache
def embedded(path: Path) -> Embedded:
    """A PNG or JPEG file as a data URI, with its size."""
    with Image.open(path) as picture:
        kind, (width, height) = str(picture.format).lower(), picture.size
    content = base64.b64encode(path.read_bytes()).decode()
    return Embedded(f"data:image/{kind};base64,{content}", width, height)


def write_page(path: Path, views: Sequence[View], command: str) -> None:
    """One file, atomically."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    steps = {made.title: made for view in views for made in view.made}
    there = sum(not view.reason for view in views)
    text = environment.get_template("page.html").render(
        title=TITLE,
        problems={key: name for key, name in PROBLEMS.items() if any(view.part.problem == key for view in views)},
        views=views,
        embedded=embedded,
        style=Markup((TEMPLATES / "style.css").read_text()),
        script=Markup((TEMPLATES / "enlarge.js").read_text()),
        made=time.strftime("%d %B %Y, %H:%M"),
        machine=detect("auto").name,
        revision=git_revision(),
        tally=f"{there} of {len(views)} parts are there, made by {len(steps)} steps.",
        command=command,
        versions=versions(),
    )
    write_text(path, text)
