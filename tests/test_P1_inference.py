"""hw2_1.sh and P1_inference.py as a grader and a user run them, with the shipped checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from digits.classifier import SHIPPED, grade_folder, misclassified, shipped_classifiers
from digits.sampling import DigitSampler
from P1_inference import Settings, main
from P1_model import Network, load_network, save_network
from runtime.cli import BadInput
from runtime.files import ROOT, load_safetensors, save_safetensors
from runtime.seeds import derived_seed

SHELL = str(ROOT / "hw2_1.sh")


def draw(output: Path, **more: Any) -> dict[str, Any]:
    """Sample a few images in few steps by the script's main; return its record."""
    record = output.parent / "record.json"
    main(Settings(**{"output": output, "steps": 2, "count": 2, "retries": 0, "record": record, **more}))
    values: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    return values


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) for p in folder.rglob("*.png")}


def test_the_defaults_are_the_graders_thousand_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 files, exact names, 28x28 RGB; the drawing, whose labels and guidance others hold, is left out."""
    monkeypatch.setattr(DigitSampler, "images", lambda self, requests, title: torch.zeros(len(requests), 3, 28, 28))
    main(Settings(output=tmp_path / "out", retries=0, record=tmp_path / "record.json"))
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    expected = {f"{d}/{digit}_{n:03d}.png" for d in ("mnistm", "svhn") for digit in range(10) for n in range(1, 51)}
    assert files == expected
    for name in files:
        with Image.open(tmp_path / "out" / name) as image:
            assert (image.size, image.mode, image.format) == ((28, 28), "RGB", "PNG")


@pytest.mark.slow
def test_the_grading_script_runs_from_any_folder(tmp_path: Path) -> None:
    """A relative output, here with a space and a trailing slash, lies in the caller's folder. Two of 1,000 images are drawn."""
    root, caller = tmp_path / "the repository", tmp_path / "some where"
    for folder in (root / "bin", caller):
        folder.mkdir(parents=True)
    shutil.copy(SHELL, root)
    few = "--count 1 --digits 4 --steps 2 --retries 0 --record record.json"
    run = f'exec "{sys.executable}" "{ROOT}/$(basename "$script")" "$@" {few}'
    (root / "bin" / "python").write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nscript="$1"; shift\n{run}\n')
    (root / "bin" / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(root / "hw2_1.sh"), "my out/"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=caller, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(pixels(caller / "my out")) == {"mnistm/4_001.png", "svhn/4_001.png"}


def test_the_shipped_digits_are_read_as_their_labels(tmp_path: Path) -> None:
    """With the checkpoint's own sampler: exchanged labels or halves of the guidance are misread nearly always."""
    draw(tmp_path / "out", steps=None, count=1)
    assert grade_folder(tmp_path / "out", shipped_classifiers(torch.device("cpu")))["mean"] >= 0.9


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / name, digits=("4", "7"))
    left, right = ({p.name: p.read_bytes() for p in (tmp_path / n / "svhn").iterdir()} for n in ("a", "b"))
    assert left == right
    assert set(left) == {"4_001.png", "4_002.png", "7_001.png", "7_002.png"}


@pytest.mark.parametrize("sampler", [{"sampler": "dpm"}, {"sampler": "ddim", "eta": 1.0}])
def test_another_batch_changes_no_image_by_more_than_one_grey_level(sampler: dict[str, Any], tmp_path: Path) -> None:
    for batch in (3, 8):
        draw(tmp_path / str(batch), digits=("2", "5", "8"), batch=batch, **sampler)
    left, right = pixels(tmp_path / "3"), pixels(tmp_path / "8")
    assert left.keys() == right.keys()
    assert max(abs(left[name] - right[name]).max() for name in left) <= 1


def test_a_part_of_the_job_gives_the_same_images_as_the_whole(tmp_path: Path) -> None:
    draw(tmp_path / "all", digits=("0", "1", "2"))
    draw(tmp_path / "part", digits=("2",), domains=("svhn",))
    whole, part = pixels(tmp_path / "all"), pixels(tmp_path / "part")
    assert set(part) == {"svhn/2_001.png", "svhn/2_002.png"}
    assert max(abs(whole[name] - part[name]).max() for name in part) <= 1


def test_a_digit_and_a_domain_given_twice_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "out", digits=("3", "3"), domains=("svhn", "svhn"))
    assert len(pixels(tmp_path / "out")) == 2
    assert "2 pictures in" in capsys.readouterr().out


def test_another_seed_gives_other_images(tmp_path: Path) -> None:
    for seed in (0, 1):
        draw(tmp_path / str(seed), digits=("3",), seed=seed)
    left, right = pixels(tmp_path / "0"), pixels(tmp_path / "1")
    assert all(abs(left[name] - right[name]).mean() > 5 for name in left)


def test_retries_replace_misread_images_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps of DPM-Solver++ give poor images: some are misread, and only those may change."""
    more: dict[str, Any] = {"sampler": "dpm", "steps": 2, "count": 3, "batch": 30}
    draw(tmp_path / "plain", **more)
    capsys.readouterr()
    misread = draw(tmp_path / "again", **more, retries=4)["metrics"]["misread"]
    plain, again = pixels(tmp_path / "plain"), pixels(tmp_path / "again")
    images = torch.from_numpy(np.stack(list(plain.values()))).permute(0, 3, 1, 2).to(torch.uint8)
    digits = torch.tensor([int(Path(name).name[0]) for name in plain])
    domains = torch.tensor([int(name.startswith("svhn")) for name in plain])
    rows = misclassified(shipped_classifiers(torch.device("cpu")), images, digits, domains).tolist()
    assert {n for n in plain if (plain[n] != again[n]).any()} == {list(plain)[row] for row in rows}
    assert sum(misread["first_try"].values()) == len(rows)
    graded = grade_folder(tmp_path / "again", shipped_classifiers(torch.device("cpu")))
    left = {name: round((1 - graded[name]["accuracy"]) * 30) for name in ("mnistm", "svhn")}
    assert misread["after_retries"] == left
    assert sum(left.values()) < len(rows)
    printed = capsys.readouterr().out
    assert f"first try, by the shipped classifiers: {len(rows)} of 60 misread" in printed
    assert printed.index("first try") < printed.index("after retries") < printed.index("60 pictures in")
    assert "selected by these classifiers" in printed


@pytest.mark.parametrize("retries", [0, 1])
def test_named_classifiers_decide_what_is_drawn_again_and_none_do_with_none(
    retries: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are the shipped ones with their answers turned by one digit, which misread every good image."""
    files = []
    for domain, name in enumerate(("mnistm", "svhn")):
        tensors, metadata = load_safetensors(SHIPPED / f"judge_{name}.safetensors")
        head = f"network.{len(shipped_classifiers(torch.device('cpu'))[domain].network) - 1}."
        turned = {key: value.roll(1, 0) if key.startswith(head) else value for key, value in tensors.items()}
        save_safetensors(tmp_path / f"{name}.safetensors", turned, metadata)
        files.append(str(tmp_path / f"{name}.safetensors"))
    more: dict[str, Any] = {"sampler": "dpm", "steps": 6, "digits": ("1", "4"), "count": 1, "retries": retries}
    turned_ones = draw(tmp_path / "turned", classifiers=tuple(files), **more)["metrics"]["misread"]
    assert (sum(turned_ones["first_try"].values()) if retries else turned_ones) == (4 if retries else None)
    shown = "first try, by --classifiers: 4 of 4 misread" in capsys.readouterr().out
    assert shown == bool(retries)
    assert draw(tmp_path / "none", classifiers=("none",), **more)["metrics"]["misread"] is None
    assert ("no picture is redrawn" in capsys.readouterr().err) == bool(retries)


# ---------------------------------------------------------------- every flag, against a plain loop


@pytest.fixture
def models(
    tiny_network: Network, distilled_network: Network, few_step_network: Network, tmp_path: Path
) -> dict[str, Path]:
    """Write two small checkpoints of T = 20 with a sampler of their own, a distilled one, and one of few steps."""
    paths = {"distilled": tmp_path / "distilled.safetensors", "few": tmp_path / "few.safetensors"}
    save_network(paths["few"], few_step_network)
    sampler = {"name": "ddim", "steps": 5, "guidance": 2.0, "rule": "ddim"}
    save_network(paths["distilled"], replace(distilled_network, sampler=sampler))
    for name, factor in {"usual": 1.0, "other": -1.0}.items():
        network = replace(tiny_network, sampler=sampler)
        for parameter in network.unet.last.parameters():
            parameter.mul_(factor)
        save_network(paths.setdefault(name, tmp_path / f"{name}.safetensors"), network)
    return paths


def plain_digit(name: str, **flags: Any) -> np.ndarray:
    """Return the picture of a file such as svhn/3_001.png, by a plain loop over one image alone."""
    values = vars(Settings(Path())) | {"sampler": "ddim", "steps": 5, "guidance": 2.0, "rule": "ddim", "eta": 0.0}
    values |= {"interval": (0.0, 1.0), "guidance_rescale": 0.0, **flags}
    network = load_network(values["model"], torch.device("cpu"))
    alpha_bars, total = network.schedule.alpha_bar.tolist(), 20
    domain, digit, index = int(name.startswith("svhn")), int(name.split("/")[1][0]), int(name[-7:-4]) - 1
    stream = torch.Generator().manual_seed(derived_seed(values["seed"], domain, digit, index))
    x = torch.randn(1, 3, 28, 28, generator=stream)

    def network_output(x: Tensor, t: int) -> Tensor:
        labels = [torch.tensor([n]) for n in (digit, 10, domain)]
        low, high = values["interval"]
        inside = low <= t / total < high
        if network.unet.config.max_guidance:
            scale = torch.tensor([values["guidance"] if inside else 1.0])
            with torch.inference_mode():
                few = torch.tensor([float(values["steps"])]) if values["sampler"] == "distilled" else None
                return cast(Tensor, network.unet(x, torch.tensor([t]), labels[0], labels[2], scale, few))
        with torch.inference_mode():
            cond, uncond = (cast(Tensor, network.unet(x, torch.tensor([t]), label, labels[2])) for label in labels[:2])
        if not inside:
            return cond
        out = uncond + values["guidance"] * (cond - uncond)
        weight = values["guidance_rescale"]
        return cast(Tensor, out * (weight * cond.std() / out.std() + 1 - weight))

    steps, rule = values["steps"], values["rule"]
    visited = [k * (total // steps) + (rule == "homework") for k in reversed(range(steps))]
    if values["sampler"] == "ddpm":
        visited = [*reversed(range(total))]
    elif values["sampler"] == "distilled":
        visited = [t + total // steps - 1 for t in visited]
    elif values["sampler"] == "dpm":
        betas = network.schedule.betas.tolist()
        solver = DPMSolverMultistepScheduler(
            20,
            trained_betas=betas,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            final_sigmas_type="zero",
        )
        solver.set_timesteps(steps)
        for step in solver.timesteps.tolist():
            x = solver.step(network_output(x, step), step, x).prev_sample
        visited = []
    for t, t_prev in zip(visited, [*visited[1:], -1][: len(visited)], strict=True):
        now = alpha_bars[t]
        before = alpha_bars[t_prev] if t_prev >= 0 else alpha_bars[0] if rule == "homework" else 1.0
        output = network_output(x, t)
        x0, eps = now**0.5 * x - (1 - now) ** 0.5 * output, (1 - now) ** 0.5 * x + now**0.5 * output
        clamped = values["sampler"] == "ddpm" or (values["sampler"] == "ddim" and rule != "ddim")
        x0 = x0.clamp(-1, 1) if clamped else x0
        variance = (1 - before) / (1 - now) * (1 - now / before)
        if values["sampler"] == "ddpm":
            mean = before**0.5 * (1 - now / before) * x0 + (now / before) ** 0.5 * (1 - before) * x
            x = mean / (1 - now) + (variance**0.5 * torch.randn(3, 28, 28, generator=stream) if t else 0)
            continue
        sigma = values["eta"] * variance**0.5
        fresh = torch.randn(3, 28, 28, generator=stream) if sigma else 0
        x = before**0.5 * x0 + max(0, 1 - before - sigma**2) ** 0.5 * eps + sigma * fresh
    return (x.clamp(-1, 1) * 127.5 + 127.5).round()[0].permute(1, 2, 0).numpy().astype(int)


# flag: (flags that are given as well, its value)
DECIDES_PICTURES: dict[str, tuple[dict[str, Any], Any]] = {
    "model": ({}, "other"), "count": ({}, 3), "digits": ({}, ("7", "0")), "domains": ({}, ("svhn",)), "sampler": ({}, "ddpm"),
    "steps": ({}, 4), "guidance": ({}, -1.0), "interval": ({}, (0.3, 0.6)), "guidance_rescale": ({}, 0.7),
    "eta": ({}, 0.8), "rule": ({}, "homework"), "seed": ({}, 6),
}  # fmt: skip
CASES = [(flag, *case) for flag, case in DECIDES_PICTURES.items()] + [
    ("sampler", {"steps": 4}, "dpm"),
    ("guidance", {"sampler": "dpm"}, 4.0),
    ("guidance", {"sampler": "ddpm"}, 4.0),
    ("guidance", {"model": "distilled"}, 4.0),
    ("interval", {"model": "distilled"}, (0.3, 0.6)),
    ("sampler", {"model": "few", "steps": 4}, "distilled"),
    ("steps", {"model": "few", "sampler": "distilled"}, 2),
    ("guidance", {"model": "few", "sampler": "distilled", "steps": 4}, 4.0),
]


@pytest.mark.parametrize(("flag", "others", "value"), CASES)
def test_every_flag_that_decides_the_pictures_does_what_a_plain_loop_does_with_it(
    flag: str, others: dict[str, Any], value: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    usual: dict[str, Any] = {"model": "usual", "count": 1, "digits": ("3",), **others}
    usual, changed = (flags | {"model": models[flags["model"]]} for flags in (usual, usual | {flag: value}))
    draw(tmp_path / "out", **({"steps": None, "precision": "fp32"} | changed))
    pictures = pixels(tmp_path / "out")
    assert set(pictures) == {
        f"{domain}/{digit}_{index:03d}.png"
        for domain in changed.get("domains", ("mnistm", "svhn"))
        for digit in changed["digits"]
        for index in range(1, changed["count"] + 1)
    }
    for name, picture in pictures.items():
        assert np.abs(picture - plain_digit(name, **changed)).max() <= 1
    if flag not in ("count", "digits", "domains"):
        name = "svhn/3_001.png"
        assert np.abs(pictures[name] - plain_digit(name, **usual)).max() > 5


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_gives_nearly_the_same_pictures(
    precision: str, dtype: torch.dtype, models: dict[str, Path], tmp_path: Path
) -> None:
    types = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: types.add(output.dtype) if isinstance(module, torch.nn.Conv2d) else None
    )
    try:
        draw(tmp_path / "out", model=models["usual"], digits=("3",), steps=None, precision=precision)
    finally:
        hook.remove()
    assert types == {dtype}
    for name, picture in pixels(tmp_path / "out").items():
        assert np.abs(picture - plain_digit(name, model=models["usual"])).mean() < 5


def test_the_grid_has_a_row_per_domain_and_digit(models: dict[str, Path], tmp_path: Path) -> None:
    flags: dict[str, Any] = {"model": models["usual"], "digits": ("8", "3"), "count": 3, "batch": 4}
    draw(tmp_path / "out", **flags, grid=tmp_path / "grid.png")
    pictures, grid = pixels(tmp_path / "out"), np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    for row, label in enumerate(("mnistm/8", "mnistm/3", "svhn/8", "svhn/3")):
        for column in range(3):
            top, left = 2 + 58 * row, 2 + 58 * column  # images of 56 pixels with gaps of 2
            shown = grid[top : top + 56 : 2, left : left + 56 : 2]
            assert np.array_equal(shown, pictures[f"{label}_{column + 1:03d}.png"])


def test_files_of_the_same_name_are_replaced_and_foreign_ones_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "mnistm"
    folder.mkdir(parents=True)
    (folder / "6_001.png").write_text("old")
    (folder / "mine.txt").write_text("keep me")
    draw(tmp_path / "out", digits=("6",))
    assert Image.open(folder / "6_001.png").size == (28, 28)
    assert (folder / "mine.txt").read_text() == "keep me"
    assert "mine.txt" in capsys.readouterr().err


def test_the_record_and_the_grid_lie_outside_the_graded_folder(tmp_path: Path) -> None:
    record = draw(tmp_path / "out", digits=("1",), grid=tmp_path / "grid.png")
    assert not list((tmp_path / "out").rglob("*.json"))
    assert record["metrics"]["pictures"] == 4
    assert record["seed"] == 0
    assert Image.open(tmp_path / "grid.png").width > 2 * 28


def test_a_dry_run_checks_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "out", dry_run=True)
    assert "would take about" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "batch"),
    [({}, 100), ({"batch": 7}, 7), ({"digits": ("3",), "domains": ("svhn",)}, 50), ({"count": 1}, 20)],
)
def test_a_dry_run_times_the_batches_of_the_run_and_counts_4_kib_a_file(
    flags: dict[str, Any], batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU 100 images at once, fewer if there are fewer."""
    timed: list[tuple[int, int]] = []
    needed: list[int] = []

    def expected(sampler: DigitSampler, count: int) -> float:
        timed.append((sampler.batch, count))
        return 1.0

    def free_space(folder: Path, size: int) -> int:
        needed.append(size)
        return 1

    monkeypatch.setattr(DigitSampler, "expected_seconds", expected)
    monkeypatch.setattr("P1_inference.check_disk_space", free_space)
    settings = Settings(output=tmp_path / "out", dry_run=True, device="cpu", **flags)
    main(settings)
    images = settings.count * len(settings.digits or range(10)) * len(settings.domains or range(2))
    assert timed == [(batch, images)]
    assert needed == [4096 * images]


def test_the_grid_takes_the_place_of_no_picture(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--grid .* is the name of one of the pictures"):
        draw(tmp_path / "out", digits=("3",), domains=("svhn",), grid=tmp_path / "out" / "svhn" / "3_001.png")
    assert not (tmp_path / "out").exists()


def test_a_batch_larger_than_the_job_costs_no_memory(tmp_path: Path) -> None:
    draw(tmp_path / "out", count=1, digits=("3",), domains=("svhn",), retries=0, batch=10**12)
    assert (tmp_path / "out" / "svhn" / "3_001.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"count": 0}, "--count 0"),
        ({"count": 1000}, "--count 1000"),
        ({"digits": ("11",)}, "--digits 11"),
        ({"steps": 0}, "--steps"),
        ({"sampler": "ddim", "eta": 2.0}, "--eta 2"),
        ({"sampler": "dpm", "eta": 0.5}, "--eta has no effect on --sampler dpm"),
        ({"sampler": "ddpm", "steps": 5}, "--steps has no effect on --sampler ddpm"),
        ({"batch": -5}, "--batch -5"),
        ({"retries": -1}, "--retries -1"),
        ({"digits": ()}, "--digits names none"),
        ({"domains": ()}, "--domains names none"),
        ({"guidance": math.nan}, "--guidance nan"),
        ({"interval": (0.9, 0.1)}, "--interval 0.9 0.1"),
        ({"guidance_rescale": 1.5}, "--guidance-rescale 1.5"),
        ({"grid": ROOT}, "--grid .* is a folder"),
        ({"grid": ROOT / "pyproject.toml"}, "--grid .*pyproject.toml is another file that would be lost"),
        ({"record": Path(__file__) / "record.json"}, "--record .* is a file, name a folder"),
        ({"model": Path("nowhere.safetensors")}, "nowhere.safetensors does not exist"),
        ({"model": Path(__file__)}, "is a text, not a file of tensors"),
        ({"device": "cuda:99"}, "--device cuda:99"),
    ],
)
def test_bad_input_is_named_and_nothing_written(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        draw(tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"guidance": 5.5}, "--guidance 5.5: this checkpoint is distilled, it takes scales from 1 to 5.0"),
        ({"guidance": 0.0}, "--guidance 0.0: this checkpoint is distilled"),
        ({"guidance_rescale": 0.5}, "--guidance-rescale 0.5: this checkpoint is distilled"),
    ],
)
def test_a_guidance_that_a_distilled_checkpoint_does_not_take_is_named_and_nothing_written(
    flags: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        draw(tmp_path / "out", model=models["distilled"], **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("few", {"steps": 5}, "--steps 5: this checkpoint is distilled to 4 or 2 steps: --sampler dpm takes others"),
        ("distilled", {"sampler": "distilled"}, "--sampler distilled: this checkpoint is not distilled to a few steps"),
        ("few", {"eta": 0.5}, "--eta has no effect on --sampler distilled: it goes with ddim"),
    ],
)
def test_steps_that_a_checkpoint_is_not_distilled_to_are_named_and_nothing_written(
    model: str, flags: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        draw(tmp_path / "out", model=models[model], **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_output_that_is_a_file_is_refused_and_kept(dry_run: bool, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(BadInput, match="a file is in the way"):
        draw(tmp_path / "out", dry_run=dry_run)
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("arguments", [[], ["a", "b", "c"], [""], ["a", ""]])
def test_the_grading_script_takes_one_folder_and_perhaps_a_checkpoint(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", SHELL, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.parametrize(("more", "flags"), [([], []), (["my own.safetensors"], ["--model=my own.safetensors"])])
def test_the_grading_script_passes_on_a_checkpoint(
    more: list[str], flags: list[str], shell: Callable[..., Any]
) -> None:
    expected = ["{root}/P1_inference.py", "--output=o", *flags]
    assert shell("hw2_1.sh", "o", *more) == (0, expected, "")


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., tuple[int, list[str], str]]:
    """`shell(script, *arguments, pythons="python", torch=True)` runs a copy with stand-ins for Python that print their arguments."""

    def run(script: str, *arguments: str, pythons: str = "python", torch: bool = True) -> tuple[int, list[str], str]:
        root = tmp_path / "the repository"
        (root / "bin").mkdir(parents=True)
        shutil.copy(ROOT / script, root)
        for tool in ("dirname", "bash"):
            (root / "bin" / tool).symlink_to(shutil.which(tool) or "")
        for name in pythons.split():
            python = root / name if "/" in name else root / "bin" / name
            python.parent.mkdir(parents=True, exist_ok=True)
            python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {int(not torch)}\nprintf "%s\\n" "$@"\n')
            python.chmod(0o755)
        environment = {"PATH": str(root / "bin"), "CDPATH": f".:{tmp_path}"}
        done = subprocess.run(
            ["bash", script, *arguments], capture_output=True, text=True, cwd=root, env=os.environ | environment
        )
        lines = [line.replace(str(root), "{root}") for line in done.stdout.splitlines()]
        return done.returncode, lines, done.stderr.replace(str(root), "{root}")

    return run


ARGUMENTS = {"hw2_1.sh": ["o"], "hw2_2.sh": ["n", "o", "u"], "hw2_3.sh": ["i", "o", "m"]}


@pytest.mark.parametrize("script", ARGUMENTS)
@pytest.mark.parametrize("pythons", ["python", "python3", "python python3"])
def test_without_a_venv_the_python_on_the_path_is_used(script: str, pythons: str, shell: Callable[..., Any]) -> None:
    """CDPATH is set in the caller's shell, which makes `cd` print and look elsewhere."""
    code, lines, errors = shell(script, *ARGUMENTS[script], pythons=pythons)
    assert (code, errors) == (0, "")
    assert lines[0] in ("{root}/P1_inference.py", "{root}/P2_ddim.py", "{root}/P3_inference.py")
    assert len(lines) == 1 + len(ARGUMENTS[script])


@pytest.mark.parametrize("script", ARGUMENTS)
@pytest.mark.parametrize("python", [".venv/bin/python", ".venv/Scripts/python.exe"])
def test_the_venv_is_used_where_each_system_puts_its_python(
    script: str, python: str, shell: Callable[..., Any]
) -> None:
    code, lines, errors = shell(script, *ARGUMENTS[script], pythons=python)
    assert (code, len(lines), errors) == (0, 1 + len(ARGUMENTS[script]), "")


@pytest.mark.parametrize("script", ARGUMENTS)
@pytest.mark.parametrize("pythons", ["python", ""])
def test_without_torch_the_way_to_get_it_is_named(script: str, pythons: str, shell: Callable[..., Any]) -> None:
    code, lines, errors = shell(script, *ARGUMENTS[script], pythons=pythons, torch=False)
    assert (code, lines, len(errors.splitlines())) == (2, [], 1)
    assert "run make setup in {root}" in errors


@pytest.mark.parametrize("script", ARGUMENTS)
def test_the_grading_scripts_can_be_run_by_name(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


HELD_BY = {
    "output": test_files_of_the_same_name_are_replaced_and_foreign_ones_stay,
    "retries": test_retries_replace_misread_images_and_no_others,
    "classifiers": test_named_classifiers_decide_what_is_drawn_again_and_none_do_with_none,
    "batch": test_another_batch_changes_no_image_by_more_than_one_grey_level,
    "device": test_bad_input_is_named_and_nothing_written,
    "precision": test_half_precision_gives_nearly_the_same_pictures,
    "grid": test_the_grid_has_a_row_per_domain_and_digit,
    "record": test_the_record_and_the_grid_lie_outside_the_graded_folder,
    "dry_run": test_a_dry_run_checks_and_writes_nothing,
}


def test_the_effect_of_every_flag_is_tested() -> None:
    assert {*DECIDES_PICTURES, *HELD_BY} == {field.name for field in fields(Settings)}
