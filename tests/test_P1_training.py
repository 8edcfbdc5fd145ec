"""P1_training.py: resumable to the bit, the same on two processes, and clear about what is wrong."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from P1_training import Settings, Trainer, main
from runtime.cli import BadInput
from runtime.files import ROOT

SHORT: dict[str, Any] = {
    "preset": "tiny", "device": "cpu", "precision": "fp32", "compile": "off", "batch": 8, "warmup": 2,
    "log_every": 5, "eval_every": 0, "eval_count": 1, "final_count": 1,
}  # fmt: skip


def train(data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """Runs the script's main here; returns its record."""
    main(Settings(**{"data": data, "output": output, "steps": 10, **SHORT, **more}))
    return json.loads((output / "record.json").read_text())


def command(data: Path, output: Path, **more: Any) -> list[str]:
    """The same as a command line."""
    flags = {"data": data, "output": output, **SHORT, **more}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items()]
    return [str(ROOT / "P1_training.py"), *(word for pair in pairs for word in pair)]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as many as the runs in this process have
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_weights(digits_folder: Path, tmp_path: Path) -> None:
    more = {
        "steps": 120,
        "save_every": 4,
        "precision": "auto",
        "compile": "auto",
    }  # whatever the machine takes by itself
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(digits_folder, whole, **more)
    process = start([sys.executable, *command(digits_folder, broken, **more)])
    while not (broken / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert 0 < state(broken)["step"] < 120
    train(digits_folder, broken, **more)
    for name in ("model", "ema"):
        left, right = state(whole)[name], state(broken)[name]
        assert all(torch.equal(left[key], right[key]) for key in left), name


@pytest.mark.slow
def test_two_processes_train_like_one(digits_folder: Path, tmp_path: Path) -> None:
    train(digits_folder, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = start(torchrun + command(digits_folder, tmp_path / "two", steps=10))
    _, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors[-2000:]
    assert json.loads((tmp_path / "two" / "record.json").read_text())["metrics"]["processes"] == 2
    left, right = state(tmp_path / "one")["model"], state(tmp_path / "two")["model"]
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-3, atol=2e-5, msg=key)


def test_sigterm_leaves_a_checkpoint_of_the_last_step(digits_folder: Path, tmp_path: Path) -> None:
    def stop_once_it_trains() -> None:
        while not (tmp_path / "checkpoint.pt").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_it_trains, daemon=True).start()
    with pytest.raises(SystemExit, match="130"):
        train(digits_folder, tmp_path, steps=100_000, save_every=3)
    record = json.loads((tmp_path / "record.json").read_text())
    assert state(tmp_path)["step"] == record["metrics"]["step"] > 0


def test_a_loss_that_is_not_finite_stops_and_the_last_good_checkpoint_stays(
    digits_folder: Path, tmp_path: Path
) -> None:
    train(digits_folder, tmp_path, steps=5)
    with pytest.raises(BadInput, match="the loss is .* keeps the last good state"):
        train(digits_folder, tmp_path, steps=400, lr=1e30, save_every=1)
    assert all(torch.isfinite(w).all() for w in state(tmp_path)["model"].values())


def test_it_learns_and_leaves_what_it_promises(digits_folder: Path, tmp_path: Path) -> None:
    metrics = train(digits_folder, tmp_path, steps=120, batch=16, eval_every=60, candidates=2)["metrics"]
    assert metrics["loss"] < 0.7  # about 1 at the start: the target has unit variance
    assert [h["step"] for h in metrics["history"]] == [60, 120]
    assert {p.name for p in tmp_path.iterdir()} >= {"best.safetensors", "best.png", "checkpoint.pt", "tensorboard"}
    assert len(list((tmp_path / "candidates").iterdir())) == 2


def test_it_can_start_from_finished_weights(digits_folder: Path, tmp_path: Path) -> None:
    train(digits_folder, tmp_path / "first", steps=20)
    train(digits_folder, tmp_path / "second", steps=1, lr=1e-9, init=tmp_path / "first" / "best.safetensors")
    left, right = state(tmp_path / "first")["ema"], state(tmp_path / "second")["model"]
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-3, atol=1e-5, msg=key)  # stored in half precision


def test_a_finished_run_is_not_trained_again(digits_folder: Path, tmp_path: Path) -> None:
    train(digits_folder, tmp_path, steps=5)
    before = state(tmp_path)["model"]
    shutil.rmtree(tmp_path / "candidates")  # as if stopped before its grading
    train(digits_folder, tmp_path, steps=5)
    assert (tmp_path / "best.safetensors").is_file()
    assert all(torch.equal(before[key], value) for key, value in state(tmp_path)["model"].items())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"data": Path("nowhere")}, "prepare.py"),
        ({"steps": 0}, "--steps 0"),
        ({"batch": -1}, "--batch -1"),
        ({"lr": 0.0}, "--lr 0"),
        ({"lr": math.nan}, "--lr nan: must be above zero"),
        ({"clip": math.nan}, "--clip nan"),
        ({"min_snr": -1.0}, "--min-snr -1"),
        ({"warmup": -1}, "--warmup -1"),
        ({"eval_count": 0}, "--eval-count 0"),
        ({"final_count": 0}, "--final-count 0"),
        ({"candidates": 0}, "--candidates 0"),
        ({"save_every": -1}, "--save-every -1"),
        ({"ema": 2.0}, "--ema 2.0: must lie in 0"),
        ({"drop_digit": 2.0}, "--drop-digit 2.0: must lie"),
        ({"decay": 2.0}, "--decay 2.0: must lie"),
        ({"output": Path(__file__)}, "a file is in the way"),
        ({"init": ROOT / "checkpoints" / "p1_digits.safetensors"}, "another layout"),
        ({"init": Path("nowhere.safetensors")}, "nowhere.safetensors does not exist"),
        ({"device": "cuda:77"}, "--device cuda:77"),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], named: str, digits_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=named):
        train(**{"data": digits_folder, "output": tmp_path / "run", **given})


def test_a_damaged_checkpoint_is_named_and_kept(digits_folder: Path, tmp_path: Path) -> None:
    train(digits_folder, tmp_path, steps=2)
    torch.save({key: value for key, value in state(tmp_path).items() if key != "optimizer"}, tmp_path / "checkpoint.pt")
    with pytest.raises(BadInput, match=r"checkpoint\.pt is of another layout or damaged"):
        train(digits_folder, tmp_path, steps=4)
    assert (tmp_path / "checkpoint.pt").is_file()


def test_starting_anew_leaves_no_checkpoint_without_its_candidates(digits_folder: Path, tmp_path: Path) -> None:
    train(digits_folder, tmp_path, steps=2)
    Trainer(Settings(data=digits_folder, output=tmp_path, steps=2, **SHORT, resume="never"))
    assert not list(tmp_path.glob("candidates/*"))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_checkpoint_of_another_preset_is_refused(digits_folder: Path, tmp_path: Path) -> None:
    torch.save({"kind": "P1 training", "preset": "gpu"}, tmp_path / "checkpoint.pt")
    with pytest.raises(BadInput, match="preset gpu"):
        train(digits_folder, tmp_path)


def test_a_truncated_checkpoint_is_refused_and_kept(digits_folder: Path, tmp_path: Path) -> None:
    broken = b"PK\x03\x04" + bytes(100)
    (tmp_path / "checkpoint.pt").write_bytes(broken)
    with pytest.raises(BadInput, match="checkpoint.pt is not a torch file.*move it away"):
        train(digits_folder, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == broken
