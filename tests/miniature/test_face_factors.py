"""Reading faces: the classifier learns and is stored, spoilings spoil what they name, and a face is valid if it is what its factors say."""

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
from first_step import first_loss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import miniature.face_factors as script
from miniature.face_classifier import (
    DISTANCE,
    SHIPPED,
    FaceClassifier,
    FaceClassifierConfig,
    FaceReader,
    FaceReading,
    factor_loss,
    load_face_classifier,
    local_distance,
    save_face_classifier,
    worsen_slightly,
)
from miniature.face_factors import GradeFaceClassifier, TrainFaceClassifier, main, measure_rates
from miniature.face_spoilings import (
    SPOILINGS,
    blur,
    erase_eye,
    erase_mouth,
    exchange_colours,
    join_left_and_right,
    join_top_and_bottom,
    warp,
)
from miniature.face_world import COLUMN, FACTORS, SIDE, VALUES, FaceRenderer, face_seeds, sample_factors
from runtime.cli import BadInput
from runtime.images import to_float, to_uint8
from training.draws import Draws
from training.log import TrainingLog

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def renderer() -> FaceRenderer:
    return FaceRenderer()


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return sample_factors(range(40)).long()


def draws_of(count: int, seed: int = 0) -> Draws:
    return Draws(seed, 0, slice(count), count, CPU)


class KnownFaces(nn.Module):
    """Answers with these rows, with this probability, for any images."""

    def __init__(self, rows: Tensor, probability: float = 0.9):
        super().__init__()
        self.rows, self.probability = rows, probability

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = {}
        for factor, column in COLUMN.items():
            count = len(VALUES[factor])
            rest = (1 - self.probability) / (count - 1)
            hit = nn.functional.one_hot(self.rows[: len(x), column], count).bool()
            logits[factor] = torch.where(hit, self.probability, rest).log()
        return logits


def reader_of(rows: Tensor, probability: float = 0.9) -> FaceReader:
    network: Any = KnownFaces(rows, probability)
    return FaceReader(network)


# ---------------------------------------------------------------- validity


def test_a_face_is_valid_if_it_is_what_its_factors_say(renderer: FaceRenderer, rows: Tensor) -> None:
    images = renderer(rows)
    reading = reader_of(rows)(images)
    assert reading.valid.all()
    assert reading.distance.max() == 0
    assert torch.equal(reading.rows, rows)
    assert torch.allclose(reading.confidence, torch.tensor(0.9))
    assert not reader_of(rows.roll(1, 0))(images).valid.any()
    assert not reader_of(rows, probability=0.49)(images).valid.any()


def test_one_region_that_differs_is_enough(renderer: FaceRenderer, rows: Tensor) -> None:
    images = renderer(rows)
    near, far = images.clone(), images.clone()
    for changed, by in ((near, DISTANCE - 1), (far, DISTANCE + 1)):
        patch = changed[:, :, 20:25, 30:35].int()
        changed[:, :, 20:25, 30:35] = torch.where(patch < 128, patch + int(by), patch - int(by)).to(torch.uint8)
    assert torch.allclose(local_distance(images, far), torch.tensor(DISTANCE + 1))
    reader = reader_of(rows)
    assert reader(near).valid.all()
    assert not reader(far).valid.any()


def test_the_local_distance_is_that_of_a_plain_loop(renderer: FaceRenderer, rows: Tensor) -> None:
    a, b = renderer(rows[:1]).numpy()[0].astype(float), renderer(rows[1:2]).numpy()[0].astype(float)
    windows = [
        np.sqrt(((a - b)[:, y : y + 5, x : x + 5] ** 2).mean()) for y in range(SIDE - 4) for x in range(SIDE - 4)
    ]
    distance = local_distance(renderer(rows[:1]), renderer(rows[1:2]))
    assert float(distance) == pytest.approx(max(windows), rel=1e-5)


def test_slight_imperfections_are_slight(renderer: FaceRenderer, rows: Tensor) -> None:
    x = to_float(renderer(rows))
    worse = worsen_slightly(x, draws_of(len(x)))
    assert worse.abs().max() <= 1
    distance = local_distance(to_uint8(worse), to_uint8(x))
    assert distance.min() > 1
    assert distance.max() < DISTANCE


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 3, SIDE, SIDE)])
def test_other_images_are_refused(images: Tensor, rows: Tensor) -> None:
    with pytest.raises(ValueError, match="faces are"):
        reader_of(rows)(images)


# ---------------------------------------------------------------- spoilings


def test_every_spoiling_leaves_a_face_that_its_factors_do_not_describe(renderer: FaceRenderer) -> None:
    """By the true factors alone, nine tenths are refused and more; those of the classifier are nearer at most."""
    rows = sample_factors(face_seeds(1, 200)).long()
    good = renderer(rows)
    for name, spoil in SPOILINGS.items():
        images = spoil(renderer, rows, draws_of(len(rows)))
        assert images.shape == good.shape
        assert images.abs().max() <= 1
        assert (local_distance(to_uint8(images), good) > DISTANCE).float().mean() > 0.9, name


def test_halves_are_of_a_face_and_of_the_one_before_it(renderer: FaceRenderer, rows: Tensor) -> None:
    x, half = to_float(renderer(rows)), SIDE // 2
    sides, levels = (join(renderer, rows, draws_of(40)) for join in (join_left_and_right, join_top_and_bottom))
    assert torch.equal(sides[5, :, :, :half], x[5, :, :, :half])
    assert torch.equal(sides[5, :, :, half:], x[4, :, :, half:])
    assert torch.equal(levels[5, :, :half], x[5, :, :half])
    assert torch.equal(levels[5, :, half:], x[4, :, half:])


@pytest.mark.parametrize(("erase", "factor", "value"), [(erase_mouth, "mouth", "laugh"), (erase_eye, "eyes", "wide")])
@pytest.mark.parametrize("turn", VALUES["turn"])
def test_erasing_leaves_nothing_of_the_feature_and_everything_else(
    erase: Callable[[FaceRenderer, Tensor, Draws], Tensor], factor: str, value: str, turn: str, renderer: FaceRenderer
) -> None:
    """Of a mouth or an eye with white in it, no white is left; both eyes take their turn."""
    rows = sample_factors(range(20)).long()
    for name, fixed in ((factor, value), ("turn", turn), ("light", "even"), ("glasses", "none"), ("beard", "none")):
        rows[:, COLUMN[name]] = VALUES[name].index(fixed)
    good, spoilt = to_float(renderer(rows)), erase(renderer, rows, draws_of(20))
    changed = (good != spoilt).any(1)
    assert changed.flatten(1).sum(1).max() <= 16 * 11
    place = (slice(None), slice(42, 50) if factor == "mouth" else slice(30, 41), slice(18, 46))
    white, left = ((x.amin(1) > 0.7)[place] for x in (good, torch.minimum(good, spoilt)))
    if factor == "mouth":
        assert white.any((1, 2)).all()
        assert not left.any()
    else:
        middle = 14 + round(2.1 * (VALUES["turn"].index(turn) - 1))
        sides = torch.stack([left[..., :middle].any((1, 2)), left[..., middle:].any((1, 2))], 1)
        assert (sides.sum(1) == 1).all()
        assert 4 < sides[:, 0].sum() < 16


def test_a_warp_moves_points_and_a_blur_averages_25(renderer: FaceRenderer, rows: Tensor) -> None:
    x = to_float(renderer(rows))
    smooth = blur(renderer, rows, draws_of(40))
    assert torch.allclose(smooth[:, :, 10, 20], x[:, :, 8:13, 18:23].mean((2, 3)), atol=1e-5)
    warped = warp(renderer, rows, draws_of(40))
    assert not torch.equal(warped, warp(renderer, rows, draws_of(40, seed=1)))
    assert torch.allclose(warped.mean((2, 3)), x.mean((2, 3)), atol=0.35)
    assert ((warped - x).abs().mean((1, 2, 3)) > 0.05).all()


def test_exchanged_colours_are_those_of_skin_and_hair(renderer: FaceRenderer, rows: Tensor) -> None:
    rows = rows.clone()
    rows[:, COLUMN["hair"]], rows[:, COLUMN["light"]] = VALUES["hair"].index("bun"), VALUES["light"].index("even")
    colours = {name: to_float(colour) for name, colour in renderer.colours_of(rows).items()}
    exchanged = exchange_colours(renderer, rows, draws_of(40))
    assert (exchanged[:, :, 15, 32] - colours["skin"]).abs().max() < 0.03  # the hair above the forehead
    good = to_float(renderer(rows))
    assert (good[:, :, 15, 32] - colours["hair colour"]).abs().max() < 0.03
    assert (exchanged[:, :, 52, 32] != good[:, :, 52, 32]).any(1).all()  # the chin


# ---------------------------------------------------------------- grading


class FixedReader:
    """Reads the faces of a set right, but for one factor; spoilt ones pass if `blind`."""

    def __init__(self, seed: int, count: int, wrong: str, blind: bool):
        self.device, self.renderer, self.blind, self.calls = CPU, FaceRenderer(), blind, 0
        self.rows = sample_factors(face_seeds(seed, count)).long()
        if wrong:
            column = COLUMN[wrong]
            self.rows[:, column] = (self.rows[:, column] + 1) % len(VALUES[wrong])

    def __call__(self, images: Tensor) -> FaceReading:
        self.calls += 1
        passes = self.calls <= 2 or self.blind
        nothing = torch.zeros(len(images))
        return FaceReading(self.rows, nothing, nothing, torch.full((len(images),), passes))


@pytest.mark.parametrize("wrong", ["", "hair", "light"])
@pytest.mark.parametrize("blind", [False, True])
def test_mistakes_show_in_the_lines_they_belong_to(wrong: str, blind: bool) -> None:
    reader: Any = FixedReader(3, 6, wrong, blind)
    rates = measure_rates(reader, 6, 3)
    zero = {name for name, share in rates.items() if share == 0}
    lines = {f"read right: {wrong}", "read right: all factors"} if wrong else set()
    assert zero == lines | ({name for name in rates if name.startswith("refused")} if blind else set())
    assert all(share in (0, 1) for share in rates.values())
    assert len(rates) == len(FACTORS) + 3 + len(SPOILINGS) + 1


# ---------------------------------------------------------------- training


def small(folder: Path, **more: Any) -> TrainFaceClassifier:
    values = {"steps": 4, "batch": 4, "save_every": 2, "grade": 4, "run": folder, **more}
    return TrainFaceClassifier(**{"output": folder / "factors.safetensors", **values})


def test_the_first_steps_loss_is_that_of_a_plain_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over factors of cross-entropies, on the first faces of the seed's set, slightly worsened."""
    loss = first_loss(lambda: main(small(tmp_path, seed=5, batch=6)), monkeypatch)
    rows = sample_factors(face_seeds(5, 6)).long()
    x = worsen_slightly(to_float(FaceRenderer()(rows)), Draws(5, 0, slice(6), 6, CPU))
    torch.manual_seed(5)
    logits = FaceClassifier()(x)
    losses = [nn.functional.cross_entropy(logits[factor], rows[:, column]) for factor, column in COLUMN.items()]
    expected = torch.stack(losses).sum()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(factor_loss(logits, rows).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_training_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    monkeypatch.setattr(TrainingLog, "show", lambda _, step, **values: losses.append(values["loss"]))
    main(small(tmp_path, steps=40, batch=16, log_every=1))
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


def test_a_signal_leaves_a_checkpoint_and_the_same_command_ends_with_the_very_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal comes while the second step's faces are being made."""
    main(small(tmp_path / "straight"))

    def interrupting(x: Tensor, draws: Draws) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return worsen_slightly(x, draws)

    calls: list[int] = []
    monkeypatch.setattr(script, "worsen_slightly", interrupting)
    with pytest.raises(SystemExit, match="130"):
        main(small(tmp_path))
    assert not (tmp_path / "factors.safetensors").exists()
    main(small(tmp_path))
    straight, resumed = (load_file(folder / "factors.safetensors") for folder in (tmp_path / "straight", tmp_path))
    assert all((resumed[name] == value).all() for name, value in straight.items())
    assert "refused: an eye erased" in capsys.readouterr().out
    main(GradeFaceClassifier(tmp_path / "factors.safetensors", count=4, record=tmp_path / "grade.json"))
    record = json.loads((tmp_path / "grade.json").read_text())
    assert record["metrics"]["rates"] == json.loads((tmp_path / "record.json").read_text())["metrics"]["rates"]


def test_training_can_start_from_another_classifier(tmp_path: Path) -> None:
    torch.manual_seed(3)
    save_face_classifier(tmp_path / "first.safetensors", FaceClassifier(), {})
    main(small(tmp_path, init=tmp_path / "first.safetensors", steps=1, lr=1e-9))
    before, after = (
        load_file(tmp_path / name)["head.0.weight"] for name in ("first.safetensors", "factors.safetensors")
    )
    assert torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize(
    ("more", "named"),
    [({"weight_decay": 0.1}, "weight_decay 0.05, not 0.1"), ({"seed": 1}, "seed 0, not 1"), ({"steps": 2}, "steps 4")],
)
def test_a_run_goes_on_with_the_same_facts_only(more: dict[str, Any], named: str, tmp_path: Path) -> None:
    main(small(tmp_path))
    with pytest.raises(BadInput, match=f"was trained with {named}.* --run OTHER"):
        main(small(tmp_path, **more))


# ---------------------------------------------------------------- files and flags


def test_a_file_is_small_and_gives_its_answers_back(tmp_path: Path, renderer: FaceRenderer, rows: Tensor) -> None:
    path = tmp_path / "factors.safetensors"
    torch.manual_seed(0)
    network = FaceClassifier().half().float().eval()
    save_face_classifier(path, network, {})
    assert path.stat().st_size < 1e6
    images = renderer(rows[:3])
    before, after = FaceReader(network)(images), FaceReader(load_face_classifier(path))(images)
    assert torch.equal(before.rows, after.rows)
    assert torch.allclose(before.confidence, after.confidence, atol=1e-5)


def test_the_shipped_classifier_reads_the_shipped_sheet() -> None:
    if not SHIPPED.is_file():
        pytest.skip("not trained yet")
    rows = sample_factors(face_seeds(0, 16)).long()
    reading = FaceReader(load_face_classifier())(FaceRenderer()(rows))
    assert (reading.rows == rows).all()
    assert reading.valid.all()


KIND = "miniature face classifier"


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    header = {"kind": KIND, "model": {}, "factors": {"skin": ["green"]}}
    save_file({"a": torch.zeros(1)}, tmp_path / "words.safetensors", {"judge": json.dumps(header)})
    save_face_classifier(tmp_path / "layout.safetensors", FaceClassifier(FaceClassifierConfig(hidden=8)), {})
    tensors = load_file(tmp_path / "layout.safetensors") | {"head.0.bias": torch.zeros(3)}
    header |= {"factors": VALUES}
    save_file(tensors, tmp_path / "layout.safetensors", {"judge": json.dumps(header)})
    for name, named in (
        ("other", "no face classifier"),
        ("words", "other factors"),
        ("layout", "size mismatch"),
        ("none", "does not exist"),
    ):
        with pytest.raises(BadInput, match=named):
            load_face_classifier(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("{", "is no face classifier"),
        ("[]", "is no face classifier"),
        (json.dumps({"kind": KIND}), "other factors"),
        (json.dumps({"kind": KIND, "factors": VALUES}), "no face classifier has the layout in its header"),
        (json.dumps({"kind": KIND, "factors": VALUES, "model": []}), "no face classifier has the layout"),
        (json.dumps({"kind": KIND, "factors": VALUES, "model": {"hidden": "8"}}), "no face classifier has the layout"),
        (json.dumps({"kind": KIND, "factors": VALUES, "model": {"hiden": 8}}), "no face classifier has the layout"),
    ],
)
def test_a_damaged_header_is_one_line(header: str, named: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "f.safetensors", {"judge": header})
    with pytest.raises(BadInput, match=named):
        load_face_classifier(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (GradeFaceClassifier(count=0), "--count 0"),
        (GradeFaceClassifier(seed=-1), "--seed -1"),
        (GradeFaceClassifier(device="cuda:99"), "--device cuda:99"),
        (GradeFaceClassifier(classifier=Path(__file__)), "is a text, not a file of tensors"),
        (TrainFaceClassifier(steps=0), "--steps 0"),
        (TrainFaceClassifier(grade=0), "--grade 0"),
        (TrainFaceClassifier(ema=1.5), "--ema 1.5"),
    ],
)
def test_bad_input_is_named(command: TrainFaceClassifier | GradeFaceClassifier, named: str, tmp_path: Path) -> None:
    place: dict[str, Any] = {"record" if isinstance(command, GradeFaceClassifier) else "run": tmp_path / "r"}
    with pytest.raises(BadInput, match=named):
        main(replace(command, **place))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_classifier(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    (tmp_path / "factors.safetensors").write_text("old")
    with full_disk(10_000), pytest.raises(OSError, match="factors"):
        save_face_classifier(tmp_path / "factors.safetensors", FaceClassifier(), {})
    assert (tmp_path / "factors.safetensors").read_text() == "old"
