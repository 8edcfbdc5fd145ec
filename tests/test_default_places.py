"""Default places in a repository that may not be written: a record is a courtesy, a result's place is named before any work."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

import P1_classifier
import P1_report
import P1_training
import P2_ddim
import P2_report
import P3_textual_inversion
import report
from miniature import diffusion_grading, train_autoencoder, train_diffusion, train_faces, world
from runtime.cli import BadInput


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file can be created below the repository and the current folder; permission bits would not bind root."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.chdir(tmp_path)
    for name in ("TemporaryFile", "mkstemp"):
        monkeypatch.setattr(f"tempfile.{name}", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)


CONCEPT: dict[str, Any] = {"model": "sd", "token": "<new1>", "images": Path("dog"), "init": "dog"}
RESULTS: list[tuple[Callable[[Any], None], Any]] = [
    (P1_training.main, P1_training.Settings()),
    (P1_classifier.main, P1_classifier.Train("svhn")),
    (P1_report.main, P1_report.Settings()),
    (P2_ddim.main, P2_ddim.Settings()),
    (P2_report.main, P2_report.Settings()),
    (P3_textual_inversion.main, P3_textual_inversion.Settings(**CONCEPT)),
    (report.main, report.Settings(quick=True)),
    (train_autoencoder.grade, train_autoencoder.GradeAutoencoder()),
    (train_diffusion.grade, diffusion_grading.GradeDiffusion()),
    (train_faces.grade, train_faces.GradeFaces()),
    (world.main, world.RenderSheet()),
]


@pytest.mark.usefixtures("read_only")
@pytest.mark.parametrize(("main", "settings"), RESULTS, ids=[type(settings).__module__ for _, settings in RESULTS])
def test_a_default_place_of_results_is_named_with_its_flag_before_the_work(
    main: Callable[[Any], None], settings: Any
) -> None:
    with pytest.raises(BadInput, match=r"^--output \S+ can't be written \(Permission denied\): name another place$"):
        main(settings)
