"""The best few weights of a training, one file each, ranked by a rough score; a more exact one chooses among them later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class BestCandidates:
    """The `count` best-scored weights, as files FOLDER/{step}_{score}.safetensors; there is no other state to save or resume."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def ranked(self) -> list[Path]:
        """Return the candidates' paths, highest score first; of equal scores the later step first."""
        return sorted(self.folder.glob("*_*.safetensors"), key=_rank, reverse=True)

    def clear(self) -> None:
        """Delete the candidates of an earlier run."""
        for path in self.ranked():
            path.unlink()

    def offer(self, step: int, score: float, save: Callable[[Path], None]) -> bool:
        """Call `save(path)` if the score is among the best, and delete what drops out; return whether it is the best so far."""
        path = self.folder / f"{step:06d}_{score:.6f}.safetensors"
        if len(self.ranked()) < self.count or _rank(path) > _rank(self.ranked()[self.count - 1]):
            save(path)
        for worse in self.ranked()[self.count :]:
            worse.unlink()
        return self.ranked()[0] == path


def _rank(path: Path) -> tuple[float, int]:
    step, score = path.stem.split("_")
    return float(score), int(step)
