"""The running mean of the loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
import torch

from training.log import TrainingLog

FullDisk = Callable[[int], AbstractContextManager[None]]


def test_log_reads_the_mean_loss_since_the_last_reading(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, "test", 0, 4, shown=False)
    means = []
    for pair in ((1.0, 2.0), (5.0, 7.0)):
        for loss in pair:
            log.add(torch.tensor(loss), images=8)
        means.append(log.read()[0])
    log.close()
    assert means == [1.5, 6.0]


@pytest.mark.parametrize("size", [0, 500])
def test_a_full_disk_ends_the_curves_in_one_line_and_not_the_training(
    size: int, tmp_path: Path, full_disk: FullDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    log = TrainingLog(tmp_path / "tensorboard", "test", 0, 200, shown=True)
    with full_disk(size):
        log.start()
        for step in range(200):
            log.add(torch.tensor(1.0), images=8)
            log.show(step, loss=1.0)
            log.image(step, "image", torch.zeros(3, 32, 32, dtype=torch.uint8))
            if log.writer:
                with suppress(OSError):  # the disk is full while the thread writes
                    log.writer.flush()
        log.close()
    errors = capsys.readouterr().err
    assert errors.count(f"warning: no curves from here on in {tmp_path / 'tensorboard'}: File too large") == 1
    assert "Traceback" not in errors


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    log = TrainingLog(tmp_path / "file" / "tensorboard", "test", 0, 2, shown=True)
    log.start()
    log.show(1, loss=1.0)
    log.close()
    errors = capsys.readouterr().err
    assert "warning: no curves from here on in" in errors
    assert "--logdir" not in errors


def test_a_shown_training_says_how_to_open_its_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        log = TrainingLog(tmp_path / "my run", "test", 0, 2, shown=shown)
        log.start()
        log.close()
    assert capsys.readouterr().err.count(f"curves: tensorboard --logdir '{tmp_path / 'my run'}'\n") == 1
