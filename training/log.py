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
    """Print no traceback of TensorBoard's thread: the next value that is written raises its error again."""
    if type(arguments.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(arguments)


class TrainingLog:
    """Running mean of the loss and the speed; only the main process shows and writes them.

    `start` once, `add` every step, `read` every N steps (the only sync). Without `shown` there is no bar, no TensorBoard and no tracker.
    """

    def __init__(self, folder: Path, title: str, first: int, total: int, shown: bool, tracker: Tracker | None = None):
        self.folder, self.title, self.first, self.total, self.shown = folder, title, first, total, shown
        self.tracker = tracker if shown else None
        self.bar: tqdm[int] | None = None
        self.writer: SummaryWriter | None = None
        self.sum: Tensor | float = 0.0
        self.count, self.images, self.since, self.paused = 0, 0, time.perf_counter(), 0.0

    def start(self) -> None:
        """Open the tracker's run and TensorBoard's writer, say how to see the latter, show the bar and start the clock."""
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
        """Accumulate a detached loss on the device. None = a skipped step, which the mean leaves out."""
        if loss is not None:
            self.sum, self.count = self.sum + loss, self.count + 1
        self.images += images
        if self.bar is not None:
            self.bar.update()

    def read(self) -> tuple[float, float]:
        """Return (mean loss, images per second) since the last reading."""
        loss = float(self.sum) / self.count if self.count else float("nan")
        speed = self.images / (time.perf_counter() - self.since)
        self.sum, self.count, self.images, self.since = 0.0, 0, 0, time.perf_counter()
        return loss, speed

    def exclude_so_far(self) -> None:
        """Leave the time and images up to now out of the speed."""
        self.images, self.since = 0, time.perf_counter()

    def pause(self) -> None:
        """Stop the clock, for work that is not training."""
        self.paused = time.perf_counter()

    def resume(self) -> None:
        """Go on from `pause`."""
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
        """Write [3,H,W] uint8 to TensorBoard."""
        with self._courtesy():
            if self.writer:
                self.writer.add_image(name, image, step)

    def close(self) -> None:
        """Flush TensorBoard, end the tracker's run and the bar."""
        if self.tracker:
            self.tracker.close()
        if self.bar is not None:
            self.bar.close()
        with self._courtesy():
            if self.writer:
                self.writer.close()

    @contextmanager
    def _courtesy(self) -> Iterator[None]:
        """Go on without TensorBoard where its folder can't be written any more, such as on a full disk: one warning."""
        try:
            yield
        except OSError as error:
            log(f"warning: no curves from here on in {self.folder}: {error.strerror or error}")
            self.writer = None
