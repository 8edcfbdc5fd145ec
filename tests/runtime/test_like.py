"""--like: the settings of a record as a script's own, flags that count more, what differs, and one line for each bad record."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
import tyro

from P1_inference import Settings as DigitSettings
from P1_inference import main as draw_digits
from runtime.cli import Seed, run_script
from runtime.device import detect
from runtime.files import ROOT
from runtime.record import INPUTS, Record, path_fingerprint


@dataclass(frozen=True)
class Inner:
    sketch: float = 4.0
    parts: tuple[str, ...] = ("a", "b")


@dataclass(frozen=True)
class Settings:
    model: str
    """A setting without a default."""
    data: Path = ROOT / "hw2_data" / "digits"
    inner: Inner = field(default_factory=Inner)
    interval: tuple[float, float] = (0.0, 1.0)
    rule: Literal["ddim", "ddpm"] = "ddim"
    words: tuple[str, ...] = ()
    size: int | None = None
    resized: bool = False
    max_grad_norm: float = 1.0
    seed: Seed = 0
    output: Path = Path("out")


@dataclass(frozen=True)
class Grade:
    folder: Annotated[Path, tyro.conf.Positional]
    count: int = 3
    output: Path = Path("out")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs script.py on a command line: its settings (or exit code), and its lines on stderr.

    The script writes r.json.
    """

    def started(line: str, kind: Any = Settings, main: Any = None) -> tuple[Any, list[str]]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["script.py", *line.split()])
        runs: list[Any] = []

        def record(settings: Any) -> None:
            runs.append(settings)
            Record(settings, detect("cpu")).save(tmp_path / "r.json")

        with pytest.raises(SystemExit) as leaving:
            run_script(main or record, kind, "A test.")
        lines = capsys.readouterr().err.splitlines()
        return leaving.value.code or (runs[-1] if runs else None), lines

    return started


FLAGS = (
    "--model m --data d --sketch 2.5 --parts x y z --interval 0.25 0.5 --rule ddpm --size 7 --resized --max-grad-norm inf"
    " --seed 9 --output o"
)


def change(path: Path, **changes: Any) -> None:
    """Replace parts of a record; a function gets the part's value."""
    record = json.loads(path.read_text())
    for name, value in changes.items():
        record[name] = value(record[name]) if callable(value) else value
    path.write_text(json.dumps(record))


def test_every_setting_of_a_record_comes_back_and_flags_count_more(start: Callable[..., Any]) -> None:
    first, lines = start(FLAGS)
    assert not lines
    again, lines = start("--like r.json")
    assert again == first
    assert lines == ["--like r.json: the same versions, device and data"]
    other, _ = start("--size None --like=r.json --no-resized --parts q --seed 1")
    assert (other.size, other.resized, other.inner, other.seed) == (None, False, Inner(2.5, ("q",)), 1)
    assert (other.model, other.interval, other.rule, other.max_grad_norm) == ("m", (0.25, 0.5), "ddpm", float("inf"))


def test_a_list_without_values_takes_those_of_the_record_away(start: Callable[..., Any]) -> None:
    start("--model m --words a b")
    assert start("--like r.json --words")[0].words == ()
    assert start("--model m --words") == (2, ["error: --words: its value is missing"])


def test_a_record_of_a_subcommand_serves_this_subcommand(start: Callable[..., Any]) -> None:
    kind = Settings | Grade
    first, _ = start("grade f --count 5", kind)
    assert start("--like r.json", kind)[0] == first
    assert start("grade --like r.json --count 6", kind)[0] == Grade(Path("f"), 6)
    assert start("settings --model m --like r.json", kind) == (
        2, ["error: --like r.json is a record of another subcommand, with the settings of Grade"]
    )  # fmt: skip


def test_paths_in_the_repository_of_the_run_are_paths_in_this_one(start: Callable[..., Any], tmp_path: Path) -> None:
    start("--model m")
    moved = {"data": "/elsewhere/here/hw2_data/digits", "output": "/elsewhere/here2/x"}
    change(tmp_path / "r.json", root="/elsewhere/here", settings=lambda settings: settings | moved)
    again, _ = start("--like r.json")
    assert (again.data, again.output) == (Settings.data, Path("/elsewhere/here2/x"))


def test_what_differs_is_said_in_a_line_each(start: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").write_bytes(b"1")
    (tmp_path / "m").write_bytes(b"1")
    start("--model m --data d")
    versions = {"torch": "1.0", "gone": "2"}
    change(tmp_path / "r.json", versions=lambda old: old | versions, device="cuda", threads=64, revision="abc")
    (tmp_path / "d" / "a.png").write_bytes(b"2")  # of the same size
    version, revision = torch.__version__.split("+")[0], Record(Grade(Path("f")), detect("cpu")).facts()["revision"]
    _, lines = start("--like r.json")
    assert lines == [
        f"--like r.json: code abc there, {revision} here",
        f"--like r.json: torch 1.0 there, {version} here",
        "--like r.json: gone 2 there, absent here",
        "--like r.json: device cuda there, cpu here",
        f"--like r.json: threads 64 there, {torch.get_num_threads()} here",
        f"--like r.json: --data holds other data than there: d is relative to the present folder, {tmp_path}",
    ]


def test_a_whole_path_that_holds_other_data_is_said_without_the_folder(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    for name in ("m", "n"):
        (tmp_path / name).write_text(name)
    start(f"--model {tmp_path}/m --data d")
    assert start(f"--like r.json --model {tmp_path}/n")[1] == ["--like r.json: --model holds other data than there"]


def test_settings_that_a_record_lacks_are_named_and_an_earlier_version_says_nothing_of_data(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    start("--model m --size 4 --seed 3")
    record = json.loads((tmp_path / "r.json").read_text())
    del record["inputs"], record["settings"]["size"], record["settings"]["seed"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    again, lines = start("--like old.json")
    assert (again.size, again.seed) == (None, 0)
    assert lines == [
        "--like old.json: not in the record, and by default here: size, seed",
        "--like old.json: it is of an earlier version, and does not say which data it had",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"script": "P9.py"}, "--like r.json is a record of P9.py, not of script.py"),
        ({"settings": 3}, "--like r.json is no record of a run: name the record.json that a script wrote"),
        ({"settings": {"model": "m", "colour": 3}}, "--like r.json: the setting colour no longer exists; remove or"),
        (
            {"settings": {"model": "m", "clip": 3}},
            "the setting clip no longer exists, it is now --max-grad-norm; remove",
        ),
        ({"settings": {"model": "m", "inner": {"x": 1}}}, "--like r.json: the setting x no longer exists; remove or"),
        ({"settings": {}}, "--like r.json, settings, model is missing"),
        ({"versions": 5}, "--like r.json, versions: must be a valid dictionary, it is 5"),
        ({"versions": None}, "--like r.json, versions: must be a valid dictionary, it is None"),
        ({"inputs": 7}, "--like r.json, inputs: must be a valid dictionary, it is 7"),
        ({"root": None}, "--like r.json, root: must be a valid string, it is None"),
        ({"settings": {"model": "m", "size": "big"}}, "--like r.json, settings, size: must be a valid integer"),
        (
            {"settings": {"model": "m", "rule": "x"}},
            "--like r.json, settings, rule: must be 'ddim' or 'ddpm', it is 'x'",
        ),
        ({"settings": {"model": "m", "seed": -1}}, "--seed -1: a seed has 32 bits"),
    ],
)
def test_a_bad_record_is_one_line(
    changes: dict[str, Any], message: str, start: Callable[..., Any], tmp_path: Path
) -> None:
    start("--model m")
    change(tmp_path / "r.json", **changes)
    code, lines = start("--like r.json")
    assert code == 2
    assert [line for line in lines if "not in the record" not in line] == [lines[-1]]
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--like", "--like: its value is missing"),
        ("--like --seed 3", "--like: its value is missing"),
        ("--like none.json", "none.json does not exist"),
        ("--like text.json", "text.json is not valid JSON"),
        ("--like list.json", "list.json holds list, not an object"),
        ("--lik r.json", "--lik: there is no such flag, the closest is --like"),
    ],
)
def test_a_file_that_is_no_record_is_one_line(
    line: str, message: str, start: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "text.json").write_text("notes")
    (tmp_path / "list.json").write_text("[3]")
    code, lines = start(line)
    assert (code, len(lines)) == (2, 1)
    assert message in lines[0]


def test_the_help_names_the_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["script.py", "--help"])
    with pytest.raises(SystemExit):
        run_script(print, Settings, "A test.")
    assert "--like RECORD takes a record.json's settings; flags win." in capsys.readouterr().out


# ---------------------------------------------------------------- what is compared


def test_a_fingerprint_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    for place, name, content in (("a", "1", b"x"), ("b", "1", b"x"), ("c", "2", b"x"), ("d", "1", b"y")):
        (tmp_path / place / "in").mkdir(parents=True)
        (tmp_path / place / "in" / name).write_bytes(content)
        (tmp_path / place / ".hidden").write_text(place)
    marks = [path_fingerprint(tmp_path / place) for place in "abcd"]
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3


def test_of_many_files_names_and_sizes_count(tmp_path: Path) -> None:
    marks = []
    for content in (b"x", b"y", b"yy"):
        for number in range(201):
            (tmp_path / str(number)).write_bytes(content)
        marks.append(path_fingerprint(tmp_path))
    assert marks[0] == marks[1] != marks[2]


OUTPUTS = {
    *("cache", "downloads", "draw_layout", "export", "features", "figure", "grid", "output", "record", "run", "save_noise"),
}  # fmt: skip


def test_every_path_of_the_problems_scripts_is_read_or_written() -> None:
    """A new one belongs into runtime.record.INPUTS, if it is read."""
    for script in ROOT.glob("P?_*.py"):
        nodes = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ClassDef)]
        for node in (each for kind in nodes if kind.name in ("Settings", "Train", "Grade") for each in kind.body):
            if isinstance(node, ast.AnnAssign) and "Path" in ast.unparse(node.annotation):
                assert ast.unparse(node.target) in {*INPUTS, *OUTPUTS}, script.name


# ---------------------------------------------------------------- a real script


def test_digits_drawn_like_a_record_have_the_very_same_bytes(start: Callable[..., Any], tmp_path: Path) -> None:
    def run(line: str) -> list[str]:
        code, lines = start(line, DigitSettings, draw_digits)
        assert code is None, lines
        return [each for each in lines if each.startswith("--like")]

    few = "--count 2 --digits 3 7 --domains svhn --steps 2 --guidance 2.5 --retries 0 --seed 5 --batch 4"
    assert not run(f"{few} --output a --record a.json")
    assert run("--like a.json --output b --record b.json") == ["--like a.json: the same versions, device and data"]
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    settings = [json.loads((tmp_path / f"{name}.json").read_text())["settings"] for name in "ab"]
    assert settings[1] == settings[0] | {"output": "b", "record": "b.json"}
