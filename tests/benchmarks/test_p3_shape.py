"""The benchmark of shape fidelity: malformed objects are rejected, prompts ask for colours that stand out, kinds are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_pipeline import WIDTH, save_pipeline
from torch import Tensor

from benchmarks.p3_shape import Between, Calibrate, coloured_prompts, main, renders
from concepts.embeddings import file_of, save_vectors
from concepts.sampling import Request
from miniature.scenery.scenes import fits
from runtime.cli import BadInput


@pytest.mark.parametrize(("style", "fidelity"), [("flat", (0.8, 1)), ("ripple", (0.5, 0.8))])
def test_the_calibration_passes_right_objects_and_no_other_kinds(
    style: str, fidelity: tuple[float, float], tmp_path: Path
) -> None:
    """Ripples bend outlines, so fidelity is lower, of right objects too."""
    main(Calibrate(count=6, style=style, device="cpu", record=tmp_path / "record.json"))
    rows = json.loads((tmp_path / "record.json").read_text())["metrics"]["rows"]
    assert min(row["passing"] for row in rows if row["images"] in ("rendered", "through the autoencoder")) >= 0.6
    assert max(row["passing"] for row in rows if row["images"] == "the other kinds") <= 0.05
    means = [row["fidelity"] for row in rows if row["images"] == "through the autoencoder"]
    assert fidelity[0] < sum(means) / len(means) < fidelity[1]


def test_the_calibration_refuses_an_unknown_style(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--style cubist: the miniature has flat, outline"):
        main(Calibrate(style="cubist", device="cpu", record=tmp_path / "record.json"))


def test_prompts_name_colours_that_stand_out() -> None:
    for prompt, colour, background in coloured_prompts("heart", 20, 0):
        assert fits(colour, background)
        assert f"{colour} heart on" in prompt
        assert prompt.endswith(f" {background} background in the style of flat")


def test_what_is_seen_between_two_words_is_counted_by_kind_and_fraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins are renders: the first kind, squares between, the second kind."""
    for index, kind in enumerate(("fish", "cup")):
        vectors = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(index))
        save_vectors(file_of(tmp_path / "learned", f"<{kind}>"), f"<{kind}>", vectors, "test")
    rows: list[list[Request]] = []

    def rendered(_sampler: Any, requests: list[Request]) -> Tensor:
        rows.append(requests)
        return torch.cat([renders(kind, 1, requests[0].seed) for kind in ("fish", "square", "cup")])

    monkeypatch.setattr("concepts.sampling.StableDiffusionSampler.sample_images", rendered)
    model, sheet, record = save_pipeline(tmp_path / "model"), tmp_path / "sheet.png", tmp_path / "record.json"
    main(Between(tmp_path / "learned", str(model), steps=3, count=2, device="cpu", sheet=sheet, record=record))
    results = json.loads(record.read_text())["metrics"]["rows"]
    assert [(row["pair"], row["fraction"]) for row in results] == [
        (["fish", "cup"], fraction) for fraction in ("0.00", "0.50", "1.00")
    ]
    assert [row["seen"] for row in results] == [
        {"fish": 1.0, "cup": 0.0, "another": 0.0},
        {"fish": 0.0, "cup": 0.0, "another": 1.0},
        {"fish": 0.0, "cup": 1.0, "another": 0.0},
    ]
    assert results[0]["fidelity"]["fish"] > 0.85 > results[0]["fidelity"]["cup"]
    assert results[2]["fidelity"]["cup"] > 0.85 > results[2]["fidelity"]["fish"]
    assert sheet.is_file()
    for requests in rows:
        first, middle, last = requests
        assert first.seed == middle.seed == last.seed
        assert first.prompt.replace("<fish>", "<cup>") == last.prompt
        assert first.prompt.replace("<fish>", "<1|2|fish|cup>") == middle.prompt
    assert rows[0][0].seed != rows[1][0].seed


@pytest.mark.parametrize(("flags", "message"), [({}, "holds fewer than two of <key>"), ({"steps": 1}, "--steps 1")])
def test_between_needs_two_objects_and_two_steps(tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        main(Between(tmp_path, **flags, device="cpu", record=tmp_path / "record.json"))
