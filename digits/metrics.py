"""Metrics of what accuracy hides: how far generated features are from real ones, how much real variety they cover, and copies.

All functions take features [N,F] of one classifier. Every number depends on N: compare equal N only.
Precision counts a share of even pure noise as realistic (checkpoints/judge_*.md): read it together with the Frechet distance.
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
        """Return all fields by name for a file, `real` and `train` in half precision."""
        banks = {"real": self.real.half(), "train": self.train.half()}
        return {**vars(self), **banks}

    @staticmethod
    def from_tensors(values: dict[str, Tensor], device: torch.device) -> Reference:
        """Return the reference from what `tensors` returned, in float32 on `device`; raise KeyError for a missing name."""
        names = Reference.__dataclass_fields__
        return Reference(**{name: values[name].to(device, torch.float32) for name in names})


def make_reference(train: Tensor, val: Tensor, bank: int, real: int, weights: Tensor | None = None) -> Reference:
    """Return the reference made from the features of training images [N,F] and validation images [M,F], both in random order.

    It keeps the first `bank` training and the first `real` validation features.
    Mean and covariance are those of all features with weights [N+M].
    """
    mean, covariance = moments(torch.cat([train, val]), weights)
    stored = train[:bank].half().float()  # as they will be read back
    threshold = neighbour_distance(stored, 1).quantile(COPY_PERCENTILE)
    return Reference(mean.float(), covariance.float(), val[:real], stored, threshold)


def moments(features: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean [F] and covariance [F,F] in float64 of features [N,F], weighted by `weights` [N] (None = equal weights)."""
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
    """Return Euclidean distances [N,M] in float64: in float32, rounding hides the small ones of near copies."""
    return torch.cdist(a.double(), b.double())


def coverage(queries: Tensor, manifold: Tensor, k: int = NEIGHBOURS) -> float:
    """Return the share of `queries` inside at least one ball around a row of `manifold` (Kynkaanniemi et al. 2019, eq. 1).

    A ball's radius is the distance from its row to the k-th nearest other row.
    Generated queries in a real manifold give precision; real queries in a generated manifold give recall.
    """
    inside = exact_distances(queries, manifold) <= neighbour_distance(manifold, k)
    return float(inside.any(1).double().mean())


def copies(features: Tensor, reference: Reference) -> float:
    """Return the share (0..1) of rows that are copies: nearer to a training image than reference.copy_distance.

    99 % of the training images are farther than this from their nearest neighbour. New real images have about 0.01 copies.
    """
    nearest = exact_distances(features, reference.train).amin(1)
    return float((nearest < reference.copy_distance).double().mean())


def measure(features: Tensor, reference: Reference) -> dict[str, float]:
    """Return {"frechet", "precision", "recall", "copies"} of generated features [N,F]; their best values are 0, 1, 1, 0.

    All are nan if N is 3 or less. Precision is also nan if the reference has 3 validation features or fewer.
    """
    if len(features) <= NEIGHBOURS:
        return dict.fromkeys(("frechet", "precision", "recall", "copies"), float("nan"))
    return {
        "frechet": frechet(*moments(features), reference.mean, reference.covariance),
        "precision": coverage(features, reference.real) if len(reference.real) > NEIGHBOURS else float("nan"),
        "recall": coverage(reference.real, features),
        "copies": copies(features, reference),
    }
