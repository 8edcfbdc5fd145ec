"""The running mean of the loss."""

from __future__ import annotations

from pathlib import Path

import torch

from training.log import TrainingLog


def test_log_reads_the_mean_loss_since_the_last_reading(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, "test", 0, 4, shown=False)
    means = []
    for pair in ((1.0, 2.0), (5.0, 7.0)):
        for loss in pair:
            log.add(torch.tensor(loss), images=8)
        means.append(log.read()[0])
    log.close()
    assert means == [1.5, 6.0]
