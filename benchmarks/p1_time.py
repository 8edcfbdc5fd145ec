"""Time from the first step of a P1 training to a mean accuracy of 0.99 in one of the gradings during training.

  python benchmarks/p1_time.py                          on hw2_data/digits; two minutes on a fast GPU
  python benchmarks/p1_time.py --accuracy 0.9 --steps 400 --eval-every 100

The time includes earlier gradings. That of the whole run includes the start of Python and the last grading, too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import repository_root  # noqa: F401  # isort: split
import torch

from benchmarks.timing import BENCH, report, timed
from digits.recipes import RECIPES
from P1_dataloader import describe_data
from runtime.cli import BadInput, check_fractions, run_script
from runtime.device import Device, detect
from runtime.files import ROOT, read_json
from runtime.record import Record

RECIPE = "--preset gpu --candidates 1 --resume never"


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    data: Path = ROOT / "hw2_data" / "digits"
    """Folder with mnistm/ and svhn/."""
    accuracy: float = 0.99
    """Mean accuracy of both domains to reach."""
    steps: int = RECIPES["gpu"].steps
    """Steps of the training."""
    batch: int = RECIPES["gpu"].batch
    eval_every: int = 200
    """Steps between two gradings."""
    eval_count: int = 50
    """Images per digit and domain in a grading."""
    device: Device = "auto"
    record: Path = BENCH / "p1_time.json"


def main(settings: Settings) -> None:
    """Train, and print when a grading reached the accuracy. Raises BadInput if the training fails, or if no grading reaches it."""
    check_fractions(settings, "accuracy")
    describe_data(settings.data)
    record = Record(settings, detect(settings.device))
    numbers = {"--steps": settings.steps, "--batch": settings.batch, "--eval-every": settings.eval_every}
    numbers |= {"--eval-count": settings.eval_count, "--final-count": settings.eval_count}
    flags = [*RECIPE.split(), *(str(word) for pair in numbers.items() for word in pair)]
    with tempfile.TemporaryDirectory() as folder:
        flags += ["--data", str(settings.data), "--output", folder, "--device", settings.device]
        command = [sys.executable, str(ROOT / "P1_training.py"), *flags]
        seconds, done = timed(lambda: subprocess.run(command, check=False), torch.device("cpu"))
        if done.returncode:
            raise BadInput(f"--data {settings.data}: P1_training.py ended with exit code {done.returncode}")
        metrics: dict[str, Any] = read_json(Path(folder) / "record.json")["metrics"]

    best = max(grading["accuracy"] for grading in metrics["history"])
    record.add_repeats({"best mean accuracy": [best], "whole run, s": [seconds]})
    if reached := [each["seconds"] for each in metrics["history"] if each["accuracy"] >= settings.accuracy]:
        record.add_repeats({f"to a mean accuracy of {settings.accuracy:g}, s": reached[:1]})
    report(record, settings.record)
    if not reached:
        raise BadInput(
            f"--accuracy {settings.accuracy:g} was not reached in {settings.steps} steps: the best is {best:.4f}"
        )


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
