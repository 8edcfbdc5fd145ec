"""Progress bar, TensorBoard and running means of a training, without a device sync per step."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from runtime.cli import progress


class TrainingLog:
    """`add` every step, `read` every N steps (the only sync); rank 0 shows and writes, the others stay silent."""

    def __init__(self, folder: Path, title: str, first: int, total: int, main: bool):
        self.bar = progress(range(total), title, initial=first, total=total)
        self.writer = SummaryWriter(str(folder), purge_step=first) if main else None
        self.sum: Tensor | None = None
        self.count, self.images, self.since = 0, 0, time.perf_counter()

    def add(self, loss: Tensor, images: int) -> None:
        """Accumulates on the device."""
        loss = loss.detach()
        self.sum = loss.clone() if self.sum is None else self.sum + loss
        self.count, self.images = self.count + 1, self.images + images
        self.bar.update()

    def read(self) -> tuple[float, float]:
        """(mean loss, images per second) since the last read."""
        loss = float(self.sum) / self.count if self.sum is not None else float("nan")
        speed = self.images / (time.perf_counter() - self.since)
        self.sum, self.count, self.images, self.since = None, 0, 0, time.perf_counter()
        return loss, speed

    def pause(self, seconds: float) -> None:
        """Takes time that was not spent on training out of the speed."""
        self.since += seconds

    def show(self, step: int, **values: float) -> None:
        """To the bar and, per name, to TensorBoard."""
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """[3,H,W] uint8 to TensorBoard."""
        if self.writer:
            self.writer.add_image(name, image, step)

    def close(self) -> None:
        """Flushes TensorBoard and ends the bar."""
        self.bar.close()
        if self.writer:
            self.writer.close()
