"""The face model: it trains on the face world, can be resumed, P2 draws from the result, and grading finds copies and broken faces."""

from __future__ import annotations

import json
import os
import signal
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
from torch import Tensor

import miniature.train_faces as train_faces
import P2_ddim
from diffusion.schedule import linear
from faces.models import load_model
from miniature.face_classifier import FaceClassifier, FaceReading, save_face_classifier
from miniature.face_world import SIDE, FaceRenderer, face_seeds, sample_factors, world_fingerprint
from miniature.faces_model import make_network, save_folder
from miniature.train_faces import GradeFaces, TrainFaces, figures, main, nearest
from runtime.cli import BadInput
from runtime.images import open_image, to_float
from training.draws import Draws
from training.log import TrainingLog

CPU = torch.device("cpu")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def small(folder: Path, **more: Any) -> TrainFaces:
    values: dict[str, Any] = {"steps": 4, "batch": 2, "save_every": 2, "channels": (8, 8, 8, 8), "images": 12}
    return TrainFaces(**{**values, "draw_every": 0, "run": folder / "run", "output": folder / "model", **more})


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    path = tmp_path / "factors.safetensors"
    save_face_classifier(path, FaceClassifier(), {})
    return path


# ---------------------------------------------------------------- training


def test_the_first_steps_loss_is_that_of_a_plain_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """v prediction with weight min(1, (1 + gamma) / (1 + SNR)) on faces of the seed's set, in -1..1."""
    settings = small(tmp_path, batch=6, seed=5, gamma=3.0)
    loss = first_loss(lambda: main(settings), monkeypatch)
    torch.manual_seed(5)
    unet = make_network(settings.channels, settings.blocks)
    draws = Draws(5, 0, slice(6), 6, CPU)
    rows = sample_factors(face_seeds(5, 12))[(draws.uniform() * 12).long()]
    x0 = to_float(FaceRenderer()(rows))
    t, eps = draws.timesteps(1000), draws.normal(3, SIDE, SIDE)
    alpha_bar = linear(1000).alpha_bar[t].float().view(-1, 1, 1, 1)
    with torch.no_grad():
        predicted = unet(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps, t).sample
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    errors = (predicted - v).square().mean((1, 2, 3))
    assert loss == pytest.approx(float(((1 + 3) / (1 + snr)).clamp(max=1).mul(errors).mean()), rel=1e-3)


def test_training_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    monkeypatch.setattr(TrainingLog, "show", lambda _, step, **values: losses.append(values["loss"]))
    main(small(tmp_path, steps=20, batch=4, lr=3e-3, log_every=1))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_a_signal_leaves_a_checkpoint_and_the_same_command_ends_with_the_very_same_weights(
    tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal comes while the second step's faces are being made. The folder that is left draws faces in P2."""
    straight, settings, calls = small(tmp_path / "straight"), small(tmp_path, draw_every=4), []
    main(straight)

    def interrupting(images: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return to_float(images)

    monkeypatch.setattr(train_faces, "to_float", interrupting)
    with pytest.raises(SystemExit, match="130"):
        main(settings)
    assert not settings.output.exists()
    main(settings)
    assert len(calls) == settings.steps
    before, after = (load_file(each.output / WEIGHTS) for each in (straight, settings))
    assert all((after[name] == value).all() for name, value in before.items())
    record = json.loads((settings.run / "record.json").read_text())
    assert record["metrics"]["images"] == 12
    assert Image.open(settings.run / "step-000004.png").size == (8 * (2 * SIDE + 2) + 2, 4 * (2 * SIDE + 2) + 2)

    out = tmp_path / "drawn"
    P2_ddim.main(
        P2_ddim.Settings(model=str(settings.output), seeds="0-1", steps=2, output=out, record=tmp_path / "r.json")
    )
    assert sorted(path.name for path in out.iterdir()) == ["00.png", "01.png"]
    main(GradeFaces(settings.output, classifier, count=3, output=tmp_path / "grade"))
    assert "share of drawn faces nearer" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "grade" / "record.json").read_text())["metrics"]
    assert metrics["drawn faces that are valid"] == 0  # after four steps
    for name, faces in (("faces", 3), ("refused", 4), ("nearest", 4)):
        assert Image.open(tmp_path / "grade" / f"{name}.png").size[0] == faces * (SIDE + 2) + 2


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"channels": (8, 8, 8, 16)}, "channels"),
        ({"images": 13}, "images 12, not 13"),
        ({"gamma": 4.0}, "gamma"),
        ({"lr": 1e-5}, "lr"),
        ({"steps": 2}, "steps 4, not 2"),
    ],
)
def test_a_run_goes_on_with_the_same_facts_only(more: dict[str, Any], named: str, tmp_path: Path) -> None:
    main(small(tmp_path))
    with pytest.raises(BadInput, match=f"was trained with {named}.* --run OTHER"):
        main(small(tmp_path, **more))


# ---------------------------------------------------------------- files


def test_the_folder_is_small_half_precision_and_loads_in_full(tmp_path: Path) -> None:
    network = make_network((8, 8, 8, 8), 1)
    (tmp_path / "README.md").write_text("card")
    save_folder(network, tmp_path, {"seed": 0})
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


def test_the_default_network_and_its_classifier_keep_to_7_megabytes() -> None:
    with torch.device("meta"):
        networks = make_network(TrainFaces.channels, TrainFaces.blocks), FaceClassifier()
    assert 2 * sum(p.numel() for network in networks for p in network.parameters()) < 6.9e6


def test_starting_from_a_model_keeps_its_weights(tmp_path: Path) -> None:
    network = make_network((8, 8, 8, 8), 1).half().float()
    save_folder(network, tmp_path / "first", {})
    main(small(tmp_path, init=tmp_path / "first", steps=1, lr=1e-9))
    weights = load_file(tmp_path / "model" / WEIGHTS)
    assert all(torch.allclose(weights[name].float(), value, atol=1e-3) for name, value in network.state_dict().items())
    with pytest.raises(BadInput, match="another layout"):
        main(small(tmp_path / "more", init=tmp_path / "first", channels=(8, 8, 8, 16)))


def test_a_full_disk_keeps_the_old_model(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    save_folder(make_network((8, 8, 8, 8), 1), tmp_path, {})
    before = (tmp_path / WEIGHTS).read_bytes()
    torch.manual_seed(1)
    with full_disk(10_000), pytest.raises(Exception, match=r"(?i)disk|large|write"):
        save_folder(make_network((8, 8, 8, 8), 1), tmp_path, {})
    assert (tmp_path / WEIGHTS).read_bytes() == before


# ---------------------------------------------------------------- grading


def test_a_copy_is_distinguished_from_a_new_face(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noisy copies find their face, across chunks too, and are nearer to it than any other face is to its nearest."""
    monkeypatch.setattr(train_faces, "COMPARED", 7)
    renderer = FaceRenderer()
    trained, others = sample_factors(face_seeds(0, 30)), sample_factors(face_seeds(1, 30))
    noise = 6 * torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    copies = (renderer(trained[[3, 12, 29]]) + noise).round().clamp(0, 255).to(torch.uint8)
    near, rows = nearest(copies, trained, renderer)
    far, _ = nearest(renderer(others), trained, renderer)
    assert rows.tolist() == [3, 12, 29]
    assert near.max() < 0.5 * far.min()
    assert nearest(renderer(trained[[8]]), trained, renderer)[0] < 0.1


def test_the_distance_is_in_grey_levels() -> None:
    renderer, trained = FaceRenderer(), sample_factors([0])
    image = renderer(trained)
    moved = torch.where(image < 128, image + 10, image - 10)
    pooled = torch.nn.functional.avg_pool2d(moved.float() - image.float(), 2).square().mean().sqrt()
    assert float(nearest(moved, trained, renderer)[0]) == pytest.approx(float(pooled), rel=1e-3)


def test_the_figures_are_shares_and_medians() -> None:
    valid = torch.tensor([True, True, True, False])
    confidence = torch.tensor([1.0, 0.5, 0.4, 0.3])
    reading = FaceReading(torch.zeros(4, 14), confidence, torch.tensor([1.0, 3.0, 5.0, 90.0]), valid)
    held_out = torch.arange(101.0)
    assert list(figures(reading, torch.tensor([0.0, 0.5, 2.0, 70.0]), held_out).values()) == [
        0.75, 0.5, 3.0, 0.5, 50.0, 1.0, 0.5
    ]  # fmt: skip


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"batch": 0}, "--batch 0"),
        ({"images": 0}, "--images 0"),
        ({"gamma": 0.0}, "--gamma 0"),
        ({"save_every": 0}, "--save-every 0"),
        ({"draw_every": -1}, "--draw-every -1"),
        ({"channels": (12, 16)}, "--channels"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"precision": "tf32"}, "--precision tf32"),
    ],
)
def test_bad_training_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        main(replace(small(tmp_path, device="cpu"), **change))
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(BadInput, match="a file is in the way"):
        main(small(tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": 0}, "--count 0"),
        ({"seed": -1}, "--seed -1"),
        ({"model": Path("nowhere")}, "training.json does not exist"),
        ({"classifier": Path("nowhere.safetensors")}, "nowhere.safetensors does not exist"),
    ],
)
def test_bad_grading_is_named(tmp_path: Path, classifier: Path, change: dict[str, Any], named: str) -> None:
    save_folder(make_network((8, 8, 8, 8), 1), tmp_path / "model", {"world": world_fingerprint()})
    with pytest.raises(BadInput, match=named):
        main(replace(GradeFaces(tmp_path / "model", classifier, output=tmp_path / "grade"), **change))


def test_a_model_of_other_images_is_not_graded(tmp_path: Path, classifier: Path) -> None:
    save_folder(make_network((8, 8, 8, 8), 1), tmp_path / "model", {"faces": "faces_orl.tar.gz"})
    with pytest.raises(BadInput, match="model was not trained on this face world"):
        main(GradeFaces(tmp_path / "model", classifier, output=tmp_path / "grade"))


def test_sheets_show_the_first_faces(tmp_path: Path, classifier: Path) -> None:
    torch.manual_seed(0)
    save_folder(
        make_network((8, 8, 8, 8), 1), tmp_path / "model", {"world": world_fingerprint(), "seed": 0, "images": 9}
    )
    main(GradeFaces(tmp_path / "model", classifier, count=2, output=tmp_path / "grade"))
    faces, pairs = (open_image(tmp_path / "grade" / name) for name in ("faces.png", "nearest.png"))
    first = (slice(None), slice(2, 2 + SIDE), slice(2, 2 + SIDE))
    assert torch.equal(faces[first], pairs[first])
    trained = FaceRenderer()(sample_factors(face_seeds(0, 9)))
    assert (trained == pairs[:, 2 : 2 + SIDE, SIDE + 4 : 2 * SIDE + 4]).all((1, 2, 3)).any()
