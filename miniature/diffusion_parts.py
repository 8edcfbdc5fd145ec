"""The miniature's Stable Diffusion: its networks, their folders, and the pipeline that is made of them.

vae/, unet/ and scheduler/ ship with the repository; text tower and tokenizer are those of the small CLIP, which is stored once.
`assemble` writes all into one folder, laid out as any Stable Diffusion v1 of diffusers.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from torch import Tensor, nn

from runtime.batches import in_batches
from runtime.cli import BadInput, progress_bar
from runtime.files import ROOT, atomic, output_folder

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

PARTS = ROOT / "checkpoints" / "miniature" / "stable_diffusion"  # what ships
COMPLETE = ROOT / "runs" / "miniature" / "stable_diffusion"  # the whole pipeline folder
CLIP = ROOT / "runs" / "miniature" / "clip"  # the small CLIP in transformers' form
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name

MAKE_CLIP = "python miniature/train_clip.py convert --output runs/miniature/clip makes it of the small CLIP that ships"


# ---------------------------------------------------------------- networks


def make_autoencoder(channels: tuple[int, ...]) -> AutoencoderKL:
    """Return an untrained autoencoder [N,3,64,64] in -1..1 <-> [N,4,16,16]; `channels` from 64x64 positions down to 16x16."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels = len(channels)
    network: AutoencoderKL = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )
    return network


def make_unet(channels: tuple[int, ...], text_width: int, side: int = 16) -> UNet2DConditionModel:
    """Return an untrained U-Net: latents [N,4,side,side], t and text [N,77,text_width] -> eps.

    `channels` are those of each level, finest first. Every level has attention, in heads of about 32 channels.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    network: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=side,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        attention_head_dim=tuple(max(1, width // 32) for width in channels),  # diffusers' name for the number of heads
        norm_num_groups=16,
        cross_attention_dim=text_width,
    )
    return network


# ---------------------------------------------------------------- folders


def save_part(network: nn.Module, folder: Path) -> None:
    """Write a copy of the network in fp16: safetensors and config.json."""
    save_atomically(copy.deepcopy(network).half(), folder)


def save_atomically(model: Any, folder: Path) -> None:
    """Write a diffusers model or pipeline, each file atomically; other files in the folder stay."""
    output_folder(folder)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as temporary:
        try:
            model.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(f"could not write {folder} (disk full?): {error}") from None
        files = [path for path in Path(temporary).rglob("*") if path.is_file()]
        for file in sorted(files, reverse=True):  # weights before config.json
            with atomic(folder / file.relative_to(temporary)) as whole:
                shutil.copyfile(file, whole)


def load_vae(folder: Path) -> AutoencoderKL:
    """Return the autoencoder in float32, frozen; raise BadInput where the folder doesn't hold one."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    network: AutoencoderKL = _load_part(AutoencoderKL, folder, "python miniature/train_autoencoder.py train makes it")
    return network


def load_unet(folder: Path) -> UNet2DConditionModel:
    """Return the U-Net in float32, frozen; raise BadInput where the folder doesn't hold one."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    hint = "python miniature/train_diffusion.py train makes it"
    network: UNet2DConditionModel = _load_part(UNet2DConditionModel, folder, hint)
    return network


def _load_part(kind: Any, folder: Path, hint: str) -> Any:
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} holds no {kind.__name__}: {hint}")
    try:
        network = kind.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{folder} is no readable {kind.__name__}: {str(error).splitlines()[0][:160]}; {hint}") from None
    return network.eval().requires_grad_(False)


def start_from(network: nn.Module, initial: nn.Module, folder: Path) -> None:
    """Copy the weights of `initial`, read from --init `folder`, into `network`; raise BadInput if it has another layout."""
    try:
        network.load_state_dict(initial.state_dict())
    except RuntimeError:
        raise BadInput(f"--init {folder} is of another layout than the other flags ask for") from None


def load_text_tower(folder: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Return text model (float32, frozen) and tokenizer of a transformers CLIP folder; raise BadInput if it holds none."""
    from transformers import CLIPTextModel, CLIPTokenizer

    from runtime.hub import quiet_libraries

    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} holds no CLIP: {MAKE_CLIP}")
    quiet_libraries()
    load: Any = CLIPTextModel.from_pretrained
    try:
        tower, info = load(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{folder} is no readable CLIP: {str(error).splitlines()[0][:160]}; {MAKE_CLIP}") from None
    if info["missing_keys"]:  # transformers fills them at random; the folder's other tensors don't matter
        raise BadInput(f"{folder} is no whole CLIP: it lacks {min(info['missing_keys'])}; {MAKE_CLIP}")
    length = tower.config.max_position_embeddings
    if tokenizer.model_max_length != length:
        raise BadInput(
            f"{folder}: its tokenizer ends prompts at {tokenizer.model_max_length} tokens, its model at {length}"
        )
    return tower.eval().requires_grad_(False), tokenizer


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Return token ids [N,77] of N texts, padded and cut as the pipeline does."""
    shape: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    # as numpy it is twice as fast
    return torch.from_numpy(tokenizer(list(texts), return_tensors="np", return_attention_mask=False, **shape).input_ids)


def make_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, tower: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Return the parts as one pipeline, without the safety checker, which needs a download."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    from concepts.single_file import make_scheduler

    parts: dict[str, Any] = {"vae": vae, "unet": unet, "text_encoder": tower, "tokenizer": tokenizer}
    parts["scheduler"] = make_scheduler()
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(**parts, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(parts: Path, clip: Path) -> StableDiffusionPipeline:
    """Return the pipeline of vae/ and unet/ in `parts` and the transformers folder `clip`.

    Raise BadInput for an absent part, naming the command that makes it, and if U-Net and text tower differ in width.
    """
    tower, tokenizer = load_text_tower(clip)
    vae, unet = load_vae(parts / "vae"), load_unet(parts / "unet")
    width = unet.config["cross_attention_dim"]
    if width != tower.config.hidden_size:
        raise BadInput(f"{parts / 'unet'} reads text {width} wide, {clip} writes {tower.config.hidden_size}")
    return make_pipeline(vae, unet, tower, tokenizer)


def assemble(parts: Path, clip: Path, output: Path) -> None:
    """Write the whole pipeline to one folder, in float32: loaders differ in how they treat half precision."""
    pipe = load_pipeline(parts, clip)
    pipe.save_pretrained(output_folder(output))


# ---------------------------------------------------------------- images


def with_solver(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Switch the pipeline to DPM-Solver++ (Lu et al. 2022), on timesteps that start at pure noise; return the pipeline."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


@torch.inference_mode()
def draw(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, batch: int
) -> Tensor:
    """Draw an image per prompt: [N,3,64,64] uint8 on the CPU.

    Image k starts from the noise of `seeds[k]`. `batch` images are drawn at a time.
    """

    def work(items: list[tuple[str, int]]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for _, seed in items]
        output: Any = pipe([prompt for prompt, _ in items], num_inference_steps=steps, guidance_scale=guidance,
                           generator=generators, output_type="np")  # fmt: skip
        return torch.from_numpy((output.images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)

    items = list(zip(prompts, seeds, strict=True))
    with progress_bar(len(items), "drawing") as bar:
        parts = []
        for chunk, images in in_batches(work, items, min(batch, len(items))):
            parts.append(images[: len(chunk)])
            bar.update(len(chunk))
    return torch.cat(parts)


def prompt_sheet(images: Tensor, prompts: Sequence[str], columns: int = 6, scale: int = 3) -> Tensor:
    """Return one [3,H,W] uint8 image on white, of images [N,3,h,w] uint8 enlarged `scale` times, each with its prompt below."""
    font, lines = ImageFont.load_default(size=12), 3
    width, height = images.shape[3] * scale, images.shape[2] * scale
    cell = (width + 8, height + 15 * lines + 8)
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * -(-len(images) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        left, top = index % columns * cell[0] + 4, index // columns * cell[1] + 4
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        text = "\n".join(textwrap.wrap(prompt, max(8, width // 6))[:lines])
        pen.multiline_text((left, top + height + 2), text, "black", font, spacing=2)
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
