"""The benchmark of shape fidelity: its calibration rejects malformed objects, and its prompts ask for colours that stand out."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.p3_shape import Calibrate, coloured_prompts, main
from miniature.scenery.scenes import fits


def test_the_calibration_passes_right_objects_and_no_other_kinds(tmp_path: Path) -> None:
    main(Calibrate(count=6, device="cpu", record=tmp_path / "record.json"))
    rows = json.loads((tmp_path / "record.json").read_text())["metrics"]["rows"]
    assert min(row["passing"] for row in rows if row["images"] in ("rendered", "through the autoencoder")) >= 0.6
    assert max(row["passing"] for row in rows if row["images"] == "the other kinds") <= 0.05


def test_prompts_name_colours_that_stand_out() -> None:
    for prompt, colour, background in coloured_prompts("heart", 20, 0):
        assert fits(colour, background)
        assert f"{colour} heart on" in prompt
        assert prompt.endswith(f" {background} background")
