"""What the benchmarks share: times, ratios, peak memory and the report."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.table import Settings
from benchmarks.timing import peak_memory, ratios, report, seconds, timed
from runtime.device import detect
from runtime.record import Record

CPU = torch.device("cpu")


def work(duration: float) -> str:
    time.sleep(duration)
    return "result"


def test_a_time_comes_with_the_result() -> None:
    taken, result = timed(partial(work, 0.05), CPU)
    assert result == "result"
    assert taken >= 0.05
    assert seconds(partial(work, 0.02), CPU, 3) >= 0.06


def test_ratios_are_of_each_repeat() -> None:
    assert ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is known on Linux only")
def test_the_peak_is_of_the_time_since_its_reset() -> None:
    before = peak_memory(CPU, reset=True)
    torch.ones(50_000_000).sum()  # 0.2 GB
    assert 0.15 < peak_memory(CPU) - before < 0.5
    assert peak_memory(CPU, reset=True) - before < 0.15


def test_the_report_has_mean_and_spread_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record(Settings(), detect("cpu"))
    record.add_repeats({"ours, s": [1.0, 3.0], "difference": [1e-7]})
    report(record, tmp_path / "record.json")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["ours,", "s", "2", "+-", "1", "(n", "=", "2)"], ["difference", "1e-07"]]
    metrics = json.loads((tmp_path / "record.json").read_text())["metrics"]
    assert metrics == {"repeats": {"ours, s": [1.0, 3.0], "difference": [1e-7]}}
