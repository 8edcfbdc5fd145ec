"""Digit classifiers: our network, the course's two, their files, and the grading of images. P1_classifier.py is the command."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import NonNegativeInt
from torch import Tensor, nn

from digits.metrics import Reference, measure
from P1_dataloader import read_exactly
from P1_model import DIGITS, DOMAINS, HOMEWORK, DataSpec, header_json, load_weights
from runtime.cli import BadInput
from runtime.device import full_precision, to_channels_last
from runtime.files import (
    ROOT,
    load_safetensors,
    load_tensors,
    require_file,
    safetensors_metadata,
    save_safetensors,
    visible,
)
from runtime.hub import first_line
from runtime.images import read_as_graded, to_float
from runtime.validation import validate_json
from runtime.weights import describe, named_tensors

SHIPPED = ROOT / "checkpoints"
HUB = "edadaltocg/resnet34_svhn"
BATCH = 500  # images per forward pass

# ---------------------------------------------------------------- networks: each is a Sequential whose last layer is the head


class Block(nn.Module):
    """Residual block: conv, BatchNorm, ReLU, conv, BatchNorm, skip connection added, ReLU (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if (inputs, 1) != (outputs, stride) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B,inputs,H,W] to [B,outputs,H/stride,W/stride]."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


@dataclass(frozen=True)
class ClassifierConfig:
    """Layout of our own classifier.

    `fold` is the side of the pixel patches folded into channels before the first layer. 2 is three times as fast as 1.
    """

    channels: tuple[int, ...] = (32, 64, 128)
    blocks: tuple[int, ...] = (1, 2, 2)
    fold: int = 2
    spec: DataSpec = HOMEWORK  # of the images it classifies


@dataclass(frozen=True)
class ClassifierHeader:
    """What a classifier file holds besides tensors, as JSON."""

    kind: Literal["P1 digit judge"]
    domain: NonNegativeInt
    model: ClassifierConfig
    origin: dict[str, Any]


def make_resnet(config: ClassifierConfig) -> nn.Sequential:
    """Return our classifier, a small residual network with levels of 14x14, 7x7, 4x4 positions; with fold 1: 28x28, 14x14, 7x7."""
    width, fold = config.channels[0], config.fold
    pixels = config.spec.channels * fold**2
    layers: list[nn.Module] = [nn.PixelUnshuffle(fold), nn.Conv2d(pixels, width, 3, padding=1), nn.ReLU()]
    for level, (channels, blocks) in enumerate(zip(config.channels, config.blocks, strict=True)):
        for block in range(blocks):
            layers.append(Block(width, channels, 2 if level and not block else 1))
            width = channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, len(config.spec.classes))]
    return nn.Sequential(*layers)


def make_lenet() -> nn.Sequential:
    """Return the course's MNIST-M classifier, untrained, with layers named as in its file Classifier.pth."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 6, 5), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(), fc1=nn.Linear(256, 128), relu3=nn.ReLU(),
            fc2=nn.Linear(128, 64), relu4=nn.ReLU(), fc3=nn.Linear(64, DIGITS),
        )
    )  # fmt: skip


def make_resnet34() -> nn.Sequential:
    """Return the course's SVHN classifier, untrained: timm's resnet34 with a stem for small images (conv1 3x3, no max pool)."""
    import timm  # slow to import

    network = timm.create_model("resnet34", num_classes=DIGITS)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return nn.Sequential(OrderedDict(network.named_children()))


# ---------------------------------------------------------------- the classifier


class DigitClassifier(nn.Module):
    """A classifier for uint8 images of one domain (0 = mnistm, 1 = svhn).

    `reference`: features of real images, which the quality metrics need.
    A classifier of other images has the shape and classes of its `spec` in the place of [N,3,28,28] and ten digits.
    """

    def __init__(
        self, network: nn.Sequential, domain: int, reference: Reference | None = None, spec: DataSpec = HOMEWORK
    ):
        super().__init__()
        self.network, self.domain, self.reference, self.spec = network, domain, reference, spec
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Map [N,3,28,28] uint8 on any device to the last layer's input [N,F], in float32 as the course's grader does."""
        device, body = next(self.parameters()).device, self.network[:-1]
        floats = (to_float(chunk.to(device)) for chunk in images.split(BATCH))
        with full_precision(device):
            return torch.cat([body(x.contiguous(memory_format=torch.channels_last)) for x in floats])

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Map [N,3,28,28] uint8 to logits [N,10] in float32."""
        features = self.features(images)
        with full_precision(features.device):
            logits: Tensor = self.network[-1](features)
        return logits

    def read(self, images: Tensor) -> Tensor:
        """Return the predicted digits [N] int64 of images [N,3,28,28] uint8, on the CPU."""
        logits: Tensor = self(images)
        return logits.argmax(1).cpu()


# ---------------------------------------------------------------- classifier files


def round_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict as a file stores it: matrices and kernels in half precision, vectors (norms, biases) in full."""
    state = network.state_dict()
    return {k: (v.half() if v.dim() > 1 else v).cpu().contiguous() for k, v in state.items()}


def save_classifier(path: Path, classifier: DigitClassifier, config: ClassifierConfig, origin: dict[str, Any]) -> None:
    """Write one safetensors file: weights, reference, and a JSON header with kind, domain, layout and `origin`."""
    assert classifier.reference
    header = ClassifierHeader("P1 digit judge", classifier.domain, config, origin)
    tensors = {f"network.{name}": value for name, value in round_weights(classifier.network).items()}
    for name, value in classifier.reference.tensors().items():
        tensors[f"reference.{name}"] = value.cpu().contiguous()
    save_safetensors(path, tensors, {"judge": header_json(header)})


HINT = "the course's Classifier.pth is in ntudlcv/DLCV-Fall-2024-HW2 at github.com"


def load_classifier(path: Path, device: torch.device) -> DigitClassifier:
    """Load one of our files, the course's Classifier.pth, or weights of timm's resnet34_svhn; raise BadInput for another file."""
    if "judge" not in safetensors_metadata(require_file(path, HINT)):
        return course_classifier(load_tensors(path), path, device)
    tensors, metadata = load_safetensors(path)
    where = f"{path}, header of a digit classifier"
    header = validate_json(ClassifierHeader, metadata["judge"], where)
    if header.domain >= len(header.model.spec.domains):
        raise BadInput(f"{where}, domain: there are {len(header.model.spec.domains)}, it is {header.domain}")
    try:
        network = make_resnet(header.model)
    except (ValueError, RuntimeError, ArithmeticError, IndexError) as error:
        raise BadInput(f"{where}, model: no network has this layout ({str(error).splitlines()[0]})") from None
    load_weights(network, strip_prefix(tensors, "network"), path)
    try:
        reference = Reference.from_tensors(strip_prefix(tensors, "reference"), device)
    except KeyError as error:
        raise BadInput(f"{path} lacks reference.{error.args[0]}: train it again") from None
    return DigitClassifier(to_channels_last(network, device), header.domain, reference, header.model.spec)


def course_classifier(state: Any, path: Path, device: torch.device) -> DigitClassifier:
    """Return the course's classifier with the weights `state`, recognised by their names: LeNet for mnistm, resnet34 for svhn."""
    weights = named_tensors(state, path, "fc3.weight", "layer1.0.conv1.weight")
    weights = weights if isinstance(weights, dict) else {}
    if "fc3.weight" in weights:
        return DigitClassifier(to_channels_last(load_weights(make_lenet(), weights, path), device), 0)
    if "layer1.0.conv1.weight" in weights:
        return DigitClassifier(to_channels_last(load_weights(make_resnet34(), weights, path), device), 1)
    kind = describe(state)
    raise BadInput(
        f"{path} is no digit classifier{f' but {kind}' * bool(kind)}: neither one of ours, nor the course's Classifier.pth (conv1 .. fc3), "
        "nor timm's resnet34_svhn (conv1, layer1 .. fc)"
    )


def hub_classifier(device: torch.device) -> DigitClassifier:
    """Load the course's SVHN classifier from the Hugging Face hub; raise BadInput if the hub can't be reached."""
    from timm.models import load_state_dict_from_hf  # slow to import

    try:
        weights = load_state_dict_from_hf(HUB, weights_only=True)
    except Exception as error:  # the hub's many errors share no common class
        raise BadInput(
            f"--svhn-classifier hub: {HUB} can't be loaded ({first_line(error)}); name a local file of its weights instead"
        ) from None
    return course_classifier(weights, Path(HUB), device)


def strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix.`, under their names without it."""
    return {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


def shipped_classifiers(device: torch.device) -> list[DigitClassifier]:
    """Load the classifiers in checkpoints/, one per domain; raise BadInput if one is missing."""
    return [load_classifier(SHIPPED / f"judge_{name}.safetensors", device) for name in DOMAINS]


def choose_classifiers(names: Sequence[str], spec: DataSpec, device: torch.device) -> list[DigitClassifier]:
    """Load the classifiers that `--classifiers` names, one per domain of `spec`; return an empty list for `none`.

    `auto` means the shipped ones for the homework's digits, and `none` for other images.
    Raise BadInput for a wrong number of files, or for a classifier of other images or another domain.
    """
    if [*names] == ["none"] or [*names] == ["auto"] and spec != HOMEWORK:
        return []
    if [*names] == ["auto"]:
        return shipped_classifiers(device)
    if len(names) != len(spec.domains):
        raise BadInput(
            f"--classifiers {' '.join(names)}: give auto, none, or a file for each of {', '.join(spec.domains)}"
        )
    classifiers = [load_classifier(Path(name), device) for name in names]
    for domain, (name, classifier) in enumerate(zip(names, classifiers, strict=True)):
        if classifier.spec != spec:
            raise BadInput(f"--classifiers {name} reads {classifier.spec}; the images are of {spec}")
        if classifier.domain != domain:
            expected = spec.domains[domain]
            raise BadInput(f"--classifiers {name} is a classifier of {spec.domains[classifier.domain]}, not {expected}")
    return classifiers


# ---------------------------------------------------------------- accuracy and metrics


def misclassified(classifiers: Sequence[DigitClassifier], images: Tensor, digits: Tensor, domains: Tensor) -> Tensor:
    """Return the indices [M], ascending, of images [N,3,28,28] uint8 that their domain's classifier does not read as their digit."""
    wrong = torch.zeros(len(digits), dtype=torch.bool)
    for domain, classifier in enumerate(classifiers):
        rows = (domains == domain).nonzero().squeeze(1).cpu()
        if len(rows):
            wrong[rows] = classifier.read(images[rows.to(images.device)]) != digits.cpu()[rows]
    return wrong.nonzero().squeeze(1)


def accuracy(classifiers: Sequence[DigitClassifier], images: Tensor, digits: Tensor, domains: Tensor) -> list[float]:
    """Return each domain's share (0..1) of images [N,3,28,28] uint8 that its classifier reads as their digit; nan without images."""
    domains = domains.cpu().long()
    total = torch.bincount(domains, minlength=len(classifiers))
    wrong = torch.bincount(domains[misclassified(classifiers, images, digits, domains)], minlength=len(classifiers))
    return (1 - wrong[: len(classifiers)] / total[: len(classifiers)]).tolist()


def quality(classifier: DigitClassifier, images: Tensor) -> dict[str, float]:
    """Return the metrics of `digits.metrics.measure` for images [N,3,28,28] uint8; raise ValueError if the classifier has no reference."""
    if classifier.reference is None:
        raise ValueError("this classifier carries no reference of real images")
    return measure(classifier.features(images), classifier.reference)


def read_graded(folder: Path, spec: DataSpec = HOMEWORK) -> tuple[Tensor, Tensor]:
    """Read a folder as the course's grader does: images [N,3,28,28] uint8, and the digits [N] that begin their file names.

    Images of another `spec` are named by class (cat_001.png) and must have its shape. Raise BadInput for a faulty file or name.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} does not exist; the graded folder holds {' and '.join(spec.domains)}")
    paths = visible(folder)
    if not paths:
        raise BadInput(f"{folder} is empty")
    images, digits = [], []
    for path in paths:
        label = path.name[0] if spec == HOMEWORK else path.stem.rpartition("_")[0]
        if label not in spec.classes:
            name, example = ("digit", "7") if spec == HOMEWORK else ("class", spec.classes[0])
            raise BadInput(f"{path}: the name must begin with its {name}, as in {example}_001.png")
        digits.append(spec.classes.index(label))
        if spec == HOMEWORK:
            image = read_as_graded(path).resize(spec.shape[1:], Image.Resampling.BILINEAR)
            images.append(np.asarray(image).transpose(2, 0, 1))
        else:
            images.append(read_exactly(path, spec))
    return torch.from_numpy(np.stack(images)), torch.tensor(digits)


def grade_folder(
    folder: Path, classifiers: Sequence[DigitClassifier], critics: Sequence[DigitClassifier] | None = None
) -> dict[str, Any]:
    """Grade the images in folder/DOMAIN/: return {domain: results} and, under "mean", the mean accuracy of the domains.

    Results: "accuracy", "pictures" (number of images), "confusion" [10][10] (row: label, column: answer), and "quality".
    `critics` (None = the classifiers) measure the quality by their reference. Raise BadInput for a folder that can't be graded.
    """
    result: dict[str, Any] = {}
    spec, count = classifiers[0].spec, len(classifiers[0].spec.classes)
    graded = [read_graded(folder / name, spec) for name in spec.domains]  # all input is checked before the work
    for name, classifier, critic, (images, digits) in zip(
        spec.domains, classifiers, critics or classifiers, graded, strict=True
    ):
        answers = classifier.read(images)
        confusion = torch.bincount(digits * count + answers, minlength=count**2).view(count, count)
        result[name] = {
            "accuracy": int(confusion.trace()) / len(digits),
            "pictures": len(digits),
            "confusion": confusion.tolist(),
            "quality": quality(critic, images),
        }
    result["mean"] = sum(result[name]["accuracy"] for name in spec.domains) / len(spec.domains)
    return result
