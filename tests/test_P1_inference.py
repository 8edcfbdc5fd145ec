"""hw2_1.sh and P1_inference.py as a grader and a user run them, with the shipped checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from digits.classifier import grade_folder, misclassified, shipped_classifiers
from P1_inference import Settings, main
from runtime.cli import BadInput
from runtime.files import ROOT

SHELL = str(ROOT / "hw2_1.sh")


def draw(output: Path, **more: Any) -> dict[str, Any]:
    """Sample a few images in few steps by the script's main; return its record."""
    record = output.parent / "record.json"
    main(Settings(**{"output": output, "steps": 3, "count": 2, "retries": 0, "record": record, **more}))
    values: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    return values


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) for p in folder.rglob("*.png")}


@pytest.mark.slow
def test_the_grading_script_writes_the_contract_from_any_folder(tmp_path: Path) -> None:
    """1,000 files, exact names, 28x28 RGB. A relative output, here with a space and a trailing slash, lies in the caller's folder."""
    caller = tmp_path / "some where"
    caller.mkdir()
    done = subprocess.run(["bash", SHELL, "my out/"], capture_output=True, text=True, cwd=caller, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    files = {str(p.relative_to(caller / "my out")) for p in (caller / "my out").rglob("*") if p.is_file()}
    expected = {f"{d}/{digit}_{n:03d}.png" for d in ("mnistm", "svhn") for digit in range(10) for n in range(1, 51)}
    assert files == expected
    for path in (caller / "my out").rglob("*.png"):
        with Image.open(path) as image:
            assert (image.size, image.mode, image.format) == ((28, 28), "RGB", "PNG")
    grades = grade_folder(caller / "my out", shipped_classifiers(torch.device("cpu")))
    assert grades["mean"] > 0.9


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / name, digits=(4, 7))
    left, right = ({p.name: p.read_bytes() for p in (tmp_path / n / "svhn").iterdir()} for n in ("a", "b"))
    assert left == right
    assert set(left) == {"4_001.png", "4_002.png", "7_001.png", "7_002.png"}


@pytest.mark.parametrize("sampler", [{"sampler": "dpm"}, {"sampler": "ddim", "eta": 1.0}])
def test_another_batch_changes_no_image_by_more_than_one_grey_level(sampler: dict[str, Any], tmp_path: Path) -> None:
    for batch in (3, 8):
        draw(tmp_path / str(batch), digits=(2, 5, 8), batch=batch, **sampler)
    left, right = pixels(tmp_path / "3"), pixels(tmp_path / "8")
    assert left.keys() == right.keys()
    assert max(abs(left[name] - right[name]).max() for name in left) <= 1


def test_a_part_of_the_job_gives_the_same_images_as_the_whole(tmp_path: Path) -> None:
    draw(tmp_path / "all", digits=(0, 1, 2))
    draw(tmp_path / "part", digits=(2,), domains=("svhn",))
    whole, part = pixels(tmp_path / "all"), pixels(tmp_path / "part")
    assert set(part) == {"svhn/2_001.png", "svhn/2_002.png"}
    assert max(abs(whole[name] - part[name]).max() for name in part) <= 1


def test_a_digit_and_a_domain_given_twice_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "out", digits=(3, 3), domains=("svhn", "svhn"))
    assert len(pixels(tmp_path / "out")) == 2
    assert "2 pictures in" in capsys.readouterr().out


def test_another_seed_gives_other_images(tmp_path: Path) -> None:
    for seed in (0, 1):
        draw(tmp_path / str(seed), digits=(3,), seed=seed)
    left, right = pixels(tmp_path / "0"), pixels(tmp_path / "1")
    assert all(abs(left[name] - right[name]).mean() > 5 for name in left)


def test_retries_replace_misread_images_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps give poor images: some are misread, and only those may change."""
    more: dict[str, Any] = {"steps": 2, "count": 3, "batch": 30}
    draw(tmp_path / "plain", **more)
    capsys.readouterr()
    misread = draw(tmp_path / "again", **more, retries=4)["metrics"]["misread"]
    plain, again = pixels(tmp_path / "plain"), pixels(tmp_path / "again")
    images = torch.from_numpy(np.stack(list(plain.values()))).permute(0, 3, 1, 2).to(torch.uint8)
    digits = torch.tensor([int(Path(name).name[0]) for name in plain])
    domains = torch.tensor([int(name.startswith("svhn")) for name in plain])
    rows = misclassified(shipped_classifiers(torch.device("cpu")), images, digits, domains).tolist()
    assert {n for n in plain if (plain[n] != again[n]).any()} == {list(plain)[row] for row in rows}
    assert sum(misread["first_try"].values()) == len(rows)
    graded = grade_folder(tmp_path / "again", shipped_classifiers(torch.device("cpu")))
    left = {name: round((1 - graded[name]["accuracy"]) * 30) for name in ("mnistm", "svhn")}
    assert misread["after_retries"] == left
    assert sum(left.values()) < len(rows)
    printed = capsys.readouterr().out
    assert f"first try, by the shipped classifiers: {len(rows)} of 60 misread" in printed
    assert printed.index("first try") < printed.index("after retries") < printed.index("60 pictures in")
    assert "selected by these classifiers" in printed


def test_files_of_the_same_name_are_replaced_and_foreign_ones_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "mnistm"
    folder.mkdir(parents=True)
    (folder / "6_001.png").write_text("old")
    (folder / "mine.txt").write_text("keep me")
    draw(tmp_path / "out", digits=(6,))
    assert Image.open(folder / "6_001.png").size == (28, 28)
    assert (folder / "mine.txt").read_text() == "keep me"
    assert "mine.txt" in capsys.readouterr().err


def test_the_record_and_the_grid_lie_outside_the_graded_folder(tmp_path: Path) -> None:
    record = draw(tmp_path / "out", digits=(1,), grid=tmp_path / "grid.png")
    assert not list((tmp_path / "out").rglob("*.json"))
    assert record["metrics"]["pictures"] == 4
    assert record["seed"] == 0
    assert Image.open(tmp_path / "grid.png").width > 2 * 28


def test_a_dry_run_checks_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "out", dry_run=True)
    assert "would take about" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"count": 0}, "--count 0"),
        ({"count": 1000}, "--count 1000"),
        ({"digits": (11,)}, "--digits 11"),
        ({"steps": 0}, "--steps"),
        ({"eta": 2.0}, "--eta 2"),
        ({"batch": -5}, "--batch -5"),
        ({"retries": -1}, "--retries -1"),
        ({"digits": ()}, "--digits names none"),
        ({"domains": ()}, "--domains names none"),
        ({"guidance": math.nan}, "--guidance nan"),
        ({"interval": (0.9, 0.1)}, "--interval 0.9 0.1"),
        ({"grid": ROOT}, "--grid .* is a folder"),
        ({"record": Path(__file__) / "record.json"}, "--record .* is a file, name a folder"),
        ({"model": Path("nowhere.safetensors")}, "nowhere.safetensors does not exist"),
        ({"model": Path(__file__)}, "is a text, not a file of tensors"),
        ({"device": "cuda:99"}, "--device cuda:99"),
    ],
)
def test_bad_input_is_named_and_nothing_written(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        draw(tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_output_that_is_a_file_is_refused_and_kept(dry_run: bool, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(BadInput, match="a file is in the way"):
        draw(tmp_path / "out", dry_run=dry_run)
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("arguments", [[], ["a", "b", "c"], [""], ["a", ""]])
def test_the_grading_script_takes_one_folder_and_perhaps_a_checkpoint(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", SHELL, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.parametrize(("more", "flags"), [([], []), (["my own.safetensors"], ["--model=my own.safetensors"])])
def test_the_grading_script_passes_on_a_checkpoint(
    more: list[str], flags: list[str], shell: Callable[..., Any]
) -> None:
    expected = ["{root}/P1_inference.py", "--output=o", *flags]
    assert shell("hw2_1.sh", "o", *more) == (0, expected, "")


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., tuple[int, list[str], str]]:
    """`shell(script, *arguments, pythons="python", torch=True)` runs a copy with stand-ins for Python that print their arguments."""

    def run(script: str, *arguments: str, pythons: str = "python", torch: bool = True) -> tuple[int, list[str], str]:
        root = tmp_path / "the repository"
        (root / "bin").mkdir(parents=True)
        shutil.copy(ROOT / script, root)
        for tool in ("dirname", "bash"):
            (root / "bin" / tool).symlink_to(shutil.which(tool) or "")
        for name in pythons.split():
            python = root / "bin" / name
            python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {int(not torch)}\nprintf "%s\\n" "$@"\n')
            python.chmod(0o755)
        environment = {"PATH": str(root / "bin"), "CDPATH": f".:{tmp_path}"}
        done = subprocess.run(
            ["bash", script, *arguments], capture_output=True, text=True, cwd=root, env=os.environ | environment
        )
        lines = [line.replace(str(root), "{root}") for line in done.stdout.splitlines()]
        return done.returncode, lines, done.stderr.replace(str(root), "{root}")

    return run


ARGUMENTS = {"hw2_1.sh": ["o"], "hw2_2.sh": ["n", "o", "u"], "hw2_3.sh": ["i", "o", "m"]}


@pytest.mark.parametrize("script", ARGUMENTS)
@pytest.mark.parametrize("pythons", ["python", "python3", "python python3"])
def test_without_a_venv_the_python_on_the_path_is_used(script: str, pythons: str, shell: Callable[..., Any]) -> None:
    """CDPATH is set in the caller's shell, which makes `cd` print and look elsewhere."""
    code, lines, errors = shell(script, *ARGUMENTS[script], pythons=pythons)
    assert (code, errors) == (0, "")
    assert lines[0] in ("{root}/P1_inference.py", "{root}/P2_ddim.py", "{root}/P3_inference.py")
    assert len(lines) == 1 + len(ARGUMENTS[script])


@pytest.mark.parametrize("script", ARGUMENTS)
@pytest.mark.parametrize("pythons", ["python", ""])
def test_without_torch_the_way_to_get_it_is_named(script: str, pythons: str, shell: Callable[..., Any]) -> None:
    code, lines, errors = shell(script, *ARGUMENTS[script], pythons=pythons, torch=False)
    assert (code, lines, len(errors.splitlines())) == (2, [], 1)
    assert "run make setup in {root}" in errors


@pytest.mark.parametrize("script", ARGUMENTS)
def test_the_grading_scripts_can_be_run_by_name(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
