"""What the five trainings of the miniature share: flags, the loop's configuration, and the facts that a continued run must match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from runtime.cli import check_fractions, check_not_negative, check_positive
from runtime.device import Device
from runtime.files import check_writable_folder, file_fingerprint
from runtime.images import save_image
from training.loop import LoopConfig, TrainingRun
from training.schedule import LearningRate
from training.tracking import Track, check_tracker


@dataclass(frozen=True)
class TrainingFlags:
    """Flags of every training of the miniature."""

    run: Path
    """Run folder: checkpoint, TensorBoard, record.json."""
    steps: int
    """Optimizer steps in all. A run that continues may be given more."""
    batch: int
    """Images per step."""
    lr: float
    """Peak learning rate of AdamW."""
    ema: float
    """Decay of the averaged weights (EMA), which are the ones that are saved."""
    log_every: int = 50
    """Steps between two reports of the loss."""
    save_every: int = 200
    """Steps between two checkpoints."""
    init: Path | None = None
    """Model of the same layout to start from, such as the shipped one, with a new optimizer; None = random weights."""
    seed: int = 0
    device: Device = "auto"
    track: Track = None

    def check(self, *positive: str) -> None:
        """Raise BadInput for a flag out of range or a run folder that can't be made. `positive`: more flags that must be above 0."""
        check_positive(self, "steps", "batch", "lr", "log_every", "save_every", *positive)
        check_not_negative(self, "seed")
        check_fractions(self, "ema")
        check_tracker(self.track)
        check_writable_folder(self.run, "--run")

    def facts(self, weights: str, *names: str, **more: Any) -> dict[str, Any]:
        """Return what determines the trained weights: shared flags, weights of --init, flags `names`, and `more`.

        `weights` is the path of the weights in the folder --init, or "" if --init is a file.
        """
        init = {"init": file_fingerprint(self.init / weights) if self.init else None}
        return {name: getattr(self, name) for name in ("batch", "lr", "ema", "seed", *names)} | init | more

    def loop(
        self, kind: str, lr: LearningRate, precision: str = "fp32", max_grad_norm: float = 1.0, compiled: bool = False
    ) -> LoopConfig:
        """Return the configuration of the training loop; `kind` names the training in its checkpoints."""
        often = self.log_every, self.save_every
        elsewhere = "--run OTHER (with --init to start from trained weights)"
        return LoopConfig(
            kind, self.run, self.steps, self.batch, lr, max_grad_norm, *often, compiled, elsewhere,
            precision=precision, track=self.track,
        )  # fmt: skip


def save_sheet(run: TrainingRun, sheet: Tensor) -> None:
    """Write a sheet [3,H,W] uint8 of images by the averaged weights to step-NNNNNN.png in the run folder, and to TensorBoard."""
    save_image(run.config.folder / f"step-{run.step:06d}.png", sheet)
    run.log.image(run.step, "sheet", sheet)
