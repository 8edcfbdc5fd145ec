"""Environments: requirements.txt, pyproject.toml and uv.lock name the same requirements, and the lock only public files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from runtime.files import ROOT

tomllib: Any = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK_TEXT = (ROOT / "uv.lock").read_text()
LOCK = tomllib.loads(LOCK_TEXT)
LISTS = {
    "requirements.txt": (PROJECT["project"]["dependencies"], "requires-dist"),
    "requirements-dev.txt": (PROJECT["dependency-groups"]["dev"], "requires-dev"),
}


def requirements_of(file: str) -> list[str]:
    """Return the requirements of a file without its comments."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("file", LISTS)
def test_the_project_names_the_requirements_of_the_file(file: str) -> None:
    assert LISTS[file][0] == requirements_of(file)


@pytest.mark.parametrize("file", LISTS)
def test_the_lock_is_of_these_requirements(file: str) -> None:
    """Otherwise: uv lock."""
    (project,) = [package for package in LOCK["package"] if package["source"] == {"virtual": "."}]
    metadata = project["metadata"][LISTS[file][1]]
    locked = {one["name"]: one["specifier"] for one in (metadata["dev"] if isinstance(metadata, dict) else metadata)}
    required = {canonicalize_name(one.name): one.specifier for one in map(Requirement, requirements_of(file))}
    assert locked.keys() == required.keys()
    assert not [name for name, specifier in required.items() if specifier != type(specifier)(locked[name])]


def test_the_lock_names_the_public_index_only() -> None:
    files = [file for package in LOCK["package"] for file in [*package.get("wheels", []), package.get("sdist")] if file]
    assert len(files) > 1000
    assert not [
        file for file in files if not re.fullmatch(r"https://files\.pythonhosted\.org/packages/\S+", file["url"])
    ]
    assert not [file for file in files if not re.fullmatch(r"sha256:[0-9a-f]{64}", file["hash"])]
    sources = [package["source"] for package in LOCK["package"]]
    assert [source for source in sources if source != {"registry": "https://pypi.org/simple"}] == [{"virtual": "."}]
    assert set(re.findall(r"\w+://[^/\"]*", LOCK_TEXT)) == {"https://pypi.org", "https://files.pythonhosted.org"}
    assert "file:" not in LOCK_TEXT


def test_uv_has_no_settings_of_an_index() -> None:
    assert PROJECT["tool"]["uv"].keys() == {"package", "environments"}
    assert PROJECT["tool"]["uv"]["package"] is False
    assert not (ROOT / "uv.toml").exists()


def test_the_locked_releases_are_those_noted_as_tested() -> None:
    locked: dict[str, set[str]] = {}
    for package in LOCK["package"]:
        locked.setdefault(package["name"], set()).add(package.get("version", ""))
    noted = re.findall(r"^([\w-]+)\S+ +# (\d+(?:\.\d+)+) ", (ROOT / "requirements.txt").read_text(), re.M)
    assert len(noted) > 8
    assert not [
        (name, release)
        for name, release in noted
        if not any(f"{version}.".startswith(f"{release}.") for version in locked[canonicalize_name(name)])
    ]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(
    ("arguments", "expected", "absent"),
    [
        ([], "bin/uv sync --frozen --inexact  || ", "-m pip"),
        (["PYTHON=python3.12"], 'bin/uv sync --frozen --inexact --python "python3.12" || ', "-m pip"),
        (["UV="], ".venv/bin/python -m pip install --progress-bar on -r requirements.txt -r requirements-dev.txt\n", "uv "),
    ],
)  # fmt: skip
def test_make_setup_takes_uv_if_there_is_one(
    tmp_path: Path, arguments: list[str], expected: str, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHON", "UV", "MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "uv.lock"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["make", "--dry-run", "setup", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert expected in done.stdout
    assert absent not in done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_setup_takes_pip_if_uv_fails(tmp_path: Path) -> None:
    """As where only a mirror of the index is in reach."""
    (tmp_path / "uv").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").write_text(
        '#!/bin/sh\necho "$@" >> calls\n[ "$2" != venv ] || { mkdir -p .venv/bin; cp "$0" .venv/bin/; }\n'
    )
    for name in ("uv", "python"):
        (tmp_path / name).chmod(0o755)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "uv.lock"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["make", "setup", f"UV={tmp_path / 'uv'}", f"PYTHON={tmp_path / 'python'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "== uv failed: pip instead" in done.stdout
    calls = (tmp_path / "calls").read_text()
    assert "-m venv .venv" in calls
    assert "-m pip install --progress-bar on -r requirements.txt -r requirements-dev.txt" in calls
    assert (tmp_path / ".venv" / ".done").exists()
