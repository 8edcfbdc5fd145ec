"""Atomic checkpoints of a training in progress: one torch file of tensors and plain types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.cli import BadInput
from runtime.files import atomic, load_tensors, require_file


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` with torch.save, atomically: after a crash or on a full disk the previous file is intact."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path, kind: str) -> dict[str, Any]:
    """Return the state that `save_state` wrote; raise BadInput unless state["kind"] is `kind`, and for a missing or damaged file."""
    require_file(path)
    try:
        state = load_tensors(path)
    except BadInput as error:
        raise BadInput(f"{error}; move it away to start from nothing") from None
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise BadInput(f"{path} is not a checkpoint of {kind}")
    return state
