"""The commands on a page, parsed as their scripts parse them."""

from __future__ import annotations

import importlib
import re
import shlex
import typing
from typing import Any

import pytest
import tyro

from runtime.cli import split_like
from runtime.files import ROOT

STARTS = ("python ", "torchrun ", "accelerate launch ", "sbatch ")


def commands_in(text: str) -> list[list[str]]:
    """Return [script, argument, ..] of every line that starts a script, without the remark behind it."""
    commands = []
    for line in text.splitlines():
        line = line.strip().lstrip("`")
        if line.startswith(STARTS):
            command = re.split(r"\s{2,}|`|\s#\s", line)[0]
            words = shlex.split(command.replace("%a", "1"))  # the number of an array's task
            script = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
            if script is not None:
                commands.append(words[script:])
    return commands


def parse(command: list[str]) -> None:
    """Parse the arguments as the script does, without running it."""
    path = (ROOT / command[0]).resolve()
    assert path.is_file(), f"{command[0]} does not exist"
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    main = importlib.import_module(name).main
    kind: Any = next(iter(typing.get_type_hints(main).values()))
    try:
        tyro.cli(kind, args=split_like(command[1:])[0], config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as error:
        pytest.fail(f"{shlex.join(command)}: refused ({error.code})")
