"""Training curves in a tracker, wandb or trackio, in addition to TensorBoard: the flag --track.

Neither package is a requirement. Only `init`, `log` and `finish` of the installed one are used.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

import tyro

from runtime.cli import BadInput, log
from runtime.hub import first_line

Track = Annotated[
    Literal["wandb", "trackio"] | None,
    tyro.conf.arg(
        help="Also send the curves to this tracker, a package that must be installed. None = TensorBoard only."
    ),
]


def check_tracker(track: Track) -> None:
    """Raise BadInput if the tracker's package is not installed or fails on import; None is fine."""
    if track:
        _package(track)


def _package(track: str) -> Any:
    try:
        package = importlib.import_module(track)
    except Exception as error:  # absent, or it fails on import, with any error
        raise BadInput(f"--track {track}: {first_line(error)}; pip install {track}, or leave the flag out") from None
    if not hasattr(package, "init"):  # a folder of that name, such as wandb's own of earlier runs
        raise BadInput(f"--track {track}: the package is not installed; pip install {track}, or leave the flag out")
    return package


class Tracker:
    """One run in a tracker, the package `track`, under the names `project` and `run`."""

    def __init__(self, track: str, project: str, run: str, settings: Any):
        """Keep the arguments; `start` opens the run. `settings`: the script's dataclass, shown as the run's configuration."""
        self.track, self.project, self.run, self.settings = track, project, run, settings
        self.package: Any = None

    def start(self) -> None:
        """Open the run, or resume it. Raise BadInput if the tracker refuses, such as without an account."""
        package = _package(self.track)
        config = json.loads(json.dumps(asdict(self.settings), default=str))
        try:
            package.init(project=self.project, name=self.run, config=config, resume="allow")
        except Exception as error:  # a service's client raises errors of many unrelated classes
            raise BadInput(f"--track {self.track}: {first_line(error)}") from None
        self.package = package

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send {name: value} for this step."""
        self._unless_lost(lambda package: package.log(dict(values), step=step))

    def close(self) -> None:
        """End the run."""
        self._unless_lost(lambda package: package.finish())

    def _unless_lost(self, call: Callable[[Any], object]) -> None:
        """Call `call(package)`. If it fails, warn once and go on without the tracker, so that no training is lost."""
        if not self.package:
            return
        try:
            call(self.package)
        except Exception as error:
            log(f"warning: --track {self.track}: no curves there from here on ({first_line(error)})")
            self.package = None
