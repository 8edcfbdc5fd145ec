"""--track: what a tracker gets, and what happens without it."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_tracker import SOURCE, stand_in, without

from runtime.cli import BadInput
from runtime.device import detect
from runtime.files import ROOT
from runtime.record import Record
from training.loop import LoopConfig, Trained, TrainingRun
from training.schedule import LearningRate
from training.tracking import Track, check_tracker


@dataclass(frozen=True)
class Settings:
    """The settings of a script."""

    output: Path = Path("runs/words")
    seed: int = 3


def train(folder: Path, track: Track, steps: int = 4, show: bool = True) -> list[float]:
    """Train one weight, whose loss is read at every second step; return these losses."""
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(network.parameters())
    rate = LearningRate(0.1, 0, 0.0)
    config = LoopConfig("test", folder, steps, 8, rate, log_every=2, save_every=0, show=show, track=track)
    record = Record(Settings(), detect("cpu"))
    run, losses = TrainingRun(config, {}, Trained(network, optimizer), record), []
    for step in run:
        run.update(network(torch.ones(1, 1)).square().mean())
        if step % 2:
            losses.append(record.metrics["loss"])
        if step == 2:
            run.log.show(run.step, accuracy=0.5)
    run.finish()
    return losses


def test_a_tracker_gets_the_settings_and_every_value_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = stand_in(tmp_path, monkeypatch, "trackio")
    losses = train(tmp_path / "fish", "trackio")
    first, *logged, last = tracker.calls
    config = {"output": "runs/words", "seed": 3}
    assert first == ("init", {"project": "test", "name": "fish", "config": config, "resume": "allow"})
    assert last == ("finish",)
    assert [step for _, step, _ in logged] == [2, 3, 4]
    assert logged[1] == ("log", 3, {"accuracy": 0.5})
    assert [values["loss"] for _, _, values in logged[::2]] == losses
    assert all(set(values) == {"loss", "images_s", "lr"} for _, _, values in logged[::2])
    assert list((tmp_path / "fish" / "tensorboard").iterdir())  # as well


def test_a_run_that_continues_goes_on_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = stand_in(tmp_path, monkeypatch)
    train(tmp_path / "run", "wandb", steps=2)
    train(tmp_path / "run", "wandb", steps=4)
    assert [call[1] for call in tracker.calls if call[0] == "log"] == [2, 3, 4]
    assert [call[0] for call in tracker.calls].count("init") == 2


def test_without_the_flag_no_tracker_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "trackio"):
        without(name, monkeypatch)
    train(tmp_path, None)
    assert LoopConfig.track is None


def test_only_the_process_that_shows_the_training_tracks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = stand_in(tmp_path, monkeypatch)
    train(tmp_path, "wandb", show=False)
    assert not tracker.calls


def test_no_requirements_file_names_a_tracker() -> None:
    files = [*ROOT.glob("requirements*.txt"), *ROOT.glob("*/requirements*.txt"), ROOT / "pyproject.toml"]
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert not [line for line in lines if "wandb" in line or "trackio" in line]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_an_absent_tracker_is_named_with_the_way_to_install_it(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without(name, monkeypatch)
    with pytest.raises(BadInput, match=rf"^--track {name}: .*{name}.*; pip install {name}, or leave the flag out$"):
        check_tracker(name)


def test_a_tracker_that_fails_on_import_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text('raise AttributeError("numpy has no float_\\nsee the notes")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(
        BadInput, match="^--track wandb: numpy has no float_; pip install wandb, or leave the flag out$"
    ):
        check_tracker("wandb")


def test_a_folder_of_a_trackers_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wandb leaves one where it is run."""
    (tmp_path / "wandb").mkdir()
    without("wandb", monkeypatch)
    del sys.modules["wandb"]
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BadInput, match="--track wandb: the package is not installed; pip install wandb"):
        check_tracker("wandb")


def test_a_tracker_that_refuses_ends_the_training_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, source='def init(**options):\n    raise ValueError("no account\\nlog in first")\n')
    with pytest.raises(BadInput, match="^--track wandb: no account$"):
        train(tmp_path / "run", "wandb")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("function", ["log", "finish"])
def test_a_tracker_that_fails_later_is_one_warning(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = f"\ndef {function}(*values, **options):\n    raise ConnectionError('the server is gone')\n"
    stand_in(tmp_path, monkeypatch, source=SOURCE + fails)
    train(tmp_path / "run", "wandb")
    warning = "warning: --track wandb: no curves there from here on (the server is gone)"
    assert capsys.readouterr().err.count(warning) == 1
    assert (tmp_path / "run" / "record.json").is_file()


def test_trackio_keeps_a_run_and_its_continuation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    losses = [loss for steps in (4, 6) for loss in train(tmp_path / "fish", "trackio", steps)]
    (run,) = trackio.Api().runs("test")
    assert (run.name, run.config["seed"]) == ("fish", 3)
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    rows = storage.get_logs("test", "fish", run_id=run.id)
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses)
