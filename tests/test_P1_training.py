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
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file
from small_digits import TINY, write_images
from stand_in_tracker import stand_in, without
from torch import Tensor

from diffusion.schedule import make_schedule
from digits.classifier import DigitClassifier
from digits.recipes import RECIPES
from digits.sampling import DigitSampler, graded_requests
from P1_dataloader import BalancedIndex, load_digits
from P1_model import HOMEWORK, PRESETS, Network, UNet, load_network, save_network
from P1_training import Grading, Settings, digit_sheet, main, validation_loss
from runtime.cli import BadInput
from runtime.files import ROOT
from runtime.images import open_image
from runtime.seeds import derived_seed
from training import loop
from training.log import TrainingLog

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
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets: dict[int, Tensor] = {}
    monkeypatch.setattr(TrainingLog, "image", lambda self, step, name, image: sheets.update({step: image}))
    metrics = train(digits_folder, tmp_path, steps=120, batch=16, eval_every=60, candidates=2)["metrics"]
    assert metrics["loss"] < 0.7  # about 1 at the start: the target has unit variance
    assert [h["step"] for h in metrics["history"]] == [60, 120]
    assert {p.name for p in tmp_path.iterdir()} >= {"best.safetensors", "best.png", "checkpoint.pt", "tensorboard"}
    assert len(list((tmp_path / "candidates").iterdir())) == 2
    shown = capsys.readouterr().err
    assert "step 60, 20 images: mnistm" in shown
    assert "000060" not in shown
    assert list(sheets) == [60, 120]  # in TensorBoard, as in the run folder
    assert all(torch.equal(open_image(tmp_path / f"step-{step:06d}.png"), sheet) for step, sheet in sheets.items())
    assert f"curves: tensorboard --logdir {tmp_path / 'tensorboard'}" in shown
    assert shown.splitlines()[-1] == f"next: bash hw2_1.sh out {tmp_path / 'best.safetensors'}"


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_in_the_last_grading_loses_nothing_and_the_same_command_goes_on(
    number: int, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"steps": 4, "eval_every": 2, "candidates": 2}
    with monkeypatch.context() as patch:
        patch.setattr("P1_training.Grading.score", interrupted_at(3, number, Grading.score))
        before = signal.signal(number, signal.default_int_handler)  # as run_script leaves it
        with pytest.raises(SystemExit, match="130"):
            train(digits_folder, tmp_path / "a", **more)
        signal.signal(number, before)
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
        ({"schedule": "linear"}, "schedule cosine, not linear"),
        ({"prediction": "eps"}, "prediction v, not eps"),
        ({"classifiers": ("none",)}, "classifiers None, not none"),
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


# ---------------------------------------------------------------- every flag, against a plain loop


@pytest.fixture
def ungraded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the time of the gradings out of tests of the weights."""
    images = torch.zeros(20, 3, 28, 28, dtype=torch.uint8)
    scores = {"mnistm": 0.0, "svhn": 0.0, "accuracy": 0.0}
    monkeypatch.setattr(Grading, "score", lambda self, network, count, seed: (scores, images))


def plain_training(**flags: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train as docs and papers say, in a plain loop; return the weights and their average."""
    teacher = load_network(flags["distill"], torch.device("cpu")) if flags.get("distill") else None
    preset = "distill-steps" if flags.get("distill_steps") else "distill" if teacher else flags.get("preset", "tiny")
    recipe = vars(RECIPES[preset])
    values: dict[str, Any] = vars(Settings()) | recipe | SHORT | {"steps": 6} | flags
    digits = load_digits(values["data"], "train")
    index = BalancedIndex(digits, values["svhn_share"], values["balance_digits"])
    torch.manual_seed(values["seed"])
    if teacher:
        inputs = {"max_guidance": values["max_guidance"], "distilled_steps": values["distill_steps"]}
        unet = UNet(replace(teacher.unet.config, **inputs))
        unet.load_state_dict(teacher.unet.state_dict(), strict=False)
    else:
        unet = UNet(PRESETS[values["preset"]])
    if values["init"]:
        unet.load_state_dict(load_network(values["init"], torch.device("cpu")).unet.state_dict())
    average = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    total, batch, steps = unet.config.timesteps, values["batch"], values["steps"]
    alpha_bars = make_schedule(values["schedule"], total, values["prediction"]).alpha_bar.float()

    for step in range(steps):
        stream = torch.Generator().manual_seed(derived_seed(values["seed"], step))
        group, member, keep_digit, keep_domain, offset = (torch.rand(batch, generator=stream) for _ in range(5))
        rows = index(group, member)
        digit = digits.digits[rows].masked_fill(keep_digit < values["drop_digit"], 10)
        domain = digits.domains[rows].masked_fill(keep_domain < values["drop_domain"], 2)
        t = ((torch.arange(batch) + offset) / batch * total).long()
        eps = torch.randn(batch, 3, 28, 28, generator=stream)
        x0, alpha_bar = digits.images[rows] / 127.5 - 1, alpha_bars[t][:, None, None, None]
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x, v = signal * x0 + noise * eps, values["prediction"] == "v"
        if teacher:
            scale = 1 + (values["max_guidance"] - 1) * torch.rand(batch, generator=stream)
            cond, uncond = (teacher.unet(x, t, label, domain) for label in (digit, torch.full_like(digit, 10)))
            error = (
                unet(x, t, digit, domain, scale) - (uncond + scale[:, None, None, None] * (cond - uncond))
            ).square()
        else:
            error = (unet(x, t, digit, domain) - (signal * eps - noise * x0 if v else eps)).square()
        if values["min_snr"]:
            snr = alpha_bar / (1 - alpha_bar)
            error = error * snr.clamp(max=values["min_snr"]) / (snr + 1 if v else snr)
        loss = error.mean()
        if teacher and values["distill_steps"]:
            start = torch.randn(batch, 3, 28, 28, generator=stream)
            loss = loss + plain_step_loss(unet, teacher, start, digit, domain, scale, values["distill_steps"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), values["max_grad_norm"])
        left = min(1, (steps - step) / (values["decay"] * steps)) if values["decay"] else 1
        if values["decay_shape"] == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        optimizer.param_groups[0]["lr"] = values["lr"] * min(1, (step + 1) / max(1, values["warmup"])) * left
        optimizer.step()
        optimizer.zero_grad()
        decay = min(values["ema"], (1 + step) / (10 + step)) if step else 0
        for name, value in unet.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    return unet.state_dict(), average


def plain_step_loss(
    unet: UNet, teacher: Network, x: Tensor, digit: Tensor, domain: Tensor, scale: Tensor, counts: tuple[int, ...]
) -> Tensor:
    """Return how far v is from that of one DDIM step over several steps of diffusers' solver, on average over all steps."""
    solver = DPMSolverMultistepScheduler(
        trained_betas=teacher.schedule.betas.tolist(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    solver.set_timesteps(teacher.sampler.get("steps", 12))
    times, states, angles = solver.timesteps.tolist(), [x], [math.acos(a**0.5) for a in teacher.schedule.alpha_bar]
    for t in times:
        cond, uncond = (
            teacher.unet(x, torch.full((len(x),), t), label, domain) for label in (digit, torch.full_like(digit, 10))
        )
        x = solver.step(uncond + scale[:, None, None, None] * (cond - uncond), t, x).prev_sample
        states.append(x)
    states[-1] = x.clamp(-1, 1)
    errors = []
    for count in counts:
        stride = len(times) // count
        for k in range(0, len(times), stride):
            now, end = angles[times[k]], angles[times[k + stride]] if k + stride < len(times) else 0.0
            v = (math.cos(now - end) * states[k] - states[k + stride]) / math.sin(now - end)
            steps = torch.full((len(x),), float(count))
            errors.append((unet(states[k], torch.full((len(x),), times[k]), digit, domain, scale, steps) - v).square())
    return torch.stack(errors).mean()


DECIDES_WEIGHTS: dict[str, Any] = {
    "steps": 4, "batch": 6, "lr": 4e-3, "warmup": 5, "decay": 0.9, "decay_shape": "cosine", "min_snr": 0.5,
    "drop_digit": 0.7, "drop_domain": 0.7, "svhn_share": 0.9, "balance_digits": False, "ema": 0.1,
    "max_grad_norm": 0.05, "seed": 3, "schedule": "linear", "prediction": "eps", "preset": "report",
    "data": None, "init": None,  # of the lesson below
}  # fmt: skip


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write two data sets, whose SVHN is unbalanced, and two networks to start from: zero-initialised layers hide labels."""
    root = tmp_path_factory.mktemp("lesson")
    paths: dict[str, Path] = {}
    torch.manual_seed(1)
    for seed, name in enumerate(("usual", "other")):
        for domain, (folder, labels) in enumerate(
            {"mnistm": [*range(10)] * 4, "svhn": [*range(10), *[7] * 10]}.items()
        ):
            images = [f"{index:05d}.png" for index in range(len(labels))]
            write_images(root / name / folder, "train.csv", images, labels, seed=2 * seed + domain)
            write_images(root / name / folder, "val.csv", ["val.png"], [3], seed=9)
        unet = UNet(PRESETS["tiny"])
        for parameter in unet.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        network = Network(unet, make_schedule("cosine", 1000, "v"), "cosine", {}, {})
        save_network(root / f"{name}.safetensors", network)
        paths |= {f"{name}_data": root / name, f"{name}_init": root / f"{name}.safetensors"}
    return paths


@pytest.fixture(scope="module")
def usual(lesson: dict[str, Path]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights and their average when no flag is given."""
    return plain_training(data=lesson["usual_data"], init=lesson["usual_init"])


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the length of the difference of all weights; six steps move them by about 1."""
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


ROUNDING, EFFECT = 1e-3, 3e-3  # bounds of distances: 0.0002 at most, 0.004 at least were measured


@pytest.mark.usefixtures("ungraded")
@pytest.mark.parametrize("flag", DECIDES_WEIGHTS)
def test_every_flag_that_decides_the_weights_does_what_a_plain_loop_does_with_it(
    flag: str,
    tmp_path: Path,
    lesson: dict[str, Path],
    usual: tuple[dict[str, Tensor], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PRESETS, "report", replace(TINY, conditioning="onehot", timesteps=500))
    fresh = flag in ("preset", "schedule", "prediction")  # the other weights are of another kind
    flags: dict[str, Any] = {"data": lesson["usual_data"], "init": None if fresh else lesson["usual_init"]}
    flags |= {flag: lesson.get(f"other_{flag}", DECIDES_WEIGHTS[flag])}
    train(**{"output": tmp_path, "steps": 6, **flags})
    expected, average = plain_training(**flags)
    assert distance(weights(tmp_path), expected) < ROUNDING
    assert distance(averaged(tmp_path), average) < ROUNDING
    if not fresh:
        assert max(distance(expected, usual[0]), distance(average, usual[1])) > EFFECT


# ---------------------------------------------------------------- distillation: the student learns a teacher's guided output

DISTILL: dict[str, Any] = {"preset": "auto", "distill": "usual_init"}


@pytest.mark.usefixtures("ungraded")
@pytest.mark.parametrize(
    "change",
    [
        {}, {"distill": "other_init"}, {"max_guidance": 2.0}, {"min_snr": 0.5}, {"drop_digit": 0.7}, {"lr": 3e-3},
        {"distill_steps": (6, 3), "batch": 3},
    ],
)  # fmt: skip
def test_a_distillation_does_what_a_plain_loop_does(
    change: dict[str, Any], tmp_path: Path, lesson: dict[str, Path]
) -> None:
    flags = {"data": lesson["usual_data"], "init": None, **DISTILL, **change}
    usual: dict[str, Any] = {"data": lesson["usual_data"], "init": None, "distill": lesson["usual_init"]}
    flags["distill"] = lesson[flags["distill"]]
    train(**{"output": tmp_path, "steps": 6, **flags})
    expected, average = plain_training(**flags)
    assert distance(weights(tmp_path), expected) < ROUNDING
    assert distance(averaged(tmp_path), average) < ROUNDING
    if change:
        assert distance(plain_training(**usual)[0], expected) > EFFECT


@pytest.mark.usefixtures("ungraded")
def test_a_stopped_distillation_continues_to_the_same_weights(tmp_path: Path, lesson: dict[str, Path]) -> None:
    flags: dict[str, Any] = {
        "data": lesson["usual_data"],
        "preset": "auto",
        "distill": lesson["usual_init"],
        "distill_steps": (6, 3),
        "batch": 3,
        "decay": 0.0,
    }
    train(output=tmp_path / "whole", steps=6, **flags)
    for steps in (3, 6):
        train(output=tmp_path / "broken", steps=steps, **flags)
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(left[name], right[name]) for name in left)
    for name, value in {"distill": lesson["other_init"], "max_guidance": 3.0, "distill_steps": (3, 6)}.items():
        with pytest.raises(BadInput, match=f"was trained with {name}"):
            train(output=tmp_path / "whole", steps=8, **flags | {name: value})


@pytest.mark.usefixtures("ungraded")
def test_a_training_can_start_from_a_distilled_network_as_the_conditional_one(
    tmp_path: Path, lesson: dict[str, Path]
) -> None:
    """The same seed, data and weights: only the embedding of the guidance scale is left out."""
    train(lesson["usual_data"], tmp_path / "a", steps=4, preset="auto", distill=lesson["usual_init"])
    train(lesson["usual_data"], tmp_path / "b", steps=1, lr=1e-9, init=tmp_path / "a" / "best.safetensors")
    left, right = averaged(tmp_path / "a"), weights(tmp_path / "b")
    assert {*left} - {*right} == {name for name in left if name.startswith("guidance.")} != set()
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=1e-3, atol=1e-5, msg=name)  # stored in half precision


SHIPPED = ROOT / "checkpoints" / "p1_digits.safetensors"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"preset": "tiny"}, "--preset tiny: the checkpoint of --distill decides it, leave it out"),
        ({"schedule": "cosine"}, "--schedule cosine: the checkpoint of --distill"),
        ({"prediction": "v"}, "--prediction v: the checkpoint of --distill"),
        ({"init": SHIPPED}, "--init .*p1_digits.safetensors: the checkpoint of --distill"),
        ({"distill": None, "max_guidance": 5.0}, "--max-guidance 5.0: goes with --distill"),
        ({"max_guidance": 1.0}, "--max-guidance 1.0: must be above 1"),
        ({"max_guidance": math.nan}, "--max-guidance nan"),
        ({"max_guidance": math.inf}, "--max-guidance inf"),
        ({"distill": Path("nowhere.safetensors")}, "nowhere.safetensors does not exist"),
        ({"distill": ROOT / "checkpoints" / "judge_svhn.safetensors"}, "not a P1 checkpoint"),
        ({"distill": "distilled"}, "distilled already: give the checkpoint that it was made from"),
        ({"distill": "few", "distill_steps": (2,)}, "distilled already: give the checkpoint that it was made from"),
        ({"distill": "distilled", "distill_steps": (2,)}, "its sampler is ddim, --distill-steps learns from dpm alone"),
        ({"distill": "dpm", "distill_steps": (2,), "max_guidance": 4.0}, "--max-guidance 4.0: the checkpoint"),
        ({"distill": "dpm", "distill_steps": (2, 3)}, "--distill-steps 3: give divisors of the 4 steps of .*dpm"),
        ({"distill": "dpm", "distill_steps": (4,)}, "--distill-steps 4: give divisors"),
        ({"distill": "dpm", "distill_steps": (0,)}, "--distill-steps 0: give divisors"),
        ({"distill": "dpm", "distill_steps": (2, 1, 2)}, "--distill-steps 2 1 2: give each number once"),
        ({"distill": None, "distill_steps": (5, 2)}, "--distill-steps 5 2: goes with --distill"),
    ],
)
def test_bad_input_of_a_distillation_is_named(
    flags: dict[str, Any],
    message: str,
    digits_folder: Path,
    tmp_path: Path,
    distilled_network: Network,
    few_step_network: Network,
) -> None:
    flags = {"preset": "auto", "distill": SHIPPED, **flags}
    dpm = replace(distilled_network, sampler={"name": "dpm", "steps": 4})
    networks = {"distilled": distilled_network, "few": few_step_network, "dpm": dpm}
    if flags["distill"] in networks:
        save_network(path := tmp_path / f"{flags['distill']}.safetensors", networks[flags["distill"]])
        flags["distill"] = path
    with pytest.raises(BadInput, match=message):
        train(**{"data": digits_folder, "output": tmp_path / "run", **flags})
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the machine: compiled layers, precision


@pytest.mark.usefixtures("ungraded")
def test_compiled_layers_train_to_the_same_weights(
    tmp_path: Path,
    lesson: dict[str, Path],
    usual: tuple[dict[str, Tensor], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The compiler itself is left out; the layers that are written out for it are not."""
    asked: list[tuple[str, bool]] = []
    compiled: list[UNet] = []

    def should_compile(choice: str, machine: Any, worthwhile: bool) -> bool:
        asked.append((choice, worthwhile))
        return choice == "on"

    monkeypatch.setattr("P1_training.should_compile", should_compile)
    monkeypatch.setattr(UNet, "compile", lambda self: compiled.append(self))
    flags: dict[str, Any] = {"data": lesson["usual_data"], "init": lesson["usual_init"], "steps": 6}
    train(output=tmp_path, **flags, compile="on")
    assert asked == [("on", False)]  # six steps are not worth the minute
    assert len(compiled) == 1
    assert distance(weights(tmp_path), usual[0]) < ROUNDING


@pytest.mark.usefixtures("ungraded")
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_computes_in_it_and_trains_to_nearly_the_same_weights(
    precision: str,
    dtype: torch.dtype,
    tmp_path: Path,
    lesson: dict[str, Path],
    usual: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> None:
    types = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: types.add(output.dtype) if isinstance(module, torch.nn.Conv2d) else None
    )
    flags: dict[str, Any] = {"data": lesson["usual_data"], "init": lesson["usual_init"], "steps": 6}
    try:
        metrics = train(output=tmp_path, **flags, precision=precision)["metrics"]
    finally:
        hook.remove()
    assert types == {dtype}
    assert ("loss_scale" in metrics) == (precision == "fp16")
    assert distance(weights(tmp_path), usual[0]) < 0.2 * distance(load_file(lesson["usual_init"]), usual[0])


@pytest.mark.usefixtures("ungraded")
def test_checkpoints_and_reports_come_as_often_as_asked(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, shown = [], []
    save, show = vars(loop)["save_state"], TrainingLog.show

    def record_save(path: Path, content: dict[str, Any]) -> None:
        saved.append(content["step"])
        save(path, content)

    def record_show(self: TrainingLog, step: int, **values: float) -> None:
        shown.extend([step] if "loss" in values else [])
        show(self, step, **values)

    monkeypatch.setattr(loop, "save_state", record_save)
    monkeypatch.setattr(TrainingLog, "show", record_show)
    train(digits_folder, tmp_path / "saves", steps=7, save_every=3, log_every=0)
    assert sorted(set(saved)) == [3, 6, 7]
    saved.clear()
    shown.clear()
    train(digits_folder, tmp_path / "reports", steps=7, save_every=0, log_every=2)
    assert set(saved) == {7}
    assert sorted(set(shown)) == [2, 4, 6, 7]


# ---------------------------------------------------------------- gradings and the choice


def script_scores(monkeypatch: pytest.MonkeyPatch, *tables: dict[int, float]) -> list[dict[str, Any]]:
    """Let the weights of step k be graded as tables[n][k] at their n-th grading; return what was graded."""
    calls: list[dict[str, Any]] = []

    def score(self: Grading, network: Network, count: int, seed: int) -> tuple[dict[str, float], Tensor]:
        step = network.origin["step"]
        value = tables[sum(call["step"] == step for call in calls)][step]
        state = {name: tensor.clone() for name, tensor in network.unet.state_dict().items()}
        calls.append({"step": step, "count": count, "seed": seed, "state": state})
        return {"mnistm": value, "svhn": value, "accuracy": value}, torch.zeros(20, 3, 28, 28, dtype=torch.uint8)

    monkeypatch.setattr(Grading, "score", score)
    return calls


FIRST = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.6}
RATES: dict[str, Any] = {"steps": 8, "eval_every": 2, "eval_count": 2, "final_count": 3, "candidates": 3, "seed": 5}


def test_the_best_of_the_second_grading_becomes_the_result(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = script_scores(monkeypatch, FIRST, {4: 0.3, 6: 0.8, 8: 0.5})
    record = train(digits_folder, tmp_path, **RATES)
    assert [(call["step"], call["count"], call["seed"]) for call in calls] == [
        *((step, 2, 5) for step in (2, 4, 6, 8)),
        *((step, 3, 6) for step in (4, 6, 8)),  # the three best, with more and other images
    ]
    best = load_network(tmp_path / "best.safetensors", torch.device("cpu"))
    assert (best.origin["step"], best.origin["accuracy"], record["metrics"]["accuracy"]) == (6, 0.8, 0.8)
    state = best.unet.state_dict()
    assert all(torch.equal(value.half(), state[name].half()) for name, value in calls[2]["state"].items())


def test_until_then_the_best_so_far_is_the_result(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, shown = script_scores(monkeypatch, FIRST), {}

    def show(self: TrainingLog, step: int, **values: float) -> None:
        shown.update({step: values} if "accuracy" in values else {})

    monkeypatch.setattr(Grading, "choose_best", lambda self: {})
    monkeypatch.setattr(TrainingLog, "show", show)
    history = train(digits_folder, tmp_path, **RATES)["metrics"]["history"]
    assert [(entry["step"], entry["accuracy"]) for entry in history] == list(FIRST.items())
    assert shown == {step: dict.fromkeys(("mnistm", "svhn", "accuracy"), value) for step, value in FIRST.items()}
    assert load_network(tmp_path / "best.safetensors", torch.device("cpu")).origin["step"] == 4
    average = averaged(tmp_path)  # what is graded, not the weights themselves
    assert all(torch.equal(value, average[name]) for name, value in calls[3]["state"].items())
    assert distance(average, weights(tmp_path)) > EFFECT


class GreyReader(DigitClassifier):
    """A classifier that reads greys of 20 per digit, and above `largest` nothing but 0."""

    def __init__(self, largest: int):
        torch.nn.Module.__init__(self)
        self.largest = largest

    def read(self, images: Tensor) -> Tensor:
        digits = images[:, 0, 0, 0].long() // 20
        return digits.where(digits <= self.largest, 0)


def test_a_grading_draws_the_asked_images_and_names_each_domains_accuracy(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are grey; the sheet has a row per digit, MNIST-M left and SVHN right."""
    requested = []

    def images(self: DigitSampler, requests: Any, title: str) -> Tensor:
        requested.append((self.config, list(requests)))
        greys = torch.tensor([20 * request.digit + 5 * request.domain for request in requests])
        return (greys / 127.5 - 1)[:, None, None, None].expand(-1, 3, 28, 28)

    monkeypatch.setattr(DigitSampler, "images", images)
    monkeypatch.setattr("digits.classifier.shipped_classifiers", lambda _: [GreyReader(9), GreyReader(6)])
    metrics = train(digits_folder, tmp_path, steps=2, seed=4, final_count=2)["metrics"]
    assert {name: metrics[name] for name in ("mnistm", "svhn", "accuracy")} == pytest.approx(
        {"mnistm": 1.0, "svhn": 0.7, "accuracy": 0.85}
    )
    sampler = RECIPES["tiny"].sampler
    assert requested == [(sampler, graded_requests(4, 1)), (sampler, graded_requests(5, 2))]
    sheet = np.asarray(Image.open(tmp_path / "best.png"))[..., 0]
    centres = sheet[2 + 28 :: 58, 2 + 28 :: 58]  # of images of 56 pixels with gaps of 2
    assert centres.tolist() == [[20 * digit + 5 * domain for domain in (0, 0, 1, 1)] for digit in range(10)]


def test_named_classifiers_grade_in_the_place_of_the_shipped_ones(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files are stood in for by readers of greys."""
    counts: list[int] = []
    readers = {"a.safetensors": GreyReader(9), "b.safetensors": GreyReader(3)}
    for domain, (name, reader) in enumerate(readers.items()):
        vars(reader).update(spec=HOMEWORK, domain=domain)
        (tmp_path / name).touch()
    monkeypatch.setattr("digits.classifier.load_classifier", lambda path, device: readers[path.name])

    def images(self: DigitSampler, requests: Any, title: str) -> Tensor:
        counts.append(len(requests))
        greys = torch.tensor([20 * request.digit for request in requests])
        return (greys / 127.5 - 1)[:, None, None, None].expand(-1, 3, 28, 28)

    monkeypatch.setattr(DigitSampler, "images", images)
    files = tuple(str(tmp_path / name) for name in readers)
    metrics = train(digits_folder, tmp_path / "run", steps=1, classifiers=files, final_count=12)["metrics"]
    assert counts == [20, 240]
    assert (metrics["mnistm"], metrics["svhn"]) == pytest.approx((1.0, 0.4))
    origin = load_network(tmp_path / "run" / "best.safetensors", torch.device("cpu")).origin
    assert "classifiers" not in origin["settings"]  # no path of this machine
    (tmp_path / "a.safetensors").write_text("another")
    with pytest.raises(BadInput, match="was trained with classifiers"):
        train(digits_folder, tmp_path / "run", steps=2, classifiers=files)


def test_without_classifiers_the_least_validation_loss_chooses(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end the candidates are measured again, with more images and another seed."""
    tables = iter([{2: 0.9, 4: 0.3, 6: 0.5, 8: 0.7}, {4: 0.6, 6: 0.2, 8: 0.4}])
    calls: list[tuple[int, int, int]] = []
    table = next(tables)

    def loss(network: Network, count: int, seed: int, data: Any, weight: Any, teacher: Any) -> float:
        nonlocal table
        table = table if count == 2 else next(tables, table)
        calls.append((network.origin["step"], count, seed))
        return table[network.origin["step"]]

    monkeypatch.setattr("P1_training.validation_loss", loss)
    record = train(digits_folder, tmp_path, **RATES, classifiers=("none",))
    assert sorted(calls) == sorted([(step, 2, 5) for step in (2, 4, 6, 8)] + [(step, 3, 6) for step in (4, 6, 8)])
    assert [entry["val_loss"] for entry in record["metrics"]["history"]] == [0.9, 0.3, 0.5, 0.7]
    assert record["metrics"]["val_loss"] == 0.2
    assert load_network(tmp_path / "best.safetensors", torch.device("cpu")).origin["step"] == 6


def test_the_validation_loss_of_a_step_distillation_is_the_trainings_loss_with_all_labels(
    lesson: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more images than a batch of it holds."""
    source = load_network(lesson["usual_init"], torch.device("cpu"))
    pairs: list[tuple[float, float]] = []

    def compare(network: Network, count: int, seed: int, data: Any, weight: Any, teacher: Any) -> float:
        total, errors = 20 * count, 0.0
        for start in range(0, total, 50):
            size, unet = min(50, total - start), network.unet
            stream = torch.Generator().manual_seed(derived_seed(seed, start))
            group, member, offset = (torch.rand(size, generator=stream) for _ in range(3))
            rows = BalancedIndex(data, 0.5, True)(group, member)
            t = ((torch.arange(size) + offset) / size * 1000).long()
            eps, scale = torch.randn(size, 3, 28, 28, generator=stream), 1 + 6 * torch.rand(size, generator=stream)
            noise = torch.randn(size, 3, 28, 28, generator=stream)
            alpha_bar = source.schedule.alpha_bar[t].float()[:, None, None, None]
            x = alpha_bar.sqrt() * (data.images[rows] / 127.5 - 1) + (1 - alpha_bar).sqrt() * eps
            labels = data.digits[rows], data.domains[rows]
            cond, uncond = source.unet(x, t, *labels), source.unet(x, t, torch.full_like(rows, 10), labels[1])
            guided = uncond + scale[:, None, None, None] * (cond - uncond)
            error = (unet(x, t, *labels, scale) - guided).square().mean()
            errors += size * float(error + plain_step_loss(unet, source, noise, *labels, scale, (6, 3)))
        pairs.append((validation_loss(network, count, seed, data, weight, teacher), errors / total))
        return pairs[-1][0]

    monkeypatch.setattr("P1_training.validation_loss", compare)
    flags = {"preset": "auto", "distill": lesson["usual_init"], "distill_steps": (6, 3), "classifiers": ("none",)}
    train(lesson["usual_data"], tmp_path / "run", steps=2, final_count=3, **flags)
    assert [value for value, _ in pairs] == pytest.approx([expected for _, expected in pairs], rel=1e-3)


def test_the_sheet_shows_at_most_ten_images_per_digit() -> None:
    images = torch.arange(2 * 10 * 12)[:, None, None, None].expand(-1, 3, 28, 28).to(torch.uint8)
    centres = digit_sheet(images)[0, 2 + 28 :: 58, 2 + 28 :: 58]
    assert centres[0].tolist() == [*range(10), *range(120, 130)]
    assert centres[9].tolist() == [*range(108, 118), *range(228, 238)]


def test_the_curves_go_to_a_tracker_and_the_weights_file_stays(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        without("wandb", patch)
        with pytest.raises(BadInput, match="--track wandb: .* pip install wandb"):
            train(digits_folder, tmp_path / "run", track="wandb")
    assert not (tmp_path / "run").exists()
    tracker = stand_in(tmp_path, monkeypatch)
    train(digits_folder, tmp_path / "run", track="wandb")
    train(digits_folder, tmp_path / "other" / "run")
    options, logged = tracker.calls[0][1], [call for call in tracker.calls if call[0] == "log"]
    assert (options["project"], options["name"], options["config"]["track"]) == ("P1 training", "run", "wandb")
    assert [step for _, step, values in logged if "loss" in values] == [5, 10]
    assert [step for _, step, values in logged if "accuracy" in values] == [10]
    assert [call[0] for call in tracker.calls].count("init") == 1
    best = [(tmp_path / name / "best.safetensors").read_bytes() for name in ("run", "other/run")]
    assert best[0] == best[1]


HELD_BY = {
    "distill": test_a_distillation_does_what_a_plain_loop_does,
    "max_guidance": test_a_distillation_does_what_a_plain_loop_does,
    "distill_steps": test_a_distillation_does_what_a_plain_loop_does,
    "output": test_the_loss_falls_and_the_run_folder_is_complete,
    "device": test_bad_input_is_named,
    "precision": test_half_precision_computes_in_it_and_trains_to_nearly_the_same_weights,
    "compile": test_compiled_layers_train_to_the_same_weights,
    "classifiers": test_named_classifiers_grade_in_the_place_of_the_shipped_ones,
    "eval_every": test_the_best_of_the_second_grading_becomes_the_result,
    "eval_count": test_the_best_of_the_second_grading_becomes_the_result,
    "candidates": test_the_best_of_the_second_grading_becomes_the_result,
    "final_count": test_the_best_of_the_second_grading_becomes_the_result,
    "save_every": test_checkpoints_and_reports_come_as_often_as_asked,
    "log_every": test_checkpoints_and_reports_come_as_often_as_asked,
    "track": test_the_curves_go_to_a_tracker_and_the_weights_file_stays,
    "resume": test_a_restart_deletes_the_candidates_of_the_earlier_run,
}


def test_the_effect_of_every_flag_is_tested() -> None:
    assert {*DECIDES_WEIGHTS, *HELD_BY} == {field.name for field in fields(Settings)}
