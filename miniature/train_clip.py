"""Trains, grades and converts the miniature's CLIP: a small open_clip model of images and captions of the world.

  python miniature/train_clip.py train                      checkpoints/miniature/clip, in open_clip's form
  python miniature/train_clip.py grade --count 2000         zero-shot accuracy on new images, held-out (colour, object) pairs first
  python miniature/train_clip.py convert --output DIR       the same model as a transformers CLIPModel with its processor
  python P3_clip_zeroshot.py --model local-dir:checkpoints/miniature/clip --images DIR/val --prompts single

Files: miniature/clip_model.py; data: miniature/clip_batches.py; losses: miniature/clip_loss.py.
"""

from __future__ import annotations

import math
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import repository_root  # noqa: F401  # isort: split
import torch
import tyro
from torch import nn

from miniature.clip_batches import FAMILY, ClipBatches
from miniature.clip_grading import held_out_pairs, measure_rates, table
from miniature.clip_loss import PatchLoss, StyleLoss, contrastive_loss, forward, parameter_groups
from miniature.clip_model import (
    PREPROCESSING,
    SHIPPED,
    WEIGHTS,
    ClipSize,
    SmallClip,
    convert,
    load_clip,
    model_config,
    round_weights,
    save_clip,
)
from miniature.diffusion_parts import start_from
from miniature.scenery.render import world_fingerprint
from miniature.scenery.scenes import FREE
from miniature.scenery.vocabulary import LENGTH, make_tokenizer
from miniature.training_flags import TrainingFlags
from runtime.cli import BadInput, check_not_negative, check_positive, log, run_script
from runtime.device import Device, Precision, detect, len_cores, set_up
from runtime.files import check_writable_folder
from runtime.images import to_float
from runtime.record import Record
from training.ema import Ema
from training.loop import Trained, TrainingRun
from training.schedule import LearningRate

QUICK_COUNT = 240  # images for the accuracy that is logged during training
MAX_LOGIT_SCALE = math.log(100)  # as in the CLIP paper


@tyro.conf.configure(tyro.conf.subcommand(name="train"))
@dataclass(frozen=True)
class TrainClip(TrainingFlags):
    """Train on images rendered during the training. Ctrl-C or SIGTERM stops cleanly, and the same command continues."""

    output: Path = SHIPPED
    """Folder for the model, in open_clip's form."""
    run: Path = Path("runs/miniature/clip")
    steps: int = 6500
    batch: int = 64
    """Images per step, in families of four similar images; a multiple of four."""
    lr: float = 1.5e-3
    ema: float = 0.998
    weight_decay: float = 0.1
    """Weight decay of matrices; embeddings, gains and biases have none."""
    parts: float = 0.5
    """Weight of the loss that classifies the object at each patch; 0 = off."""
    styles: float = 0.25
    """Weight of the loss that classifies an image's style; 0 = off."""
    lock_text: bool = False
    """Freeze the text tower of --init, which a U-Net may depend on. Its projection, which only CLIP uses, is trained."""
    size: ClipSize = field(default_factory=ClipSize)
    save_every: int = 100
    """Steps between two checkpoints, each with a quick grading."""
    grade: int = 1200
    """Number of new images per question on which the finished model is graded."""
    workers: int = -1
    """Processes that render; -1 = one less than there are cores, at most 8; 0 = render between the steps."""
    precision: Precision = "auto"
    """Precision of the towers; auto: bf16 where the hardware has it, else fp16 on CUDA, else fp32. The loss is in fp32."""


@tyro.conf.configure(tyro.conf.subcommand(name="grade"))
@dataclass(frozen=True)
class GradeClip:
    """Measure the zero-shot accuracy on new rendered images, whose contents are known."""

    model: Path = SHIPPED
    """Folder of the model, in open_clip's form."""
    count: int = 2000
    """Number of images per question."""
    transduce: bool = False
    """Classify the images of each question together, as `P3_clip_zeroshot.py --transduce` does."""
    seed: int = 1
    device: Device = "auto"
    record: Path = Path("runs/miniature/clip/grade.json")
    """JSON file for settings and results."""


@tyro.conf.configure(tyro.conf.subcommand(name="convert"))
@dataclass(frozen=True)
class ConvertClip:
    """Write the model as transformers' CLIPModel and CLIPProcessor, in fp32."""

    output: Path
    """Folder for the converted model."""
    model: Path = SHIPPED
    """Folder of the model, in open_clip's form."""


def train(settings: TrainClip) -> None:
    """Train on the contrastive loss and two auxiliary ones, grade the model, and write it."""
    import open_clip
    from torch.utils.data import DataLoader

    settings.check("grade")
    if settings.batch % FAMILY:
        raise BadInput(f"--batch {settings.batch}: must be a multiple of {FAMILY}, the images of a family")
    if settings.lock_text and not settings.init:
        raise BadInput("--lock-text: name the model with that tower by --init")
    check_writable_folder(settings.output)
    machine = detect(settings.device)
    precision = set_up(settings.precision, machine, training=True)
    device, record = machine.device, Record(settings, machine)

    # the model, its average, the heads of the auxiliary losses, and the optimizer
    tokenizer = make_tokenizer()
    config = model_config(settings.size, tokenizer)
    torch.manual_seed(settings.seed)
    model: Any = open_clip.CLIP(**config).to(device)
    if settings.init:
        start_from(model, load_clip(settings.init).model, settings.init)
    if settings.lock_text:
        lock_text_tower(model)
    ema = Ema(model, settings.ema)  # before PatchLoss registers its hook, which the average must not have
    averaged = SmallClip(ema.module.eval(), tokenizer, config, PREPROCESSING)
    patch_loss = PatchLoss(model.visual, settings.size.vision_width).to(device)
    style_loss = StyleLoss(settings.size.embedding).to(device)
    heads = {"params": [*patch_loss.parameters(), *style_loss.parameters()]}
    groups = [*parameter_groups(model, settings.weight_decay), heads]
    optimizer = torch.optim.AdamW(groups, settings.lr, betas=(0.9, 0.98), fused=True)

    # the run: continues from its checkpoint where there is one; other processes render ahead
    facts = settings.facts(
        *(WEIGHTS, "weight_decay", "parts", "styles", "lock_text"),
        size=asdict(settings.size),
        words=len(tokenizer),
        world=world_fingerprint(FREE),
    )
    trained = Trained(model, optimizer, ema, {"patch_loss": patch_loss, "style_loss": style_loss})
    lr = LearningRate(settings.lr, settings.steps // 20, 0.9, "cosine")
    run = TrainingRun(settings.loop("miniature clip", lr, precision), facts, trained, record)
    data: Any = ClipBatches(settings.seed, settings.batch, settings.size.patch)  # a map-style data set without a length
    workers = settings.workers if settings.workers >= 0 else min(8, len_cores() - 1)
    left: Any = range(run.step, settings.steps)
    batches = iter(DataLoader(data, None, sampler=left, num_workers=workers, worker_init_fn=quiet_worker))

    for _ in run:
        batch = next(batches)
        x, is_true, never = to_float(batch.images.to(device)), batch.is_true.to(device), batch.never.to(device)
        encoded = tokenizer(batch.texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        with run.autocast():
            images, texts, scale = forward(model, x, encoded["input_ids"].to(device))
        loss = contrastive_loss(images.float(), texts.float(), scale, is_true)
        if settings.parts:
            loss = loss + settings.parts * patch_loss(batch.parts.to(device), never)
        if settings.styles:
            loss = loss + settings.styles * style_loss(images.float(), scale, batch.styles.to(device))
        run.update(loss, after_step=lambda: model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE))

        if run.every(settings.save_every):
            accuracy = held_out_pairs(averaged, QUICK_COUNT, settings.seed)
            run.log.show(run.step, accuracy=accuracy, scale=float(model.logit_scale.detach().exp()))

    if run.done:
        averaged.model.load_state_dict(round_weights(averaged.model))  # graded as the file will hold it
        with record.timed("grading"):
            rates = measure_rates(averaged, settings.grade, settings.seed + 1)
        origin = {name: asdict(settings)[name] for name in ("steps", "batch", "lr", "weight_decay", "ema", "seed")}
        save_clip(settings.output, averaged.model, config, {**origin, "rates": rates})
        record.metrics |= {"rates": rates, "parameters": sum(p.numel() for p in model.parameters())}
        print(table(rates))
        log(f"model: {settings.output}, record: {settings.run / 'record.json'}")
    run.finish()


def lock_text_tower(model: nn.Module) -> None:
    """Freeze every parameter that prompts pass through, except the projection into the space shared with images."""
    names = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.")
    for name, parameter in model.named_parameters():
        if name.startswith(names):
            parameter.requires_grad_(False)


def quiet_worker(_: int) -> None:
    """Make a rendering process ignore Ctrl-C and use one thread; the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def grade(settings: GradeClip) -> None:
    """Print the share of right answers per question, and write the record."""
    check_positive(settings, "count")
    check_not_negative(settings, "seed")
    machine = detect(settings.device)
    record = Record(settings, machine)
    clip = load_clip(settings.model)
    clip.model.to(machine.device)
    with record.timed("grading"):
        rates = measure_rates(clip, settings.count, settings.seed, settings.transduce)
    record.metrics = {"rates": rates}
    print(table(rates))
    record.save(settings.record, name_it=True)


def main(command: TrainClip | GradeClip | ConvertClip) -> None:
    """Run the chosen subcommand."""
    if isinstance(command, TrainClip):
        train(command)
    elif isinstance(command, GradeClip):
        grade(command)
    else:
        convert(command.model, command.output)
        print(f"CLIPModel and CLIPProcessor in {command.output}")


if __name__ == "__main__":
    command: Any = TrainClip | GradeClip | ConvertClip  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
