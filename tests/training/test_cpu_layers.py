"""Layers written out for CPUs: the same outputs and gradients as the layers they replace."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from P1_model import ModelConfig, UNet
from training.cpu_layers import write_out_layers


def test_layers_written_out_for_a_cpu_give_the_same_outputs_and_gradients() -> None:
    unet = UNet(ModelConfig((16, 32), (False, True), blocks=1, patch=2, embedding=32, head_channels=16)).eval()
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    explicit = copy.deepcopy(unet)
    write_out_layers(explicit)
    assert explicit.state_dict().keys() == unet.state_dict().keys()

    operations: list[str] = []

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> fx.GraphModule:
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    t, digit, domain = torch.full((2,), 400), torch.full((2,), 3), torch.full((2,), 1)
    compiled: Any = torch.compile(explicit, backend=backend)
    results = []
    for network in (unet, compiled):
        output = network(x, t, digit, domain)
        results.append((output, *torch.autograd.grad(output.square().sum(), list(network.parameters()))))
    assert operations
    assert not any(word in name for name in operations for word in ("interpolate", "scaled_dot_product", "group_norm"))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
