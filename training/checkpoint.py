"""Atomic checkpoints of a training in progress: one torch file of tensors and plain types."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from runtime.cli import BadInput
from runtime.files import atomic, load_tensors, require_file
from training.ema import make_ema


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write all or nothing: on a full disk or a crash the previous file survives."""
    with atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's writer reports a full disk this way
            raise OSError(f"could not write {path} (disk full?): {str(error).splitlines()[0]}") from None


def load_state(path: Path, kind: str) -> dict[str, Any]:
    """Load the state saved with state["kind"] == kind; raise BadInput for any other file."""
    require_file(path)
    try:
        state = load_tensors(path)
    except BadInput as error:
        raise BadInput(f"{error}; move it away to start anew") from None
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise BadInput(f"{path} is not a checkpoint of {kind}")
    return state


def weights_state(network: nn.Module, ema: AveragedModel, optimizer: Any) -> dict[str, Any]:
    """What a checkpoint holds of the three; random numbers follow from seed and step."""
    return {
        "model": network.state_dict(),
        "ema": ema.module.state_dict(),
        "averaged": int(ema.n_averaged),
        "optimizer": optimizer.state_dict(),
    }


def restore_weights(
    state: dict[str, Any], network: nn.Module, optimizer: Any, decay: float, path: Path
) -> AveragedModel:
    """Puts `weights_state`, read from `path`, back and returns the average, which goes on with `decay`; raises BadInput where the layout
    is another one."""
    try:
        network.load_state_dict(state["model"])
        ema = make_ema(network, decay, max(0, state["averaged"] - 1))  # the first one is a copy
        ema.module.load_state_dict(state["ema"])
        ema.n_averaged.fill_(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, ValueError):
        raise BadInput(f"{path} is of another layout or damaged: name another run folder, or move it away") from None
    return ema


def require_finite(loss: float, step: int, checkpoint: Path | None, cure: str = "a lower --lr") -> None:
    """Stops a training whose loss is no number any more, before its weights are saved; raises BadInput."""
    if not math.isfinite(loss):
        left = f"{checkpoint} keeps the last good state" if checkpoint else "nothing is written"
        raise BadInput(f"the loss is {loss} at step {step:,}: stopped; {left}. Try {cure}")
