"""hw2_1.sh and P1_inference.py as a grader and a user run them, with the shipped checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHELL = str(ROOT / "hw2_1.sh")


def script(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600)


def draw(output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A few pictures in few steps."""
    record = str(output.parent / "record.json")
    quick = ("--steps", "3", "--count", "2", "--record", record)
    return script("P1_inference.py", "--output", str(output), *quick, *more)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) for p in folder.rglob("*.png")}


@pytest.mark.slow
def test_the_grading_script_writes_the_contract_from_any_folder(tmp_path: Path) -> None:
    """1,000 files, exact names, 28x28 RGB; relative output with a space and a trailing slash means the caller's folder."""
    caller = tmp_path / "some where"
    caller.mkdir()
    done = subprocess.run(["bash", SHELL, "my out/"], capture_output=True, text=True, cwd=caller, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    files = {str(p.relative_to(caller / "my out")) for p in (caller / "my out").rglob("*") if p.is_file()}
    wanted = {f"{d}/{digit}_{n:03d}.png" for d in ("mnistm", "svhn") for digit in range(10) for n in range(1, 51)}
    assert files == wanted
    for path in (caller / "my out").rglob("*.png"):
        with Image.open(path) as picture:
            assert (picture.size, picture.mode, picture.format) == ((28, 28), "RGB", "PNG")
    grades = script("P1_classifier.py", "grade", str(caller / "my out"), "--record", str(tmp_path / "grades.json"))
    assert grades.returncode == 0, grades.stderr[-2000:]


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert draw(tmp_path / name, "--digits", "4", "7").returncode == 0
    left, right = ({p.name: p.read_bytes() for p in (tmp_path / n / "svhn").iterdir()} for n in ("a", "b"))
    assert left == right
    assert set(left) == {"4_001.png", "4_002.png", "7_001.png", "7_002.png"}


@pytest.mark.parametrize("sampler", [("dpm",), ("ddim", "--eta", "1")])
def test_another_batch_changes_no_picture_by_more_than_one_grey_level(sampler: tuple[str, ...], tmp_path: Path) -> None:
    more = ("--digits", "2", "5", "8", "--sampler", *sampler)
    for batch in ("3", "8"):
        assert draw(tmp_path / batch, *more, "--batch", batch).returncode == 0
    left, right = pixels(tmp_path / "3"), pixels(tmp_path / "8")
    assert left.keys() == right.keys()
    assert max(abs(left[name] - right[name]).max() for name in left) <= 1


def test_a_part_of_the_job_gives_the_same_pictures_as_the_whole(tmp_path: Path) -> None:
    assert draw(tmp_path / "all", "--digits", "0", "1", "2").returncode == 0
    assert draw(tmp_path / "part", "--digits", "2", "--domains", "svhn").returncode == 0
    whole, part = pixels(tmp_path / "all"), pixels(tmp_path / "part")
    assert set(part) == {"svhn/2_001.png", "svhn/2_002.png"}
    assert max(abs(whole[name] - part[name]).max() for name in part) <= 1


def test_another_seed_gives_other_pictures(tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert draw(tmp_path / seed, "--digits", "3", "--seed", seed).returncode == 0
    left, right = pixels(tmp_path / "0"), pixels(tmp_path / "1")
    assert all(abs(left[name] - right[name]).mean() > 5 for name in left)


def test_files_of_the_same_name_are_replaced_and_foreign_ones_stay(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "mnistm"
    folder.mkdir(parents=True)
    (folder / "6_001.png").write_text("old")
    (folder / "mine.txt").write_text("keep me")
    done = draw(tmp_path / "out", "--digits", "6")
    assert done.returncode == 0
    assert Image.open(folder / "6_001.png").size == (28, 28)
    assert (folder / "mine.txt").read_text() == "keep me"
    assert "mine.txt" in done.stderr


def test_the_record_and_the_grid_lie_outside_the_graded_folder(tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    assert draw(tmp_path / "out", "--digits", "1", "--grid", str(grid)).returncode == 0
    assert not list((tmp_path / "out").rglob("*.json"))
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["metrics"]["pictures"] == 4
    assert record["seed"] == 0
    assert Image.open(grid).width > 2 * 28


def test_a_dry_run_checks_and_writes_nothing(tmp_path: Path) -> None:
    done = draw(tmp_path / "out", "--dry-run")
    assert done.returncode == 0
    assert "would take about" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--count", "0"), "--count 0"),
        (("--digits", "11"), "--digits 11"),
        (("--steps", "0"), "--steps"),
        (("--eta", "2"), "--eta 2"),
        (("--batch", "-5"), "--batch -5"),
        (("--checkpoint", "nowhere.safetensors"), "nowhere.safetensors does not exist"),
        (("--checkpoint", __file__), "not a safetensors file"),
        (("--device", "cuda:99"), "--device cuda:99"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, str], named: str, tmp_path: Path) -> None:
    done = draw(tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    done = draw(tmp_path / "out")
    assert done.returncode == 2
    assert "a file is in the way" in done.stderr
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("arguments", [[], ["a", "b"], [""]])
def test_the_grading_script_wants_one_folder(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", SHELL, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_without_a_venv_the_python_in_use_is_taken(tmp_path: Path) -> None:
    """A copy of the repository without .venv: the script asks PATH's python."""
    shutil.copy(SHELL, tmp_path / "hw2_1.sh")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(tmp_path / "hw2_1.sh"), "o"], capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    assert done.stdout.split() == [str(tmp_path / "P1_inference.py"), "--output=o"]
