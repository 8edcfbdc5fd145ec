"""What the report is made from: the course's data and weights if they are present, else the shipped ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.files import ROOT

SHIPPED = ROOT / "checkpoints"
DIGITS = SHIPPED / "p1_digits.safetensors"
FACES = SHIPPED / "miniature" / "faces"
CLIP = SHIPPED / "miniature" / "clip"
DIFFUSION = SHIPPED / "miniature" / "stable_diffusion"


@dataclass(frozen=True)
class Inputs:
    """Absolute paths, because the steps run in the repository. None = not present: the shipped weights are used."""

    steps: Path
    """Folder with a folder for each step."""
    digits: Path
    """P1 checkpoint."""
    mnistm_classifier: Path | None
    unet: Path | None
    """The course's UNet.pt."""
    noise: Path | None
    """The course's noises."""
    reference: Path | None
    """Faces that the course's UNet.pt makes of these noises."""
    photographs: Path | None
    """The course's images for zero-shot classification."""
    textual_inversion: Path
    """The course's input.json and images for textual inversion; read if there is a `model`."""
    model: str | None
    """Stable Diffusion v1."""
    clip: str
    """CLIP that grades images of `model`."""
    device: str
    quick: bool
    """Shipped weights only, with fewer images and steps."""
