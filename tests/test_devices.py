"""Tensors are created on the device that computes with them: none is created elsewhere and copied at every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from diffusion.schedule import linear
from digits.sampling import DigitRequest, labels_of
from faces.models import Labels, digit_model, face_model
from P1_dataloader import BalancedIndex, load_digits
from P1_model import Network, sinusoid
from training.cpu_layers import ExplicitGroupNorm
from training.draws import Draws

CPU = torch.device("cpu")


def draws() -> Tensor:
    numbers = Draws(0, 3, slice(2, 5), 6, CPU)
    uniform = torch.cat([numbers.uniform(), numbers.stratified(), numbers.timesteps(10)])
    return torch.cat([uniform, numbers.normal(2).flatten()])


def labels() -> Tensor:
    return torch.cat(labels_of([DigitRequest(3, 1, 0), DigitRequest(4, 0, 0)], CPU))


def small_face_network() -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes: Any = {"sample_size": 8, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
    network: UNet2DModel = UNet2DModel(**sizes, **blocks)
    return network


@pytest.fixture
def work(tiny_network: Network, digits_folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Return what is computed for every step or image, with its inputs on the CPU."""
    x, t = torch.randn(2, 3, 28, 28), torch.tensor([3, 5])
    face = face_model("face", small_face_network(), CPU, torch.float32, linear(10))
    digit = digit_model("digit", tiny_network, torch.float32, Labels(4, "svhn", 2.0))
    norm, data = ExplicitGroupNorm(nn.GroupNorm(2, 4)), load_digits(digits_folder, "train")
    values, which, member = torch.randn(2, 4, 5, 5), torch.rand(9), torch.rand(9)
    return {
        "draws": draws,
        "labels": labels,
        "face network": lambda: face.denoiser(2)(x, 7),
        "digit network with guidance": lambda: digit.denoiser(2)(x, 7),
        "digit network": lambda: tiny_network(x, 7, (t, t.clamp(max=2))),
        "time embedding": lambda: sinusoid(t, 8),
        "group norm": lambda: norm(values).detach(),
        "balanced rows": lambda: BalancedIndex(data, 0.5, True)(which, member),
    }


@pytest.mark.parametrize(
    "name",
    [
        "draws", "labels", "face network", "digit network with guidance", "digit network", "time embedding",
        "group norm", "balanced rows",
    ],
)  # fmt: skip
def test_the_result_does_not_depend_on_torchs_default_device(name: str, work: dict[str, Callable[[], Tensor]]) -> None:
    """A tensor that is created on the default device, here one without values, could not be computed with."""
    expected = work[name]()
    with torch.device("meta"):
        result = work[name]()
    assert result.device == CPU
    torch.testing.assert_close(result, expected)
