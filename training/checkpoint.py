"""Atomic checkpoints of a training in progress: one torch file of tensors and plain types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.cli import BadInput
from runtime.files import atomic, load_tensors


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes all or nothing: on a full disk or a crash the previous file survives."""
    with atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's writer reports a full disk this way
            raise OSError(f"could not write {path} (disk full?): {str(error).splitlines()[0]}") from None


def load_state(path: Path, kind: str) -> dict[str, Any]:
    """The state saved with state["kind"] == kind; raises BadInput for any other file."""
    state = load_tensors(path)
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise BadInput(f"{path} is not a checkpoint of {kind}")
    return state
