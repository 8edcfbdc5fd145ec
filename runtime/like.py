"""--like RECORD: the settings of an earlier run, and what differs from it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from runtime.cli import LIKE, RENAMED, BadInput, log
from runtime.files import ROOT, read_object
from runtime.validation import validate


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a record.json; raise BadInput for any other file."""
    record = read_object(path)
    if not isinstance(record.get("settings"), dict) or not isinstance(record.get("script"), str):
        raise BadInput(f"{LIKE} {path} is no record of a run: name the record.json that a script wrote")
    for name, kind in (("versions", dict[str, Any]), ("inputs", dict[str, Any]), ("root", str)):
        if name in record:  # records of an earlier version lack some
            validate(kind, record[name], f"{LIKE} {path}, {name}")
    return record


def settings_like(kind: Any, path: Path) -> Any:
    """Return the settings of a record of this script as `kind`, or as the subcommand closest to them if `kind` is a union.

    Log the settings that the record lacks. Raise BadInput for another script's record, and for a setting that no longer exists.
    """
    record, script = read_record(path), Path(sys.argv[0]).name
    if record["script"] != script:
        raise BadInput(f"{LIKE} {path} is a record of {record['script']}, not of {script}")
    values = _below_this_root(record["settings"], str(record.get("root", ROOT)))

    # of several subcommands, the one whose settings are most like the record's
    kind = min(get_args(kind) or (kind,), key=lambda each: len(values.keys() ^ {field.name for field in fields(each)}))
    if name := next(iter(_unknown(kind, values)), ""):
        flag = f"--{name.replace('_', '-')}"
        renamed = next((f", it is now {new}" for old, new in RENAMED if old == flag), "")
        raise BadInput(
            f"{LIKE} {path}: the setting {name} no longer exists{renamed}; remove or rename it in the record"
        )
    if absent := [field.name for field in fields(kind) if field.name not in values]:
        log(f"{LIKE} {path}: not in the record, and by default here: {', '.join(absent)}")
    return validate(kind, values, f"{LIKE} {path}, settings")


def _below_this_root(values: Any, root: str) -> Any:
    """Return settings with paths below `root`, the repository of that run, moved below this repository."""
    if isinstance(values, dict):
        return {name: _below_this_root(value, root) for name, value in values.items()}
    if isinstance(values, list):
        return [_below_this_root(value, root) for value in values]
    inside = isinstance(values, str) and values.startswith(root + os.sep)
    return str(ROOT) + values[len(root) :] if inside else values


def _unknown(kind: Any, values: Mapping[str, Any]) -> list[str]:
    """Return the names in `values` that are no fields of the dataclass `kind`, nor of the dataclasses in it."""
    names = {field.name for field in fields(kind)}
    hints = get_type_hints(kind)
    inner = {name: value for name, value in values.items() if is_dataclass(hints.get(name)) and isinstance(value, dict)}
    return [name for name in values if name not in names] + [
        name for place, value in inner.items() for name in _unknown(hints[place], value)
    ]


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one line for each version, part of the machine and input in which two records differ. `now` must hold settings."""
    there, here = _facts(then), _facts(now)
    lines = [
        f"{name} {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if "inputs" not in then:
        return [*lines, "it is of an earlier version, and does not say which data it had"]
    names = [
        name for name in {**then["inputs"], **now["inputs"]} if then["inputs"].get(name) != now["inputs"].get(name)
    ]
    return lines + [f"--{name.replace('_', '-')} holds other data than there{_place(now, name)}" for name in names]


def _place(record: Mapping[str, Any], name: str) -> str:
    """Return a hint that a setting's path is relative to the present folder, perhaps not the record's; "" if it is absolute."""
    value = record["settings"].get(name)
    paths = [str(path) for path in (value if isinstance(value, tuple) else (value,)) if path is not None]
    relative = next((path for path in paths if not Path(path.removeprefix("local-dir:")).is_absolute()), "")
    return f": {relative} is relative to the present folder, {Path.cwd()}" if relative else ""


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    machine = {name: record.get(name, "unknown") for name in ("device", "machine", "threads")}
    return {"code": record.get("revision"), **record.get("versions", {}), **machine}
