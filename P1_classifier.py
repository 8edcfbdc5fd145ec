"""Digit judges: learns one, loads the course's, and grades a folder of pictures as the course does.

python P1_classifier.py train --domain svhn              checkpoints/judge_svhn.safetensors, with what the quality measures need
python P1_classifier.py grade out                        accuracy per domain, their mean, confusion, quality
python P1_classifier.py grade out --mnistm-judge Classifier.pth --svhn-judge hub      the course's own judges
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from P1_dataloader import BalancedIndex, Digits, load_digits, to_float
from P1_model import DIGITS, DOMAINS, IMAGE_SHAPE
from P1_quality import Reference, make_reference, measure
from runtime.cli import BadInput, note, run_script
from runtime.device import detect
from runtime.files import atomic, load_safetensors, load_tensors
from runtime.record import Record
from training.draws import Draws
from training.ema import make_ema
from training.log import TrainingLog
from training.rate import rate_factor

KIND = "P1 digit judge"
SHIPPED = Path(__file__).resolve().parent / "checkpoints"
HUB = "edadaltocg/resnet34_svhn"
BATCH = 500  # pictures per forward pass
RECIPE = (
    "epochs",
    "recolour",
    "batch",
    "lr",
    "weight_decay",
    "smoothing",
    "ema",
    "seed",
)  # settings that a judge file tells
# MNIST-M's digits are the exact negatives of their background, a sign that strong recolouring would wipe out
DEFAULTS = {"mnistm": {"epochs": 16, "recolour": 0.2}, "svhn": {"epochs": 43, "recolour": 1.0}}
BANK, REAL = 4000, 1000  # training and validation pictures whose features a judge file keeps


# ---------------------------------------------------------------- networks: each is a Sequential whose last layer is the head


class Block(nn.Module):
    """conv, BatchNorm, ReLU, twice, around a skip connection (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


@dataclass(frozen=True)
class JudgeConfig:
    """Layout of our own judge; patches of 2x2 pixels are folded into channels first, which is what makes it fast on a CPU."""

    channels: tuple[int, ...] = (32, 64, 128)
    blocks: tuple[int, ...] = (1, 2, 2)


def make_resnet(config: JudgeConfig) -> nn.Sequential:
    """A small residual network on 14x14, 7x7, 4x4 positions; its last layer is the head."""
    width = config.channels[0]
    layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), nn.ReLU()]
    for level, (channels, blocks) in enumerate(zip(config.channels, config.blocks, strict=True)):
        for block in range(blocks):
            layers.append(Block(width, channels, 2 if level and not block else 1))
            width = channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, DIGITS)]
    return nn.Sequential(*layers)


def make_lenet() -> nn.Sequential:
    """The course's MNIST-M judge, with the names of its file."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 6, 5), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(), fc1=nn.Linear(256, 128), relu3=nn.ReLU(),
            fc2=nn.Linear(128, 64), relu4=nn.ReLU(), fc3=nn.Linear(64, DIGITS),
        )
    )  # fmt: skip


def make_resnet34() -> nn.Sequential:
    """The course's SVHN judge: timm's resnet34 with a stem for small pictures (conv1 3x3, no max pool)."""
    import timm  # slow to import, and only this judge needs it

    network = timm.create_model("resnet34", num_classes=DIGITS)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return nn.Sequential(OrderedDict(network.named_children()))


# ---------------------------------------------------------------- the judge


class Judge(nn.Module):
    """Tells the digits of one domain (0 = mnistm, 1 = svhn), given pictures as uint8; some carry a reference of real pictures."""

    def __init__(self, network: nn.Sequential, domain: int, reference: Reference | None = None):
        super().__init__()
        self.network, self.domain, self.reference = network, domain, reference
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """[N,3,28,28] uint8 on any device -> [N,F] float32, what the last layer sees; in batches."""
        device, body = next(self.parameters()).device, self.network[:-1]
        floats = (to_float(chunk.to(device)) for chunk in images.split(BATCH))
        return torch.cat([body(x.contiguous(memory_format=torch.channels_last)) for x in floats])

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """[N,3,28,28] uint8 -> logits [N,10]."""
        return self.network[-1](self.features(images))


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
    """Passes over the training pictures; left out: 16 for mnistm, 43 for svhn, the smaller set."""
    recolour: float | None = None
    """Strength of the colour augmentation, 0..1; left out: 0.2 for mnistm, 1 for svhn."""
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
    device: str = "auto"
    """auto, cpu, cuda, cuda:N."""
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


def fit(data: Digits, settings: Train, device: torch.device) -> nn.Sequential:
    """The averaged network after all steps; the same seed and number of CPU threads give the same weights on one machine."""
    assert settings.epochs is not None
    assert settings.recolour is not None
    total = max(1, settings.epochs * len(data) // settings.batch)
    torch.manual_seed(settings.seed)
    network = make_resnet(JudgeConfig()).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)
    ema, index = make_ema(network, settings.ema), BalancedIndex(data, False, False)
    log = TrainingLog(settings.run / settings.domain / "tensorboard", f"judge {settings.domain}", 0, total, True)
    for step in range(total):
        draws = Draws(settings.seed, step, slice(settings.batch), settings.batch, device)
        rows = index(draws.stratified(), draws.uniform())
        x = augment(to_float(data.images[rows]), draws, settings.recolour)
        x = x.contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(x), data.digits[rows], label_smoothing=settings.smoothing)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate_factor(step, total, total // 5, 0.8)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(network)
        log.add(loss, settings.batch)
        if (step + 1) % 100 == 0 or step + 1 == total:
            mean, speed = log.read()
            log.show(step + 1, loss=mean, images_s=speed)
    log.close()
    return ema.module  # type: ignore[return-value]


def round_weights(network: nn.Module) -> dict[str, Tensor]:
    """What a judge file stores: matrices and kernels in half precision, vectors (norms, biases) as they are; on the CPU."""
    state = network.state_dict()
    return {k: (v.half() if v.dim() > 1 else v).cpu().contiguous() for k, v in state.items()}


def finish(network: nn.Sequential, domain: int, train: Digits, val: Digits, seed: int) -> Judge:
    """The judge as its file will hold it: rounded weights, and the reference made with them."""
    network.load_state_dict(round_weights(network))
    judge = Judge(network, domain)
    shuffle = torch.Generator().manual_seed(seed)
    real = [judge.features(split.images[torch.randperm(len(split), generator=shuffle)]) for split in (train, val)]
    judge.reference = make_reference(real[0], real[1], BANK, REAL)
    return judge


def run_training(settings: Train) -> None:
    """Trains, grades on the validation pictures, and writes the judge file and record.json."""
    given = {name: value for name, value in vars(settings).items() if value is not None}
    settings = replace(settings, **{**DEFAULTS[settings.domain], **given})
    machine, domain = detect(settings.device), DOMAINS.index(settings.domain)
    record, file = Record(settings, machine), settings.run / settings.domain / "record.json"
    output = settings.output or SHIPPED / f"judge_{settings.domain}.safetensors"
    train, val = (load_digits(settings.data, split).of_domain(domain).to(machine.device) for split in ("train", "val"))
    with record.timed("training"):
        network = fit(train, settings, machine.device)
    with record.timed("reference"):
        judge = finish(network, domain, train, val, settings.seed)
    right = accuracy([judge], val.images, val.digits, torch.zeros_like(val.domains))[0]
    record.metrics = {
        "val_accuracy": round(right, 4),
        "parameters": sum(p.numel() for p in judge.parameters()),
        "pictures": {"train": len(train), "val": len(val)},
    }
    save_judge(output, judge, {"recipe": {k: vars(settings)[k] for k in RECIPE}, **record.metrics})
    record.save(file)
    print(f"{settings.domain} validation accuracy: {right:.4f}")
    note(f"judge: {output}, record: {file}")


# ---------------------------------------------------------------- judge files


def save_judge(path: Path, judge: Judge, origin: dict[str, Any]) -> None:
    """One safetensors file: weights, reference, and a JSON header with kind, domain, layout and `origin`."""
    assert judge.reference
    header = {"kind": KIND, "domain": judge.domain, "model": asdict(JudgeConfig()), "origin": origin}
    tensors = round_weights(judge.network)
    tensors = {f"network.{name}": value for name, value in tensors.items()}
    for name, value in judge.reference.tensors().items():
        tensors[f"reference.{name}"] = value.cpu().contiguous()
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"judge": json.dumps(header)})


def load_judge(path: Path, device: torch.device) -> Judge:
    """One of our judge files, the course's Classifier.pth, or weights of timm's resnet34_svhn. Raises BadInput for anything else."""
    if path.suffix != ".safetensors":
        return foreign_judge(load_tensors(path), path, device)
    tensors, metadata = load_safetensors(path)
    if "judge" not in metadata:
        return foreign_judge(tensors, path, device)
    header = json.loads(metadata["judge"])
    network = fill(make_resnet(JudgeConfig(**header["model"])), part(tensors, "network"), path)
    reference = Reference.from_tensors(part(tensors, "reference"), device)
    return Judge(place(network, device), header["domain"], reference)


def foreign_judge(state: Any, path: Path, device: torch.device) -> Judge:
    """The course's judges, told apart by the names of their weights: LeNet for mnistm, resnet34 for svhn."""
    weights = state.get("state_dict", state) if isinstance(state, dict) else {}
    if "fc3.weight" in weights:
        return Judge(place(fill(make_lenet(), weights, path), device), 0)
    if "layer1.0.conv1.weight" in weights:
        return Judge(place(fill(make_resnet34(), weights, path), device), 1)
    raise BadInput(
        f"{path} is no judge: neither one of ours, nor the course's Classifier.pth (conv1 .. fc3), "
        "nor timm's resnet34_svhn (conv1, layer1 .. fc)"
    )


def hub_judge(device: torch.device) -> Judge:
    """The course's SVHN judge from the Hugging Face hub; raises BadInput where that can't be reached."""
    from timm.models import load_state_dict_from_hf  # slow to import, and only this judge needs it

    try:
        weights = load_state_dict_from_hf(HUB, weights_only=True)
    except Exception as error:  # the hub's many errors share no class of their own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(f"--svhn-judge hub: {HUB} can't be loaded: {reason[0][:200]}") from None
    return foreign_judge(weights, Path(HUB), device)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix.`, without it."""
    return {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


def fill(network: nn.Sequential, weights: dict[str, Tensor], path: Path) -> nn.Sequential:
    """The network with these weights; raises BadInput that names the first missing, unexpected or misshapen one."""
    try:
        network.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise BadInput(f"{path}: {reason[:200]}") from None
    return network


def place(network: nn.Sequential, device: torch.device) -> nn.Sequential:
    """On the device, in the memory format that is fastest for convolutions."""
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def shipped_judges(device: torch.device) -> list[Judge]:
    """The judges in checkpoints/, one per domain; raises BadInput where one is missing."""
    return [load_judge(SHIPPED / f"judge_{name}.safetensors", device) for name in DOMAINS]


# ---------------------------------------------------------------- grading


def accuracy(judges: Sequence[Judge], images: Tensor, digits: Tensor, domains: Tensor) -> list[float]:
    """Per domain the share (0..1) of pictures [N,3,28,28] uint8 in which its judge sees the digit [N]; nan where there are none."""
    shares = []
    for domain, judge in enumerate(judges):
        keep = (domains == domain).to(images.device)
        right = judge(images[keep]).argmax(1).cpu() == digits.cpu()[keep.cpu()] if keep.any() else torch.empty(0)
        shares.append(float(right.double().mean()))
    return shares


def quality(judge: Judge, images: Tensor) -> dict[str, float]:
    """frechet, precision, recall and memorised of pictures [N,3,28,28] uint8, by a judge that carries a reference."""
    if judge.reference is None:
        raise ValueError("this judge carries no reference of real pictures")
    return measure(judge.features(images), judge.reference)


def read_graded(folder: Path) -> tuple[Tensor, Tensor]:
    """Pictures [N,3,28,28] uint8 and the digits [N] their file names begin with, read as the course reads them."""
    if not folder.is_dir():
        raise BadInput(f"{folder} does not exist; the graded folder holds {' and '.join(DOMAINS)}")
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not paths:
        raise BadInput(f"{folder} is empty")
    images, digits = [], []
    for path in paths:
        if path.name[0] not in "0123456789":
            raise BadInput(f"{path}: the name must begin with its digit, as in 7_001.png")
        digits.append(int(path.name[0]))
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB").resize(IMAGE_SHAPE[1:], Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError) as error:
            raise BadInput(f"{path} is not a readable picture: {error}") from None
        images.append(np.asarray(picture).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(images)), torch.tensor(digits)


def grade_folder(folder: Path, judges: Sequence[Judge], critics: Sequence[Judge] | None = None) -> dict[str, Any]:
    """Per domain its accuracy, number of pictures, confusion [10][10] (rows: label) and quality (by the judges, or by other
    critics: they need a reference); under "mean" the mean accuracy. Raises BadInput for a folder that can't be graded."""
    result: dict[str, Any] = {}
    pictures = [read_graded(folder / name) for name in DOMAINS]  # all input is checked before the work
    for name, judge, critic, (images, digits) in zip(DOMAINS, judges, critics or judges, pictures, strict=True):
        seen = judge(images).argmax(1).cpu()
        confusion = torch.bincount(digits * DIGITS + seen, minlength=DIGITS**2).view(DIGITS, DIGITS)
        result[name] = {
            "accuracy": int(confusion.trace()) / len(digits),
            "pictures": len(digits),
            "confusion": confusion.tolist(),
            "quality": quality(critic, images),
        }
    result["mean"] = sum(result[name]["accuracy"] for name in DOMAINS) / len(DOMAINS)
    return result


@dataclass(frozen=True)
class Grade:
    """Grades a folder that holds mnistm/ and svhn/ with pictures named {digit}_{nnn}.png."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The graded folder; nothing is written into it."""
    mnistm_judge: Path | None = None
    """The course's Classifier.pth or one of our judge files; left out: the shipped judge."""
    svhn_judge: Path | None = None
    """Weights of timm's resnet34_svhn, the word hub (downloads them), or one of our judge files; left out: the shipped judge."""
    record: Path = Path("runs/grade/record.json")
    """Where the record goes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N."""


def chosen_judges(settings: Grade, device: torch.device) -> list[Judge]:
    """One judge per domain; raises BadInput when a file holds the other domain's."""
    judges = []
    for domain, path in enumerate((settings.mnistm_judge, settings.svhn_judge)):
        name = DOMAINS[domain]
        if domain == 1 and str(path) == "hub":
            judges.append(hub_judge(device))
            continue
        judge = load_judge(path or SHIPPED / f"judge_{name}.safetensors", device)
        if judge.domain != domain:
            raise BadInput(f"--{name}-judge {path} is a judge of {DOMAINS[judge.domain]}")
        judges.append(judge)
    return judges


def run_grading(settings: Grade) -> None:
    """Prints accuracies, confusion and quality, and writes the record."""
    if settings.record.resolve().is_relative_to(settings.folder.resolve()):
        raise BadInput(f"--record {settings.record} lies inside the graded folder: name another place")
    machine = detect(settings.device)
    record = Record(settings, machine)
    judges = chosen_judges(settings, machine.device)
    known = all(judge.reference for judge in judges)
    critics = judges if known else shipped_judges(machine.device)  # the course's judges know no real pictures
    with record.timed("grading"):
        result = record.metrics = grade_folder(settings.folder, judges, critics)
    record.save(settings.record)
    print(report(result))
    note(f"record: {settings.record}")


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
