"""How long a report takes on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from runtime.steps import Step

# {step: (seconds in the demo, seconds in the whole report)} with the shipped weights, on two idle cores of the setup `epyc`.
# From CPU times of single threads. Steps that only the whole report has are computed from their number of images and steps.
SECONDS = {
    "p1_digits_plain": (0, 36),
    "p1_grades_plain": (0, 3),
    "p1_digits_retries": (36, 36),
    "p1_grades_retries": (3, 3),
    "p1_figures": (22, 115),
    "p2_faces": (7, 7),
    "p2_figures": (16, 16),
    "miniature_pictures": (2, 5),
    "miniature_zeroshot": (5, 8),
    "miniature_concepts": (3, 5),
    "miniature_model": (9, 9),
    "miniature_objects": (85, 85),
    "miniature_styles": (0, 180),
    "miniature_drawn": (8, 18),
    "miniature_plain": (0, 60),
    "miniature_plain_scores": (0, 8),
    "miniature_graded": (17, 50),
    "miniature_strict": (6, 6),
    "miniature_scores": (0, 8),
    "miniature_layout": (10, 20),
}
PROBE = 0.012  # seconds of the convolution in `slowness` on `epyc`
PROBE_SECONDS = 0.5  # for which the convolution is repeated, at least


def minutes_text(steps: Sequence[Step], own: int, quick: bool) -> str:
    """Return in words how many minutes steps with the shipped weights will take.

    `own` is the number of further steps, on the user's files. Their time is not known, and the text says so.
    """
    minutes = math.ceil(sum(SECONDS.get(step.name, (0, 0))[not quick] for step in steps) * slowness() / 60)
    text = f"about {minutes} minute{'s' * (minutes != 1)} on this machine"
    return f"{text}, without {own} step{'s' * (own != 1)} on your own models or data" if own else text


@torch.inference_mode()
def slowness() -> float:
    """Return how many times as long as on the setup `epyc` a convolution takes on this CPU at this moment."""
    x, kernel = torch.randn(8, 64, 64, 64), torch.randn(64, 64, 3, 3)
    F.conv2d(x, kernel, padding=1)  # warms up
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < PROBE_SECONDS:
        F.conv2d(x, kernel, padding=1)
        count += 1
    return (time.perf_counter() - start) / count / PROBE
