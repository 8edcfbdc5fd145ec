"""What textual inversion learns from: each concept's images, as the model's autoencoder encodes them, and sentences with its token."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from PIL import Image
from pydantic import ConfigDict, Strict
from torch import Tensor

from concepts.embeddings import require_known, require_token, text_width, tokenize
from concepts.stable_diffusion import run_autoencoder
from concepts.templates import OBJECT, STYLE
from runtime.cli import BadInput, log
from runtime.files import read_json, read_text, visible
from runtime.images import read_image
from runtime.seeds import derived_seed
from runtime.validation import validate
from training.draws import Draws

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

Kind = Literal["object", "style"]
Crop = Literal["center", "random"]
TEMPLATES: dict[str, tuple[str, ...]] = {"object": OBJECT, "style": STYLE}
MAX_VECTORS = 8
CAMERA_FORMATS = {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw"}


@dataclass(frozen=True)
class ConceptSet:
    """One concept to learn: a token, its images, and the word that its embeddings start from."""

    token: str
    images: Path
    """Folder; 00.txt next to 00.png may hold sentences for that image, see `read_sentences`."""
    init: str
    kind: Kind = "object"
    vectors: Annotated[int, Strict()] = 1

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        require_token(self.token, "--token")
        if not 1 <= self.vectors <= MAX_VECTORS:
            raise BadInput(f"--vectors {self.vectors}: give 1 to {MAX_VECTORS}")

    @property
    def key(self) -> int:
        """Key of the concept's random numbers, from its token: it learns the same alone and together with others."""
        return zlib.crc32(self.token.encode())

    @property
    def sentences(self) -> list[str]:
        """Every template of the kind, with the token filled in."""
        return [template.format(self.token) for template in TEMPLATES[self.kind]]


def read_concepts(path: Path, vectors: Mapping[Kind, int]) -> list[ConceptSet]:
    """Read a JSON list of objects with token, images, init and, optionally, kind and vectors. Raise BadInput.

    Image folders may be relative to the file. An object without vectors gets the number that `vectors` has for its kind.
    """
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise BadInput(f'{path}: wanted a list such as [{{"token": "<new1>", "images": "dog", "init": "dog"}}]')
    concepts = validate(list[ConceptSet], content, str(path))
    tokens = [concept.token for concept in concepts]
    if twice := {token for token in tokens if tokens.count(token) > 1}:
        raise BadInput(f"{path}: {', '.join(sorted(twice))} is there twice")
    concepts = [replace(concept, images=path.parent / concept.images) for concept in concepts]
    return [
        concept if "vectors" in entry else replace(concept, vectors=vectors[concept.kind])
        for concept, entry in zip(concepts, content, strict=True)
    ]


# ---------------------------------------------------------------- files


def image_files(folder: Path) -> list[Path]:
    """Return a folder's image files, sorted by name. Log other files, except sentences such as 00.txt next to 00.png.

    Raise BadInput for a folder without images.
    """
    if not folder.is_dir():
        raise BadInput(f"--images {folder} is not a folder")
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [path for path in visible(folder) if not path.is_dir()]
    images = [path for path in files if path.suffix.lower() in readable]
    sentences = {path.with_suffix(".txt") for path in images}
    for path in files:
        if path not in images and path not in sentences:
            cure = ", save it as JPEG" if path.suffix.lower() in CAMERA_FORMATS else ""
            log(f"{path} is no picture: skipped{cure}")
    if not images:
        raise BadInput(f"--images {folder} holds no picture")
    if len(images) == 1:
        log(f"--images {folder} holds one picture only: what is learned may be that picture rather than its subject")
    return images


def read_sentences(image: Path, token: str) -> list[str]:
    """Return an image's training sentences: the lines of 00.txt next to 00.png, with {} replaced by the token; [] without such a file.

    They describe the rest of the image, so that the token need not represent it. Raise BadInput for lines without {}.
    """
    file = image.with_suffix(".txt")
    if not file.is_file():
        return []
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        log(f"{file} is empty: the usual sentences stand for it")
    for number, line in enumerate(lines, 1):
        if "{}" not in line:
            raise BadInput(
                f"{file}, line {number}: {line!r} wants {{}} where {token} stands; put it in, or move the file"
            )
    return [line.replace("{}", token) for line in lines]


def read_images(folder: Path) -> list[Image.Image]:
    """Return all images of a folder as RGB, sorted by name; raise BadInput."""
    return [read_image(path) for path in image_files(folder)]


# ---------------------------------------------------------------- tensors


def scaled(image: Image.Image, side: int) -> Tensor:
    """Return an image as [3,H,W] in -1..1, the shorter of H and W being `side`."""
    from torchvision.transforms import InterpolationMode  # slow to import
    from torchvision.transforms.functional import pil_to_tensor, resize

    pixels: Tensor = pil_to_tensor(resize(image, [side], InterpolationMode.LANCZOS))
    return pixels.float() / 127.5 - 1


def square(images: Sequence[Image.Image], side: int) -> Tensor:
    """Return the centre square of each image, resized: [N,3,side,side] in -1..1."""
    from torchvision.transforms.functional import center_crop  # slow to import

    return torch.stack([center_crop(scaled(image, side), [side, side]) for image in images])


@torch.no_grad()
def posteriors(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Return the autoencoder's posteriors for images [N,3,H,W] in -1..1, [N,2,2,4,h,w] float32 in the U-Net's scale.

    The second dimension is (image, mirror image), the third (mean, standard deviation).
    """

    def encode(vae: AutoencoderKL, pair: Tensor) -> Tensor:
        posterior = vae.encode(pair).latent_dist
        moments: Tensor = torch.stack([posterior.mean, posterior.std], 1)
        return moments

    moments = [run_autoencoder(vae, encode, torch.stack([image, image.flip(-1)])) for image in x]
    scaling: float = vae.config["scaling_factor"]
    return torch.stack(moments) * scaling


# ---------------------------------------------------------------- samples


@dataclass(frozen=True)
class Augmentation:
    """How training samples vary."""

    crop: Crop = "center"
    flip: bool = True
    embedding_noise: float = 0.0
    """Norm of the noise on the learned embeddings, as a multiple of their own norm."""


@dataclass
class InversionBatch:
    """B training samples: clean latents and noise [B,4,h,w], timesteps [B], token ids [B,77], embedding noise [B,77,width]."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    tokens: Tensor
    embedding_noise: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def split(self, parts: int) -> list[InversionBatch]:
        """Return the samples in at most `parts` batches of equal size; the last may be smaller."""
        size = -(-len(self) // parts)
        return [InversionBatch(*tensors) for tensors in zip(*(x.split(size) for x in self._tensors()), strict=True)]

    @classmethod
    def concatenate(cls, batches: Sequence[InversionBatch]) -> InversionBatch:
        """Return the samples of all batches in one."""
        return cls(*(torch.cat(tensors) for tensors in zip(*(batch._tensors() for batch in batches), strict=True)))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


class ConceptData:
    """The encoded images and sentences of one concept, from which batches are drawn.

    `tokens` [N,S,77] are the token ids of each image's sentences. Image i has counts[i] of them; the rest of its S rows repeats them.
    `moments` [N,2,2,4,h,w] are the `posteriors` of the images and their mirror images.
    With random crops `moments` is None, since every sample is encoded when it is drawn.
    """

    def __init__(self, pipe: StableDiffusionPipeline, concept: ConceptSet, seed: int, augmentation: Augmentation):
        """Read and encode the images and sentences; the pipeline's tokenizer must have the token already. Raise BadInput."""
        self.concept, self.seed, self.augmentation = concept, seed, augmentation
        self.device, self.vae, self.width = pipe.unet.device, pipe.vae, text_width(pipe)
        self.timesteps = len(pipe.scheduler.alphas_cumprod)
        self.latent_shape = (pipe.unet.config["in_channels"], *[pipe.unet.config["sample_size"]] * 2)
        self.side = pipe.unet.config["sample_size"] * pipe.vae_scale_factor

        files = image_files(concept.images)
        self.images = [read_image(file) for file in files]
        sentences = [read_sentences(file, concept.token) or concept.sentences for file in files]
        longest = max(map(len, sentences))
        for file, own in zip(files, sentences, strict=True):
            require_known(own, pipe.tokenizer.get_added_vocab(), f"{file.with_suffix('.txt')}: ")
        tokens = torch.stack([tokenize(pipe.tokenizer, (own * longest)[:longest]) for own in sentences])
        self.tokens = tokens.to(self.device)
        self.counts = torch.tensor([len(own) for own in sentences], device=self.device)
        self.fingerprint = zlib.crc32(b"".join(image.tobytes() for image in self.images) + tokens.numpy().tobytes())
        encoded = augmentation.crop == "center"
        self.moments = posteriors(self.vae, square(self.images, self.side)) if encoded else None

    def batch(self, step: int, rows: slice, total: int) -> InversionBatch:
        """Draw samples `rows` of the `total` training samples of this step. Equal arguments give equal samples."""
        draws = Draws(derived_seed(self.seed, self.concept.key), step, rows, total, self.device)
        which, mirrored, sentence = draws.uniform(), draws.uniform(), draws.uniform()
        t = draws.timesteps(self.timesteps)
        eps, posterior_noise = draws.normal(*self.latent_shape), draws.normal(*self.latent_shape)

        image = (which * len(self.images)).long()
        flip = (mirrored < 0.5).long() * self.augmentation.flip
        views = self.moments[image] if self.moments is not None else self._random_crops(image, draws)
        mean, std = views[torch.arange(len(flip)), flip].unbind(1)
        tokens = self.tokens[image, (sentence * self.counts[image]).long()]
        noise = draws.normal(tokens.shape[1], self.width) * (self.augmentation.embedding_noise / self.width**0.5)
        return InversionBatch(mean + std * posterior_noise, eps, t, tokens, noise)

    def _random_crops(self, which: Tensor, draws: Draws) -> Tensor:
        """Return the `posteriors` [B,2,2,4,h,w] of a random square of each image `which` [B], of 0.7 to 1 times its shorter side."""
        size, right, down = draws.uniform(), draws.uniform(), draws.uniform()
        crops = []
        for index, s, x, y in zip(which.tolist(), size.tolist(), right.tolist(), down.tolist(), strict=True):
            image = scaled(self.images[index], round(self.side / (0.7 + 0.3 * s)))
            left, top = int(x * (image.shape[2] - self.side + 1)), int(y * (image.shape[1] - self.side + 1))
            crops.append(image[:, top : top + self.side, left : left + self.side])
        return posteriors(self.vae, torch.stack(crops))
