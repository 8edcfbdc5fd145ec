"""record.json: what a run is judged by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.cli import BadInput
from runtime.device import Machine
from runtime.record import Record

MACHINE = Machine(torch.device("cpu"), "test machine", native_bf16=False, compiler=False)


@dataclass(frozen=True)
class Settings:
    seed: int = 4
    output: Path = Path("out")


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    record = Record(Settings(), MACHINE)
    for _ in range(2):
        with record.timed("drawing"):
            pass
    record.timings["training"] = 1.23456
    record.metrics["accuracy"] = 0.5
    record.save(tmp_path / "record.json")
    return json.loads((tmp_path / "record.json").read_text())


def test_record_holds_what_a_run_is_judged_by(saved: Any) -> None:
    assert set(saved) == {
        *("script", "command", "started", "settings", "seed", "device"),
        *("machine", "threads", "versions", "revision", "root", "inputs", "timings_s", "metrics"),
    }


def test_record_keeps_settings_seed_and_metrics(saved: Any) -> None:
    assert saved["settings"] == {"seed": 4, "output": "out"}
    assert (saved["seed"], saved["metrics"], saved["device"]) == (4, {"accuracy": 0.5}, "cpu")


def test_record_rounds_its_seconds_to_milliseconds(saved: Any) -> None:
    assert saved["timings_s"]["training"] == 1.235


def test_record_names_the_versions(saved: Any) -> None:
    assert saved["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_place_of_a_record_that_is_written_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Record(Settings(), MACHINE).save(tmp_path / "a.json")
    assert not capsys.readouterr().err
    Record(Settings(), MACHINE).save(tmp_path / "a.json", name_it=True)
    assert capsys.readouterr().err == f"record: {tmp_path / 'a.json'}\n"


def test_timed_adds_up_and_counts_failed_blocks_too() -> None:
    record = Record(Settings(), MACHINE, timings={"work": 10.0})
    with pytest.raises(ZeroDivisionError), record.timed("work"):
        raise ZeroDivisionError
    assert 10.0 < record.timings["work"] < 11.0


def test_a_place_that_was_named_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    @dataclass(frozen=True)
    class Run:
        record: Path = tmp_path / "runs" / "record.json"

    Record(Run(tmp_path / "elsewhere.json"), MACHINE)
    with pytest.raises(BadInput, match="^--record .*file is a file, name a folder"):
        Record(Run(tmp_path / "file" / "record.json"), MACHINE)


def test_a_default_place_that_cannot_be_written_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").touch()

    @dataclass(frozen=True)
    class Run:
        record: Path = tmp_path / "runs" / "record.json"

    Record(Run(), MACHINE).save(Run.record, name_it=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no record of this run, ")
    assert str(Run.record) in line
    with pytest.raises(OSError, match="other.json"):
        Record(Run(), MACHINE).save(tmp_path / "runs" / "other.json")


@dataclass(frozen=True)
class Named:
    record: Path = Path("default.json")


@pytest.mark.parametrize("content", ["", '{"script": "P1_inference.py"}'])
def test_a_record_takes_the_place_of_an_earlier_one(tmp_path: Path, content: str) -> None:
    place = tmp_path / "a.json"
    place.write_text(content)
    Record(Named(place), MACHINE).save(place)
    assert json.loads(place.read_text())["script"]


@pytest.mark.parametrize("name", ["input.json", "list.json", "notes.txt", "new.png", "new.PNG", "new.safetensors"])
def test_a_record_takes_the_place_of_no_other_file(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    if "new" not in name:
        place.write_text({"input.json": '{"0": {}}', "list.json": "3"}.get(name, "notes"))
    before = place.read_text() if place.exists() else None
    with pytest.raises(BadInput, match=f"--record .*{name} is the name of another file"):
        Record(Named(place), MACHINE)
    assert (place.read_text() if place.exists() else None) == before
