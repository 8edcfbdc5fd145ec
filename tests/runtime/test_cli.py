"""The command line: one line and an exit code for every error, renamed flags refused, one process that prints."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tyro

from runtime.cli import (
    BadInput,
    Seed,
    check_fractions,
    check_not_negative,
    check_positive,
    log,
    progress,
    progress_bar,
    refuse_files_called_none,
    refuse_renamed_flags,
    run_script,
)
from runtime.files import ROOT

SCRIPT = """
from dataclasses import dataclass
from runtime.cli import BadInput, progress, run_script

@dataclass(frozen=True)
class Settings:
    size: int = 3

def main(settings):
    print(settings.size)
    {body}

run_script(main, Settings, "A test.")
"""


def run(body: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a script whose main ends with `body`."""
    environment = {k: v for k, v in os.environ.items() if k != "DEBUG"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT.format(body=body), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("arguments", [["--noise", "None"], ["--noise=None"]])
def test_a_folder_called_none_is_not_taken_for_an_unset_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_files_called_none(arguments)
    (tmp_path / "None").mkdir()
    with pytest.raises(BadInput, match=r"write|as \./None"):
        refuse_files_called_none(arguments)
    refuse_files_called_none(["--noise", "./None"])


def test_a_script_that_succeeds_exits_with_0_and_an_empty_stderr() -> None:
    done = run("pass", "--size", "5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise BadInput('x.csv, row 3: bad')", 2, "error: x.csv, row 3: bad\n"),
        ("open('no/such/file')", 2, "error: [Errno 2] No such file or directory: 'no/such/file'\n"),
        (
            "raise MemoryError",
            2,
            "error: out of memory: give a smaller --batch, fewer or smaller pictures (Python)\n",
        ),
        (
            "raise RuntimeError('Storage size calculation overflowed with sizes=[9]')",
            2,
            "error: out of memory: give a smaller --batch, fewer or smaller pictures"
            " (Storage size calculation overflowed with sizes=[9])\n",
        ),
        (
            "raise RuntimeError(\"Symlink loop from 'a'\")",
            2,
            "error: 'a' is a link that leads to itself: name another place\n",
        ),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
    ],
    ids=["bad input", "OSError", "memory", "overflow", "link", "interrupt"],
)
def test_an_error_is_one_line_and_an_exit_code(body: str, code: int, line: str) -> None:
    done = run(body)
    assert (done.returncode, done.stderr) == (code, line)


def test_an_error_has_a_separate_line_after_a_progress_bar() -> None:
    done = run("bar = progress(['a.png', 'b.png'], 'reading'); bar.update(); raise BadInput('a.png: bad')")
    assert "reading: " in done.stderr
    assert done.stderr.endswith("\nerror: a.png: bad\n")


@dataclass(frozen=True)
class Train:
    domain: Literal["mnistm", "svhn"]
    size: int = 3
    share: float | None = None
    overwrite: bool = False
    folds: tuple[Literal[1, 2], ...] = (1,)
    more: tuple[int, ...] = ()


@dataclass(frozen=True)
class Grade:
    folder: Annotated[Path, tyro.conf.Positional]
    """The graded folder."""
    record: Path | None = None
    model: Annotated[str, tyro.conf.arg(aliases=["--checkpoint"])] = "m"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("train --domain x", "--domain x: choose one of mnistm, svhn"),
        ("train --domain svhn --folds 1 3", "--folds 3: choose one of 1, 2"),
        ("train --domain svhn --sise 3", "--sise: there is no such flag, the closest is --size"),
        ("train --domain svhn --zzz " + "/a/long/path" * 20, "--zzz: there is no such flag"),
        ("train --sise=3", "--sise: there is no such flag, the closest is --size"),
        ("train --domain svhn --size x", "--size x: must be a whole number"),
        ("train --domain svhn --size=a=b", "--size a=b: must be a whole number"),
        ("train --domain svhn --size=1.5 --overwrite", "--size 1.5: must be a whole number"),
        ("train --domain svhn --share " + "x" * 200, f"--share {'x' * 200}: must be None or a number"),
        ("train --domain svhn --overwrite yes", "yes: no flag takes this value"),
        ("train --domain", "--domain: its value is missing"),
        ("train --domain svhn --more", "--more: its value is missing"),
        ("train --more --domain svhn", "--more: its value is missing"),
        ("train --domain svhn --record x", "--record: script.py train has no such flag"),
        ("grade", "Missing from script.py grade: PATH The graded folder. (required)"),
        ("grade a b", "b: no flag takes this value"),
        ("grade --checkpont x", "--checkpont: there is no such flag, the closest is --checkpoint"),
        ("grade --foldr x", "--foldr: there is no such flag, the closest is --folds"),  # not the positional folder
        ("", "Expected one of {train, grade}."),
        ("--domain svhn --overwrite", "--domain: name a command first, one of train, grade"),
        ("trian", "trian: name a command first, one of train, grade"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_bad_flag_is_one_line_that_names_it_and_the_way_on(
    command: str, line: str, encoding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    union: Any = Train | Grade
    monkeypatch.setattr(sys, "argv", ["script.py", *command.split()])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))  # which the frames' form depends on
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda _: None, union, "A test.")
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("flags", [["--record", ""], ["--record="], ["--record", ".", "--record", ""]])
def test_an_empty_path_is_not_taken_for_the_current_folder(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "a", *flags])
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda _: None, Grade, "A test.")
    assert capsys.readouterr().err == "error: --record is empty: name a file or folder (. for the current one)\n"
    monkeypatch.setattr(sys, "argv", ["script.py", "a", "--record", ".", "--model", ""])
    with pytest.raises(SystemExit, match="0"):
        run_script(lambda _: None, Grade, "A test.")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_help_is_printed_once_in_the_terminals_width(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit, match="0"):
        run_script(lambda _: None, Train, "A test.")
    printed = capsys.readouterr().out
    assert ("--size" in printed) == (rank == "0")
    assert max(map(len, printed.splitlines()), default=0) <= 60


def test_a_stdout_of_another_encoding_ends_no_finished_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("print('o/' + chr(233), chr(0x732b))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\no/\\xe9 \\u732b\n", "")


def test_a_bug_keeps_its_traceback() -> None:
    done = run("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@dataclass(frozen=True)
class Sampling:
    guidance_rescale: float = 0.0
    max_loss_weight: float = 1.0


@dataclass(frozen=True)
class Personalization:
    sampling: Sampling = field(default_factory=Sampling)
    clip: str = "a CLIP"


@dataclass(frozen=True)
class Other:
    size: int = 3


@pytest.mark.parametrize("arguments", [["--rescale", "0.3"], ["--rescale=0.3"]], ids=["two words", "one word"])
@pytest.mark.parametrize(
    "settings", [Sampling, Personalization, Other | Personalization], ids=["own", "nested", "subcommand"]
)
def test_an_old_flag_is_one_line_that_names_the_new_one(
    settings: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    with pytest.raises(SystemExit) as error:
        run_script(lambda _: None, settings, "A test.")
    assert error.value.code == 2
    assert capsys.readouterr().err == "error: --rescale is now --guidance-rescale\n"


def test_an_old_flag_may_be_written_with_underscores() -> None:
    with pytest.raises(BadInput, match="^--most-weight is now --max-loss-weight$"):
        refuse_renamed_flags(["--most_weight", "3"], Sampling)


@pytest.mark.parametrize("flag", ["--clip", "--rescale"], ids=["the old name is in use", "no new name"])
def test_a_script_without_the_renamed_flag_keeps_its_own(flag: str) -> None:
    refuse_renamed_flags([flag, "x"], Personalization if flag == "--clip" else Other)


@pytest.mark.parametrize(
    ("check", "valid", "refused"),
    [
        (check_positive, [1, 0.5], [0, -1, math.inf, math.nan]),
        (check_not_negative, [0, 2.5], [-1, math.inf, math.nan]),
        (check_fractions, [0, 0.5, 1, None], [-0.1, 1.1, math.nan]),
    ],
)
def test_a_number_out_of_range_is_named_with_its_flag(check: Any, valid: list[Any], refused: list[Any]) -> None:
    for value in valid:
        check(Sampling(value), "guidance_rescale")
    for value in refused:
        with pytest.raises(BadInput, match=f"^--guidance-rescale {value}: "):
            check(Sampling(value), "guidance_rescale")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_prints(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    log("a line")
    list(progress([1], "items"))
    with progress_bar(2, "images") as bar:
        bar.update(2)
    printed = capsys.readouterr().err
    assert all((text in printed) == (rank == "0") for text in ("a line", "items", "images"))


@dataclass(frozen=True)
class Seeded:
    seed: Seed = 0
    seeds: tuple[int, ...] = (0, 1)


@pytest.mark.parametrize("flag", ["--seed", "--seeds"])
@pytest.mark.parametrize("seed", [str(2**32), "-1", "1" * 60])
def test_a_seed_beyond_32_bits_is_one_line(
    flag: str, seed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", flag, seed])
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda _: None, Seeded, "A test.")
    assert capsys.readouterr().err == f"error: {flag} {seed}: a seed has 32 bits, give 0 .. 4294967295\n"


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_a_seed_of_32_bits_reaches_the_script(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(sys, "argv", ["script.py", "--seed", str(seed)])
    with pytest.raises(SystemExit, match="0"):
        run_script(lambda settings: seeds.append(settings.seed), Seeded, "A test.")
    assert seeds == [seed]


@pytest.mark.parametrize("flags", [("--size", "x"), ("--sise", "5"), ("--size", "-1")])
def test_bad_flags_of_several_processes_are_reported_once(flags: tuple[str, str], tmp_path: Path) -> None:
    body = "if settings.size < 0: raise BadInput('--size: too small')"
    (tmp_path / "script.py").write_text(SCRIPT.format(body=body))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), *flags],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.stderr.count("error: --si") == 1


def test_a_process_whose_peer_ended_says_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: Other) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:12345")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr("runtime.cli.WAIT_FOR_MAIN", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        run_script(main, Other, "A test.")
    assert capsys.readouterr().err == "error: another process of this run ended\n"
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match="closed by peer"):
        run_script(main, Other, "A test.")


def test_an_error_of_one_process_alone_is_shown_with_its_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: Other) -> None:
        raise BadInput("a.png: bad")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr("runtime.cli.WAIT_FOR_MAIN", 0.0)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        run_script(main, Other, "A test.")
    assert capsys.readouterr().err == "error: process 1: a.png: bad\n"
