"""Textual inversion as a plain loop over diffusers, transformers and PIL: what P3_textual_inversion.py must learn, flag by flag."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from concepts.dataset import ConceptSet
from concepts.recipes import InversionRecipe
from concepts.stable_diffusion import load_pipeline
from concepts.templates import OBJECT, STYLE
from P3_textual_inversion import Settings
from runtime.seeds import derived_seed

SIDE, LATENT, TIMESTEPS = 64, (4, 16, 16), 1000


def to_network(image: Image.Image) -> Tensor:
    """Return [1,3,H,W] in -1..1, the range of diffusers' autoencoder."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 255 * 2 - 1


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """Return the image with its shorter side `side` pixels long."""
    width, height = image.size
    size = (side, int(side * height / width)) if width < height else (int(side * width / height), side)
    return image.resize(size, Image.Resampling.LANCZOS)


def centre(image: Image.Image) -> Image.Image:
    """Return the centre square of SIDE pixels."""
    image = shrunk(image, SIDE)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return image.crop((left, top, left + SIDE, top + SIDE))


@dataclass
class PlainConcept:
    """One concept: its pictures, its sentences, its trainable vectors and the longest they may be."""

    concept: ConceptSet
    pictures: list[Image.Image]
    ids: list[Tensor]
    vectors: torch.nn.Parameter
    longest: float


class PlainInversion:
    """The whole method without caches, batches of several concepts, processes and checkpoints."""

    def __init__(self, settings: Settings, recipe: InversionRecipe, concepts: Sequence[ConceptSet]):
        self.recipe = recipe
        self.settings, self.pipe = settings, load_pipeline(settings.model, torch.device("cpu"), torch.float32)
        self.pipe.unet.eval(), self.pipe.vae.eval(), self.pipe.text_encoder.eval()
        self.table = self.pipe.text_encoder.get_input_embeddings().weight.detach().clone()
        self.concepts: list[PlainConcept] = [self._concept(concept) for concept in concepts]

    def _concept(self, concept: ConceptSet) -> PlainConcept:
        tokenizer = self.pipe.tokenizer
        (word,) = tokenizer(concept.init, add_special_tokens=False).input_ids
        start = self.table[word].repeat(concept.vectors, 1)
        generator = torch.Generator().manual_seed(derived_seed(self.settings.seed, zlib.crc32(concept.token.encode())))
        noise = torch.randn(concept.vectors, start.shape[1], generator=generator)
        start[1:] += 0.1 * start.norm(dim=1, keepdim=True)[1:] / start.shape[1] ** 0.5 * noise[1:]
        names = [concept.token, *(f"{concept.token}_{k}" for k in range(1, concept.vectors))]
        tokenizer.add_tokens(names)
        sentences = [text.replace("{}", " ".join(names)) for text in (STYLE if concept.kind == "style" else OBJECT)]
        ids = list(tokenizer(sentences, padding="max_length", return_tensors="pt").input_ids)
        pictures = [Image.open(path).convert("RGB") for path in sorted(concept.images.glob("*.png"))]
        limit = self.recipe.max_norm * float(self.table[word].norm()) or float("inf")
        return PlainConcept(concept, pictures, ids, torch.nn.Parameter(start), limit)

    def train(self) -> dict[str, Tensor]:
        """Take all steps; return every token's vectors."""
        recipe = self.recipe
        optimizer = torch.optim.AdamW([each.vectors for each in self.concepts], recipe.lr, weight_decay=0)
        self.losses: list[float] = []
        for step in range(recipe.steps):
            rise = min(1.0, (step + 1) / max(1, recipe.steps // 20))
            fall = min(1.0, (recipe.steps - step) / (0.5 * recipe.steps))
            optimizer.param_groups[0]["lr"] = recipe.lr * rise * fall
            loss = torch.stack([self.loss(each, step) for each in self.concepts]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.losses.append(float(loss.detach()))
            with torch.no_grad():
                for each in self.concepts:
                    lengths = each.vectors.norm(dim=1, keepdim=True)
                    each.vectors.copy_(
                        torch.where(lengths > each.longest, each.vectors / lengths * each.longest, each.vectors)
                    )
        return {each.concept.token: each.vectors.detach().clone() for each in self.concepts}

    def loss(self, plain: PlainConcept, step: int) -> Tensor:
        """Return the mean loss over one concept's samples of one step."""
        settings, recipe, count = self.settings, self.recipe, self.recipe.batch
        key = zlib.crc32(plain.concept.token.encode())
        generator = torch.Generator().manual_seed(derived_seed(derived_seed(settings.seed, key), step))

        def uniform() -> list[float]:
            return torch.rand(count, generator=generator).tolist()

        which, mirrored, sentence = uniform(), uniform(), uniform()
        t = ((torch.arange(count) + torch.rand(count, generator=generator)) / count * TIMESTEPS).long()
        eps, spread = (torch.randn(count, *LATENT, generator=generator) for _ in range(2))
        pixels = []
        if settings.crop == "random":
            for k, (size, x, y) in enumerate(zip(uniform(), uniform(), uniform(), strict=True)):
                picture = shrunk(self._picture(plain, which[k]), round(SIDE / (0.7 + 0.3 * size)))
                left, top = int(x * (picture.width - SIDE + 1)), int(y * (picture.height - SIDE + 1))
                pixels.append(to_network(picture.crop((left, top, left + SIDE, top + SIDE))))
        else:
            pixels = [to_network(centre(self._picture(plain, each))) for each in which]
        flipped = [x.flip(-1) if recipe.flip and m < 0.5 else x for x, m in zip(pixels, mirrored, strict=True)]
        with torch.no_grad():
            posterior: Any = self.pipe.vae.encode(torch.cat(flipped)).latent_dist
            x0 = (posterior.mean + posterior.std * spread) * self.pipe.vae.config.scaling_factor
        ids = torch.stack([plain.ids[int(s * len(plain.ids))] for s in sentence])
        noise = torch.randn(count, 77, self.table.shape[1], generator=generator)
        text = self._text(plain, ids, noise * recipe.embedding_noise / self.table.shape[1] ** 0.5)
        noisy = self.pipe.scheduler.add_noise(x0, eps, t)
        error = (self.pipe.unet(noisy, t, encoder_hidden_states=text).sample - eps).square().mean((1, 2, 3))
        snr = self.pipe.scheduler.alphas_cumprod[t] / (1 - self.pipe.scheduler.alphas_cumprod[t])
        loss: Tensor = ((1 + 1 / snr).clamp(max=recipe.max_loss_weight) * error).mean()
        return loss

    def _picture(self, plain: PlainConcept, uniform: float) -> Image.Image:
        return plain.pictures[int(uniform * len(plain.pictures))]

    def _text(self, plain: PlainConcept, ids: Tensor, noise: Tensor) -> Tensor:
        """Return the text encoder's states, with noise on the learned embeddings only."""
        weight = torch.cat([self.table, *(each.vectors for each in self.concepts)])
        new = (ids >= len(self.table))[..., None]

        def embed(_module: Any, _inputs: Any, _output: Tensor) -> Tensor:
            rows = torch.nn.functional.embedding(ids, weight)
            return torch.where(new, rows + noise * rows.detach().norm(dim=-1, keepdim=True), rows)

        embedding: Any = self.pipe.text_encoder.get_input_embeddings()
        handle = embedding.register_forward_hook(embed)
        try:
            states: Tensor = self.pipe.text_encoder(ids.clamp(max=len(self.table) - 1))[0]
        finally:
            handle.remove()
        return states
