"""Atomic checkpoints of a training in progress: one torch file of tensors and plain types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.cli import BadInput
from runtime.files import atomic, load_tensors, require_file


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write all or nothing: on a full disk or a crash the previous file survives."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path, kind: str) -> dict[str, Any]:
    """Load the state saved with state["kind"] == kind; raise BadInput for any other file."""
    require_file(path)
    try:
        state = load_tensors(path)
    except BadInput as error:
        raise BadInput(f"{error}; move it away to start from nothing") from None
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise BadInput(f"{path} is not a checkpoint of {kind}")
    return state
