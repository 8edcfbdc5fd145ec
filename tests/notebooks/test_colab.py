"""notebooks/colab.ipynb: runs from top to bottom in a tiny form, takes the course's files, keeps a torch that is new enough."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from page_commands import parse
from small_digits import TINY

from diffusion.schedule import cosine
from P1_model import Network, UNet, save_network
from runtime.files import ROOT

TINY_FORM = {
    "COUNT": 40,
    "P1_FLAGS": "--preset tiny --steps 3 --batch 16 --eval-count 1 --final-count 1 --candidates 1 --device cpu",
    "P3_FLAGS": "--steps 4 --validate-every 0 --device cpu",
    "REPORT_FLAGS": "--problems P2 --device cpu",
}


def notebook(**parameters: Any) -> Any:
    """Return the notebook; a cell after the one tagged `parameters` sets these, as papermill does it."""
    pages = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
    (place,) = [k for k, cell in enumerate(pages.cells) if "parameters" in cell.metadata.get("tags", [])]
    defaults: dict[str, Any] = {}
    exec(pages.cells[place].source, defaults)
    assert parameters.keys() <= defaults.keys()
    assignments = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    pages.cells.insert(place + 1, new_code_cell(assignments))
    return pages


def files_of(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in paths}


def copy_repository(folder: Path) -> None:
    """Copy what git tracks, or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for path in (folder / name for name in names if (ROOT / name).is_file()):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path.relative_to(folder), path)


def test_the_notebook_is_valid_and_without_outputs() -> None:
    pages = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
    nbformat.validate(pages)
    code = [cell for cell in pages.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies in a copy of the repository without .venv, leaves records there, and shows the report's page at its end."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    torch.manual_seed(0)
    network = Network(
        UNet(replace(TINY, timesteps=100)).eval(), cosine(100), "cosine", {"name": "ddim", "steps": 1}, {}
    )
    save_network(tiny := tmp_path / "tiny.safetensors", network)  # its thousand digits and its DDIM cost seconds
    clone, output = tmp_path / "clone", tmp_path / "results"
    copy_repository(clone)
    before = files_of(clone)

    pages = notebook(OUTPUT=str(output), CHECKPOINT=str(tiny), UNET=str(tiny), **TINY_FORM)
    place = {"metadata": {"path": str(clone / "notebooks")}}
    NotebookClient(pages, timeout=600, kernel_name="python3", resources=place).execute()

    assert not [name for name in files_of(clone) - before if not name.startswith("runs/")]
    assert len(list((output / "digits").rglob("*.png"))) == 1000
    names = ["p1/best.safetensors", "grade.json", "zeroshot/record.json", "words/learned_new1.safetensors"]
    assert not [name for name in names if not (output / name).is_file()]
    assert len(list((output / "graded_faces").glob("*.png"))) == len(list((output / "drawn").glob("*.png"))) == 4
    shown = [one.data for cell in pages.cells for one in cell.get("outputs", []) if "data" in one]
    assert (
        len([data for data in shown if "image/png" in data]) == 10
    )  # sheet of the training, 4 faces, cases, 4 of the word
    html = shown[-1]["text/html"]
    assert "<iframe srcdoc=" in html
    assert "P2: " in html


class Recorder:
    """A kernel that runs no command; report.py leaves a page."""

    def __init__(self, output: Path) -> None:
        self.output, self.commands = output, list[list[str]]()
        self.user_ns = {"_exit_code": 0}

    def system(self, command: str) -> None:
        words = shlex.split(command)
        self.commands.append([word.removeprefix(f"{ROOT}/") for word in words[1:]])
        if words[1].endswith("report.py"):
            (self.output / "report").mkdir()
            (self.output / "report" / "index.html").write_text("the page")


def commands_of(pages: Any, output: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the commands that the notebook would run, each from the script on."""
    recorder = Recorder(output)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which the notebook changes
    monkeypatch.chdir(ROOT / "notebooks")
    values: dict[str, Any] = {"get_ipython": lambda: recorder}
    for cell in pages.cells:
        if cell.cell_type == "code":
            exec(cell.source, values)
            values["show"] = lambda *paths: None
    return recorder.commands


def test_the_courses_files_and_a_hub_name_are_what_the_scripts_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = tmp_path / "data", tmp_path / "results"
    for folder in ("digits", "face/noise", "clip_zeroshot/val", "textual_inversion/0"):
        (data / folder).mkdir(parents=True)
    (data / "face" / "UNet.pt").touch()
    pages = notebook(OUTPUT=str(output), DATA=str(data), MODEL="some/hub-name", P3_FLAGS="--low-memory")
    commands = commands_of(pages, output, monkeypatch)
    for command in commands:
        if command[0].endswith(".py"):
            parse(command)

    trained = f"{output}/p1/best.safetensors"
    learned = [
        "--model",
        "some/hub-name",
        "--images",
        f"{data}/textual_inversion/0",
        "--token",
        "<new1>",
        "--init",
        "dog",
    ]
    drawn = ["--embeddings", f"{output}/words", "--prompt", "a red <new1> on a white background"]
    assert commands == [
        ["P1_training.py", "--data", f"{data}/digits", "--output", f"{output}/p1"],
        ["hw2_1.sh", f"{output}/digits", trained],
        ["P1_classifier.py", "grade", f"{output}/digits", "--record", f"{output}/grade.json"],
        ["P2_ddim.py", "--model", f"{data}/face/UNet.pt", "--seeds", "0-3", "--output", f"{output}/faces"]
        + ["--save-noise", f"{output}/noise"],
        ["hw2_2.sh", f"{data}/face/noise", f"{output}/graded_faces", f"{data}/face/UNet.pt"],
        ["P3_clip_zeroshot.py", "--images", f"{data}/clip_zeroshot/val", "--preset", "report"]
        + ["--output", f"{output}/zeroshot"],
        ["P3_textual_inversion.py", *learned, "--output", f"{output}/words", "--run", f"{output}/inversion", "--low-memory"],
        ["P3_inference.py", "--model", "some/hub-name", *drawn, "--output", f"{output}/drawn"],
        ["report.py", "--output", f"{output}/report", "--digits", trained, "--data", str(data), "--model", "some/hub-name"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"DATA": "nowhere"}, "DATA = nowhere is not a folder"),
        ({"DATA": "{folder}"}, "DATA = .* holds none of digits, face, clip_zeroshot, textual_inversion"),
        ({"CHECKPOINT": "mine/best"}, "CHECKPOINT = mine/best does not exist"),
        ({"UNET": "UNet.pt"}, "UNET = UNet.pt does not exist"),
        ({"MODEL": "/nowhere/model", "IMAGES": "{folder}"}, "MODEL = /nowhere/model does not exist"),
        ({"MODEL": "some/hub-name"}, "MODEL needs images to learn from"),
        ({"IMAGES": "{folder}"}, "IMAGES needs MODEL"),
    ],
)
def test_wrong_parameters_are_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, str], message: str
) -> None:
    (folder := tmp_path / "folder").mkdir()
    filled = {name: value.format(folder=folder) for name, value in parameters.items()}
    monkeypatch.setattr(Recorder, "system", lambda *_: pytest.fail("a command ran"))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        commands_of(notebook(OUTPUT=str(tmp_path / "results"), **filled), tmp_path, monkeypatch)


def up_to_the_installation(output: Path) -> Any:
    pages = notebook(OUTPUT=str(output))
    (last,) = [k for k, cell in enumerate(pages.cells) if cell.id == "requirements"]
    pages.cells = pages.cells[: last + 1]
    return pages


@pytest.mark.parametrize(
    ("releases", "constraints"),
    [
        ({"torch": "2.12.0+cu126", "torchvision": "0.27.0"}, "torch==2.12.0+cu126\ntorchvision==0.27.0\n"),
        ({"torch": "2.12.0+cu126", "torchvision": "0.25.0"}, "torch==2.12.0+cu126\n"),
        ({"torch": "2.12.0+cu126"}, "torch==2.12.0+cu126\n"),
        ({"torch": "2.9.1", "torchvision": "0.24.1"}, ""),
        ({}, ""),
    ],
)
def test_the_installation_keeps_a_torch_that_is_new_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, releases: dict[str, str], constraints: str
) -> None:
    def version(name: str) -> str:
        if name not in releases:
            raise importlib.metadata.PackageNotFoundError(name)
        return releases[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    commands = commands_of(up_to_the_installation(tmp_path), tmp_path, monkeypatch)
    file = tmp_path / "constraints.txt"
    assert commands == [["-m", "pip", "install", "-q", "-r", "requirements.txt", "-c", str(file)]]
    assert file.read_text() == constraints


def test_nothing_is_installed_if_nothing_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands_of(up_to_the_installation(tmp_path), tmp_path, monkeypatch) == []
