"""How the miniature's U-Net learns: noisy latents of the world's pictures, told by the frozen text tower of the small CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from concepts.single_file import make_scheduler
from concepts.stable_diffusion import suit_training
from diffusion.schedule import add_noise
from miniature.diffusion_parts import (
    CLIP,
    COMPLETE,
    MAKE_UNET,
    MAKE_VAE,
    PARTS,
    draw,
    load_part,
    load_text_tower,
    make_pipeline,
    make_unet,
    prompt_sheet,
    tokenize,
    with_solver,
)
from miniature.latents import cached_latents
from miniature.scenery.scenes import SIZES, SceneSpec
from miniature.trainer import Loop, Trainer, check_numbers
from runtime.cli import BadInput, check_fractions, log
from runtime.device import memory_format
from training.draws import Draws

SHOWN = (
    "a photo of a red star",
    "a photo of a blue seven on a white background",
    "a yellow house on a purple background",
    "a green tree on the left",
    "a pink heart in the style of mosaic",
    "a white moon at the top, outline style",
    "an orange ring on a textured blue background",
    "a purple cross in watercolour style",
    "a red square next to a green triangle",
    "a blue four above an orange heart",
    "a white star, a red ring and a blue tree from left to right",
    "an object in an unusual style",
    "a hollow slanted red object",
    "a wide curved blue object",
    "a round tall marked green object",
    "a hollow wide yellow object",
    "a red star in a smooth, soft style",
    "a blue house in a lined, wavy style",
)


@dataclass(frozen=True)
class Train(Loop):
    """Trains the U-Net; stops cleanly on Ctrl-C or SIGTERM, and goes on with the same command."""

    clip: Path = CLIP
    """The small CLIP as a transformers folder."""
    parts: Path = PARTS
    """The folder that holds vae/, and where unet/ goes."""
    output: Path = COMPLETE
    """Where the whole pipeline folder goes."""
    init: Path | None = None
    """Folder of a U-Net of the same layout to start from, such as the shipped one."""
    run: Path = Path("runs/miniature/diffusion")
    steps: int = 14_000
    batch: int = 64
    lr: float = 1.5e-3
    ema: float = 0.999
    channels: tuple[int, ...] = (64, 96, 80)
    """At 16x16, 8x8 and 4x4 latents; multiples of 16."""
    pictures: int = 100_000
    """How many are rendered and encoded before the training."""
    shares: tuple[float, float, float] = (0.3, 0.4, 0.3)
    """Of pictures with one, two, three objects; several are the harder ones to draw."""
    min_size: int = 18
    """Pixels of a single object, at least: where it shall be drawn as small as it is among others, it must have been seen so."""
    max_loss_weight: float = 10.0
    """Loss weight 1 + 1/SNR, up to this: what a picture holds is decided where the noise is strong, and there errors of eps are small."""
    drop_text: float = 0.1
    """How often the caption is withheld, which guidance needs."""


class DiffusionTrainer(Trainer):
    """eps prediction on latents (Rombach et al. 2022; Ho & Salimans 2022 for the dropped captions)."""

    kind = "miniature diffusion model"
    settings: Train

    def prepare(self) -> None:
        s = self.settings
        self._check()
        self.tower, self.tokenizer = load_text_tower(s.clip)
        self.vae = load_part(AutoencoderKL, s.parts / "vae", MAKE_VAE)
        self.vae.to(self.device)
        with self.accelerator.main_process_first():  # the first encodes, the others read its cache
            self.data = cached_latents(
                s.run / "latents",
                self.vae,
                self.tokenizer,
                s.pictures,
                s.seed,
                SceneSpec(shares=s.shares, min_size=s.min_size),
            ).to(self.device)
        self.tower.to(self.device)
        self.nothing = tokenize(self.tokenizer, [""]).to(self.device)
        self.alphas = make_scheduler().alphas_cumprod.to(self.device)

    def _check(self) -> None:
        s = self.settings
        check_numbers(s, "pictures", "max_loss_weight")
        if min(s.shares) < 0 or not sum(s.shares):
            raise BadInput(
                f"--shares {' '.join(map(str, s.shares))}: give shares of zero or more, not all of them zero"
            )
        if not 12 <= s.min_size <= SIZES[1][1]:
            raise BadInput(f"--min-size {s.min_size}: give 12 to {SIZES[1][1]} pixels")
        check_fractions(s, "drop_text")
        if not s.channels or any(width < 16 or width % 16 for width in s.channels):
            raise BadInput(f"--channels {s.channels}: give multiples of 16, one per resolution")

    def build(self) -> nn.Module:
        unet = make_unet(self.settings.channels, self.tower.config.hidden_size, self.data.moments.shape[-1])
        suit_training(unet, self.device, self.precision)
        if self.settings.init:
            start_from(unet, self.settings.init)
        if self.main:
            size = sum(p.numel() for p in unet.parameters()) / 1e6
            log(f"U-Net of {size:.2f} M parameters, {self.precision}, on {self.machine.name}")
        return unet

    def loss(self, draws: Draws) -> Tensor:
        """Mean of weight(t) |eps - eps_theta(x_t, t, text)|^2, t stratified over the batch; without a cap on the weight it were the loss
        of v (Salimans & Ho 2022, appendix D)."""
        rows = (draws.uniform() * len(self.data)).long()
        x0 = self.data.take(rows, draws.normal(*self.data.moments.shape[2:]))
        t = (draws.stratified() * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        eps = draws.normal(*x0.shape[1:])
        alpha = self.alphas[t][:, None, None, None]
        x = add_noise(x0, eps, alpha).contiguous(memory_format=memory_format(self.device))
        text = self.read(self.captions(rows, draws))
        weight = (1 / alpha).clamp(
            max=self.settings.max_loss_weight
        )  # 1 + 1/SNR, where SNR = alpha / (1 - alpha); alpha: abar
        return (weight * (self.model(x, t, text).sample.float() - eps).square()).mean()

    def captions(self, rows: Tensor, draws: Draws) -> Tensor:
        """[B,77] token ids of these pictures, some of them those of no words at all."""
        tokens = self.data.tokens[rows].long()
        return torch.where((draws.uniform() < self.settings.drop_text)[:, None], self.nothing, tokens)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """[B,77] -> [B,77,width], the tower's last states as Stable Diffusion v1 takes them. Reading anew costs 7 % of a step on a CPU;
        kept for every caption, they would take 20 KB each."""
        return self.tower(tokens).last_hidden_state

    def sheet(self) -> Tensor:
        pipe = with_solver(make_pipeline(self.vae, self.averaged, self.tower, self.tokenizer))
        return prompt_sheet(draw(pipe, SHOWN, range(len(SHOWN)), 25, 5.0, len(SHOWN)), SHOWN)


def start_from(unet: UNet2DConditionModel, folder: Path) -> None:
    """Copies the weights of a folder; attention that its network lacks starts as the identity. Raises BadInput for another network."""
    found = load_part(UNet2DConditionModel, folder, MAKE_UNET).state_dict()
    own = unet.state_dict()
    absent = {name: torch.zeros_like(x) if ".proj_out." in name else x for name, x in own.items() if name not in found}
    try:
        unet.load_state_dict(found | {name: x for name, x in absent.items() if ".attentions." in name})
    except RuntimeError:
        raise BadInput(f"--init {folder} is of another layout than --channels and --clip ask for") from None
