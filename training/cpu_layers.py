"""Layers written out as explicit operations, which torch.compile turns into faster CPU code than the fused kernels.

Results agree up to rounding, and parameters keep their names. Eager mode and GPUs are faster with the fused kernels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def write_out_layers(network: nn.Module) -> None:
    """Replace GroupNorm, 1x1 convolutions, attention (`attend`) and upsampling (`upsample`) in place by the explicit ones below."""
    for module in list(network.modules()):
        if hasattr(module, "attend"):
            module.__dict__["attend"] = explicit_attention  # no parameters: torch's __setattr__ has nothing to register
        if hasattr(module, "upsample"):
            module.__dict__["upsample"] = repeat_pixels
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, ExplicitGroupNorm(child))
            elif isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1):
                setattr(module, name, ExplicitPointwise(child))


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Compile the network in place with torch.compile; on a CPU, apply `write_out_layers` first."""
    if device.type == "cpu":
        write_out_layers(network)
    network.compile()


class ExplicitGroupNorm(nn.Module):
    """GroupNorm that computes the means of its groups as a product with a membership matrix [C,groups].

    In the shipped networks, groups have four or five channels. A loop over each would leave a CPU's sixteen-wide vectors mostly empty.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> the same, in the dtype of x."""
        channels = x.shape[1] // self.num_groups
        member = torch.eye(self.num_groups, device=x.device).repeat_interleave(channels, dim=0)  # [C,groups]
        values = x.float()
        with torch.autocast(x.device.type, enabled=False):
            means = torch.stack([values.mean((2, 3)), values.square().mean((2, 3))])
            mean, square = means @ (member / channels)
            inverse = (square - mean.square()).clamp(min=0).add(self.eps).rsqrt()  # each [B,groups]
            inverse, offset = torch.stack([inverse, mean * inverse]) @ member.T  # each [B,C]
        scale, shift = inverse * self.weight, self.bias - offset * self.weight
        normalised: Tensor = values * scale[:, :, None, None] + shift[:, :, None, None]
        return normalised.to(x.dtype)


class ExplicitPointwise(nn.Module):
    """A 1x1 convolution as a matrix product: its weight gradient takes half the time of a convolution's."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """[B,inputs,H,W] -> [B,outputs,H,W]."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(channels)) v; each [B,heads,positions,channels]."""
    return (q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)).softmax(-1) @ v


def repeat_pixels(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,C,2H,2W], nearest neighbour."""
    b, c, h, w = x.shape
    return x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)
