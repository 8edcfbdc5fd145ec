"""Prompts -> pictures with a Stable Diffusion pipeline's parts: per-picture seeds, the samplers of `diffusion/`, guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from concepts.embeddings import encode
from concepts.stable_diffusion import ModelDims
from diffusion.guidance import Denoise, Guidance, guided
from diffusion.noise import draw, generators
from diffusion.samplers import ALL, Nudge, ddim, dpm_solver, unchanged
from diffusion.schedule import Schedule
from diffusion.steps import Rule, Steps, step_rule
from runtime.batches import even_batch, in_batches
from runtime.cli import BadInput, progress_bar
from runtime.distributed import ALONE, Shard

Solver = Literal["dpm", "ddim"]
LATENT, PICTURE = 10_000, 500_000  # numbers in one, above which the autoencoder takes one at a time
CPU_BATCH, GPU_BATCH = 8, 64  # pictures at once; a GPU's is halved until it fits


@dataclass(frozen=True)
class Request:
    """One picture to draw: its prompt and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class SamplerConfig:
    """How pictures are drawn: ddim is Song et al. 2021 at eta 0 on Stable Diffusion's grid 1 + 20 k, dpm is DPM-Solver++ (2M)."""

    solver: Solver = "dpm"
    steps: int = 25
    guidance: Guidance = field(default_factory=lambda: Guidance(7.5))
    negative: str = ""
    size: int | None = None

    def check(self, total: int) -> None:
        """Raises BadInput for steps that don't fit."""
        if not 1 <= self.steps <= total:
            raise BadInput(f"--steps {self.steps}: give 1 to {total}")


@dataclass
class StableDiffusionSampler:
    """A pipeline's parts at work; all on one device, in one dtype."""

    pipe: StableDiffusionPipeline
    manner: SamplerConfig
    _texts: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.manner.check(len(self.schedule))

    @cached_property
    def schedule(self) -> Schedule:
        """The model's own, in float64."""
        betas = self.pipe.scheduler.betas.double()
        return Schedule((1 - betas).cumprod(0))

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Of a latent; raises BadInput for a size that the model can't draw."""
        return ModelDims.of(self.pipe.unet.config, self.pipe.vae.config).shape(self.manner.size)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """[N,77,width]; each prompt is read once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self._texts |= dict(zip(new, encode(self.pipe, new), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])

    @torch.inference_mode()
    def latents(self, orders: Sequence[Request]) -> Tensor:
        """[N,4,h,w] float32 at the end of the sampler."""
        x = draw(generators([order.seed for order in orders]), self.shape, self.pipe.unet.device)
        cond = self.text([order.prompt for order in orders])
        both = torch.cat([cond, self.text([self.manner.negative]).expand_as(cond)])
        return self.solve(guided(self.network, cond, both, self.manner.guidance, len(self.schedule)), x)

    def network(self, x: Tensor, t: int, text: Tensor) -> Tensor:
        """eps of x [N,4,h,w] float32 at step t with text [N,77,width]."""
        x = x.to(self.pipe.unet.dtype).contiguous(memory_format=torch.channels_last)
        return self.pipe.unet(x, t, encoder_hidden_states=text).sample.float()

    @property
    def grid(self) -> Steps:
        """The timesteps at which the solver asks the network, from noise to picture."""
        rule: Rule = "trailing" if self.manner.solver == "dpm" else "homework"
        return replace(step_rule(rule, len(self.schedule), self.manner.steps), clamp=False)

    def solve(self, denoise: Denoise, x: Tensor, nudge: Nudge = unchanged, span: slice = ALL) -> Tensor:
        """From noise to latents by the chosen solver, or some of its steps; `nudge` as the samplers have it."""
        if self.manner.solver == "dpm":
            return dpm_solver(denoise, x, self.schedule, self.manner.steps, clamp=False, nudge=nudge, span=span)
        return ddim(denoise, x, self.schedule, replace(self.grid, pairs=self.grid.pairs[span]), nudge=nudge)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """[N,3,H,W] in -1..1 -> [N,4,h,w] float32, the means of their posteriors; one at a time where pictures are large."""
        vae = self.pipe.vae
        pieces = pictures.to(vae.device, vae.dtype).split(1 if pictures[0].numel() > PICTURE else len(pictures))
        return torch.cat([vae.encode(piece).latent_dist.mean.float() for piece in pieces]) * vae.config.scaling_factor

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """[N,4,h,w] -> [N,3,H,W] uint8 on the CPU; one at a time where pictures are large, since the decoder takes most memory."""
        vae = self.pipe.vae
        scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
        pieces = scaled.split(1 if latents[0].numel() > LATENT else len(latents))
        images = torch.cat([vae.decode(piece).sample.float() for piece in pieces])
        return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()

    def sample_images(self, orders: Sequence[Request]) -> Tensor:
        """[N,3,H,W] uint8."""
        return self.decode(self.latents(orders))


def generate_batches(
    paint: Callable[[list[Any]], Tensor], orders: Sequence[Any], batch: int, on_gpu: bool, shard: Shard = ALONE
) -> Iterator[tuple[Any, Tensor]]:
    """(order, its picture) of this process's batches, with a progress bar; `batch` 0: 64 on a GPU, halved when memory runs out, eight
    on a CPU, fewer where several processes share few pictures."""
    most = even_batch(len(orders), batch or shard.largest(len(orders), GPU_BATCH if on_gpu else CPU_BATCH))
    mine = [orders[row] for row in shard.rows(len(orders), most)]
    with progress_bar(len(mine), "drawing") as bar:
        for chunk, images in in_batches(paint, mine, most):
            yield from zip(chunk, images[: len(chunk)], strict=True)
            bar.update(len(chunk))
