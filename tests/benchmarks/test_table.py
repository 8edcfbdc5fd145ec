"""The table of benchmarks: every number of every record, with mean, spread and where it comes from; limits of its GPU form."""

from __future__ import annotations

import importlib
import json
import shlex
import time
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from benchmarks import p3_composition, table
from benchmarks.table import (
    ENTRIES,
    GPU_ENTRIES,
    MARKS,
    Measurement,
    Settings,
    around_the_table,
    main,
    markdown,
    select,
    step_of,
)
from concepts.composition.multipath import ConductorConfig
from runtime.cli import BadInput
from runtime.device import detect
from runtime.files import ROOT
from runtime.record import Record

REPEATS = {"times faster": [40.0, 20.0], "accuracy, ours": [0.75]}


def command_of(name: str, output: Path) -> tuple[str | Path, ...]:
    (entry,) = select(Settings(only=(name,)), output)
    return step_of(entry, output).commands[-1]


def write_record(folder: Path, name: str) -> None:
    record = Record(Settings(), replace(detect("cpu"), name="a machine"), started="today")
    record.add_repeats(REPEATS)
    record.save(folder / name / "record.json")


def test_the_table_has_mean_spread_and_repeats_of_what_a_record_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(tmp_path, "p1_sampling")
    main(Settings(collect=True, output=tmp_path))
    text = (tmp_path / "table.md").read_text()
    assert "| times faster | 30 | 10 | 2 |" in text
    assert "| accuracy, ours | 0.75 | - | 1 |" in text
    assert f"`python benchmarks/p1_sampling.py`, a machine, torch {torch.__version__.split('+')[0]}" in text
    assert text.strip() == capsys.readouterr().out.strip()
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["what"], row["mean"], row["spread"]) for row in rows][0] == ("times faster", 30.0, 10.0)


def test_the_table_replaces_the_lines_between_two_marks_of_a_file(tmp_path: Path) -> None:
    write_record(tmp_path / "out", "p1_sampling")
    (results := tmp_path / "results.md").write_text(f"# Results\n\nmine\n{MARKS[0]}old\n{MARKS[1]}mine too\n")
    for _ in range(2):  # the second time over its own
        main(Settings(collect=True, output=tmp_path / "out", results=results))
    sections = (tmp_path / "out" / "table.md").read_text().replace("# Benchmarks\n\n", "").replace("\n## ", "\n### ")
    assert "\n### p1_sampling\n" in sections
    assert results.read_text() == f"# Results\n\nmine\n{MARKS[0]}\n{sections}\n{MARKS[1]}mine too\n"


@pytest.mark.parametrize("text", ["", "".join(reversed(MARKS)), 2 * "".join(MARKS), MARKS[0]])
def test_a_file_without_a_place_for_the_table_is_refused_before_measuring(text: str, tmp_path: Path) -> None:
    (results := tmp_path / "results.md").write_text(text)
    with pytest.raises(BadInput, match="--results .*results.md: needs one line <!-- make bench -->"):
        main(Settings(output=tmp_path / "out", results=results))
    assert results.read_text() == text
    assert not (tmp_path / "out").exists()


def test_make_bench_has_its_place_in_the_results() -> None:
    assert "--results docs/results.md" in (ROOT / "Makefile").read_text()
    assert around_the_table(ROOT / "docs" / "results.md")


def test_a_failed_benchmark_is_in_the_table() -> None:
    assert "Not measured: no digits" in markdown([], {"p1_training": "no digits"})


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--only nothing"):
        main(Settings(only=("nothing",), output=tmp_path))
    with pytest.raises(BadInput, match="no record"):
        main(Settings(collect=True, output=tmp_path))
    with pytest.raises(BadInput, match="--device cuda:99"):
        main(Settings(gpu=True, device="cuda:99", output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_courses_grades_are_of_what_the_same_table_learned(tmp_path: Path) -> None:
    """And nothing that was made by hand lies where the table clears up."""
    learned, graded = (command_of(name, tmp_path) for name in ("p3_concepts", "p3_course"))
    vectors = str(learned[learned.index("--folder") + 1])
    assert Path(vectors).parent == tmp_path / "p3_concepts"
    assert graded[graded.index("--concepts") + 1] == vectors
    assert select(Settings(only=("p3_course",)), tmp_path)[0].after == ("p3_concepts",)


@pytest.mark.parametrize("entry", [*ENTRIES, *GPU_ENTRIES], ids=lambda entry: entry.name)
def test_every_benchmark_has_a_quick_form_and_a_record_that_its_script_knows(entry: Measurement) -> None:
    """Every flag is a field of its settings."""
    fields = (ROOT / entry.command.split()[0]).read_text()
    words = f"{entry.command} {entry.quick} --record --device".split()
    flags = [word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")]
    assert entry.quick
    assert "record.add_repeats(" in fields
    assert all(f"    {flag}: " in fields for flag in flags)


def test_the_docs_say_how_long_all_parts_of_a_gpu_may_take() -> None:
    total = sum(entry.seconds or 0 for entry in GPU_ENTRIES)
    assert f"The limits of the parts add up to {total:g} s" in (ROOT / "docs" / "gpu.md").read_text()


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", [entry.name for entry in GPU_ENTRIES])
def test_a_gpus_command_parses_as_its_script_reads_it(name: str, quick: bool, tmp_path: Path) -> None:
    (entry,) = select(Settings(gpu=True, quick=quick, only=(name,), device="cpu"), tmp_path)
    script, *flags = map(str, step_of(entry, tmp_path).commands[-1])
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    kind: Any = next(iter(typing.get_type_hints(main).values()))
    settings: Any = tyro.cli(kind, args=flags, config=(tyro.conf.OmitArgPrefixes,))
    assert settings.device == "cpu"
    assert settings.record == tmp_path / name / "record.json"


def test_a_gpus_table_compares_fp16_with_fp32_and_what_auto_takes() -> None:
    commands = {entry.name: entry.command for entry in GPU_ENTRIES}
    assert all("--precisions auto fp32 fp16" in commands[name] for name in ("p1_precisions", "p3_speed"))
    assert "--precisions" not in commands["p2_ddim"]  # all that the GPU has


def test_a_change_of_the_code_measured_counts() -> None:
    inputs = {path.name for path in step_of(ENTRIES[-1], Path("x")).inputs}
    assert {"miniature", "checkpoints", "benchmarks"} <= inputs


def test_every_gpu_benchmark_is_stopped_at_its_limit_and_the_table_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first passes its own limit, the second is done, the third gets the rest of the time."""
    done = f"import json, sys; open(sys.argv[2], 'w').write(json.dumps({RECORD!r})); print(sys.argv)"
    sleep = "-c 'import time; time.sleep(60)'"
    entries = (
        Measurement("slow", sleep, "-", seconds=10),
        Measurement("fast", f"-c {shlex.quote(done)}", "-", seconds=60),
        Measurement("late", sleep, "-", seconds=60),
    )
    monkeypatch.setattr(table, "select", lambda settings, output: entries)
    monkeypatch.setattr(table, "GRACE", 3)
    start = time.monotonic()
    with pytest.raises(SystemExit):
        main(Settings(gpu=True, device="cpu", minutes=0.3, output=tmp_path))
    assert time.monotonic() - start < 0.3 * 60 + 10
    text = (tmp_path / "table.md").read_text()
    assert "## slow\n\nNot measured: stopped at its limit of 10 s" in text
    assert "| s | 1 | - | 1 |" in text
    assert "## late\n\nNot measured: " in text


RECORD: dict[str, Any] = {
    "machine": "a machine",
    "started": "today",
    "revision": "abc",
    "versions": {"torch": "2.0"},
    "metrics": {"repeats": {"s": [1.0]}},
}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cases": ()}, "--cases"),
        ({"levels": ()}, "--levels"),
        ({"ablation": True, "config": ConductorConfig(sketch=1)}, "--ablation"),
        ({"config": ConductorConfig(sketch=-1)}, "--sketch -1"),
        ({"model": "nowhere"}, "--model nowhere"),
    ],
)
def test_bad_flags_of_composition_are_named(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        p3_composition.main(p3_composition.Settings(device="cpu", record=tmp_path / "record.json", **flags))
    assert not list(tmp_path.iterdir())
