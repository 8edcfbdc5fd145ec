"""The data and weights that the report uses: the course's if they are present, else those of the repository."""

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
    """Absolute paths, because the steps run in the repository's folder.

    None = not present: shipped weights are used, and noise or images made by code.
    """

    steps: Path
    """Folder that holds a folder of results for each step."""
    digits: Path
    """P1 checkpoint."""
    mnistm_classifier: Path | None
    unet: Path | None
    """The course's UNet.pt."""
    noise: Path | None
    """The course's noises."""
    reference: Path | None
    """The course's faces for `noise`."""
    photographs: Path | None
    """The course's images for zero-shot classification."""
    textual_inversion: Path
    """Folder of the course's input.json and images for textual inversion; read if there is a `model`."""
    model: str | None
    """Stable Diffusion v1: a path or a hub name."""
    clip: str
    """CLIP that grades images of `model`: a path or a hub name."""
    device: str
    quick: bool
    """Shipped weights only, with fewer images and steps."""
