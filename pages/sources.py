"""What the report is made from: the course's data and weights where they are given, what ships with the repository where not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.files import ROOT
from runtime.steps import short

SHIPPED = ROOT / "checkpoints"
FACES = SHIPPED / "miniature" / "faces"
DIGITS = SHIPPED / "p1_digits.safetensors"
CLIP = SHIPPED / "miniature" / "clip"
DIFFUSION = SHIPPED / "miniature" / "stable_diffusion"


@dataclass(frozen=True)
class Sources:
    """Paths are absolute; `quick` takes the shipped files with fewer pictures and steps, as the demo does."""

    steps: Path
    """Folder in which every step has its own."""
    data: Path
    model: str | None
    unet: Path | None
    digits: Path
    judge: Path | None
    clip: str
    device: str
    quick: bool

    def place(self, step: str) -> Path:
        """A step's folder."""
        return self.steps / step

    @property
    def course_unet(self) -> Path | None:
        """UNet.pt as given, or where the data have it."""
        return self.unet or self._in_data("face/UNet.pt")

    @property
    def noise(self) -> Path | None:
        """The course's noises."""
        return self._in_data("face/noise")

    @property
    def truth(self) -> Path | None:
        """What these must become."""
        return self._in_data("face/GT")

    @property
    def mnistm_classifier(self) -> Path | None:
        """Classifier.pth as given, or where the data have it."""
        return self.judge or self._in_data("Classifier.pth")

    @property
    def photographs(self) -> Path | None:
        """The course's pictures for zero-shot classification."""
        return self._in_data("clip_zeroshot/val")

    def _in_data(self, name: str) -> Path | None:
        path = self.data / name
        return path if path.exists() and not self.quick else None

    def label(self, path: Path | str) -> str:
        """How the page names a file."""
        return short(path)
