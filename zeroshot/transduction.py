"""Transductive classification: all images are classified together, without reading a label.

A Gaussian mixture over the image features, whose prior for each image is what the text says of it. This is TransCLIP
(Zanella et al. 2024, arXiv 2406.01837) without its term of neighbours, and with a full covariance in the place of its diagonal one,
shrunk as in GDA for CLIP (Wang et al. 2024, arXiv 2402.04087).
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.cli import log

NAME = "Gaussian mixture with the text as prior (TransCLIP without neighbours, full covariance)"
ITERATIONS = 10  # of expectation and maximisation, as in TransCLIP


def transduce(features: Tensor, logits: Tensor) -> Tensor:
    """Return the probabilities [N,C] float32 of all images together, from their features [N,D] and the text's logits [N,C].

    The density of image i and class k is softmax(logits)_ik N(x_i; mean_k, covariance), with one covariance for all classes.
    """
    x, log_prior = features.double(), logits.double().log_softmax(1)
    if len(x) <= x.shape[1]:
        log(
            f"warning: {len(x)} images estimate a covariance of {x.shape[1]} features: more images make --transduce better"
        )
    assignments = log_prior.exp()
    for _ in range(ITERATIONS):
        means = class_means(x, assignments)
        covariance = shrunk_covariance(x, assignments, means)
        assignments = (log_prior + log_density(x, means, covariance)).softmax(1)
    return assignments.float()


def class_means(x: Tensor, assignments: Tensor) -> Tensor:
    """Return the mean [C,D] of each class over the images [N,D], weighted by their assignments [N,C]."""
    return assignments.T @ x / assignments.sum(0).clamp(min=1e-12)[:, None]


def shrunk_covariance(x: Tensor, assignments: Tensor, means: Tensor) -> Tensor:
    """Return the covariance S [D,D] of images around the means of their classes, shrunk to S + trace(S) / (N - 1) I.

    Few images are shrunk more, so that the inverse exists for any number.
    """
    scatter = x.T @ x - means.T @ (assignments.sum(0)[:, None] * means)
    covariance = scatter / len(x)
    ridge = covariance.trace().clamp(min=1e-9) / max(1, len(x) - 1)
    return covariance + ridge * torch.eye(x.shape[1], dtype=x.dtype)


def log_density(x: Tensor, means: Tensor, covariance: Tensor) -> Tensor:
    """Return log N(x_i; mean_k, covariance) [N,C] up to a number that is the same for all classes of an image."""
    weights: Tensor = torch.linalg.solve(covariance, means.T)  # [D,C]
    return x @ weights - (means.T * weights).sum(0) / 2
