"""Progress bar, TensorBoard, a tracker and running means of a training, without a device sync per step."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from runtime.cli import log, progress
from training.tracking import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def _hide_writers_errors(arguments: threading.ExceptHookArgs) -> None:
    """Hide tracebacks of TensorBoard's writer thread: the next write raises the same error in the main thread."""
    if type(arguments.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(arguments)


class TrainingLog:
    """Running means of a training's loss and speed, and the places that show values: bar, TensorBoard, tracker.

    Call `start` once, `add` every step, and `read` every N steps (the only sync). With `shown` off nothing is shown or written.
    """

    def __init__(self, folder: Path, title: str, first: int, total: int, shown: bool, tracker: Tracker | None = None):
        self.folder, self.title, self.first, self.total, self.shown = folder, title, first, total, shown
        self.tracker = tracker if shown else None
        self.bar: tqdm[int] | None = None
        self.writer: SummaryWriter | None = None
        self.sum: Tensor | float = 0.0
        self.count, self.images, self.since, self.paused = 0, 0, time.perf_counter(), 0.0

    def start(self) -> None:
        """Open the tracker's run, TensorBoard's writer and the bar, log the command that shows the curves, and start the clock."""
        if self.tracker:
            self.tracker.start()
        if self.shown:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            threading.excepthook = _hide_writers_errors
            with self._courtesy():
                self.writer = SummaryWriter(str(self.folder), purge_step=self.first)
                log(f"curves: {shlex.join(['tensorboard', '--logdir', str(self.folder)])}")
            self.bar = progress(range(self.total), self.title, initial=self.first, total=self.total)
        self.since = time.perf_counter()

    def add(self, loss: Tensor | None, images: int) -> None:
        """Add one step: its detached loss, without a device sync, and its number of images. Loss None = a skipped step, not averaged."""
        if loss is not None:
            self.sum, self.count = self.sum + loss, self.count + 1
        self.images += images
        if self.bar is not None:
            self.bar.update()

    def read(self) -> tuple[float, float]:
        """Return (mean loss, images per second) since the last `read`; the loss is NaN if all steps were skipped."""
        loss = float(self.sum) / self.count if self.count else float("nan")
        speed = self.images / (time.perf_counter() - self.since)
        self.sum, self.count, self.images, self.since = 0.0, 0, 0, time.perf_counter()
        return loss, speed

    def exclude_so_far(self) -> None:
        """Restart the measurement of the speed, without the time and images so far."""
        self.images, self.since = 0, time.perf_counter()

    def pause(self) -> None:
        """Stop the clock of the speed until `resume`, for work that is not training."""
        self.paused = time.perf_counter()

    def resume(self) -> None:
        """Start the clock again after `pause`."""
        self.since += time.perf_counter() - self.paused

    def show(self, step: int, **values: float) -> None:
        """Show values on the bar, and write them to TensorBoard and the tracker under their names."""
        if self.tracker:
            self.tracker.log(step, values)
        if self.bar is not None:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
        with self._courtesy():
            if self.writer:
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Tensor) -> None:
        """Write an image [3,H,W] uint8 to TensorBoard only."""
        with self._courtesy():
            if self.writer:
                self.writer.add_image(name, image, step)

    def close(self) -> None:
        """End the tracker's run, and close the bar and TensorBoard's writer."""
        if self.tracker:
            self.tracker.close()
        if self.bar is not None:
            self.bar.close()
        with self._courtesy():
            if self.writer:
                self.writer.close()

    @contextmanager
    def _courtesy(self) -> Iterator[None]:
        """Go on without TensorBoard, with one warning, if the block can't write its folder, such as on a full disk."""
        try:
            yield
        except OSError as error:
            log(f"warning: no curves from here on in {self.folder}: {error.strerror or error}")
            self.writer = None
