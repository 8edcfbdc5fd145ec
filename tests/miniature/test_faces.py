"""The face model: pictures are read safely and cut within their borders, training can be stopped and resumed, P2 draws from the result."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from first_step import first_loss
from PIL import Image
from safetensors.torch import load_file

import miniature.train_faces as train_faces
import P2_ddim
from diffusion.schedule import linear
from faces.models import load_model
from miniature.faces import SIDE, STORED, central_crops, crop, held_out_people, load_faces, random_crops, training_crops
from miniature.faces_model import make_network, save_folder
from miniature.train_faces import GradeFaces, TrainFaces, figures, main, nearest, people_to_hold_out
from runtime.cli import BadInput
from runtime.images import to_float
from training.draws import Draws
from training.log import TrainingLog

CPU = torch.device("cpu")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def write_people(folder: Path, people: int = 4, each: int = 2) -> Path:
    """Smooth grey pictures of 46x56, ten times as different between people as within one."""
    random = np.random.default_rng(0)
    for person in range(people):
        (folder / f"s{person}").mkdir(parents=True)
        for index in range(each):
            own = np.random.default_rng(person).integers(30, 220, (7, 6)) + random.integers(-10, 10, (7, 6))
            picture = Image.fromarray(own.astype(np.uint8)).resize((46, 56), Image.Resampling.BICUBIC)
            picture.save(folder / f"s{person}" / f"{index}.pgm")
    return folder


@pytest.fixture
def people(tmp_path: Path) -> Path:
    return write_people(tmp_path / "people")


@pytest.fixture
def archive(people: Path) -> Path:
    (people / "README").write_text("no picture")
    path = people.parent / "people.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(people, "some_faces")
    return path


def small(faces: Path, folder: Path, **more: Any) -> TrainFaces:
    values: dict[str, Any] = {
        "steps": 4,
        "batch": 2,
        "save_every": 2,
        "channels": (8, 8, 8, 8),
        "held_out": 1,
        "draw_every": 0,
    }
    return TrainFaces(**{**values, "faces": faces, "run": folder / "run", "output": folder / "model", **more})


# ---------------------------------------------------------------- pictures


def test_a_folder_and_its_archive_are_the_same_faces(people: Path, archive: Path) -> None:
    folder, packed = load_faces(people), load_faces(archive)
    assert folder.images.shape == (8, 3, STORED, STORED)
    assert folder.images.dtype == torch.uint8
    assert folder.people == packed.people == ["s0", "s0", "s1", "s1", "s2", "s2", "s3", "s3"]
    assert (folder.images == packed.images).all()


def test_the_middle_of_a_high_picture_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((112, 92), np.uint8)
    pixels[10:102] = 200  # the central square
    Image.fromarray(pixels).save(tmp_path / "face.png")
    assert (load_faces(tmp_path).images == 200).all()


def test_without_subfolders_each_picture_is_a_person(people: Path) -> None:
    assert load_faces(people / "s1").people == ["0.pgm", "1.pgm"]


def test_an_archive_writes_nothing_outside(tmp_path: Path) -> None:
    inside = io.BytesIO()
    Image.new("L", (8, 8)).save(inside, "PNG")
    with tarfile.open(tmp_path / "evil.tar", "w") as file:
        member = tarfile.TarInfo("../../escaped.png")
        member.size = len(inside.getvalue())
        file.addfile(member, io.BytesIO(inside.getvalue()))
    with pytest.raises(BadInput, match="evil.tar"):
        load_faces(tmp_path / "evil.tar")


def test_held_out_people_are_not_trained_on(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.Tensor] = []

    def crops(images: torch.Tensor, draws: Draws) -> torch.Tensor:
        used.append(images)
        return random_crops(images, draws)

    monkeypatch.setattr(train_faces, "random_crops", crops)
    main(small(people, tmp_path, held_out=2, steps=1))
    held_out = json.loads((tmp_path / "model" / "training.json").read_text())["held_out"]
    assert len(held_out) == 2
    faces, trained = load_faces(people), {image.numpy().tobytes() for image in used[0]}
    for image, person in zip(faces.images, faces.people, strict=True):
        assert (image.numpy().tobytes() in trained) == (person not in held_out)


def test_who_is_held_out_follows_from_the_seed(people: Path) -> None:
    faces = load_faces(people)
    chosen = [tuple(held_out_people(faces, 2, seed)) for seed in range(10)]
    assert chosen == [tuple(held_out_people(faces, 2, seed)) for seed in range(10)]
    assert len(set(chosen)) > 1


# ---------------------------------------------------------------- cuts


def test_a_cut_shows_the_part_it_names() -> None:
    x = torch.linspace(0, 1, STORED).expand(1, 3, STORED, STORED)  # rises to the right
    one, still = torch.ones(1), torch.zeros(1)
    whole = crop(x, one, still, still, still > 0)
    assert whole.shape == (1, 3, SIDE, SIDE)
    assert torch.allclose(crop(x, one, still, still, still == 0), whole.flip(3), atol=1e-5)
    left, right = (crop(x, 0.9 * one, side * one, still, still > 0) for side in (-1, 1))
    assert torch.allclose(left[..., 0], whole[..., 0], atol=0.01)
    assert torch.allclose(right[..., -1], whole[..., -1], atol=0.01)
    assert right.mean() - left.mean() == pytest.approx(0.1, abs=0.005)


def test_random_cuts_never_leave_the_photograph() -> None:
    """Outside the photograph there would be border repeated: columns alike."""
    images = (torch.arange(STORED) * 3).to(torch.uint8).expand(5, 3, STORED, STORED)
    found = random_crops(images, Draws(0, 0, slice(200), 200, CPU))
    steps = found.diff(dim=3).abs()
    assert steps.min() > 0.8 * 3 / 127.5
    assert steps.max() < 1.4 * 3 / 127.5
    rising = found[:, 0, 0, -1] > found[:, 0, 0, 0]
    assert 60 < rising.sum() < 140


# ---------------------------------------------------------------- training


def test_the_first_steps_loss_is_that_of_a_plain_step(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """eps prediction with weight min(SNR, 5) / SNR on random crops of the people who are trained on, in -1..1."""
    settings = small(people, tmp_path, batch=6, seed=5)
    loss = first_loss(lambda: main(settings), monkeypatch)
    faces = load_faces(people)
    left_out = held_out_people(faces, settings.held_out, 5)
    images = faces.images[[person not in left_out for person in faces.people]]
    torch.manual_seed(5)
    unet = make_network(settings.channels, settings.blocks)
    draws = Draws(5, 0, slice(6), 6, CPU)
    x0 = random_crops(images, draws)
    t, eps = draws.timesteps(1000), draws.normal(3, 64, 64)
    alpha_bar = linear(1000).alpha_bar[t].float().view(-1, 1, 1, 1)
    with torch.no_grad():
        predicted = unet(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps, t).sample
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    errors = (predicted - eps).square().mean((1, 2, 3))
    assert loss == pytest.approx(float((snr.clamp(max=5) / snr * errors).mean()), rel=1e-3)


def test_training_learns(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    monkeypatch.setattr(TrainingLog, "show", lambda _, step, **values: losses.append(values["loss"]))
    main(small(people, tmp_path, steps=20, batch=4, lr=3e-3, log_every=1))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_a_signal_leaves_a_checkpoint_and_the_same_command_ends_with_the_very_same_weights(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal comes while the second step's pictures are being cut. The folder that is left at the end draws faces in P2."""
    straight, settings, seen = small(archive, tmp_path / "straight"), small(archive, tmp_path, draw_every=4), []
    main(straight)

    def interrupting(images: torch.Tensor, draws: Draws) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return random_crops(images, draws)

    monkeypatch.setattr(train_faces, "random_crops", interrupting)
    with pytest.raises(SystemExit, match="130"):
        main(settings)
    assert not settings.output.exists()
    main(settings)
    assert len(seen) == settings.steps
    before, after = (load_file(each.output / WEIGHTS) for each in (straight, settings))
    assert all((after[name] == value).all() for name, value in before.items())
    record = json.loads((settings.run / "record.json").read_text())
    assert record["metrics"]["pictures"] == 6
    assert Image.open(settings.run / "step-000004.png").size == (8 * (2 * SIDE + 2) + 2, 2 * (2 * SIDE + 2) + 2)
    out = tmp_path / "drawn"
    P2_ddim.main(
        P2_ddim.Settings(model=str(settings.output), seeds="0-1", steps=2, output=out, record=tmp_path / "r.json")
    )
    assert sorted(path.name for path in out.iterdir()) == ["00.png", "01.png"]
    grade = GradeFaces(archive, settings.output, count=3, output=tmp_path / "grade")
    main(grade)
    assert "share of drawn faces" in capsys.readouterr().out
    assert Image.open(tmp_path / "grade" / "memorisation.png").size == (3 * (SIDE + 2) + 2, 2 * (SIDE + 2) + 2 + 6)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"channels": (8, 8, 8, 16)}, "channels"),
        ({"held_out": 2}, "held_out"),
        ({"lr": 1e-5}, "lr"),
        ({"steps": 2}, "steps 4, not 2"),
    ],
)
def test_a_run_goes_on_with_the_same_facts_only(more: dict[str, Any], named: str, people: Path, tmp_path: Path) -> None:
    main(small(people, tmp_path))
    with pytest.raises(BadInput, match=f"was trained with {named}.* --run OTHER"):
        main(small(people, tmp_path, **more))


def test_other_photographs_are_refused_and_a_moved_folder_goes_on(people: Path, tmp_path: Path) -> None:
    main(small(people, tmp_path, steps=1))
    moved = people.rename(tmp_path / "moved")
    main(small(moved, tmp_path, steps=2))
    for person in moved.iterdir():
        (person / "0.pgm").write_bytes((person / "1.pgm").read_bytes())
    with pytest.raises(BadInput, match="was trained with images"):
        main(small(moved, tmp_path, steps=3))


# ---------------------------------------------------------------- files


def test_the_folder_is_small_half_precision_and_loads_in_full(tmp_path: Path) -> None:
    network = make_network((8, 8, 8, 8), 1)
    (tmp_path / "README.md").write_text("card")
    save_folder(network, tmp_path, {"held_out": ["s1"]})
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}
    model = load_model(str(tmp_path), CPU, torch.float32)
    assert {value.dtype for value in model.network.parameters()} == {torch.float32}
    assert torch.equal(model.schedule.alpha_bar, linear(1000).alpha_bar)
    assert model.shape == (3, SIDE, SIDE)
    x = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.eval()(x, 500, return_dict=False)[0]
    assert torch.allclose(model.denoiser(1)(x, 500), expected, atol=5e-3)
    assert DDIMPipeline.from_pretrained(tmp_path).scheduler.config["beta_schedule"] == "linear"
    assert (tmp_path / "README.md").read_text() == "card"


def test_the_default_network_keeps_to_8_megabytes() -> None:
    with torch.device("meta"):
        network = make_network(TrainFaces.channels, TrainFaces.blocks)
    assert 2 * sum(p.numel() for p in network.parameters()) < 8e6


def test_starting_from_a_model_keeps_its_weights_and_its_held_out_people(people: Path, tmp_path: Path) -> None:
    network = make_network((8, 8, 8, 8), 1).half().float()
    faces = load_faces(people)
    for person in ("s0", "s3"):
        save_folder(network, tmp_path / person, {"held_out": [person]})
        assert people_to_hold_out(faces, small(people, tmp_path, init=tmp_path / person)) == [person]
    main(small(people, tmp_path, init=tmp_path / "s0", steps=1, lr=1e-9))
    weights = load_file(tmp_path / "model" / WEIGHTS)
    assert all(torch.allclose(weights[name].float(), value, atol=1e-3) for name, value in network.state_dict().items())
    with pytest.raises(BadInput, match="another layout"):
        main(small(people, tmp_path / "more", init=tmp_path / "s0", channels=(8, 8, 8, 16)))


def test_a_full_disk_keeps_the_old_model(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    save_folder(make_network((8, 8, 8, 8), 1), tmp_path, {"held_out": []})
    before = (tmp_path / WEIGHTS).read_bytes()
    torch.manual_seed(1)
    with full_disk(10_000), pytest.raises(Exception, match=r"(?i)disk|large|write"):
        save_folder(make_network((8, 8, 8, 8), 1), tmp_path, {"held_out": []})
    assert (tmp_path / WEIGHTS).read_bytes() == before


# ---------------------------------------------------------------- memorisation


def test_a_copy_is_told_from_a_new_face(people: Path) -> None:
    """Copies are near however they were cut and mirrored; other people's pictures are further away than any of them."""
    faces = load_faces(people)
    known, others = faces.of(["s0", "s1", "s2"]), faces.of(["s3"])
    train = training_crops(known)
    copies = random_crops(known, Draws(0, 0, slice(16), 16, CPU))
    near, rows = nearest(copies, train)
    far, _ = nearest(central_crops(others), train)
    assert near.max() < 0.7 * far.min()
    assert figures(near, far)["share of drawn faces nearer than that"] == 1
    assert figures(far, far)["share of drawn faces nearer than that"] <= 0.5
    exact, rows = nearest(train[[3, 40]], train)
    assert exact.max() == 0
    assert rows.tolist() == [3, 40]


def test_the_distance_is_in_grey_levels() -> None:
    x = to_float(torch.full((1, 3, SIDE, SIDE), 100, dtype=torch.uint8))
    assert float(nearest(x + 10 / 127.5, x)[0]) == pytest.approx(10, abs=1e-3)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"batch": 0}, "--batch 0"),
        ({"save_every": 0}, "--save-every 0"),
        ({"channels": (12, 16)}, "--channels"),
        ({"held_out": 0}, "--held-out 0"),
        ({"held_out": 4}, "--held-out 4"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"faces": Path("missing.tar.gz")}, "missing.tar.gz: no such folder or archive"),
        ({"faces": Path(__file__)}, "neither a folder nor a whole tar archive"),
    ],
)
def test_bad_training_is_named(people: Path, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        main(replace(small(people, tmp_path), **change))
    assert not (tmp_path / "run").exists()


def test_bad_faces_are_named(people: Path, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInput, match="none: no pictures there"):
        load_faces(tmp_path / "none")
    (people / "s0" / "0.pgm").write_text("no picture")
    with pytest.raises(BadInput, match="0.pgm is not a readable picture"):
        load_faces(people)
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(BadInput, match="neither a folder nor a whole tar archive"):
        load_faces(archive)


def test_a_file_in_the_way_is_named(people: Path, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(BadInput, match="a file is in the way"):
        main(small(people, tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": 0}, "--count 0"),
        ({"seed": -1}, "--seed -1"),
        ({"model": Path("nowhere")}, "training.json does not exist"),
    ],
)
def test_bad_grading_is_named(people: Path, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    save_folder(make_network((8, 8, 8, 8), 1), tmp_path / "model", {"held_out": ["s9"]})
    grade = GradeFaces(people, tmp_path / "model", output=tmp_path / "grade")
    with pytest.raises(BadInput, match=named):
        main(replace(grade, **change))
    with pytest.raises(BadInput, match="lacks s9"):
        main(grade)
