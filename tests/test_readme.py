"""README and docs: every command parses, quick blocks run, links have files, figures are those of docs/results.md. Prose is plain."""

from __future__ import annotations

import ast
import importlib
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from page_commands import commands_in, parse
from PIL import Image
from source_files import PYTHON_FILES

from runtime.files import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "hw2_data" / "README.md",
    ROOT / "miniature" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
CARDS = sorted((ROOT / "checkpoints").rglob("*.md"))
SCRIPTS = sorted(
    path
    for path in (
        *ROOT.glob("*.py"),
        *(ROOT / "miniature").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        ROOT / "hw2_data/prepare.py",
    )
    if 'if __name__ == "__main__":' in path.read_text()
)

NUMBER = r"\d+(?:[.,]\d+)*(?:e-?\d+)?"
UNIT = r"(?: ?(%|dB|s|seconds|minutes|times|GB)(?!\w))"
QUOTED = rf"({NUMBER}(?:; {NUMBER})*){UNIT}? <!-- ([a-z0-9-]+) -->"
BANNED = (
    "told", "hears", "heard", "asks", "whatever", "wherever", "where there is none", "none given", "had better", "goes by", "of its own",
    "as it was", "anew", "beside", "can't be had",
)  # fmt: skip


def blocks_of(page: Path) -> list[str]:
    """Return the code blocks of a page, and the commands in its tables."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^    (python .*)$", text, re.M)
    return [*blocks, *indented, *re.findall(r"`(python [^`]+)`", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_on_a_page_parses(page: Path) -> None:
    for block in blocks_of(page):
        for command in commands_in(block):
            parse(command)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_help_shows_examples_that_parse(script: Path) -> None:
    name = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    examples = commands_in(importlib.import_module(name).__doc__ or "")
    own = [command for command in examples if Path(command[0]).name == script.name]
    assert own, f"{script.name}: its docstring, which --help shows, has no example"
    for command in own:
        parse(command)


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_images_of_a_page_exist(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", without_code(page.read_text())):
        if "://" not in link:
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors_of(target), f"{page.name}: {link}#{anchor}"


def anchors_of(page: Path) -> list[str]:
    """Return the anchors that a code host gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_make_targets_named_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)", (ROOT / "README.md").read_text(), re.M))
    assert {first or second for first, second in named} <= targets


def quick_blocks() -> list[str]:
    """Return the blocks that the README marks as quick."""
    return re.findall(r"<!-- quick -->\n```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("block", quick_blocks(), ids=lambda block: block.split()[1])
def test_quick_commands_run_as_they_stand(block: str, tmp_path: Path) -> None:
    """Run each in a folder with links to the repository's files; `python` is the one that runs the tests."""
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".sh") or path.name in ("miniature", "checkpoints"):
            (tmp_path / path.name).symlink_to(path)
    before = {path.name for path in tmp_path.iterdir()}
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in block.splitlines():
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    assert {path.name for path in tmp_path.iterdir()} - before <= {"out", "runs"}
    outputs = set(re.findall(r"--(?:output|grid|save-noise|run) (\S+)", block))
    assert all((tmp_path / name).exists() for name in outputs)
    assert all(any((tmp_path / name).rglob("*.*")) for name in outputs if (tmp_path / name).is_dir())


# ---------------------------------------------------------------- figures and words


def without_code(text: str) -> str:
    """Return a page without its code blocks and inline code."""
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)


def values_of(text: str) -> list[float]:
    """Return the numbers of a cell without their spreads."""
    return [float(number.replace(",", "")) for number in re.findall(NUMBER, re.sub(rf"\+- {NUMBER}", "", text))]


def result_rows() -> list[tuple[str, str]]:
    """Return (name, value) of every row of docs/results.md."""
    return re.findall(r"^\| `([\w-]+)` \| [^|]+ \| ([^|]+) \|", (ROOT / "docs" / "results.md").read_text(), re.M)


def test_every_row_of_the_results_has_a_name_of_one_meaning() -> None:
    names = [name for name, _ in result_rows()]
    assert len(names) > 100
    assert len(names) == len(set(names))


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_figure_equals_its_row_of_the_results(page: Path) -> None:
    rows, text = dict(result_rows()), without_code(page.read_text())
    quoted = re.findall(QUOTED, text)
    marks = re.findall("<!-- (?:quick|make bench|end of make bench) -->", text)
    assert len(quoted) + len(marks) == text.count("<!--"), "a comment has no figure before it"
    for numbers, unit, name in quoted:
        assert name in rows, f"docs/results.md has no row {name}"
        assert unit in rows[name] or unit == "%", f"{name}: {numbers} {unit}, {rows[name]} in docs/results.md"
        factor = 100 if unit == "%" and "%" not in rows[name] else 1
        values = [value * factor for value in values_of(rows[name])]
        for number in numbers.split("; "):  # in the row's order
            digits = 9 if "e" in number else len(number.partition(".")[2])
            rounded, (value,) = [round(value, digits) for value in values], values_of(number)
            assert value in rounded, f"{name}: {number}, {rows[name]} in docs/results.md"
            values = values[rounded.index(value) + 1 :]


def test_every_figure_with_a_unit_in_the_readme_names_its_row() -> None:
    text = re.sub(QUOTED, "", without_code((ROOT / "README.md").read_text()))
    text = re.sub(r"(?<=\d) GB of disk|https?://\S+", "", text)
    assert not re.findall(rf"{NUMBER}{UNIT}", text)


def test_every_row_of_a_table_of_measurements_in_the_readme_names_its_row() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text(), re.M)
    measured = [table.splitlines() for table in tables if table.splitlines()[0].endswith("| bar |")]
    assert len(measured) >= 3
    for head, _, *rows in measured:
        assert all(re.search(QUOTED, row) for row in rows), head


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 12 * 1024
    assert text.count(b"\n") <= 180


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_is_plain(page: Path) -> None:
    assert not banned_words(without_code(page.read_text()))


@pytest.mark.parametrize("source", PYTHON_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_of_the_code_is_plain(source: Path) -> None:
    """Of docstrings, helps and messages (strings of four words or more), comments, and names of functions."""
    text = source.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    names = [node.name.replace("_", " ") for node in nodes if isinstance(node, ast.FunctionDef)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    prose = [string for string in strings if len(string.split()) > 3] + names + comments
    assert not [part for part in prose if part not in BANNED and banned_words(part)]


def banned_words(text: str) -> list[str]:
    """Return the banned words of a text."""
    words = " ".join(text.lower().split())
    return [word for word in BANNED if re.search(rf"\b{word}\b", words)]


# ---------------------------------------------------------------- docs/extending.md

EXTENDING = (ROOT / "docs" / "extending.md").read_text()


@pytest.mark.parametrize(
    "diff", re.findall(r"^```diff\n(.*?)^```", EXTENDING, re.M | re.S), ids=lambda diff: diff.split()[1]
)
def test_a_diff_that_extends_the_code_applies(diff: str) -> None:
    done = subprocess.run(["git", "apply", "--check", "-"], input=diff, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_library_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```", EXTENDING, re.M | re.S)
    exec(example, {})
    with Image.open("out/three.png") as image:
        assert image.size == (28, 28)
