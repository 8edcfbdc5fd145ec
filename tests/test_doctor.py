"""The doctor: what is there, what isn't, and times in minutes that follow from what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

import doctor
from digits.recipes import RECIPES
from digits.sampling import DigitSampler
from runtime.device import detect
from runtime.files import ROOT


def test_files_are_found_or_absent_and_times_are_in_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "face" / "noise").mkdir(parents=True)
    (tmp_path / "digits" / "svhn").mkdir(parents=True)
    monkeypatch.setattr(DigitSampler, "expected_seconds", lambda sampler, count: 0.27 * count)
    monkeypatch.setattr(doctor, "face_minutes", lambda _: 33.0)
    monkeypatch.setattr(doctor, "training_minutes", lambda machine, preset: {"cpu": 240.0}[preset])
    doctor.main(doctor.Settings(data=tmp_path, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device   cpu: ")
    data = {line.split()[1]: line.split()[2] for line in lines if line.startswith("data ")}
    assert {name for name, state in data.items() if state == "found"} == {"face/noise", "digits/svhn"}
    assert set(data) == set(doctor.DATA)
    for name, file in doctor.WEIGHTS.items():
        size = (ROOT / "checkpoints" / file).stat().st_size / 1e6
        assert f"weights  {name:24s}{size:.1f} MB" in lines
    times = {" ".join(line.split()[:-2]): line.split("minutes")[0].split()[-1] for line in lines if "hw2_1.sh" in line}
    assert times == {"bash hw2_1.sh out": "4.5"}
    assert [line.split("minutes")[0].split()[-1] for line in lines if "hw2_2.sh" in line] == ["33"]
    assert [line.split("minutes")[0].split()[-1] for line in lines if "P1_training.py" in line] == ["240"]


def test_minutes_are_scaled_up_from_measured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.5 s for a step of at most 16 images; 0.5 s for one layer of 19.3 GFLOP."""
    monkeypatch.setattr(doctor, "seconds", lambda work, device: 0.5)
    recipe, machine = RECIPES["tiny"], detect("cpu")
    share = recipe.batch / min(16, recipe.batch)
    assert doctor.training_minutes(machine, "tiny") == pytest.approx(0.5 * share * recipe.steps / 60)
    layer = 2 * 9 * 128**2 * 256**2 / 1e9
    assert doctor.face_minutes(machine) == pytest.approx(0.5 * (496 / layer) * 50 * 10 / 60)


def test_the_mean_time_of_three_calls_leaves_out_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    durations = iter([100.0, 1.0, 2.0, 6.0])

    def work() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr("doctor.time.perf_counter", lambda: clock[0])
    assert doctor.seconds(work, detect("cpu").device) == pytest.approx(3.0)
