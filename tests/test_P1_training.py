"""P1_training.py: resumable to the bit, the same on two processes, and clear about what is wrong."""

from __future__ import annotations

import json
import math
import os
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

from P1_training import Grading, Settings, main
from runtime.cli import BadInput
from runtime.files import ROOT

SHORT: dict[str, Any] = {
    "preset": "tiny", "device": "cpu", "precision": "fp32", "compile": "off", "batch": 8, "warmup": 2,
    "log_every": 5, "eval_every": 0, "eval_count": 1, "final_count": 1,
}  # fmt: skip


def train(data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """Run the script's main in this process; return its record."""
    main(Settings(**{"data": data, "output": output, "steps": 10, **SHORT, **more}))
    record: dict[str, Any] = json.loads((output / "record.json").read_text())
    return record


def command(data: Path, output: Path, **more: Any) -> list[str]:
    """Return the same run as a command line."""
    flags = {"data": data, "output": output, **SHORT, **more}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items()]
    return [str(ROOT / "P1_training.py"), *(word for pair in pairs for word in pair)]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as many as the runs in this process have
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def state(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content


def weights(folder: Path) -> dict[str, Any]:
    model: dict[str, Any] = state(folder)["parts"]["model"]
    return model


def averaged(folder: Path) -> dict[str, Any]:
    parts = state(folder)["parts"]["ema"]
    return {key.removeprefix("module."): value for key, value in parts.items() if key != "n_averaged"}


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_weights(digits_folder: Path, tmp_path: Path) -> None:
    more = {"steps": 120, "save_every": 4, "precision": "auto", "compile": "auto"}  # as on this machine by default
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(digits_folder, whole, **more)
    process = start([sys.executable, *command(digits_folder, broken, **more)])
    while not (broken / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert 0 < state(broken)["step"] < 120
    train(digits_folder, broken, **more)
    for name in ("model", "ema"):
        left, right = state(whole)["parts"][name], state(broken)["parts"][name]
        assert all(torch.equal(left[key], right[key]) for key in left), name


@pytest.mark.slow
def test_two_processes_train_like_one(digits_folder: Path, tmp_path: Path) -> None:
    train(digits_folder, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = start(torchrun + command(digits_folder, tmp_path / "two", steps=10))
    _, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors[-2000:]
    assert json.loads((tmp_path / "two" / "record.json").read_text())["metrics"]["processes"] == 2
    left, right = weights(tmp_path / "one"), weights(tmp_path / "two")
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
    with pytest.raises(BadInput, match="the loss is .* keeps the last good state"):
        train(digits_folder, tmp_path, steps=400, lr=1e30, save_every=1)
    assert all(torch.isfinite(w).all() for w in weights(tmp_path).values())


def test_the_loss_falls_and_the_run_folder_is_complete(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = train(digits_folder, tmp_path, steps=120, batch=16, eval_every=60, candidates=2)["metrics"]
    assert metrics["loss"] < 0.7  # about 1 at the start: the target has unit variance
    assert [h["step"] for h in metrics["history"]] == [60, 120]
    assert {p.name for p in tmp_path.iterdir()} >= {"best.safetensors", "best.png", "checkpoint.pt", "tensorboard"}
    assert len(list((tmp_path / "candidates").iterdir())) == 2
    shown = capsys.readouterr().err
    assert "step 60, 20 images: mnistm" in shown
    assert "000060" not in shown


def test_it_can_start_from_finished_weights(digits_folder: Path, tmp_path: Path) -> None:
    train(digits_folder, tmp_path / "first", steps=20)
    train(digits_folder, tmp_path / "second", steps=1, lr=1e-9, init=tmp_path / "first" / "best.safetensors")
    left, right = averaged(tmp_path / "first"), weights(tmp_path / "second")
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-3, atol=1e-5, msg=key)  # stored in half precision


def test_a_finished_run_is_not_trained_again(digits_folder: Path, tmp_path: Path) -> None:
    train(digits_folder, tmp_path, steps=5)
    before = weights(tmp_path)
    shutil.rmtree(tmp_path / "candidates")  # as if stopped before its grading
    train(digits_folder, tmp_path, steps=5)
    assert (tmp_path / "best.safetensors").is_file()
    assert all(torch.equal(before[key], value) for key, value in weights(tmp_path).items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_grading_loses_nothing_and_the_same_command_goes_on(
    number: int, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"steps": 4, "eval_every": 2, "candidates": 2}
    with monkeypatch.context() as patch:
        patch.setattr("P1_training.Grading.score", interrupted_at(3, number, Grading.score))
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as run_script leaves it
        with pytest.raises(SystemExit, match="130"):
            train(digits_folder, tmp_path / "a", **more)
        signal.signal(signal.SIGTERM, before)
    assert state(tmp_path / "a")["step"] == 4
    assert len(list((tmp_path / "a" / "candidates").iterdir())) == 2
    chosen = [train(digits_folder, tmp_path / name, **more)["metrics"] for name in ("a", "b")]
    assert chosen[0]["accuracy"] == chosen[1]["accuracy"]
    best = [(tmp_path / name / "best.safetensors").read_bytes() for name in ("a", "b")]
    assert best[0] == best[1]


def interrupted_at(call: int, number: int, score: Any) -> Any:
    """Return `score` with a signal in the call of this number."""
    calls: list[int] = []

    def wrapped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return score(*arguments)

    return wrapped


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data": Path("nowhere")}, "prepare.py"),
        ({"steps": 0}, "--steps 0"),
        ({"batch": -1}, "--batch -1"),
        ({"lr": 0.0}, "--lr 0"),
        ({"lr": math.nan}, "--lr nan: must be above zero"),
        ({"max_grad_norm": math.nan}, "--max-grad-norm nan"),
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
def test_bad_input_is_named(flags: dict[str, Any], message: str, digits_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        train(**{"data": digits_folder, "output": tmp_path / "run", **flags})


def test_a_damaged_checkpoint_is_named_and_kept(digits_folder: Path, tmp_path: Path) -> None:
    train(digits_folder, tmp_path, steps=2)
    damaged = state(tmp_path)
    del damaged["parts"]["optimizer"]
    torch.save(damaged, tmp_path / "checkpoint.pt")
    with pytest.raises(BadInput, match=r"checkpoint\.pt is of another layout or damaged"):
        train(digits_folder, tmp_path, steps=4)
    assert (tmp_path / "checkpoint.pt").is_file()


def test_a_restart_deletes_the_candidates_of_the_earlier_run(digits_folder: Path, tmp_path: Path) -> None:
    train(digits_folder, tmp_path, steps=4, eval_every=1)
    train(digits_folder, tmp_path, steps=2, resume="never")
    assert [path.name[:6] for path in tmp_path.glob("candidates/*")] == ["000002"]
    assert state(tmp_path)["step"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"preset": "cpu"}, "preset tiny, not cpu"),
        ({"lr": 1e-4}, "lr 0.001, not 0.0001"),
        ({"drop_digit": 0.5}, "drop_digit 0.15, not 0.5"),
        ({"batch": 4}, "batch 8, not 4"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"steps": 1}, "steps 2, not 1"),
    ],
)
def test_a_run_resumes_with_the_same_facts_only(
    flags: dict[str, Any], message: str, digits_folder: Path, tmp_path: Path
) -> None:
    train(digits_folder, tmp_path, steps=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(
        BadInput, match=rf"checkpoint\.pt was trained with {message}: give that again, or --output OTHER"
    ):
        train(digits_folder, tmp_path, **{"steps": 4, **flags})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_other_data_is_refused_and_a_moved_folder_is_not(digits_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(digits_folder, run, steps=2)
    moved = digits_folder.rename(tmp_path / "moved")
    assert train(moved, run, steps=3, eval_every=1, log_every=1, save_every=1)["metrics"]["step"] == 3
    csv = moved / "mnistm" / "train.csv"
    csv.write_text(csv.read_text().replace("00000.png,0", "00000.png,1"))
    with pytest.raises(BadInput, match="was trained with data"):
        train(moved, run, steps=4)


def test_a_checkpoint_of_an_earlier_version_is_refused(digits_folder: Path, tmp_path: Path) -> None:
    torch.save({"kind": "P1 training", "preset": "gpu"}, tmp_path / "checkpoint.pt")
    with pytest.raises(BadInput, match="earlier version"):
        train(digits_folder, tmp_path)


def test_a_truncated_checkpoint_is_refused_and_kept(digits_folder: Path, tmp_path: Path) -> None:
    broken = b"PK\x03\x04" + bytes(100)
    (tmp_path / "checkpoint.pt").write_bytes(broken)
    with pytest.raises(BadInput, match="checkpoint.pt is not a torch file.*move it away"):
        train(digits_folder, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == broken
