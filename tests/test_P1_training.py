"""P1_training.py as a user runs it: resumable to the bit, the same on two processes, and clear about what is wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "P1_training.py")
SHORT = "--preset tiny --device cpu --batch 8 --warmup 2 --log-every 5 --eval-every 0 --eval-count 1 --final-count 1"


def command(data: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, SCRIPT, "--data", str(data), "--output", str(output), *SHORT.split(), *more]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=240)


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(arguments, stdout=quiet, stderr=quiet, env=environment)


def state(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), "no checkpoint appeared"


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_weights(digits_folder: Path, tmp_path: Path) -> None:
    more = ("--steps", "80", "--save-every", "4")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(command(digits_folder, whole, *more)).returncode == 0
    process = start(command(digits_folder, broken, *more))
    wait_for(broken / "checkpoint.pt", process)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert 0 < state(broken)["step"] < 80
    resumed = run(command(digits_folder, broken, *more))
    assert "going on at step" in resumed.stderr
    for name in ("model", "ema"):
        left, right = state(whole)[name], state(broken)[name]
        assert all(torch.equal(left[key], right[key]) for key in left), name
    assert (whole / "best.safetensors").read_bytes()[-1000:] == (broken / "best.safetensors").read_bytes()[-1000:]


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_of_the_last_step(digits_folder: Path, tmp_path: Path) -> None:
    process = start(command(digits_folder, tmp_path / "run", "--steps", "5000", "--save-every", "5"))
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert state(tmp_path / "run")["step"] == record["metrics"]["step"] > 0


@pytest.mark.slow
def test_two_processes_train_like_one(digits_folder: Path, tmp_path: Path) -> None:
    more = ("--steps", "10")
    assert run(command(digits_folder, tmp_path / "one", *more)).returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    two = run(torchrun + command(digits_folder, tmp_path / "two", *more)[1:])
    assert two.returncode == 0, two.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "record.json").read_text())["metrics"]["processes"] == 2
    left, right = state(tmp_path / "one")["model"], state(tmp_path / "two")["model"]
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_the_last_good_checkpoint_stays(
    digits_folder: Path, tmp_path: Path
) -> None:
    good = command(digits_folder, tmp_path / "run", "--steps", "5", "--save-every", "5")
    assert run(good).returncode == 0
    bad = run(command(digits_folder, tmp_path / "run", "--steps", "400", "--lr", "1e30", "--save-every", "10"))
    assert bad.returncode == 2
    assert "loss is" in bad.stderr
    weights = state(tmp_path / "run")["model"].values()
    assert all(torch.isfinite(w).all() for w in weights)


@pytest.mark.slow
def test_it_learns(digits_folder: Path, tmp_path: Path) -> None:
    done = run(command(digits_folder, tmp_path / "run", "--steps", "150", "--batch", "16"))
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "run" / "record.json").read_text())["metrics"]
    assert metrics["loss"] < 0.6  # 1.0 at the start: the target has unit variance
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "best.safetensors",
        "best.png",
        "checkpoint.pt",
        "tensorboard",
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--data", "nowhere"), "prepare.py"),
        (("--steps", "0"), "--steps 0"),
        (("--batch", "-1"), "--batch -1"),
        (("--output", SCRIPT), "a file is in the way"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, str], named: str, digits_folder: Path, tmp_path: Path
) -> None:
    done = run(command(digits_folder, tmp_path / "run", *arguments))
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_preset_is_refused(digits_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"kind": "P1 training", "preset": "gpu"}, tmp_path / "run" / "checkpoint.pt")
    done = run(command(digits_folder, tmp_path / "run"))
    assert done.returncode == 2
    assert "preset gpu" in done.stderr


def test_a_truncated_checkpoint_is_refused(digits_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    done = run(command(digits_folder, tmp_path / "run"))
    assert done.returncode == 2
    assert "checkpoint.pt" in done.stderr
