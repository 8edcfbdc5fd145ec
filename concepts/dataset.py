"""What textual inversion learns from: the pictures of each concept, as a model's autoencoder sees them, and sentences with its token."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, pad, pil_to_tensor, resize

from concepts.embeddings import require_token
from concepts.templates import OBJECT, STYLE
from runtime.cli import BadInput, log
from runtime.files import read_json

Kind = Literal["object", "style"]
TEMPLATES: dict[str, tuple[str, ...]] = {"object": OBJECT, "style": STYLE}
VALIDATION_PROMPTS = {  # what looks at the progress ask for, unless told otherwise: likeness, and whether other words are still heard
    "object": ("a photo of a {}", "a {} on a blue background"),
    "style": ("a picture in the style of {}", "a red house in the style of {}"),
}
MOST_VECTORS = 8
SENTENCES = ".txt"


@dataclass(frozen=True)
class ConceptSet:
    """One thing to learn."""

    token: str
    """Its name in prompts, such as <new1>."""
    images: Path
    """Folder of its pictures; 00.txt beside 00.png may hold sentences for that picture, see `sentences_beside`."""
    init: str
    """An ordinary word for it, which its vectors start from."""
    kind: Kind = "object"
    vectors: int = 1

    def __post_init__(self) -> None:
        """Raises BadInput for what no concept can be."""
        require_token(self.token, "--token")
        if self.kind not in TEMPLATES:
            raise BadInput(f"{self.token}: kind {self.kind!r} is neither object nor style")
        if not 1 <= self.vectors <= MOST_VECTORS:
            raise BadInput(f"--vectors {self.vectors}: give 1 to {MOST_VECTORS}")

    @property
    def key(self) -> int:
        """Of its random numbers: a concept learns alone as it does among others."""
        return zlib.crc32(self.token.encode())

    @property
    def sentences(self) -> list[str]:
        """Every template with the token in it."""
        return [template.format(self.token) for template in TEMPLATES[self.kind]]


def read_concepts(path: Path) -> list[ConceptSet]:
    """A json list of objects with token, images, init and, where not object and 1, kind and vectors; folders may be relative to the
    file. Raises BadInput."""
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise BadInput(f'{path}: wanted a list such as [{{"token": "<new1>", "images": "dog", "init": "dog"}}]')
    concepts = [_concept(path, number, entry) for number, entry in enumerate(content)]
    tokens = [concept.token for concept in concepts]
    if twice := {token for token in tokens if tokens.count(token) > 1}:
        raise BadInput(f"{path}: {', '.join(sorted(twice))} is there twice")
    return concepts


def _concept(path: Path, number: int, entry: Any) -> ConceptSet:
    types = {"token": str, "images": str, "init": str, "kind": str, "vectors": int}
    if not isinstance(entry, dict) or not {"token", "images", "init"} <= set(entry):
        raise BadInput(f"{path}, entry {number}: wants token, images and init")
    for name, value in entry.items():
        if name not in types or not isinstance(value, types[name]):
            raise BadInput(f"{path}, entry {number}: {name} {value!r} is not known there, or not of its type")
    return ConceptSet(**entry | {"images": path.parent / entry["images"]})


# ---------------------------------------------------------------- pictures


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder by name; other files, but for sentences beside a picture, are skipped with a line.
    Raises BadInput where there is none."""
    if not folder.is_dir():
        raise BadInput(f"--images {folder} is not a folder")
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = [path for path in files if path.suffix.lower() in known]
    beside = {path.with_suffix(SENTENCES) for path in found}
    for path in files:
        if path not in found and path not in beside:
            log(f"{path} is no picture: skipped")
    if not found:
        raise BadInput(f"--images {folder} holds no picture")
    if len(found) == 1:
        log(f"--images {folder} holds one picture only: what is learned may be that picture rather than its subject")
    return found


def read_pictures(folder: Path) -> list[Image.Image]:
    """All pictures of a folder by name, upright, on white where they are transparent. Raises BadInput where there is none, or one can't
    be read."""
    return [upright(path) for path in picture_files(folder)]


def sentences_beside(picture: Path, token: str) -> list[str]:
    """The lines of 00.txt beside 00.png, with the token for {}: sentences that also tell what isn't the concept. None without such a
    file; raises BadInput for lines without {}."""
    file = picture.with_suffix(SENTENCES)
    if not file.is_file():
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} is not a readable text: {error}") from None
    for number, line in enumerate(lines, 1):
        if "{}" not in line:
            raise BadInput(f"{file}, line {number}: {line!r} wants {{}} where {token} stands")
    return [line.replace("{}", token) for line in lines]


def upright(path: Path) -> Image.Image:
    """RGB, turned as its EXIF data says, transparent parts white; raises BadInput."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode[0] in "IF":  # more than 8 bit: there is no telling what is white
                raise BadInput(f"{path} has mode {picture.mode}: save it with 8 bits per channel")
            if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path} is not a readable picture: {error}") from None


def scaled(picture: Image.Image, side: int) -> Tensor:
    """[3,H,W] in -1..1, the shorter of H and W being `side`."""
    fitted = resize(picture, [side], InterpolationMode.LANCZOS)
    return pil_to_tensor(fitted).float() / 127.5 - 1


def square(pictures: Sequence[Image.Image], side: int) -> Tensor:
    """[N,3,side,side] in -1..1: the middle of each."""
    return torch.stack([center_crop(scaled(picture, side), [side, side]) for picture in pictures])


def zoomed_out(x: Tensor, stream: torch.Generator) -> Tensor:
    """[N,3,S,S] in -1..1 -> the same: each picture at 0.6 to 0.95 of its size, somewhere in a frame that its edges fill."""
    side, views = x.shape[-1], []
    for image in x:
        share, right, down = torch.rand(3, generator=stream).tolist()
        size = round(side * (0.6 + 0.35 * share))
        left, top = int(right * (side - size + 1)), int(down * (side - size + 1))
        small = resize(image, [size, size], InterpolationMode.BICUBIC, antialias=True).clamp(-1, 1)
        views.append(pad(small, [left, top, side - size - left, side - size - top], padding_mode="edge"))
    return torch.stack(views)


@torch.no_grad()
def posteriors(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """x [N,3,H,W] in -1..1 -> [N,2,2,4,h,w] float32 in the U-Net's scale: both flips; mean and standard deviation."""
    found = []
    for image in x:
        pair = torch.stack([image, image.flip(-1)]).to(vae.device, vae.dtype)
        posterior = vae.encode(pair).latent_dist
        found.append(torch.stack([posterior.mean, posterior.std], 1).float() * vae.config["scaling_factor"])
    return torch.stack(found)
