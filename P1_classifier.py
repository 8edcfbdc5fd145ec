"""Digit judges: learns one, loads the course's, and grades a folder of pictures as the course does.

  python P1_classifier.py train --domain svhn              checkpoints/judge_svhn.safetensors, with what the quality measures need
  python P1_classifier.py grade out                        accuracy per domain, their mean, confusion, quality
  python P1_classifier.py grade out --mnistm-classifier Classifier.pth --svhn-classifier hub      the course's own judges

The graded folder stays as it is; the course's own lines come last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from digits.classifier import (
    SHIPPED,
    ClassifierConfig,
    DigitClassifier,
    accuracy,
    grade_folder,
    hub_classifier,
    load_classifier,
    make_resnet,
    round_weights,
    save_classifier,
    shipped_classifiers,
)
from digits.metrics import make_reference
from P1_dataloader import BalancedIndex, Digits, load_digits
from P1_model import DOMAINS, IMAGE_SHAPE
from runtime.cli import BadInput, check_fractions, check_not_negative, check_positive, log, run_script
from runtime.device import Device, Machine, Precision, detect, set_up, to_channels_last
from runtime.files import check_writable_file
from runtime.images import to_float
from runtime.record import Record
from training.checkpoint import require_finite
from training.draws import Draws
from training.ema import make_ema
from training.log import TrainingLog
from training.schedule import lr_factor

# settings that a judge file tells
RECIPE = ("epochs", "recolour", "fold", "batch", "lr", "weight_decay", "smoothing", "ema", "seed")
# MNIST-M's digits are the exact negatives of their background, a sign that strong recolouring would wipe out
DEFAULTS = {"mnistm": {"epochs": 24, "recolour": 0.2, "fold": 1}, "svhn": {"epochs": 43, "recolour": 1.0, "fold": 2}}
BANK, REAL = 4000, 1000  # training and validation pictures whose features a judge file keeps


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Train:
    """Learns a judge from one domain's training pictures."""

    domain: Literal["mnistm", "svhn"]
    """Whose digits."""
    data: Path = SHIPPED.parent / "hw2_data" / "digits"
    """Folder with mnistm/ and svhn/ (see hw2_data/README.md)."""
    output: Path | None = None
    """The judge file; left out: checkpoints/judge_{domain}.safetensors."""
    epochs: int | None = None
    """Passes over the training pictures; left out: 24 for mnistm, 43 for svhn, the smaller set."""
    recolour: float | None = None
    """Strength of the colour augmentation, 0..1; left out: 0.2 for mnistm, 1 for svhn."""
    fold: Literal[1, 2] | None = None
    """2 folds patches of 2x2 pixels into channels first, which is three times as fast; 1 looks at every pixel; left out: 1 for mnistm,
    2 for svhn."""
    batch: int = 128
    """Pictures per step."""
    lr: float = 4e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    smoothing: float = 0.1
    """Share of every label that is spread over all digits."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones that are kept."""
    seed: int = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it, else fp32."""
    run: Path = Path("runs/judge")
    """Run folder: record.json and TensorBoard, one folder per domain."""


def augment(x: Tensor, draws: Draws, recolour: float) -> Tensor:
    """[B,3,28,28] in -1..1, moved, turned, scaled, inverted, recoloured and noised, in -1..1: what a judge shouldn't mind."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * draws.uniform()[:, None, None, None]

    x = warp(x, draws)
    x = torch.where(between(0, 1) < 0.5, -x, x)
    grey = x.mean(1, keepdim=True)
    x = grey + between(1 - recolour, 1 + 0.2 * recolour) * (x - grey)
    x = between(1 - 0.5 * recolour, 1 + 0.4 * recolour) * x
    x = x + recolour * (between(-0.3, 0.3) + 0.1 * draws.normal(3, 1, 1))
    return (x + between(0, 0.12) * draws.normal(*IMAGE_SHAPE)).clamp(-1, 1)


def warp(x: Tensor, draws: Draws) -> Tensor:
    """Shift by up to 3 pixels, turn by up to 12 degrees, scale each side by up to 15 %."""

    def within(largest: float) -> Tensor:
        return largest * (2 * draws.uniform() - 1)

    angle, reach = within(math.radians(12)), 3 / (IMAGE_SHAPE[1] / 2)
    wide, high, right, down = within(0.15).exp(), within(0.15).exp(), within(reach), within(reach)
    cosine, sine = angle.cos(), angle.sin()
    rows = [cosine * wide, -sine * high, right, sine * wide, cosine * high, down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def fit(data: Digits, settings: Train, machine: Machine) -> nn.Sequential:
    """The averaged network after all steps; the same seed and number of CPU threads give the same weights on one machine."""
    assert settings.epochs is not None
    assert settings.recolour is not None
    assert settings.fold is not None
    half = set_up(settings.precision, machine, training=True) == "bf16"
    device = machine.device
    total = max(1, settings.epochs * len(data) // settings.batch)
    torch.manual_seed(settings.seed)
    network = to_channels_last(make_resnet(ClassifierConfig(fold=settings.fold)), device)
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)
    ema, index = make_ema(network, settings.ema), BalancedIndex(data, None, False)
    log = TrainingLog(settings.run / settings.domain / "tensorboard", f"judge {settings.domain}", 0, total, True)
    for step in range(total):
        draws = Draws(settings.seed, step, slice(settings.batch), settings.batch, device)
        rows = index(draws.stratified(), draws.uniform())
        x = augment(to_float(data.images[rows]), draws, settings.recolour)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = network(x).float()
        loss = F.cross_entropy(logits, data.digits[rows], label_smoothing=settings.smoothing)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(step, total, total // 5, 0.8)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(network)
        log.add(loss, settings.batch)
        if (step + 1) % 100 == 0 or step + 1 == total:
            mean, speed = log.read()
            require_finite(mean, step + 1, None)
            log.show(step + 1, loss=mean, images_s=speed)
    log.close()
    return ema.module  # type: ignore[return-value]


def finish(network: nn.Sequential, domain: int, train: Digits, val: Digits, seed: int) -> DigitClassifier:
    """The judge as its file will hold it: rounded weights, and the reference made with them."""
    network.load_state_dict(round_weights(network))
    judge = DigitClassifier(network, domain)
    shuffle = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(split), generator=shuffle) for split in (train, val)]
    digits = torch.cat([train.digits[orders[0]], val.digits[orders[1]]])
    even = 1 / digits.bincount()[digits]  # a graded folder holds every digit equally often, SVHN doesn't
    real = [judge.features(split.images[order]) for split, order in zip((train, val), orders, strict=True)]
    judge.reference = make_reference(real[0], real[1], BANK, REAL, even)
    return judge


def run_training(settings: Train) -> None:
    """Trains, grades on the validation pictures, and writes the judge file and record.json."""
    given = {name: value for name, value in vars(settings).items() if value is not None}
    settings = replace(settings, **{**DEFAULTS[settings.domain], **given})
    assert settings.fold is not None
    check_positive(settings, "epochs", "batch", "lr")
    check_not_negative(settings, "weight_decay")
    check_fractions(settings, "recolour", "smoothing", "ema")
    machine, domain = detect(settings.device), DOMAINS.index(settings.domain)
    record, file = Record(settings, machine), settings.run / settings.domain / "record.json"
    output = settings.output or SHIPPED / f"judge_{settings.domain}.safetensors"
    check_writable_file(output, "--output")
    check_writable_file(file, "--run")
    train, val = (load_digits(settings.data, split).of_domain(domain).to(machine.device) for split in ("train", "val"))
    with record.timed("training"):
        network = fit(train, settings, machine)
    with record.timed("reference"):
        judge = finish(network, domain, train, val, settings.seed)
    right = accuracy([judge], val.images, val.digits, torch.zeros_like(val.domains))[0]
    record.metrics = {
        "val_accuracy": round(right, 4),
        "parameters": sum(p.numel() for p in judge.parameters()),
        "pictures": {"train": len(train), "val": len(val)},
    }
    save_classifier(
        output,
        judge,
        ClassifierConfig(fold=settings.fold),
        {"recipe": {k: vars(settings)[k] for k in RECIPE}, **record.metrics},
    )
    record.save(file)
    print(f"{settings.domain} validation accuracy: {right:.4f}")
    log(f"judge: {output}, record: {file}")


# ---------------------------------------------------------------- grading


@dataclass(frozen=True)
class Grade:
    """Grades a folder that holds mnistm/ and svhn/ with pictures named {digit}_{nnn}.png."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The graded folder; nothing is written into it."""
    mnistm_classifier: Path | None = None
    """The course's Classifier.pth or one of our judge files; left out: the shipped judge."""
    svhn_classifier: Path | None = None
    """Weights of timm's resnet34_svhn, the word hub (downloads them), or one of our judge files; left out: the shipped judge."""
    record: Path = Path("runs/grade/record.json")
    """Where the record goes."""
    device: Device = "auto"


def chosen_judges(settings: Grade, device: torch.device) -> list[DigitClassifier]:
    """One judge per domain; raises BadInput when a file holds the other domain's."""
    judges = []
    for domain, path in enumerate((settings.mnistm_classifier, settings.svhn_classifier)):
        name = DOMAINS[domain]
        if domain == 1 and str(path) == "hub":
            judges.append(hub_classifier(device))
            continue
        judge = load_classifier(path or SHIPPED / f"judge_{name}.safetensors", device)
        if judge.domain != domain:
            raise BadInput(f"--{name}-classifier {path} is a judge of {DOMAINS[judge.domain]}")
        judges.append(judge)
    return judges


def run_grading(settings: Grade) -> None:
    """Prints accuracies, confusion and quality, and writes the record."""
    if settings.record.resolve().is_relative_to(settings.folder.resolve()):
        raise BadInput(f"--record {settings.record} lies inside the graded folder: name another place")
    check_writable_file(settings.record, "--record")
    machine = detect(settings.device)
    record = Record(settings, machine)
    judges = chosen_judges(settings, machine.device)
    known = all(judge.reference for judge in judges)
    critics = judges if known else shipped_classifiers(machine.device)  # the course's judges know no real pictures
    with record.timed("grading"):
        result = record.metrics = grade_folder(settings.folder, judges, critics)
    record.save(settings.record)
    print(report(result))
    log(f"record: {settings.record}")


def report(result: dict[str, Any]) -> str:
    """What `grade_folder` found, as text: confusion and quality per domain, then the three graded numbers."""
    lines = []
    for name in DOMAINS:
        table = pd.DataFrame(result[name]["confusion"])
        lines.append(f"{name}: rows are the labels, columns what the judge sees\n{table}")
        found = ", ".join(f"{k} {v:.4f}" for k, v in result[name]["quality"].items())
        lines.append(f"{name} quality: {found}\n")
    lines += [f"{name} accuracy: {result[name]['accuracy']:.4f}" for name in DOMAINS]
    return "\n".join([*lines, f"mean accuracy: {result['mean']:.4f}"])


def main(settings: Train | Grade) -> None:
    """The subcommand that was asked for."""
    if isinstance(settings, Train):
        run_training(settings)
    else:
        run_grading(settings)


if __name__ == "__main__":
    run_script(main, Train | Grade, __doc__)  # type: ignore[arg-type]  # tyro takes a union: subcommands
