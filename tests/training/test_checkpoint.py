"""Checkpoint files: written all or nothing, read without running code, refused by name when damaged or of another kind."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runtime.cli import BadInput
from training.checkpoint import load_state, save_state

FullDisk = Callable[[int], AbstractContextManager[None]]
STATE = {
    "kind": "test",
    "step": 3,
    "history": [{"accuracy": 0.5}],
    "model": {"w": torch.arange(6.0).view(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
}


class Evil:
    """An object whose unpickling makes a folder: a stand-in for any code in a pickle."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def assert_same(state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the tensors under "model" and the values elsewhere."""
    torch.testing.assert_close(state["model"], expected["model"], rtol=0, atol=0)
    assert {**state, "model": None} == {**expected, "model": None}


def assert_untouched(path: Path) -> None:
    """Check that the file holds STATE and that its folder holds nothing else."""
    assert_same(load_state(path, "test"), STATE)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_state_is_loaded_back_unchanged(tmp_path: Path) -> None:
    save_state(tmp_path / "c.pt", STATE)
    assert_same(load_state(tmp_path / "c.pt", "test"), STATE)


def test_optimizer_state_comes_back_and_trains_on_alike(tmp_path: Path) -> None:
    def build() -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        return model, torch.optim.AdamW(model.parameters(), 0.1)

    def train(model: nn.Linear, optimizer: torch.optim.AdamW, steps: range) -> None:
        for step in steps:
            model(torch.ones(1, 2) * step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = build()
    train(whole, optimizer, range(2))
    save_state(tmp_path / "c.pt", {"kind": "test", "model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    train(whole, optimizer, range(2, 4))

    resumed, optimizer = build()
    state = load_state(tmp_path / "c.pt", "test")
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, optimizer, range(2, 4))
    assert torch.equal(whole.weight, resumed.weight)


def test_state_that_does_not_fit_on_the_disk_leaves_the_old_one(tmp_path: Path, full_disk: FullDisk) -> None:
    save_state(tmp_path / "c.pt", STATE)
    with full_disk(50_000), pytest.raises(OSError, match="could not write .*c.pt"):
        save_state(tmp_path / "c.pt", STATE | {"big": torch.ones(100_000)})
    assert_untouched(tmp_path / "c.pt")


def test_state_that_cannot_be_saved_leaves_the_old_one(tmp_path: Path) -> None:
    save_state(tmp_path / "c.pt", STATE)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_state(tmp_path / "c.pt", STATE | {"function": lambda: None})
    assert_untouched(tmp_path / "c.pt")


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path, modern: bool) -> None:
    path, trap = tmp_path / "c.pt", tmp_path / "executed"
    torch.save({"kind": "test", "model": Evil(trap)}, path, _use_new_zipfile_serialization=modern)
    with pytest.raises(BadInput, match="c.pt is refused: besides tensors it calls"):
        load_state(path, "test")
    assert not trap.exists()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_a_truncated_file_is_named(tmp_path: Path, modern: bool, share: float) -> None:
    path = tmp_path / "c.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=modern)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(BadInput, match="c.pt"):
        load_state(path, "test")


@pytest.mark.parametrize("state", [STATE | {"kind": "other"}, {"w": torch.ones(1)}, torch.ones(1)])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(BadInput, match="c.pt is not a checkpoint of test"):
        load_state(tmp_path / "c.pt", "test")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="c.pt does not exist"):
        load_state(tmp_path / "c.pt", "test")
