"""Classifying all images together: equal to a plain loop in float64, without labels, and better where the text is biased."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zeroshot.transduction import ITERATIONS, transduce


def problem(count: int, seed: int, bias: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return features [N,6] of 3 classes, logits that only see a part of them, and the truth. A nuisance is louder than the classes."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.randint(3, (count,), generator=random)
    features = torch.randn(count, 6, generator=random)
    features[:, 0] *= 10
    features[:, :3] += 2.5 * torch.eye(3)[truth] + features[:, :1].clone() * torch.tensor([0.0, 0.5, 0.5])
    logits = 0.7 * torch.eye(3)[truth] + torch.randn(count, 3, generator=random)
    return features, logits + torch.tensor([bias, 0.0, 0.0]), truth


def plain_loop(features: Any, logits: Any) -> Any:
    """Return the probabilities by loops over images and classes, with the density of a Gaussian as it is in textbooks."""
    x, scores = np.array(features, np.float64), np.array(logits, np.float64)
    (count, size), classes = x.shape, scores.shape[1]
    prior = np.array([[math.exp(s) / sum(map(math.exp, row)) for s in row] for row in scores])
    z = prior.copy()
    for _ in range(ITERATIONS):
        means = [sum(z[i, k] * x[i] for i in range(count)) / sum(z[i, k] for i in range(count)) for k in range(classes)]
        covariance = np.zeros((size, size))
        for i in range(count):
            for k in range(classes):
                covariance += z[i, k] * np.outer(x[i] - means[k], x[i] - means[k]) / count
        covariance += sum(covariance[d, d] for d in range(size)) / (count - 1) * np.eye(size)
        for i in range(count):
            joint = []
            for k in range(classes):
                distance = (x[i] - means[k]) @ np.linalg.inv(covariance) @ (x[i] - means[k])
                normal = math.exp(-distance / 2) / math.sqrt((2 * math.pi) ** size * np.linalg.det(covariance))
                joint.append(prior[i, k] * normal)
            z[i] = np.array(joint) / sum(joint)
    return z


@pytest.mark.parametrize("count", [4, 30])
def test_it_equals_a_plain_loop_in_float64(count: int) -> None:
    features, logits, _ = problem(count, seed=count)
    result = transduce(features, logits)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), plain_loop(features, logits), atol=1e-6)


def test_the_order_of_the_images_changes_nothing() -> None:
    features, logits, _ = problem(60, seed=1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transduce(features[order], logits[order]), transduce(features, logits)[order])


def test_images_together_tell_more_than_a_biased_text_about_each() -> None:
    features, logits, truth = problem(600, seed=2, bias=1.0)
    alone, together = ((scores.argmax(1) == truth).double().mean() for scores in (logits, transduce(features, logits)))
    assert alone < 0.6
    assert together > 0.85


def test_fewer_images_than_features_are_logged_and_equal_images_are_no_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = transduce(torch.ones(1, 4), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(result, torch.tensor([[1.0, 2.0]]).softmax(1))
    assert capsys.readouterr().err.startswith("warning: 1 images estimate a covariance of 4 features")
    transduce(*problem(7, seed=0)[:2])
    assert not capsys.readouterr().err


def test_a_class_that_no_image_shows_is_no_error() -> None:
    features, logits, truth = problem(50, seed=3)
    logits = torch.cat([logits, torch.full((50, 1), -1e4)], 1)
    result = transduce(features, logits)
    assert result.isfinite().all()
    assert not (result.argmax(1) == 3).any()
