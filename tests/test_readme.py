"""README and docs against the scripts: every command parses, quick blocks run, and every link has its file."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import tyro

from runtime.cli import split_like
from runtime.files import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "hw2_data" / "README.md",
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
STARTS = ("python ", "torchrun ", "accelerate launch ")


def commands_in(text: str) -> list[list[str]]:
    """Return [script, argument, ..] of every line that starts a script, without the remark behind it."""
    commands = []
    for line in text.splitlines():
        line = line.strip().lstrip("`")
        if line.startswith(STARTS):
            words = shlex.split(re.split(r"\s{2,}|`|\s#\s", line)[0])
            script = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
            if script is not None:
                commands.append(words[script:])
    return commands


def blocks_of(page: Path) -> list[str]:
    """Return the code blocks of a page, and the commands in its tables."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^    (python .*)$", text, re.M)
    return [*blocks, *indented, *re.findall(r"`(python [^`]+)`", text)]


def parse(command: list[str]) -> None:
    """Parse the arguments as the script does, without running it."""
    path = (ROOT / command[0]).resolve()
    assert path.is_file(), f"{command[0]} does not exist"
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    main = importlib.import_module(name).main
    kind: Any = next(iter(typing.get_type_hints(main).values()))
    try:
        tyro.cli(kind, args=split_like(command[1:])[0], config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as error:
        pytest.fail(f"{shlex.join(command)}: refused ({error.code})")


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
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_make_targets_named_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)", (ROOT / "README.md").read_text(), re.M))
    assert {first or second for first, second in named} <= targets


def quick_blocks() -> list[str]:
    """Return the blocks that the README marks as quick."""
    return re.findall(r"<!-- quick -->\n```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("block", quick_blocks(), ids=lambda block: shlex.split(block)[1])
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
