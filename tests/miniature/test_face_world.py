"""The face world: a face follows from its seed, its factors are what one sees, and the layers add up to the style's own faces."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from miniature import face_parts, face_world
from miniature.face_classifier import local_distance
from miniature.face_world import (
    COLOURS,
    COLUMN,
    FACTORS,
    PARTS,
    SHADE,
    SIDE,
    VALUES,
    FaceRenderer,
    RenderFaces,
    face_seeds,
    load_parts,
    main,
    name_factors,
    sample_factors,
    world_fingerprint,
)
from runtime.cli import BadInput
from runtime.images import open_image


@pytest.fixture(scope="module")
def renderer() -> FaceRenderer:
    return FaceRenderer()


def with_values(rows: Tensor, **values: str) -> Tensor:
    """Return the rows with these values; `_` stands for the space in a factor's name."""
    rows = rows.clone()
    for name, value in values.items():
        factor = name.replace("_", " ")
        rows[:, COLUMN[factor]] = VALUES[factor].index(value)
    return rows


def not_bald(rows: Tensor) -> Tensor:
    return rows[rows[:, COLUMN["hair"]] != VALUES["hair"].index("bald")]


def test_a_face_follows_from_its_seed_alone_to_the_byte() -> None:
    """On every machine: a different hash means that faces trained on and graded with are no longer these."""
    assert world_fingerprint() == "c08139be12a0a1ea"
    assert torch.equal(sample_factors(face_seeds(3, 8))[5:], sample_factors(face_seeds(3, 3, first=5)))
    assert not torch.equal(sample_factors(face_seeds(3, 8)), sample_factors(face_seeds(4, 8)))


def test_a_face_is_drawn_alike_in_any_batch(renderer: FaceRenderer) -> None:
    rows = sample_factors(range(5))
    assert torch.equal(renderer(rows)[3:4], renderer(rows[3:4]))
    assert renderer(rows[:0]).shape == (0, 3, SIDE, SIDE)


def test_values_occur_in_their_shares() -> None:
    everyone = sample_factors(range(4000))
    for factor, shares in FACTORS.items():
        rows = not_bald(everyone) if factor == "rear hair" else everyone
        counts = rows[:, COLUMN[factor]].long().bincount(minlength=len(shares)) / len(rows)
        expected = torch.tensor(list(shares.values())) / sum(shares.values())
        assert torch.allclose(counts, expected, atol=0.03), factor


def test_bald_heads_have_no_hair_behind_them() -> None:
    for face in name_factors(sample_factors(range(300))):
        assert face["hair"] != "bald" or face["rear hair"] == "none"


def test_the_layers_add_up_to_the_faces_that_the_packages_draw(renderer: FaceRenderer) -> None:
    """The sheet that ships was drawn face by face at 128 pixels; a layer is halved before it is laid over others."""
    faces = json.loads((PARTS.parent / "sheet.json").read_text())
    rows = sample_factors(face_seeds(0, len(faces)))
    assert name_factors(rows) == faces
    sheet = open_image(PARTS.parent / "sheet.png").unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE)
    whole = sheet.permute(1, 2, 0, 3, 4).reshape(-1, 3, SIDE, SIDE)
    error = (renderer(rows).int() - whole.int()).abs().float()
    assert error.mean((1, 2, 3)).max() < 0.6
    assert (error > 12).float().mean() < 0.002
    assert error.max() < 40


@pytest.mark.parametrize("factor", FACTORS)
def test_every_factor_is_seen_in_every_face(factor: str, renderer: FaceRenderer) -> None:
    """In every face, another value of the factor changes it by ten grey levels somewhere, mostly by far more."""
    everyone = sample_factors(range(100, 130))
    rows = not_bald(everyone) if factor == "rear hair" else everyone
    base = renderer(rows)
    for value in range(len(VALUES[factor])):
        others = rows.clone()
        others[:, COLUMN[factor]] = value
        distance = local_distance(base, renderer(others))[rows[:, COLUMN[factor]] != value]
        assert distance.min() > 10


def test_the_background_has_its_colour_and_the_light_comes_from_its_side(renderer: FaceRenderer) -> None:
    rows = sample_factors(range(6))
    for value, colour in zip(VALUES["background"], COLOURS["background"], strict=True):
        expected = torch.tensor(list(bytes.fromhex(colour)))
        even, left, right = (
            renderer(with_values(rows, background=value, light=light, hair="bald", rear_hair="none"))[:, :, 2]
            for light in ("even", "left", "right")
        )
        assert (even == expected[:, None].to(torch.uint8)).all()
        assert torch.equal(left, right.flip(2))
        assert torch.equal(left[..., 0], even[..., 0])
        assert ((left[0, :, -1] - (1 - SHADE) * expected).abs() <= 1).all()


def test_a_turn_moves_eyes_and_mouth_sideways(renderer: FaceRenderer) -> None:
    plain = {"skin": "light", "glasses": "none", "beard": "none", "light": "even", "brows": "neutral"}
    plain |= {"hair": "bald", "rear_hair": "none"}
    rows = with_values(sample_factors([1]), **plain, eyes="wide", mouth="agape")
    axis = torch.arange(SIDE).float()
    for band in (slice(31, 40), slice(43, 49)):
        centres = []
        for turn in VALUES["turn"]:
            dark = (renderer(with_values(rows, turn=turn))[0, :, band, 14:50].sum(0) < 330).float().sum(0)
            centres.append(float((dark * axis[14:50]).sum() / dark.sum()))
        left, front, right = centres
        assert front - left == pytest.approx(2.1, abs=0.6)
        assert right - front == pytest.approx(2.1, abs=0.6)


# ---------------------------------------------------------------- layers


def test_the_layers_are_small_and_their_card_carries_the_designs_licence() -> None:
    assert PARTS.stat().st_size < 100_000
    card = (PARTS.parent / "README.md").read_text()
    assert "licensed under „CC BY 4.0” (https://creativecommons.org/licenses/by/4.0/)" in card
    assert "Johan Melin" in card


def test_a_layer_drawn_again_is_the_one_that_ships() -> None:
    pytest.importorskip("dicebear")
    pytest.importorskip("resvg_py")
    names, layers = load_parts()
    style = face_parts.load_style()
    for component, shape, turn in (("eyes", "wink", "left"), ("glasses", "round", "right"), ("hair", "bun", "front")):
        drawn = face_parts.draw_layer(style, component, shape, turn).astype(int)
        assert np.abs(drawn - layers[names[f"{component} {shape} {turn}"]]).max() <= 1


def test_an_absent_package_is_named_with_the_way_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dicebear", None)
    with pytest.raises(BadInput, match="dicebear.*pip install -r miniature/requirements.txt"):
        face_parts.main(face_parts.DrawParts(tmp_path / "parts"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_absent_or_damaged_layers_are_named(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "parts.npz"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(face_world, "PARTS", path)
    with pytest.raises(BadInput, match=r"parts.npz: .*face_parts.py makes it"):
        load_parts.__wrapped__()


# ---------------------------------------------------------------- command


def test_the_command_writes_faces_and_their_factors(tmp_path: Path, renderer: FaceRenderer) -> None:
    main(RenderFaces(tmp_path / "faces", count=3, seed=7))
    rows = sample_factors(face_seeds(7, 3))
    assert json.loads((tmp_path / "faces" / "factors.json").read_text()) == name_factors(rows)
    for index, image in enumerate(renderer(rows)):
        assert torch.equal(open_image(tmp_path / "faces" / f"{index:02}.png"), image)


@pytest.mark.parametrize(("change", "named"), [({"count": 0}, "--count 0"), ({"seed": -1}, "--seed -1")])
def test_bad_input_is_named(change: dict[str, int], named: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=named):
        main(RenderFaces(tmp_path / "faces", **change))
    assert not list(tmp_path.iterdir())
