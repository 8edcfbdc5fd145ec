"""What eta and interpolation change in faces: shares, paths and their measures, against values counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.p2_factors import (
    Settings,
    draw_changes,
    draw_paths,
    factor_changes,
    local_contrast,
    main,
    measure_paths,
    path_noises,
    print_paths,
    with_interval,
)
from diffusion.noise import linear, slerp
from faces.noises import Noise
from miniature.face_classifier import FaceReader, FaceReading, load_face_classifier
from miniature.face_world import COLUMN, FACTORS, FaceRenderer, face_seeds, sample_factors
from runtime.cli import BadInput
from runtime.images import open_image


def reading(rows: torch.Tensor, valid: list[bool]) -> FaceReading:
    return FaceReading(rows, 0.5 * torch.tensor(valid), torch.zeros(len(rows)), torch.tensor(valid))


@pytest.fixture(scope="module")
def reader() -> FaceReader:
    return FaceReader(load_face_classifier())


def test_a_factor_changes_where_it_differs_from_eta_0_among_faces_read_at_both() -> None:
    start = torch.zeros(4, len(FACTORS), dtype=torch.long)
    later = start.clone()
    later[0, COLUMN["eyes"]] = 1
    later[1, COLUMN["mouth"]] = 2
    later[3] = 1  # not valid there
    changed = factor_changes(
        {0.0: reading(start, [True, True, False, True]), 0.5: reading(later, [True, True, True, False])}
    )
    assert changed["eta 0.5"] == dict.fromkeys(FACTORS, 0.0) | {"eyes": 0.5, "mouth": 0.5, "valid": 0.75}
    assert changed["eta 0"] == dict.fromkeys(FACTORS, 0.0) | {"valid": 0.75}


def test_the_last_column_compares_with_another_noise() -> None:
    start = torch.zeros(3, len(FACTORS), dtype=torch.long)
    start[:, COLUMN["skin"]] = torch.tensor([0, 1, 1])
    changed = factor_changes({0.0: reading(start, [True] * 3)})
    assert changed["another noise"]["skin"] == pytest.approx(2 / 3)  # 0 and 1, 1 and 0; then 1 and 1
    assert changed["another noise"]["hair"] == 0.0


def test_faces_that_are_never_read_end_in_one_line() -> None:
    rows = torch.zeros(2, len(FACTORS), dtype=torch.long)
    with pytest.raises(BadInput, match="eta 0.5: no noise whose face is read with confidence"):
        factor_changes({0.0: reading(rows, [True, False]), 0.5: reading(rows, [False, True])})


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"count": 1}, "--count 1"), ({"pairs": 1}, "--pairs 1"), ({"frames": 1}, "--frames 1"), ({"etas": ()}, "--etas")],
)
def test_too_few_of_anything_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        main(Settings(**flags))


def test_a_path_leads_from_the_first_noise_of_a_pair_to_the_second() -> None:
    ends = [
        Noise(str(index), torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(index))) for index in range(4)
    ]
    for way in (slerp, linear):
        noises = path_noises(ends, 3, way)
        assert len(noises) == 6
        for frame, end in zip((0, 2, 3, 5), ends, strict=True):
            torch.testing.assert_close(noises[frame].x, end.x)
        torch.testing.assert_close(noises[4].x, way(ends[2].x, ends[3].x, 0.5))


def test_a_path_is_as_long_as_its_frames_differ_and_counts_their_factors(reader: FaceReader) -> None:
    rows = sample_factors(face_seeds(1, 2))
    images = FaceRenderer()(rows[[0, 0, 0, 0, 1, 0]])  # a path of one face, and one to another and back
    states = torch.full((6, 3, 64, 64), 2.0)
    features = nn.Sequential(nn.AvgPool2d(16), nn.Conv2d(3, 5, 1)).requires_grad_(False)
    measures = measure_paths(images, states, 3, reader, features)
    assert measures["valid"] == [1.0] * 3
    assert measures["length of the noise"] == [2.0] * 3
    assert measures["factors changed on the way"] == [0.0, 2.0 * int((rows[0] != rows[1]).sum())]

    # unit features at each of 4x4 positions; two steps of half the way
    a, b = (F.normalize(features(images[index : index + 1].float() / 127.5 - 1), dim=1) for index in (3, 4))
    expected = 4 * float((a - b).square().sum(1).mean())
    assert measures["perceptual path length"] == pytest.approx([0.0, expected], abs=1e-4)


def test_local_contrast_is_the_deviation_within_windows() -> None:
    flat = torch.full((1, 3, 8, 8), 90, dtype=torch.uint8)
    stripes = flat.clone()
    stripes[..., ::2] = 110
    expected = (0.4 * 0.6 * 20**2) ** 0.5  # two of five columns, or three
    assert local_contrast(torch.cat([flat, stripes])).tolist() == pytest.approx([0.0, expected], abs=1e-2)


def test_the_interval_is_that_of_the_mean() -> None:
    assert with_interval([1.0, 2.0, 3.0, 4.0]) == "2.50 +- 1.27"  # 1.96 * 1.291 / 2


def test_both_figures_and_the_table_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = {name: dict.fromkeys(FACTORS, 0.25) | {"valid": 1.0} for name in ("eta 0", "eta 1", "another noise")}
    draw_changes(tmp_path / "factors.png", changed)
    path = {"valid": [1.0, 0.5, 1.0], "local contrast": [8.0, 6.0, 8.0], "length of the noise": [1.0, 0.7, 1.0]}
    paths = {"linear": path | {"perceptual path length": [1.0, 3.0], "factors changed on the way": [4.0, 4.0]}}
    draw_paths(tmp_path / "paths.png", paths, 3)
    print_paths(paths)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["valid,", "the", "middle", "one", "0.500"] for line in lines)
    assert any(line.split() == ["factors", "changed", "on", "the", "way", "4.00", "+-", "0.00"] for line in lines)
    assert min(open_image(tmp_path / f"{name}.png").shape[1] for name in ("factors", "paths")) > 300
