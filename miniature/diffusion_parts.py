"""The parts of the miniature's Stable Diffusion: what they are, where they lie, how they become one pipeline folder and draw.

vae/, unet/ and scheduler/ ship with the repository; text tower and tokenizer are those of the small CLIP, stored there once. `assemble`
writes the whole folder, laid out as any Stable Diffusion v1 of diffusers.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from concepts.single_file import make_scheduler
from runtime.batches import in_batches
from runtime.cli import BadInput, progress_bar
from runtime.files import ROOT, atomic, output_folder
from runtime.hub import quiet_libraries

PARTS = ROOT / "checkpoints" / "miniature" / "stable_diffusion"  # what ships
COMPLETE = ROOT / "runs" / "miniature" / "stable_diffusion"  # what draws
CLIP = ROOT / "runs" / "miniature" / "clip"  # the small CLIP as transformers has it

MAKE_CLIP = "python miniature/train_clip.py convert --output runs/miniature/clip makes it of the small CLIP that ships"
MAKE_VAE = "python miniature/train_autoencoder.py train makes it"
MAKE_UNET = "python miniature/train_diffusion.py train makes it"

Part = TypeVar("Part", AutoencoderKL, UNet2DConditionModel)


# ---------------------------------------------------------------- networks


def make_autoencoder(channels: tuple[int, ...]) -> AutoencoderKL:
    """[N,3,64,64] in -1..1 <-> [N,4,16,16]; one residual block per level, channels from 64x64 positions down to 16x16."""
    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def make_unet(channels: tuple[int, ...], text_width: int, side: int = 16) -> UNet2DConditionModel:
    """eps from latents [N,4,side,side], t and text [N,77,text_width]; attention at every level, in heads of about 32 channels."""
    return UNet2DConditionModel(
        sample_size=side,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        attention_head_dim=tuple(max(1, width // 32) for width in channels),  # diffusers' name for the number of heads
        norm_num_groups=16,
        cross_attention_dim=text_width,
    )


# ---------------------------------------------------------------- folders


def save_part(network: AutoencoderKL | UNet2DConditionModel, folder: Path) -> None:
    """fp16 safetensors and config.json; each file is either whole or the old one."""
    output_folder(folder)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as temporary:
        try:
            copy.deepcopy(network).half().save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(f"could not write {folder} (disk full?): {error}") from None
        for file in sorted(Path(temporary).iterdir(), reverse=True):  # weights before config.json
            with atomic(folder / file.name) as whole:
                shutil.copyfile(file, whole)


def load_part(kind: type[Part], folder: Path, hint: str) -> Part:
    """The network in float32, frozen; raises BadInput, ending with the hint, where the folder doesn't hold it."""
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} holds no {kind.__name__}: {hint}")
    try:
        network = kind.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{folder} is no readable {kind.__name__}: {str(error).splitlines()[0][:160]}; {hint}") from None
    return network.eval().requires_grad_(False)


def load_text_tower(folder: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Text model in float32, frozen, and tokenizer of a transformers CLIP folder; raises BadInput where it isn't one."""
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} holds no CLIP: {MAKE_CLIP}")
    quiet_libraries()
    try:
        tower, info = cast(Any, CLIPTextModel.from_pretrained)(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{folder} is no readable CLIP: {str(error).splitlines()[0][:160]}; {MAKE_CLIP}") from None
    if info["missing_keys"]:  # transformers draws them at random; what the folder holds beside the tower is no matter
        raise BadInput(f"{folder} is no whole CLIP: it lacks {min(info['missing_keys'])}; {MAKE_CLIP}")
    length = tower.config.max_position_embeddings
    if tokenizer.model_max_length != length:
        raise BadInput(
            f"{folder}: its tokenizer ends prompts at {tokenizer.model_max_length} tokens, its model at {length}"
        )
    return tower.eval().requires_grad_(False), tokenizer


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """[N,77] token ids, padded and cut as the pipeline does."""
    given = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    made = tokenizer(list(texts), return_tensors="np", return_attention_mask=False, **given)  # twice as fast so
    return torch.from_numpy(made.input_ids)


def make_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, tower: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """All parts together, without the filter that needs a download."""
    given: dict[str, Any] = {
        "vae": vae,
        "unet": unet,
        "text_encoder": tower,
        "tokenizer": tokenizer,
        "scheduler": make_scheduler(),
    }
    without: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(**given, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(parts: Path, clip: Path) -> StableDiffusionPipeline:
    """From vae/ and unet/ of `parts` and the transformers folder `clip`; raises BadInput, naming the command that makes what is absent."""
    tower, tokenizer = load_text_tower(clip)
    vae = load_part(AutoencoderKL, parts / "vae", MAKE_VAE)
    unet = load_part(UNet2DConditionModel, parts / "unet", MAKE_UNET)
    if unet.config.cross_attention_dim != tower.config.hidden_size:
        raise BadInput(
            f"{parts / 'unet'} reads text {unet.config.cross_attention_dim} wide, {clip} writes {tower.config.hidden_size}"
        )
    return make_pipeline(vae, unet, tower, tokenizer)


def assemble(parts: Path, clip: Path, output: Path) -> None:
    """Writes the whole pipeline folder in float32: loaders differ in what they make of halves, and it is made anew at any time."""
    pipe = load_pipeline(parts, clip)
    pipe.save_pretrained(output_folder(output))


# ---------------------------------------------------------------- pictures


def with_solver(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The same pipeline with DPM-Solver++ (Lu et al. 2022), on a grid that starts at pure noise."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


@torch.inference_mode()
def draw(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, batch: int
) -> Tensor:
    """[N,3,64,64] uint8 on the CPU; picture k has seed k's noise, whatever the batch."""

    def work(items: list[tuple[str, int]]) -> Tensor:
        streams = [torch.Generator().manual_seed(seed) for _, seed in items]
        made: Any = pipe([prompt for prompt, _ in items], num_inference_steps=steps, guidance_scale=guidance,
                         generator=streams, output_type="np")  # fmt: skip
        return torch.from_numpy((made.images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)

    items = list(zip(prompts, seeds, strict=True))
    with progress_bar(len(items), "drawing") as bar:
        parts = []
        for chunk, images in in_batches(work, items, min(batch, len(items))):
            parts.append(images[: len(chunk)])
            bar.update(len(chunk))
    return torch.cat(parts)


def prompt_sheet(images: Tensor, prompts: Sequence[str], columns: int = 6, scale: int = 3) -> Tensor:
    """[N,3,h,w] uint8 -> one [3,H,W] uint8 picture on white, each with its prompt below."""
    font, lines = ImageFont.load_default(size=12), 3
    width, height = images.shape[3] * scale, images.shape[2] * scale
    cell = (width + 8, height + 15 * lines + 8)
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * -(-len(images) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        left, top = index % columns * cell[0] + 4, index // columns * cell[1] + 4
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        told = textwrap.wrap(prompt, max(8, width // 6))[:lines]
        pen.multiline_text((left, top + height + 2), "\n".join(told), "black", font, spacing=2)
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
