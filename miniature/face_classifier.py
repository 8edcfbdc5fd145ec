"""A classifier of a face's factors, such as hair colour, and the test of a valid face. miniature/face_factors.py trains it.

A face is valid if every factor is read with confidence, and if the face rendered from the read factors is near the image everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digits.classifier import Block
from miniature.classifier_files import ClassifierFormat
from miniature.face_world import FACTORS, SIDE, VALUES, FaceRenderer
from runtime.device import to_channels_last
from runtime.files import ROOT
from runtime.images import to_float
from training.draws import Draws

KIND = "miniature face classifier"
SHIPPED = ROOT / "checkpoints" / "miniature" / "face_factors.safetensors"
FILES = ClassifierFormat(
    KIND, {"factors": VALUES}, "face classifier", "other factors", "python miniature/face_factors.py train"
)
BATCH = 250  # images per forward pass
CONFIDENCE = 0.5  # least probability of each factor's value in a valid face
DISTANCE = 24.0  # largest `local_distance` of a valid face from the face rendered of its factors, in grey levels
WINDOW = 5  # pixels along each side of the regions that are compared


@dataclass(frozen=True)
class FaceClassifierConfig:
    """Layout of the network."""

    stem: int = 24  # channels at 32x32 positions
    channels: tuple[int, ...] = (32, 64)  # at 16x16, 8x8
    gathered: int = 24  # channels that the 8x8 positions are reduced to
    hidden: int = 128


class FaceClassifier(nn.Module):
    """A small residual network with one head for all factors. Positions are not averaged, as each part of a face has its place."""

    def __init__(self, config: FaceClassifierConfig = FaceClassifierConfig()):
        super().__init__()
        self.config, width = config, config.stem
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), nn.ReLU())
        levels: list[nn.Module] = []
        for channels in config.channels:
            levels += [Block(width, channels, 2), Block(channels, channels, 1)]
            width = channels
        self.levels = nn.Sequential(*levels)
        self.gather = nn.Conv2d(width, config.gathered, 1)
        positions = (SIDE // 2 >> len(config.channels)) ** 2
        answers = sum(map(len, VALUES.values()))
        self.head = nn.Sequential(
            nn.Linear(config.gathered * positions, config.hidden), nn.ReLU(), nn.Linear(config.hidden, answers)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return {factor: logits [N,values]} of images [N,3,64,64] in -1..1."""
        logits = self.head(F.relu(self.gather(self.levels(self.stem(x)))).flatten(1))
        return dict(zip(FACTORS, logits.split([len(values) for values in VALUES.values()], 1), strict=True))


def factor_loss(logits: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Return the sum of all factors' mean cross-entropies; `rows` [N,14] are the true values."""
    labels = zip(logits.values(), rows.long().T, strict=True)
    return torch.stack([F.cross_entropy(logit.float(), label) for logit, label in labels]).sum()


def worsen_slightly(x: Tensor, draws: Draws) -> Tensor:
    """Return the images [N,3,64,64] in -1..1 with flaws of a good generated face: softened, of another contrast and tint, noisy."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * draws.uniform()[:, None, None, None]

    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, between(0, 0.3))
    x = between(0.95, 1.05) * x + 0.02 * draws.normal(3, 1, 1)
    return (x + between(0, 0.05) * draws.normal(3, SIDE, SIDE)).clamp(-1, 1)


# ---------------------------------------------------------------- reading and validity


class FaceReading(NamedTuple):
    """The factors that N faces show, and whether the faces are valid."""

    rows: Tensor  # [N,14] long, the most probable values
    confidence: Tensor  # [N], the least of these values' probabilities
    distance: Tensor  # [N], `local_distance` from the face rendered of these values
    valid: Tensor  # [N] bool

    @property
    def certain(self) -> Tensor:
        """[N] bool: whether the least sure factor reaches CONFIDENCE; `distance` does not count."""
        return self.confidence >= CONFIDENCE


class FaceReader:
    """Reads the factors of faces, and renders a face of these for comparison, on one device."""

    def __init__(self, network: FaceClassifier, device: torch.device | str = "cpu"):
        self.network = to_channels_last(network, device).eval().requires_grad_(False)
        self.renderer = FaceRenderer(device)
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> FaceReading:
        """Read faces [N,3,64,64] uint8; the result is on the CPU."""
        if images.dtype != torch.uint8 or images.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"faces are [N,3,{SIDE},{SIDE}] uint8, not {list(images.shape)} {images.dtype}")
        parts = []
        for chunk in images.to(self.device).split(BATCH):
            x = to_float(chunk).contiguous(memory_format=torch.channels_last)
            best = [logits.float().softmax(1).max(1) for logits in self.network(x).values()]
            rows = torch.stack([values for _, values in best], 1)
            confidence = torch.stack([probability for probability, _ in best], 1).amin(1)
            distance = local_distance(chunk, self.renderer(rows))
            valid = (confidence >= CONFIDENCE) & (distance <= DISTANCE)
            parts.append([part.cpu() for part in (rows, confidence, distance, valid)])
        return FaceReading(*(torch.cat(part) for part in zip(*parts, strict=True)))


def local_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return [N]: the root mean square difference, in grey levels, of a and b [N,3,64,64] uint8 in the 5 x 5 pixels where it is largest."""
    squares = (a.float() - b.float()).square().mean(1, keepdim=True)
    return F.avg_pool2d(squares, WINDOW, 1).amax((1, 2, 3)).sqrt()


# ---------------------------------------------------------------- files


def save_face_classifier(path: Path, network: FaceClassifier, origin: dict[str, Any]) -> None:
    """Write one safetensors file: weights, and a JSON header with layout, factors and `origin`, how it was trained."""
    FILES.save(path, network, network.config, origin)


def load_face_classifier(path: Path = SHIPPED) -> FaceClassifier:
    """Return a file's classifier (default: the shipped one); raise BadInput for a file of another kind or other factors."""
    return FILES.load(path, lambda layout: FaceClassifier(FaceClassifierConfig(**layout)))
