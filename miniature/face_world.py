"""A world of drawn faces, 64x64 pixels in colour. A seed gives the named factors of a face, and the factors give the image.

  python miniature/face_world.py --count 16 --output FOLDER        images and their factors as json

The drawings are layers of the DiceBear style "Toon Head" (CC BY 4.0), stored in checkpoints/miniature/face_parts.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from miniature.scenery.scenes import StableRandom
from runtime.cli import BadInput, check_not_negative, check_positive, log, run_script
from runtime.files import ROOT, output_folder, write_json
from runtime.images import save_image
from runtime.seeds import derived_seed

SIDE = 64  # pixels, height and width of every image
PARTS = ROOT / "checkpoints" / "miniature" / "face_parts" / "parts.npz"
CHUNK = 256  # images that are composed at a time

# every factor with its values and their relative frequencies; shapes have their names in "Toon Head"
FACTORS: dict[str, dict[str, float]] = {
    "skin": {"light": 1, "tan": 1, "brown": 1, "dark": 1},
    "hair": {"bald": 0.5, "bun": 1, "sideComed": 1, "spiky": 1, "undercut": 1},
    "rear hair": {"none": 3, "longStraight": 1, "longWavy": 1, "neckHigh": 1, "shoulderHigh": 1},
    "hair colour": {"black": 1, "brown": 1, "auburn": 1, "blond": 1, "grey": 1},
    "brows": {"angry": 1, "happy": 1, "neutral": 1, "raised": 1, "sad": 1},
    "eyes": {"bow": 1, "happy": 2, "humble": 1, "wide": 2, "wink": 1},
    "mouth": {"agape": 1, "angry": 1, "laugh": 1, "sad": 1, "smile": 1},
    "beard": {"none": 6, "chin": 1, "chinMoustache": 1, "fullBeard": 1, "longBeard": 1, "moustacheTwirl": 1},
    "glasses": {"none": 2, "round": 1, "square": 1},
    "clothes": {"dress": 1, "openJacket": 1, "shirt": 1, "tShirt": 1, "turtleNeck": 1},
    "clothes colour": dict.fromkeys(("red", "orange", "yellow", "green", "blue", "purple", "white", "black"), 1),
    "background": dict.fromkeys(("sky", "rose", "mint", "lilac", "sand", "silver"), 1),
    "turn": {"left": 1, "front": 2, "right": 1},
    "light": {"left": 1, "even": 2, "right": 1},
}
VALUES = {factor: tuple(shares) for factor, shares in FACTORS.items()}
COLUMN = {factor: column for column, factor in enumerate(FACTORS)}  # column of a factor in the values [N,14]

COLOURS = {
    "skin": ("f6d5bb", "dfab7e", "b87a4c", "8a5842"),
    "hair colour": ("221a1c", "55301e", "a5341a", "edc84e", "a3a8b2"),
    "clothes colour": ("b11f1f", "f97316", "eab308", "147f3c", "2456b8", "731ac3", "e8e9e6", "2a2a2e"),
    "background": ("b6e3f4", "ffd5dc", "c0ebc8", "d1c4f5", "f3e3b8", "c4c9cc"),
}
# components in drawing order: the factor that chooses the shape ("" = there is one shape), and the factor that chooses the colour
LAYERS = {
    "rearHair": ("rear hair", "hair colour"),
    "body": ("", "skin"),
    "head": ("", "skin"),
    "clothes": ("clothes", "clothes colour"),
    "nose": ("", "skin"),
    "beard": ("beard", "hair colour"),
    "mouth": ("mouth", "skin"),
    "eyes": ("eyes", "skin"),
    "eyebrows": ("brows", "hair colour"),
    "glasses": ("glasses", "skin"),
    "hair": ("hair", "hair colour"),
}
ABSENT = ("none", "bald")  # values without a drawing
SHADE = 0.22  # share of the light that is lost on the far side


# ---------------------------------------------------------------- factors


def sample_factors(seeds: Sequence[int]) -> Tensor:
    """Draw the values [N,14] uint8 of one face per seed (0 or more).

    A column is a factor, in the order of FACTORS. An entry is the index of a value in VALUES.
    """
    rows = []
    for seed in seeds:
        random = StableRandom(seed)
        row = [random.weighted(list(shares.values())) for shares in FACTORS.values()]
        if VALUES["hair"][row[COLUMN["hair"]]] == "bald":
            row[COLUMN["rear hair"]] = VALUES["rear hair"].index("none")
        rows.append(row)
    return torch.tensor(rows, dtype=torch.uint8).view(-1, len(FACTORS))


def face_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """Return the seeds of `count` faces of the set `seed`, from number `first` on."""
    return [derived_seed(seed, index) for index in range(first, first + count)]


def name_factors(rows: Tensor) -> list[dict[str, str]]:
    """Return a dictionary {factor: name of its value} for each face of values [N,14]."""
    return [{f: VALUES[f][v] for f, v in zip(FACTORS, row, strict=True)} for row in rows.tolist()]


# ---------------------------------------------------------------- images


class FaceRenderer:
    """Renders faces from layers, on one device. The arithmetic is of integers: the same bytes everywhere."""

    def __init__(self, device: torch.device | str = "cpu"):
        names, layers = load_parts()
        self.layers = torch.from_numpy(layers).to(device)
        self.device = self.layers.device
        turns = VALUES["turn"]
        self.tables = {}  # {component: [value, turn] -> row of the layer}
        for component, (factor, _) in LAYERS.items():
            shapes = VALUES[factor] if factor else (component,)
            table = [[names.get(f"{component} {shape} {turn}", 0) for turn in turns] for shape in shapes]
            self.tables[component] = torch.tensor(table, device=device)
        self.colours = {
            factor: torch.tensor([list(bytes.fromhex(colour)) for colour in colours], device=device).int()
            for factor, colours in COLOURS.items()
        }
        lost = torch.linspace(0, SHADE, SIDE, dtype=torch.float64)
        light = torch.stack([1 - lost, torch.ones_like(lost), 1 - lost.flip(0)])  # as in VALUES["light"]
        self.light = (255 * light).round().int().to(device)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the faces [N,3,64,64] uint8 of values [N,14], on the renderer's device."""
        rows = rows.to(self.device).long()
        parts = [self.compose(chunk, self.colours_of(chunk)) for chunk in rows.split(CHUNK)]
        return torch.cat(parts) if parts else self.layers.new_zeros(0, 3, SIDE, SIDE)

    def colours_of(self, rows: Tensor) -> dict[str, Tensor]:
        """Return {factor of COLOURS: its colour [N,3], RGB 0..255} for values [N,14]."""
        return {factor: table[rows[:, COLUMN[factor]].long()] for factor, table in self.colours.items()}

    def compose(self, rows: Tensor, colours: dict[str, Tensor]) -> Tensor:
        """Return the faces [N,3,64,64] uint8 of values [N,14], in these colours (see `colours_of`).

        A layer is its alpha, its fixed colour, and how much of its factor's colour it takes.
        """
        value = {factor: rows[:, column].long() for factor, column in COLUMN.items()}
        x = colours["background"][..., None, None].expand(-1, -1, SIDE, SIDE)
        for component, (shape, paint) in LAYERS.items():
            variant = value[shape] if shape else torch.zeros_like(value["turn"])
            layer = self.layers[self.tables[component][variant, value["turn"]]].int()
            alpha, own, tint = layer[:, :1], layer[:, 1:4], layer[:, 4:]
            x = own + _over_255(x * (255 - alpha) + tint * colours[paint][..., None, None])
        x = x.clamp(max=255)  # every layer may round up
        return _over_255(x * self.light[value["light"]][:, None, None, :]).to(torch.uint8)


def _over_255(x: Tensor) -> Tensor:
    """Return x / 255, rounded, for integers 0 .. 2 x 65025."""
    return (x + 127) // 255


@functools.cache
def load_parts() -> tuple[dict[str, int], np.ndarray]:
    """Return the row of each layer by name, and the layers [P,5,64,64] uint8, the first one empty; raise BadInput for a bad file."""
    try:
        with np.load(PARTS) as file:
            return {str(name): row for row, name in enumerate(file["names"])}, file["layers"]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{PARTS}: {error}; python miniature/face_parts.py makes it") from None


def world_fingerprint() -> str:
    """Return a hash of a few faces, which changes with the factors or the drawing."""
    faces = FaceRenderer()(sample_factors(range(16)))
    return hashlib.blake2b(faces.numpy().tobytes(), digest_size=8).hexdigest()


# ---------------------------------------------------------------- command


@dataclass(frozen=True)
class RenderFaces:
    """Write faces and their factors."""

    output: Path
    """Folder for 00.png, 01.png, .. and factors.json."""
    count: int = 16
    """Number of faces."""
    seed: int = 0
    """Seed of the set; face k depends on the seed and k alone."""


def main(settings: RenderFaces) -> None:
    """Render the faces, and write images and factors.json."""
    check_positive(settings, "count")
    check_not_negative(settings, "seed")
    output_folder(settings.output)
    rows = sample_factors(face_seeds(settings.seed, settings.count))
    for index, image in enumerate(FaceRenderer()(rows)):
        save_image(settings.output / f"{index:02}.png", image)
    write_json(settings.output / "factors.json", name_factors(rows))
    log(f"{settings.count} faces and factors.json: {settings.output}")


if __name__ == "__main__":
    run_script(main, RenderFaces, __doc__)
