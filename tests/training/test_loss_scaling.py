"""The scale of the loss in fp16; the loop's tests hold what a skipped step means for a training."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from training.loss_scaling import LossScaler

CPU = torch.device("cpu")


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_keeps_weights_and_moments_in_a_skipped_step(fused: bool) -> None:
    """A fused one is handed the overflow and skips by itself."""
    weight = torch.ones(3, requires_grad=True)
    optimizer, scaler = torch.optim.AdamW([weight], fused=fused), LossScaler(CPU, "fp16")
    taken, states = [], []
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(weight.square().sum() * factor).backward()
        scaler.unscale_(optimizer)
        taken.append(scaler.take_step(optimizer))
        optimizer.zero_grad()
        states.append(deepcopy([weight.detach(), optimizer.state_dict()["state"]]))
    assert taken == [True, False, True]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert not torch.equal(states[2][0], states[1][0])
    assert (scaler.skipped, scaler.get_scale()) == (1, 2**15)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_in_other_precisions_nothing_is_scaled_skipped_or_kept(precision: str) -> None:
    weight = torch.ones(1, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([weight], 1.0), LossScaler(CPU, precision)
    loss = weight.square().sum()
    assert scaler.scale(loss) is loss
    (loss * float("nan")).backward()
    assert scaler.take_step(optimizer)
    assert weight.isnan().all()
    assert scaler.state_dict() == {}
