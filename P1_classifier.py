"""Train a digit classifier, load the course's, and grade a folder of images as the course does.

  python P1_classifier.py train --domain svhn              writes runs/p1_classifier/svhn/classifier.safetensors
  python P1_classifier.py grade out                        accuracy per domain, their mean, confusion, quality
  python P1_classifier.py train --data my/images --domain images       on images of your own, in a folder per class (docs/p1.md)
  python P1_classifier.py grade out --mnistm-classifier hw2_data/Classifier.pth --svhn-classifier hub      the course's classifiers

`grade` changes nothing in the folder. The last lines it prints are those of the course's grader: the accuracies and their mean.
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from digits.classifier import (
    SHIPPED,
    ClassifierConfig,
    DigitClassifier,
    accuracy,
    choose_classifiers,
    grade_folder,
    hub_classifier,
    load_classifier,
    make_resnet,
    round_weights,
    save_classifier,
    shipped_classifiers,
)
from digits.metrics import make_reference
from P1_dataloader import BalancedIndex, Digits, describe_data, load_digits
from P1_model import DOMAINS, HOMEWORK
from runtime.cli import (
    BadInput,
    Seed,
    check_fractions,
    check_not_negative,
    check_positive,
    default_hint,
    log,
    run_script,
)
from runtime.device import Device, Precision, detect, set_up, to_channels_last
from runtime.files import ROOT, check_writable_file, output_folder
from runtime.images import to_float
from runtime.record import Record
from training.draws import Draws
from training.ema import Ema
from training.loop import LoopConfig, Trained, TrainingRun
from training.schedule import LearningRate
from training.tracking import Track, check_tracker

# settings that decide the weights; a classifier file holds them
RECIPE = ("epochs", "recolour", "fold", "batch", "lr", "weight_decay", "smoothing", "ema", "seed")
# MNIST-M's digits are the exact negatives of their background, a sign that strong recolouring would wipe out
DEFAULTS: dict[str, dict[str, Any]] = {
    "mnistm": {"epochs": 24, "recolour": 0.2, "fold": 1},
    "svhn": {"epochs": 43, "recolour": 1.0, "fold": 2},
}
OTHERS = DEFAULTS["svhn"]  # for other domains
BANK, REAL = 4000, 1000  # training and validation images whose features a classifier file keeps


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Train:
    """Train a classifier on one domain's training images; the same command continues a stopped training."""

    domain: str
    """Domain to train on: mnistm or svhn. For your own images: the domain's folder in --data, or `images` if --data holds the classes."""
    data: Path = ROOT / "hw2_data" / "digits"
    """Folder with mnistm/ and svhn/ (see hw2_data/README.md). For your own images: with CLASS/ or DOMAIN/CLASS/ folders."""
    output: Annotated[Path | None, default_hint("runs/p1_classifier/DOMAIN")] = None
    """Run folder for classifier.safetensors, checkpoint, TensorBoard and record.json."""
    epochs: Annotated[int | None, default_hint("24 for mnistm, 43 for svhn (the smaller set) and others")] = None
    """Passes over the training images."""
    recolour: Annotated[float | None, default_hint("0.2 for mnistm, 1 for svhn and others")] = None
    """Strength of the colour augmentation, 0..1."""
    fold: Annotated[Literal[1, 2] | None, default_hint("1 for mnistm, 2 for svhn and others")] = None
    """Side of the pixel patches that are folded into channels before the first layer. 2 = three times as fast; 1 = no folding."""
    batch: int = 128
    """Images per step."""
    lr: float = 4e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    smoothing: float = 0.1
    """Label smoothing, 0..1: share of each label that is spread over all digits."""
    ema: float = 0.998
    """Decay per step of the weights' moving average (EMA). The classifier file holds this average."""
    save_every: int = 200
    """Steps between two checkpoints. 0 = only at the end."""
    seed: Seed = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """auto = bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    track: Track = None


def augment(x: Tensor, draws: Draws, recolour: float, invert: bool = True) -> Tensor:
    """Return x [B,C,H,W] in -1..1 augmented at random, in the same shape and range.

    Images are warped, recoloured (strength 0..1) and noised; with `invert`, about half of them are negated.
    """

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * draws.uniform()[:, None, None, None]

    x = warp(x, draws)
    if invert:  # the negative shows the same digit
        x = torch.where(between(0, 1) < 0.5, -x, x)
    grey = x.mean(1, keepdim=True)
    x = grey + between(1 - recolour, 1 + 0.2 * recolour) * (x - grey)
    x = between(1 - 0.5 * recolour, 1 + 0.4 * recolour) * x
    x = x + recolour * (between(-0.3, 0.3) + 0.1 * draws.normal(x.shape[1], 1, 1))
    return (x + between(0, 0.12) * draws.normal(*x.shape[1:])).clamp(-1, 1)


def warp(x: Tensor, draws: Draws) -> Tensor:
    """Return x [B,C,H,W], each image shifted by up to 3 pixels, rotated by up to 12 degrees and scaled by up to about 15 %.

    Width and height are scaled separately. `draws` supplies the random numbers. Pixels from outside mirror the image.
    """

    def within(largest: float) -> Tensor:
        return largest * (2 * draws.uniform() - 1)

    angle, reach = within(math.radians(12)), 3 / (x.shape[-1] / 2)
    wide, high, right, down = within(0.15).exp(), within(0.15).exp(), within(reach), within(reach)
    cosine, sine = angle.cos(), angle.sin()
    rows = [cosine * wide, -sine * high, right, sine * wide, cosine * high, down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def train(settings: Train) -> None:
    """Train a classifier, measure its validation accuracy, and write classifier.safetensors and record.json."""
    # settings: None becomes the domain's default
    defaults = DEFAULTS.get(settings.domain, OTHERS)
    settings = replace(settings, **{name: value for name, value in defaults.items() if getattr(settings, name) is None})
    assert settings.epochs is not None
    assert settings.recolour is not None
    assert settings.fold is not None
    check_positive(settings, "epochs", "batch", "lr")
    check_not_negative(settings, "weight_decay", "save_every")
    check_fractions(settings, "recolour", "smoothing", "ema")
    check_tracker(settings.track)
    folder = output_folder(settings.output or Path("runs/p1_classifier") / settings.domain)
    file = folder / "classifier.safetensors"
    check_writable_file(file, "--output")
    machine = detect(settings.device)
    device, record = machine.device, Record(settings, machine)
    precision = set_up(settings.precision, machine, training=True)

    # data, network, average, optimizer
    spec = describe_data(settings.data)
    if settings.domain not in spec.domains:
        raise BadInput(f"--domain {settings.domain}: {settings.data} holds {', '.join(spec.domains)}")
    domain = spec.domains.index(settings.domain)
    data, val = (load_digits(settings.data, split, [domain]).to(device) for split in ("train", "val"))
    index = BalancedIndex(data, None, False)
    torch.manual_seed(settings.seed)
    layout = ClassifierConfig(fold=settings.fold, spec=spec)
    network = to_channels_last(make_resnet(layout), device)
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)
    ema = Ema(network, settings.ema)

    total = max(1, settings.epochs * len(data) // settings.batch)
    config = LoopConfig(
        f"P1 classifier of {settings.domain}",
        folder,
        total,
        settings.batch,
        LearningRate(settings.lr, total // 5, 0.8),
        log_every=100,
        save_every=settings.save_every,
        precision=precision,
        track=settings.track,
    )
    recipe = {name: getattr(settings, name) for name in RECIPE}
    facts = {k: v for k, v in recipe.items() if k != "epochs"} | {"domain": settings.domain, "data": data.fingerprint()}
    run = TrainingRun(config, facts, Trained(network, optimizer, ema), record)
    for step in run:
        draws = Draws(settings.seed, step, slice(settings.batch), settings.batch, device)
        rows = index(draws.stratified(), draws.uniform())
        x = augment(to_float(data.images[rows]), draws, settings.recolour, spec == HOMEWORK)
        with run.autocast():
            logits = network(x.contiguous(memory_format=torch.channels_last)).float()
        run.update(F.cross_entropy(logits, data.digits[rows], label_smoothing=settings.smoothing))

    # the classifier's file: rounded weights, the reference of the metrics, the validation accuracy
    metrics: dict[str, Any] = {}
    if run.done:
        with run.last_work(), record.timed("reference"):
            body = DigitClassifier(cast(nn.Sequential, ema.module), domain, spec=spec)
            classifier = with_reference(body, data, val, settings.seed)
        right = accuracy([classifier], val.images, val.digits, torch.zeros_like(val.domains))[0]
        metrics = {
            "val_accuracy": round(right, 4),
            "parameters": sum(p.numel() for p in classifier.parameters()),
            "pictures": {"train": len(data), "val": len(val)},
        }
        origin = {"recipe": recipe, **metrics}
        save_classifier(file, classifier, layout, origin)
        print(f"{settings.domain} validation accuracy: {right:.4f}")
        flag = f"--{settings.domain}-classifier" if spec == HOMEWORK else "--classifiers"
        log(f"classifier: {file}; to grade with it: python P1_classifier.py grade out {flag} {file}")
    run.finish(**metrics)


def with_reference(classifier: DigitClassifier, train: Digits, val: Digits, seed: int) -> DigitClassifier:
    """Round the classifier's weights to those that its file stores, set its `reference` (features of real images), and return it."""
    classifier.network.load_state_dict(round_weights(classifier.network))
    shuffle = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(split), generator=shuffle) for split in (train, val)]
    digits = torch.cat([train.digits[orders[0]], val.digits[orders[1]]])
    even = 1 / digits.bincount()[digits]  # a graded folder holds every digit equally often, unlike SVHN
    real = [classifier.features(split.images[order]) for split, order in zip((train, val), orders, strict=True)]
    classifier.reference = make_reference(real[0], real[1], BANK, REAL, even)
    return classifier


# ---------------------------------------------------------------- grading


@dataclass(frozen=True)
class Grade:
    """Grade a folder that holds mnistm/ and svhn/ with {digit}_{nnn}.png, or for your own images DOMAIN/{class}_{nnn}.png."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The graded folder; nothing is written into it."""
    mnistm_classifier: Path | None = None
    """The course's Classifier.pth or one of our classifier files; None = the shipped classifier."""
    svhn_classifier: Path | None = None
    """Weights of timm's resnet34_svhn, `hub` to download them, or one of our classifier files; None = the shipped classifier."""
    classifiers: tuple[Path, ...] = ()
    """For images of your own: files written by the subcommand train, one per domain, in alphabetical order of the domains."""
    record: Path = Path("runs/grade/record.json")
    """JSON file for the results."""
    device: Device = "auto"


def chosen_classifiers(settings: Grade, device: torch.device) -> list[DigitClassifier]:
    """Load the classifiers that the flags name, one per domain; raise BadInput if one is for another domain or other images."""
    if settings.classifiers:
        if settings.mnistm_classifier or settings.svhn_classifier:
            raise BadInput("--classifiers names all classifiers: leave out --mnistm-classifier and --svhn-classifier")
        spec = load_classifier(settings.classifiers[0], device).spec
        return choose_classifiers([*map(str, settings.classifiers)], spec, device)
    classifiers = []
    for domain, path in enumerate((settings.mnistm_classifier, settings.svhn_classifier)):
        name = DOMAINS[domain]
        if domain == 1 and str(path) == "hub":
            classifiers.append(hub_classifier(device))
            continue
        classifier = load_classifier(path or SHIPPED / f"judge_{name}.safetensors", device)
        if classifier.spec != HOMEWORK:
            raise BadInput(f"--{name}-classifier {path} reads {classifier.spec}: name it with --classifiers")
        if classifier.domain != domain:
            raise BadInput(f"--{name}-classifier {path} is a classifier of {DOMAINS[classifier.domain]}")
        classifiers.append(classifier)
    return classifiers


def grade(settings: Grade) -> None:
    """Grade the folder: print confusion, quality metrics and accuracies, and write the record."""
    from pandas import DataFrame  # slow to import

    if settings.record.resolve().is_relative_to(settings.folder.resolve()):
        raise BadInput(f"--record {settings.record} lies inside the graded folder: name another place")
    machine = detect(settings.device)
    record = Record(settings, machine)
    classifiers = chosen_classifiers(settings, machine.device)
    complete = all(classifier.reference for classifier in classifiers)
    critics = classifiers if complete else shipped_classifiers(machine.device)  # the course's have no reference

    with record.timed("grading"):
        result = record.metrics = grade_folder(settings.folder, classifiers, critics)

    # confusion and quality per domain, then the three graded numbers
    spec = classifiers[0].spec
    names = None if spec == HOMEWORK else spec.classes
    for name in spec.domains:
        print(f"{name}: rows are the labels, columns the classifier's answers")
        print(DataFrame(result[name]["confusion"], names, names))
        print(f"{name} quality: " + ", ".join(f"{k} {v:.4f}" for k, v in result[name]["quality"].items()) + "\n")
    for name in spec.domains:
        print(f"{name} accuracy: {result[name]['accuracy']:.4f}")
    print(f"mean accuracy: {result['mean']:.4f}", flush=True)
    if not (settings.classifiers or settings.mnistm_classifier and settings.svhn_classifier):
        log(
            "images that P1_inference.py redrew (--retries) were selected by the shipped classifiers: see its record for the first try"
        )
    record.save(settings.record, name_it=True)


def main(settings: Train | Grade) -> None:
    """Run the subcommand."""
    if isinstance(settings, Train):
        train(settings)
    else:
        grade(settings)


if __name__ == "__main__":
    command: Any = Train | Grade  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
