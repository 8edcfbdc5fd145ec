"""Ctrl-C while a script is still importing: one line and exit code 130."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.files import ROOT

FOLDERS = (".", "miniature", "benchmarks", "hw2_data")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in FILES if "    run_script(" in path.read_text()]
SCRIPTS.remove("benchmarks/mutants.py")  # imports nothing slow


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupt_during_the_imports_is_one_line(script: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, str(ROOT / script), "--help"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
