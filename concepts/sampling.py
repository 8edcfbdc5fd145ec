"""Prompts -> images with a Stable Diffusion pipeline's parts: per-image seeds, the samplers of `diffusion/`, guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from concepts.embeddings import encode
from concepts.stable_diffusion import ModelDims, run_autoencoder
from diffusion.guidance import Denoise, Guidance, guided
from diffusion.noise import draw, generators
from diffusion.samplers import ALL, Generators, Nudge, ddim, dpm_solver, unchanged
from diffusion.schedule import Schedule
from diffusion.step_rules import Steps, step_rule
from runtime.batches import even_batch, in_batches
from runtime.cli import BadInput, progress_bar
from runtime.distributed import ALONE, Shard
from runtime.images import to_uint8

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

Solver = Literal["dpm", "sde", "ddim"]
LATENT, IMAGE = 10_000, 500_000  # values in a latent and in an image; the autoencoder takes larger ones one at a time
CPU_BATCH, GPU_BATCH = 8, 64  # images at once; a GPU's is halved until it fits


@dataclass(frozen=True)
class Request:
    """One image to sample: its prompt and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class SamplerConfig:
    """How images are sampled; `size` in pixels along each side, None = the model's own.

    ddim is Song et al. 2021 at eta 0 on Stable Diffusion's grid (1, 21, .. for 50 steps).
    dpm is DPM-Solver++ (2M), and sde its stochastic form.
    """

    solver: Solver = "dpm"
    steps: int = 25
    guidance: Guidance = field(default_factory=lambda: Guidance(7.5))
    negative: str = ""
    size: int | None = None

    def check(self, total: int) -> None:
        """Raise BadInput unless the number of steps is in 1 .. `total`, the model's number of timesteps."""
        if not 1 <= self.steps <= total:
            raise BadInput(f"--steps {self.steps}: give 1 to {total}")


@dataclass
class StableDiffusionSampler:
    """A pipeline's parts, all on one device in one dtype, and how to sample with them."""

    pipe: StableDiffusionPipeline
    config: SamplerConfig
    _texts: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config.check(len(self.schedule))

    @property
    def device(self) -> torch.device:
        device: torch.device = self.pipe.unet.device
        return device

    @cached_property
    def schedule(self) -> Schedule:
        """The model's own noise schedule, in float64."""
        betas = self.pipe.scheduler.betas.double()
        return Schedule((1 - betas).cumprod(0))

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a latent (channels, h, w); raises BadInput for a size that the model doesn't support."""
        return ModelDims.of(self.pipe.unet.config, self.pipe.vae.config).latent_shape(self.config.size)

    @property
    def grid(self) -> Steps:
        """The solver's timesteps, from noise to image."""
        rule: Literal["trailing", "homework"] = "homework" if self.config.solver == "ddim" else "trailing"
        return replace(step_rule(rule, len(self.schedule), self.config.steps), clamp=False)

    def step_of(self, t: int) -> int:
        """Return the index of the solver's step at timestep t, 0 for the noisiest.

        The nearest one counts: a few timesteps of dpm and sde are off `grid` by one, since diffusers rounds differently.
        """
        distances = [abs(step_t - t) for step_t, _ in self.grid.pairs]
        return distances.index(min(distances))

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Return the prompts' text embeddings [N,77,width]; each prompt is encoded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self._texts |= dict(zip(new, encode(self.pipe, new), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def network(self, x: Tensor, t: int, text: Tensor) -> Tensor:
        """Return eps of x [N,4,h,w] float32 at timestep t, conditioned on text [N,77,width]."""
        x = x.to(self.pipe.unet.dtype).contiguous(memory_format=torch.channels_last)
        eps: Tensor = self.pipe.unet(x, t, encoder_hidden_states=text).sample
        return eps.float()

    def denoiser(self, prompts: Sequence[str]) -> Denoise:
        """Return a function (x [N,4,h,w], t) -> guided eps for a batch with these N prompts."""
        cond = self.text(prompts)
        both = torch.cat([cond, self.text([self.config.negative]).expand_as(cond)])
        return guided(self.network, cond, both, self.config.guidance, len(self.schedule))

    def solve(
        self, denoise: Denoise, x: Tensor, noise: Generators, nudge: Nudge = unchanged, span: slice = ALL
    ) -> Tensor:
        """Return the latents that the solver reaches from x [N,4,h,w], over all its steps or those of `span`.

        `noise` has a generator per image, for the noise that sde adds at each step. `nudge(x, t)` may change the latents before each step.
        """
        if self.config.solver == "ddim":
            return ddim(denoise, x, self.schedule, replace(self.grid, pairs=self.grid.pairs[span]), nudge=nudge)
        noise = noise if self.config.solver == "sde" else ()
        steps = self.config.steps
        return dpm_solver(denoise, x, self.schedule, steps, clamp=False, nudge=nudge, span=span, generators=noise)

    @torch.inference_mode()
    def latents(self, requests: Sequence[Request]) -> Tensor:
        """Return the sampled latents [N,4,h,w] float32."""
        noise = generators([request.seed for request in requests])
        x = draw(noise, self.shape, self.device)
        return self.solve(self.denoiser([request.prompt for request in requests]), x, noise)

    def sample_images(self, requests: Sequence[Request]) -> Tensor:
        """Return the images [N,3,H,W] uint8 on the CPU."""
        return self.decode(self.latents(requests))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the posterior means [N,4,h,w] float32 of images [N,3,H,W] in -1..1, in the U-Net's scale.

        Large images go one at a time.
        """
        vae = self.pipe.vae
        pieces = images.split(1 if images[0].numel() > IMAGE else len(images))
        scaling: float = vae.config.scaling_factor
        return torch.cat([run_autoencoder(vae, encoded_mean, piece) for piece in pieces]) * scaling

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [N,3,H,W] uint8 on the CPU of latents [N,4,h,w].

        Large images go one at a time, since the decoder takes most memory.
        """
        vae = self.pipe.vae
        pieces = (latents / vae.config.scaling_factor).split(1 if latents[0].numel() > LATENT else len(latents))
        images = torch.cat([run_autoencoder(vae, decoded, piece) for piece in pieces])
        return to_uint8(images).cpu()


def encoded_mean(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the unscaled posterior means of images, both in the autoencoder's dtype."""
    mean: Tensor = vae.encode(images).latent_dist.mean
    return mean


def decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return the images of unscaled latents, both in the autoencoder's dtype."""
    images: Tensor = vae.decode(latents).sample
    return images


def generate_batches(
    sample: Callable[[list[Any]], Tensor], requests: Sequence[Any], batch: int, on_gpu: bool, shard: Shard = ALONE
) -> Iterator[tuple[Any, Tensor]]:
    """Yield (request, its row of `sample`'s result) for this process's requests, with a progress bar.

    `batch` 0 = 64 on a GPU, 8 on a CPU, fewer where several processes share few images. It is halved when memory runs out.
    """
    most = even_batch(len(requests), batch or shard.largest(len(requests), GPU_BATCH if on_gpu else CPU_BATCH))
    mine = [requests[row] for row in shard.rows(len(requests), most)]
    with progress_bar(len(mine), "drawing") as bar:
        for chunk, images in in_batches(sample, mine, most):
            yield from zip(chunk, images[: len(chunk)], strict=True)
            bar.update(len(chunk))
