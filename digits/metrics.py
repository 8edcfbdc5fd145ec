"""What accuracy hides: the distance between generated and real features, the coverage of real variety, and copies.

All functions take features [N,F] of one classifier. Every number depends on N: compare equal N only.
Precision in a digit classifier's features accepts even pure noise (see the cards): read it together with the Frechet distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3  # k of the k-NN manifolds
COPY_PERCENTILE = 0.01  # of training images' distances to their own nearest neighbour


@dataclass(frozen=True)
class Reference:
    """Features of a domain's real images; all float32, on the classifier's device."""

    mean: Tensor  # [F] over all training and validation images, every digit with the same weight
    covariance: Tensor  # [F,F]
    real: Tensor  # [R,F] features of validation images
    train: Tensor  # [M,F] features of training images
    copy_distance: Tensor  # scalar: nearer than this to a training image counts as a copy

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors for a file, the two banks of features in half precision."""
        banks = {"real": self.real.half(), "train": self.train.half()}
        return {**vars(self), **banks}

    @staticmethod
    def from_tensors(values: dict[str, Tensor], device: torch.device) -> Reference:
        """Return the reference of `tensors`' values; raise KeyError for a missing name."""
        names = Reference.__dataclass_fields__
        return Reference(**{name: values[name].to(device, torch.float32) for name in names})


def make_reference(train: Tensor, val: Tensor, bank: int, real: int, weights: Tensor | None = None) -> Reference:
    """Return the reference for the features of all training [N,F] and validation [M,F] images, in random order.

    It keeps the first `bank` and `real` features, and the moments with these weights [N+M].
    """
    mean, covariance = moments(torch.cat([train, val]), weights)
    stored = train[:bank].half().float()  # as they will be read back
    threshold = neighbour_distance(stored, 1).quantile(COPY_PERCENTILE)
    return Reference(mean.float(), covariance.float(), val[:real], stored, threshold)


def moments(features: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean [F] and covariance [F,F] in float64 of features [N,F], each row with its weight [N]."""
    features = features.double()
    weights = torch.ones_like(features[:, 0]) if weights is None else weights.double()
    return weights @ features / weights.sum(), features.T.cov(aweights=weights)


def frechet(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared distance of two Gaussians (Heusel et al. 2017, eq. 6)."""
    first, second = covariance1.double(), covariance2.double()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # tr (C1 C2)^(1/2) = tr (R C2 R)^(1/2) with R = C1^(1/2): symmetric, so real eigenvalues
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    shift = (mean1.double() - mean2.double()).square().sum()
    return max(0.0, float(shift + first.trace() + second.trace() - 2 * cross))


def neighbour_distance(features: Tensor, k: int) -> Tensor:
    """Return [N], the distance of every row to its k-th nearest other row."""
    distances = exact_distances(features, features)
    distances.fill_diagonal_(torch.inf)
    return distances.kthvalue(k, dim=1).values


def exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return [N,M] Euclidean distances in float64; in float32 near copies drown in the rounding of the matrix product."""
    return torch.cdist(a.double(), b.double())


def coverage(queries: Tensor, manifold: Tensor, k: int = NEIGHBOURS) -> float:
    """Return the share of queries inside the union of balls around the manifold's points (Kynkaanniemi et al. 2019, eq. 1).

    A ball's radius is the distance to the k-th neighbour. Generated queries give precision, real ones give recall.
    """
    inside = exact_distances(queries, manifold) <= neighbour_distance(manifold, k)
    return float(inside.any(1).double().mean())


def copies(features: Tensor, reference: Reference) -> float:
    """Return the share of rows that copy a training image: nearer to one than 99 % of these are to their own nearest neighbour.

    About 0.01 for new real images.
    """
    nearest = exact_distances(features, reference.train).amin(1)
    return float((nearest < reference.copy_distance).double().mean())


def measure(features: Tensor, reference: Reference) -> dict[str, float]:
    """Return frechet (0 is best), precision, recall (1) and copies (0) of features [N,F]; nan for too few rows.

    A reference of too few validation images has no precision either.
    """
    if len(features) <= NEIGHBOURS:
        return dict.fromkeys(("frechet", "precision", "recall", "copies"), float("nan"))
    return {
        "frechet": frechet(*moments(features), reference.mean, reference.covariance),
        "precision": coverage(features, reference.real) if len(reference.real) > NEIGHBOURS else float("nan"),
        "recall": coverage(reference.real, features),
        "copies": copies(features, reference),
    }
