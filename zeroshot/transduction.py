"""Transductive classification: all images are classified together, without reading a label.

A Gaussian mixture with one component per class is fitted to the image features. Its prior for each image is the softmax of the text's
logits. This is TransCLIP (Zanella et al. 2024, arXiv 2406.01837) without its term of neighbours. The covariance is full instead of
diagonal, and shrunk as in GDA for CLIP (Wang et al. 2024, arXiv 2402.04087).
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.cli import log

NAME = "Gaussian mixture with the text as prior (TransCLIP without neighbours, full covariance)"
ITERATIONS = 10  # of expectation and maximisation, as in TransCLIP


def transduce(features: Tensor, logits: Tensor) -> Tensor:
    """Return class probabilities [N,C] float32, from the features [N,D] and zero-shot logits [N,C] of all images together.

    They are softmax(logits)_ik N(x_i; mean_k, covariance) for image i and class k, normalized. All classes share one covariance.
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
    """Return the mean [C,D] of each class over the images x [N,D], weighted by the class probabilities `assignments` [N,C]."""
    return assignments.T @ x / assignments.sum(0).clamp(min=1e-12)[:, None]


def shrunk_covariance(x: Tensor, assignments: Tensor, means: Tensor) -> Tensor:
    """Return S + trace(S) / (N - 1) I. S [D,D] is the covariance of the images x [N,D] around their classes' means [C,D].

    The second term makes the matrix invertible for any number of images. It weighs more for few.
    """
    scatter = x.T @ x - means.T @ (assignments.sum(0)[:, None] * means)
    covariance = scatter / len(x)
    ridge = covariance.trace().clamp(min=1e-9) / max(1, len(x) - 1)
    return covariance + ridge * torch.eye(x.shape[1], dtype=x.dtype)


def log_density(x: Tensor, means: Tensor, covariance: Tensor) -> Tensor:
    """Return log N(x_i; mean_k, covariance) [N,C], except for a constant per image, which is the same for all classes."""
    weights: Tensor = torch.linalg.solve(covariance, means.T)  # [D,C]
    return x @ weights - (means.T * weights).sum(0) / 2
