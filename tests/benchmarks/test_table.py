"""The table of benchmarks: every number of every record, with mean, spread and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import p3_composition
from benchmarks.table import BENCHES, Benchmark, Settings, main, markdown, rows_of, step_of
from concepts.composition.multipath import ConductorConfig
from runtime.cli import BadInput
from runtime.files import ROOT

RECORD: dict[str, Any] = {
    "machine": "a machine", "started": "today", "revision": "abc", "versions": {"torch": "2.0"},
    "metrics": {"default_s": [1.0, 3.0], "ddpm_s": 40.0, "ratio": [40.0, 20.0], "accuracy": {"ours": [1.0, 0.5], "ddpm": [1.0, 1.0]}},
}  # fmt: skip


INVERSION = {
    "plain_s": [2.0],
    "ours_s": [1.0],
    "ratios": [2.0],
    "cpu_ratios": [1.9],
    "precision": "fp32",
    "gradient_difference": 1e-7,
}


def bench(name: str) -> Benchmark:
    return next(one for one in BENCHES if one.name == name)


def write(folder: Path, name: str, record: dict[str, Any]) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "record.json").write_text(json.dumps(record))


def test_rows_have_mean_spread_and_repeats() -> None:
    rows = {row.what: row for row in rows_of(bench("p1_sampling"), RECORD)}
    assert (rows["times faster"].mean, rows["times faster"].spread, rows["times faster"].repeats) == (30.0, 10.0, 2)
    assert rows["accuracy, ours"].mean == 0.75
    assert (rows["times faster"].machine, rows["times faster"].torch) == ("a machine", "2.0")


def test_the_table_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "p1_sampling", RECORD)
    main(Settings(collect=True, output=tmp_path))
    text = (tmp_path / "table.md").read_text()
    assert "| times faster | 30 | 10 | 2 |" in text
    assert "`python benchmarks/p1_sampling.py`, a machine, torch 2.0, revision abc, today" in text
    assert text.strip() == capsys.readouterr().out.strip()
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 5


def test_a_failed_benchmark_is_in_the_table() -> None:
    assert "Not measured: no digits" in markdown([], {"p1_training": "no digits"})


@pytest.mark.parametrize(
    ("name", "metrics", "what", "values"),
    [
        ("p1_accuracy", {"as drawn": [{"seconds": 1.0}, {"seconds": 2.0}]}, "as drawn: seconds", [1.0, 2.0]),
        ("p1_training", {"images_per_s": {"ours": [3.0]}, "ratio": [1.5]}, "times faster", [1.5]),
        (
            "p2_ddim",
            {"fp32": {"rows": [{"baseline_s": 4.0, "ours_s": 2.0, "baseline_gb": 1.0, "ours_gb": 1.0}], "ratio": [2.0], "mse": 0.1}},
            "fp32: times faster",
            [2.0],
        ),
        (
            "p3_clip",
            {"images_per_s": {"batched": [9.0], "image": [3.0], "pair": [1.0]}, "ratio": {"pair": [9.0]}, "first_s": 8.0, "cached_s": 2.0},
            "second run, times faster",
            [4.0],
        ),
        ("p3_speed", INVERSION, "times faster", [2.0]),
        (
            "p3_concepts",
            {"rates": {"object": {"1 vector": [0.5, 1.0], "initial word": [0.25]}}},
            "object: 1 vector",
            [0.5, 1.0],
        ),
        ("p3_course", {"cases": [{"passed": True}, {"passed": False}], "margin": [1.2, -0.3]}, "share of cases passed", [1.0, 0.0]),
        ("p3_composition", {"two": {"joint": 0.1, "conductor": 0.9}}, "two: conductor", [0.9]),
    ],
)  # fmt: skip
def test_the_numbers_of_each_record(name: str, metrics: dict[str, Any], what: str, values: list[float]) -> None:
    assert bench(name).values(metrics)[what] == values


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--only nothing"):
        main(Settings(only=("nothing",), output=tmp_path))
    with pytest.raises(BadInput, match="no record"):
        main(Settings(collect=True, output=tmp_path))


def test_the_courses_grades_are_of_what_the_same_table_learned(tmp_path: Path) -> None:
    """And nothing that was made by hand lies where the table clears up."""
    (*_, learned), (*_, graded) = (step_of(bench(name), tmp_path).commands for name in ("p3_concepts", "p3_course"))
    vectors = learned[learned.index("--folder") + 1]
    assert Path(vectors).parent == tmp_path / "p3_concepts"
    assert graded[graded.index("--concepts") + 1] == vectors
    assert step_of(bench("p3_course"), tmp_path).after == ("p3_concepts",)


@pytest.mark.parametrize("name", [bench.name for bench in BENCHES])
def test_every_benchmark_has_a_quick_form_that_its_script_knows(name: str) -> None:
    """Every flag is a field of its settings."""
    fields = (ROOT / bench(name).command[0]).read_text()
    flags = [word.removeprefix("--").replace("-", "_") for word in bench(name).quick.split() if word.startswith("--")]
    assert flags
    assert all(f"    {flag}: " in fields for flag in flags)


def test_a_change_of_the_code_measured_counts() -> None:
    read = {path.name for path in step_of(bench("p3_composition"), Path("x")).reads}
    assert {
        "concepts/composition/multipath.py",
        "concepts/composition/first_noise.py",
        "miniature",
        "checkpoints",
        "benchmarks",
    } <= read


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cases": ()}, "--cases"),
        ({"levels": ()}, "--levels"),
        ({"ablation": True, "means": ConductorConfig(sketch=1)}, "--ablation"),
        ({"means": ConductorConfig(sketch=-1)}, "--sketch -1"),
        ({"model": "nowhere"}, "--model nowhere"),
    ],
)
def test_bad_flags_of_composition_are_named(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        p3_composition.main(p3_composition.Settings(device="cpu", output=tmp_path / "record.json", **flags))
    assert not list(tmp_path.iterdir())
