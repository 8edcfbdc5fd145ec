"""The teacher of a distillation: its guided output, and the guidance scales."""

from __future__ import annotations

import torch

from digits.distillation import Teacher
from P1_model import NO_DIGIT, NO_DOMAIN, Network


def test_the_teacher_returns_each_images_guided_output_in_one_call(tiny_network: Network) -> None:
    """The prediction without a digit is of the same domain; an image without a digit has no guidance."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 3, 28, 28, generator=generator), torch.tensor([3, 19, 7, 12])
    digit, domain = torch.tensor([3, 8, NO_DIGIT, 5]), torch.tensor([0, 1, 1, NO_DOMAIN])
    guidance, batches = torch.tensor([1.0, 3.0, 5.0, 7.0]), list[int]()
    tiny_network.unet.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    output = Teacher(tiny_network.unet, 7.0)(x, t, digit, domain, guidance)
    assert batches == [8]
    cond, uncond = (tiny_network.unet(x, t, d, domain) for d in (digit, torch.full_like(digit, NO_DIGIT)))
    expected = uncond + guidance[:, None, None, None] * (cond - uncond)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert torch.equal(cond[2], uncond[2])


def test_no_gradient_flows_into_the_teacher(tiny_network: Network) -> None:
    tiny_network.unet.requires_grad_(True)
    one = torch.ones(1, dtype=torch.long)
    assert not Teacher(tiny_network.unet, 7.0)(torch.zeros(1, 3, 28, 28), one, one, one, one.float()).requires_grad


def test_scales_go_from_1_to_the_largest(tiny_network: Network) -> None:
    assert Teacher(tiny_network.unet, 7.0).scales(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1.0, 2.5, 7.0]
