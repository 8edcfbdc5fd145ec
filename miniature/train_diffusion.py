"""Trains, assembles and grades the miniature's Stable Diffusion: a small U-Net, conditioned on the small CLIP's text tower.

  python miniature/train_diffusion.py train                     checkpoints/miniature/stable_diffusion/unet; the same command resumes
  python miniature/train_diffusion.py assemble --output DIR     the whole StableDiffusionPipeline folder, from the parts that ship
  python miniature/train_diffusion.py grade                     draws images of prompts; a classifier, the judge, says what they show

Needs the small CLIP as a transformers folder (--clip) and, for grading, the judge. Several GPUs: accelerate launch, or torchrun.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import repository_root  # noqa: F401  # isort: split
import torch
import tyro
from torch import Tensor, nn

from diffusion.loss import capped_v_weight, denoising_loss
from miniature.diffusion_grading import GradeDiffusion, PromptCase, cases_of, rates_of, table
from miniature.diffusion_parts import (
    CLIP,
    COMPLETE,
    PARTS,
    WEIGHTS,
    assemble,
    draw,
    load_pipeline,
    load_text_tower,
    load_unet,
    load_vae,
    make_pipeline,
    make_unet,
    prompt_sheet,
    save_part,
    start_from,
    tokenize,
    with_solver,
)
from miniature.judge_model import load_scene_classifier
from miniature.latents import cached_latents, weights_fingerprint
from miniature.scenery.scenes import SIZES, SceneSpec
from miniature.training_flags import TrainingFlags, save_sheet
from runtime.cli import BadInput, check_fractions, check_not_negative, check_positive, log, run_script
from runtime.device import (
    AutoOnOff,
    Precision,
    detect,
    memory_format,
    set_up,
    should_compile,
    to_training_device,
)
from runtime.files import check_writable_folder, file_fingerprint
from runtime.images import save_image
from runtime.record import Record
from runtime.seeds import derived_seed
from training.draws import Draws, process_rows
from training.ema import Ema
from training.loop import Trained, TrainingRun
from training.schedule import LearningRate

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

SHEET_PROMPTS = (
    "a photo of a red star on a white background",
    "a yellow house on a purple background",
    "a green tree on the left",
    "a pink heart in the style of mosaic",
    "a white moon at the top, outline style",
    "an orange ring on a textured blue background",
    "a purple cross in watercolour style",
    "a blue four above an orange heart",
    "a white star, a red ring and a blue tree from left to right",
    "an object in an unusual style",
    "a round tall marked green object",
    "a blue house in a lined, wavy style",
)


@tyro.conf.configure(tyro.conf.subcommand(name="train"))
@dataclass(frozen=True)
class TrainDiffusion(TrainingFlags):
    """Train the U-Net. Ctrl-C or SIGTERM stops cleanly, and the same command continues."""

    clip: Path = CLIP
    """Folder of the small CLIP in transformers' form (train_clip.py convert)."""
    parts: Path = PARTS
    """Folder that holds vae/, and in which unet/ and scheduler/ are written."""
    output: Path = COMPLETE
    """Folder for the whole pipeline."""
    run: Path = Path("runs/miniature/diffusion")
    steps: int = 14_000
    batch: int = 64
    """Images per step over all processes."""
    lr: float = 1.5e-3
    ema: float = 0.999
    channels: tuple[int, ...] = (64, 96, 80)
    """Channels of the U-Net at 16x16, 8x8 and 4x4 positions; multiples of 16."""
    pictures: int = 100_000
    """Number of training images, rendered and encoded before the training."""
    shares: tuple[float, float, float] = (0.3, 0.4, 0.3)
    """Shares of images with one, two and three objects. Several objects are harder to draw."""
    min_size: int = 18
    """Smallest size of a single object, in pixels (12 to 44). The model draws no object smaller than in training."""
    max_loss_weight: float = 10.0
    """Cap on the loss weight 1 + 1/SNR (1 = unweighted). Higher values emphasise noisy steps, which decide shape and position."""
    drop_text: float = 0.1
    """Share of images, 0 to 1, trained with an empty caption, as classifier-free guidance needs."""
    show_every: int = 1000
    """Steps between two sheets of generated images; 0 = none."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    compile: AutoOnOff = "auto"
    """torch.compile; auto: in a long training on CUDA or on a CPU with bf16."""


@tyro.conf.configure(tyro.conf.subcommand(name="assemble"))
@dataclass(frozen=True)
class AssemblePipeline:
    """Write the whole pipeline folder, as StableDiffusionPipeline.from_pretrained takes it."""

    clip: Path = CLIP
    """Folder of the small CLIP in transformers' form (train_clip.py convert)."""
    parts: Path = PARTS
    """Folder that holds vae/ and unet/."""
    output: Path = COMPLETE
    """Folder for the whole pipeline."""


# ---------------------------------------------------------------- training


def check_training(settings: TrainDiffusion) -> None:
    """Raise BadInput for flags out of range, and for folders that can't be made."""
    settings.check("pictures", "max_loss_weight")
    check_fractions(settings, "drop_text")
    if min(settings.shares) < 0 or not sum(settings.shares):
        shares = " ".join(map(str, settings.shares))
        raise BadInput(f"--shares {shares}: give shares of zero or more, not all of them zero")
    if not 12 <= settings.min_size <= SIZES[1][1]:
        raise BadInput(f"--min-size {settings.min_size}: give 12 to {SIZES[1][1]} pixels")
    if not settings.channels or any(width < 16 or width % 16 for width in settings.channels):
        raise BadInput(f"--channels {settings.channels}: give multiples of 16, one per resolution")
    check_writable_folder(settings.output)


def train(settings: TrainDiffusion) -> None:
    """Train eps prediction on latents (Rombach et al. 2022), save the U-Net, and assemble the pipeline."""
    from accelerate import Accelerator  # slow to import

    from concepts.single_file import make_scheduler
    from concepts.stable_diffusion import suit_training

    # the machine
    check_training(settings)
    machine = detect(settings.device)
    precision = set_up(settings.precision, machine, training=True)
    accelerator = Accelerator(mixed_precision="no", cpu=machine.device.type == "cpu")  # devices and processes only
    device = accelerator.device
    share = process_rows(settings.batch, accelerator.process_index, accelerator.num_processes)
    record = Record(settings, replace(machine, device=device))

    # the frozen parts, and the data
    tower, tokenizer = load_text_tower(settings.clip)
    vae = load_vae(settings.parts / "vae")
    vae.to(device)
    spec = SceneSpec(shares=settings.shares, min_size=settings.min_size)
    cache = settings.run / "latents"
    with accelerator.main_process_first():  # the first process encodes, the others read its cache
        data = cached_latents(cache, vae, tokenizer, settings.pictures, settings.seed, spec).to(device)
    tower.to(device)
    no_text = tokenize(tokenizer, [""]).to(device)
    alpha_bar = make_scheduler().alphas_cumprod.to(device)
    weight = partial(capped_v_weight, maximum=settings.max_loss_weight)

    # the network, its average and its optimizer
    torch.manual_seed(settings.seed)
    unet = make_unet(settings.channels, tower.config.hidden_size, data.moments.shape[-1])
    suit_training(unet, device, precision)
    if settings.init:
        start_from(unet, load_unet(settings.init), settings.init)
    to_training_device(unet, device)
    ema = Ema(unet, settings.ema)
    averaged: Any = ema.module.eval()
    adamw = torch.optim.AdamW(unet.parameters(), settings.lr, weight_decay=0.01, fused=device.type != "mps")
    compiled = should_compile(settings.compile, machine, settings.steps >= machine.compile_steps)
    if compiled:
        unet.compile()
    model, optimizer = accelerator.prepare(unet, adamw)
    parameters = sum(p.numel() for p in unet.parameters())
    log(f"U-Net of {parameters / 1e6:.2f} M parameters, {precision}, on {machine.name}")

    # the run: continues from its checkpoint where there is one
    lr = LearningRate(settings.lr, min(200, settings.steps // 10), decay=0.6)
    facts = settings.facts(
        *(WEIGHTS, "channels", "pictures", "shares", "min_size", "max_loss_weight", "drop_text"),
        latents=file_fingerprint(cache / "facts.json"),  # holds what determines the latents: world and autoencoder
        clip=weights_fingerprint(tower),
    )
    config = settings.loop("miniature diffusion model", lr, precision, compiled=compiled)
    run = TrainingRun(config, facts, Trained(unet, optimizer, ema), record, accelerator)

    def predict(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        eps: Tensor = model(x.contiguous(memory_format=memory_format(device)), t, text).sample
        return eps

    for step in run:
        # latents, noise and captions, some of them dropped so that guidance has an unconditional prediction
        draws = Draws(settings.seed, step, share, settings.batch, device)
        rows = (draws.uniform() * len(data)).long()
        x0 = data.sample(rows, draws.normal(*data.moments.shape[2:]))
        t, eps = draws.timesteps(len(alpha_bar)), draws.normal(*x0.shape[1:])
        tokens = data.captions(rows, draws.uniform() < settings.drop_text, no_text)
        with run.autocast():
            with torch.no_grad():  # 7 % of a step on a CPU; storing the states instead would take 20 KB a caption
                text = tower(tokens).last_hidden_state
            loss = denoising_loss(partial(predict, text=text), x0, eps, t, alpha_bar, "eps", weight)
        run.update(loss)

        if run.is_main and settings.show_every and run.every(settings.show_every):
            save_sheet(run, draw_sheet(make_pipeline(vae, averaged, tower, tokenizer)))

    if run.is_main and run.done:
        save_model(averaged, settings)
        loss, speed = (record.metrics.get(name, float("nan")) for name in ("loss", "images_per_s"))
        print(f"{run.step:,} steps, loss {loss:.4f}, {speed:.0f} images/s")
    run.finish(parameters=parameters)


def draw_sheet(pipe: StableDiffusionPipeline) -> Tensor:
    """Return one image [3,H,W] uint8 of SHEET_PROMPTS, drawn by the pipeline, which is switched to DPM-Solver++."""
    images = draw(with_solver(pipe), SHEET_PROMPTS, range(len(SHEET_PROMPTS)), 25, 5.0, len(SHEET_PROMPTS))
    return prompt_sheet(images, SHEET_PROMPTS)


def save_model(unet: nn.Module, settings: TrainDiffusion) -> None:
    """Write unet/ and scheduler/ into --parts, and the whole pipeline into --output."""
    from concepts.single_file import make_scheduler

    save_part(unet, settings.parts / "unet")
    make_scheduler().save_pretrained(settings.parts / "scheduler")
    assemble(settings.parts, settings.clip, settings.output)
    log(f"U-Net: {settings.parts / 'unet'}, pipeline: {settings.output}, record: {settings.run / 'record.json'}")


# ---------------------------------------------------------------- grading


def grade(settings: GradeDiffusion) -> None:
    """Draw an image per prompt, classify the images with the judge, print the table, and write record.json and a sheet."""
    check_positive(settings, "count", "steps", "batch")
    check_not_negative(settings, "seed")
    if min(settings.held_out, settings.scenes, settings.couples) < 0:
        raise BadInput("--held-out, --scenes and --couples: give zero or more")
    check_writable_folder(settings.output)
    machine = detect(settings.device)
    set_up("fp32", machine)
    judge = load_scene_classifier(machine.device, settings.judge)
    pipe = with_solver(load_pipeline(settings.parts, settings.clip)).to(machine.device)
    cases, record = cases_of(settings), Record(settings, machine)
    with record.timed("drawing"):
        images = draw_cases(pipe, cases, settings)
    rates = rates_of(judge, images, cases)
    seconds = record.timings["drawing"] / len(cases)
    record.metrics = {"rates": rates, "seconds_per_picture": round(seconds, 4)}
    groups = dict.fromkeys(case.group for case in cases)
    rows = [row for name in groups for row in [k for k, case in enumerate(cases) if case.group == name][:12]]
    save_image(settings.output / "sheet.png", prompt_sheet(images[rows], [cases[row].prompt for row in rows]))
    record.save(settings.output / "record.json")
    print(f"{table(rates)}\n{'seconds per image':<40}{seconds:>8.3f}")
    log(f"sheet and record: {settings.output}")


def draw_cases(pipe: StableDiffusionPipeline, cases: list[PromptCase], settings: GradeDiffusion) -> Tensor:
    """Return [N,3,64,64] uint8, an image per case, each with another seed."""
    seeds = [derived_seed(settings.seed, index) for index in range(len(cases))]
    return draw(pipe, [case.prompt for case in cases], seeds, settings.steps, settings.guidance, settings.batch)


def main(command: TrainDiffusion | AssemblePipeline | GradeDiffusion) -> None:
    """Run the chosen subcommand."""
    if isinstance(command, TrainDiffusion):
        train(command)
    elif isinstance(command, AssemblePipeline):
        assemble(command.parts, command.clip, command.output)
        print(f"pipeline: {command.output}")
    else:
        grade(command)


if __name__ == "__main__":
    command: Any = TrainDiffusion | AssemblePipeline | GradeDiffusion  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
