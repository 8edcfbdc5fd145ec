"""What the miniature's trainings share."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_in_tracker import without

from miniature.training_flags import TrainingFlags
from runtime.cli import BadInput
from training.schedule import LearningRate


def test_track_reaches_the_loop_and_its_absence_is_named_before_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = TrainingFlags(tmp_path / "run", steps=1, batch=1, lr=0.1, ema=0.5, track="wandb")
    assert flags.loop("test", LearningRate(0.1, 0, 0.0)).track == "wandb"
    without("wandb", monkeypatch)
    with pytest.raises(BadInput, match="--track wandb: .* pip install wandb"):
        flags.check()
    assert not (tmp_path / "run").exists()
