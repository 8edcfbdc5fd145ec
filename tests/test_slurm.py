"""slurm/*.sbatch, run by bash in the place of sbatch: signals before the end, going back to the queue, tasks of an array."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from runtime.files import ROOT

TINY = (
    "--preset tiny --device cpu --precision fp32 --compile off --batch 8 --warmup 2 --steps 120 --save-every 4 --log-every 5"
    " --eval-every 0 --eval-count 1 --final-count 1"
)


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    """Return a folder whose bin/scontrol writes its arguments to `calls`, and whose bin/python is this one."""
    (tmp_path / "bin").mkdir()
    for name, lines in (
        ("scontrol", f'echo "$@" >> "{tmp_path}/calls"'),
        ("python", f'exec "{sys.executable}" "$@"'),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def submit(queue: Path, job: str, *arguments: str, folder: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PATH": f"{queue / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = ["bash", str(ROOT / "slurm" / job), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    errors = process.communicate(timeout=300)[1]
    return process.returncode, errors


def calls(queue: Path) -> str:
    return (queue / "calls").read_text() if (queue / "calls").exists() else ""


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "ended before the signal"


@pytest.mark.slow
def test_a_training_whose_time_is_up_is_requeued_and_ends_as_one_without_a_stop(
    queue: Path, digits_folder: Path
) -> None:
    def train(name: str) -> subprocess.Popen[str]:
        flags = ["--data", str(digits_folder), "--output", str(queue / name), *TINY.split()]
        return submit(queue, "train.sbatch", "P1_training.py", *flags)

    def parts(name: str) -> dict[str, torch.Tensor]:
        parts = torch.load(queue / name / "checkpoint.pt", weights_only=True)["parts"]
        return {key: value for part in ("model", "ema") for key, value in parts[part].items()}

    first = train("broken")
    wait_for(queue / "broken" / "checkpoint.pt", first)
    first.send_signal(signal.SIGUSR1)  # to the shell alone, as --signal=B:USR1 does
    code, errors = finish(first)
    assert (code, calls(queue)) == (130, "requeue 17\n"), errors
    step = torch.load(queue / "broken" / "checkpoint.pt", weights_only=True)["step"]
    assert f"stopped at step {step}; the same command goes on" in errors
    assert 0 < step < 120

    code, errors = finish(train("broken"))
    assert (code, calls(queue)) == (0, "requeue 17\n"), errors
    assert f"going on at step {step} " in errors
    assert finish(train("whole"))[0] == 0
    broken, whole = parts("broken"), parts("whole")
    assert broken.keys() == whole.keys()
    assert all(torch.equal(broken[key], whole[key]) for key in whole)


# a training in place of the real ones: ready once the file exists, then it does what the test wants on a signal
STAND_IN = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGUSR1, {on_usr1})
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
Path("ready").write_text(" ".join(sys.argv))
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("on_usr1", "sent", "code", "requeued"),
    [
        ("lambda *_: sys.exit(130)", signal.SIGUSR1, 130, True),
        ("signal.SIG_DFL", signal.SIGUSR1, 138, True),  # still importing
        ("lambda *_: sys.exit(0)", signal.SIGUSR1, 0, False),  # it was done
        ("lambda *_: sys.exit(2)", signal.SIGUSR1, 2, False),  # bad input would fail again, without an end
        ("lambda *_: sys.exit(1)", signal.SIGTERM, 130, False),  # scancel; after a preemption SLURM requeues by itself
    ],
)
def test_only_a_training_stopped_before_its_end_goes_back_to_the_queue(
    queue: Path, on_usr1: str, sent: signal.Signals, code: int, requeued: bool
) -> None:
    (queue / "training.py").write_text(STAND_IN.format(on_usr1=on_usr1))
    process = submit(queue, "train.sbatch", "training.py", "--prompt", "a b", folder=queue)
    wait_for(queue / "ready", process)
    process.send_signal(sent)
    assert finish(process)[0] == code
    assert calls(queue) == ("requeue 17\n" if requeued else "")


@pytest.mark.parametrize(("program", "code"), [("", 0), ("raise SystemExit(2)", 2)])
def test_a_training_that_ends_by_itself_gives_its_exit_code(queue: Path, program: str, code: int) -> None:
    (queue / "training.py").write_text(program)
    assert finish(submit(queue, "train.sbatch", "training.py", folder=queue))[0] == code
    assert not calls(queue)


@pytest.mark.parametrize(
    ("task", "arguments"),
    [("3", "--seed 3 --output out/3/3 --record=a_3.json"), ("", "--seed %a --output out/%a/%a --record=a_%a.json")],
)
@pytest.mark.parametrize("suffix", ["py", "sh"])
def test_a_task_of_an_array_has_its_number_in_its_arguments(
    queue: Path, task: str, arguments: str, suffix: str
) -> None:
    program = {"py": "import sys\nprint(*sys.argv[1:], sep='|', file=sys.stderr)", "sh": 'IFS="|"; echo "$*" >&2'}
    (queue / f"script.{suffix}").write_text(program[suffix])
    texts = ["--prompt", "a & {} 100 %", "a 100%acid <new1>", "100%a\nb"]
    words = [*texts, "--seed", "%a", "--output", "out/%a/%a", "--record=a_%a.json"]
    variables = {"SLURM_ARRAY_TASK_ID": task} if task else {}
    code, errors = finish(submit(queue, "generate.sbatch", f"script.{suffix}", *words, folder=queue, **variables))
    assert (code, errors) == (0, "|".join([*texts, *arguments.split()]) + "\n")


def test_a_drawing_whose_time_is_up_receives_the_signal(queue: Path) -> None:
    (queue / "drawing.py").write_text(STAND_IN.format(on_usr1="lambda *_: sys.exit(130)"))
    process = submit(queue, "generate.sbatch", "drawing.py", folder=queue)
    wait_for(queue / "ready", process)
    process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 130
    assert not calls(queue)


@pytest.mark.parametrize("job", ["train.sbatch", "generate.sbatch"])
@pytest.mark.parametrize("arguments", [[], ["P9_nothing.py"]])
def test_a_script_that_is_not_there_is_one_line(queue: Path, job: str, arguments: list[str]) -> None:
    code, errors = finish(submit(queue, job, *arguments))
    assert code == 2
    assert errors.startswith(f"error: {(arguments or ['no script'])[0]}: no such file here")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("job", "script", "message"),
    [
        ("train.sbatch", "hw2_1.sh", "a training is a .py file; hw2_*.sh go with slurm/generate.sbatch"),
        ("train.sbatch", "README.md", "a training is a .py file; hw2_*.sh go with slurm/generate.sbatch"),
        ("generate.sbatch", "README.md", "neither a .py nor a .sh file"),
    ],
)
def test_a_file_that_is_no_script_is_one_line(queue: Path, job: str, script: str, message: str) -> None:
    assert finish(submit(queue, job, script, "out")) == (2, f"error: {script}: {message}\n")
