"""What accuracy hides: how far generated features lie from real ones, how much of the real variety they cover, and copies.

All functions work on features [N,F] of one judge; they know nothing of pictures. Every number depends on N: compare equal N only.
In features of a digit judge precision forgives much, pure noise included (see the judges' cards): read it beside the Frechet distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3  # k of the k-NN manifolds
COPY_PERCENTILE = 0.01  # of training pictures' distances to their own nearest neighbour


@dataclass(frozen=True)
class Reference:
    """What a judge remembers of its domain's real pictures; all float32, on the judge's device."""

    mean: Tensor  # [F] over all training and validation pictures, every digit with the same weight
    covariance: Tensor  # [F,F]
    real: Tensor  # [R,F] features of validation pictures
    train: Tensor  # [M,F] features of training pictures
    copy_distance: Tensor  # scalar: nearer than this to a training picture counts as a copy

    def tensors(self) -> dict[str, Tensor]:
        """For a file: the two banks of features in half precision."""
        banks = {"real": self.real.half(), "train": self.train.half()}
        return {**vars(self), **banks}

    @staticmethod
    def from_tensors(values: dict[str, Tensor], device: torch.device) -> Reference:
        """Inverse of `tensors`; raises KeyError for a missing name."""
        names = Reference.__dataclass_fields__
        return Reference(**{name: values[name].to(device, torch.float32) for name in names})


def make_reference(train: Tensor, val: Tensor, bank: int, real: int, weights: Tensor | None = None) -> Reference:
    """From the features of all training [N,F] and validation [M,F] pictures (in random order): banks of the first `bank` and `real`,
    and moments with these weights [N+M]."""
    mean, covariance = moments(torch.cat([train, val]), weights)
    kept = train[:bank].half().float()  # as they will be read back
    nearest = neighbour_distance(kept, 1)
    threshold = nearest.quantile(COPY_PERCENTILE)
    return Reference(mean.float(), covariance.float(), val[:real], kept, threshold)


def moments(features: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean [F] and covariance [F,F] in float64 of features [N,F], each row with its weight [N]."""
    features = features.double()
    weights = torch.ones_like(features[:, 0]) if weights is None else weights.double()
    return weights @ features / weights.sum(), features.T.cov(aweights=weights)


def frechet(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared distance of two Gaussians (Heusel et al. 2017, eq. 6)."""
    first, second = covariance1.double(), covariance2.double()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # tr (C1 C2)^(1/2) = tr (R C2 R)^(1/2) with R = C1^(1/2): symmetric, so real eigenvalues
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    shift = (mean1.double() - mean2.double()).square().sum()
    return max(0.0, float(shift + first.trace() + second.trace() - 2 * cross))


def neighbour_distance(features: Tensor, k: int) -> Tensor:
    """[N] distance of every row to its k-th nearest other row."""
    distances = exact_distances(features, features)
    distances.fill_diagonal_(torch.inf)
    return distances.kthvalue(k, dim=1).values


def exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """[N,M] Euclidean distances, in float64: in float32 near copies drown in the rounding of the matrix product."""
    return torch.cdist(a.double(), b.double())


def coverage(queries: Tensor, manifold: Tensor, k: int = NEIGHBOURS) -> float:
    """Share of the queries inside the union of the manifold's balls, each as wide as its centre's k-th neighbour is far
    (Kynkaanniemi et al. 2019, eq. 1): precision with generated queries and a real manifold, recall the other way round."""
    inside = exact_distances(queries, manifold) <= neighbour_distance(manifold, k)
    return float(inside.any(1).double().mean())


def memorised(features: Tensor, reference: Reference) -> float:
    """Share nearer to a stored training picture than all but 1 % of training pictures are to each other: about 0.01 for real new ones."""
    nearest = exact_distances(features, reference.train).amin(1)
    return float((nearest < reference.copy_distance).double().mean())


def measure(features: Tensor, reference: Reference) -> dict[str, float]:
    """frechet (0 is best), precision, recall (1 is best) and memorised (0 is best) of features [N,F]; nan for too few rows."""
    if len(features) <= NEIGHBOURS:
        return dict.fromkeys(("frechet", "precision", "recall", "memorised"), float("nan"))
    return {
        "frechet": frechet(*moments(features), reference.mean, reference.covariance),
        "precision": coverage(features, reference.real),
        "recall": coverage(reference.real, features),
        "memorised": memorised(features, reference),
    }
