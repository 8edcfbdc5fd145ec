"""Atomic writes, checks of paths, and safe reading of JSON and tensor files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.cli import BadInput

ROOT = Path(__file__).resolve().parents[1]  # of the repository


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces `path`, on any error `path` stays unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON, atomically; values that JSON lacks become text."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; raise BadInput with the line of a syntax error."""
    try:
        return json.loads(require_file(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from None


def require_file(path: Path, hint: str = "") -> Path:
    """Return `path` if it is a file; else raise BadInput that ends with the hint."""
    if not Path(path).is_file():
        kind = "is a folder, not a file" if Path(path).is_dir() else "does not exist"
        raise BadInput(f"{path} {kind}" + (f"; {hint}" if hint else ""))
    return Path(path)


def output_folder(path: Path) -> Path:
    """Create the folder; raise BadInput as `check_writable_folder` does."""
    check_writable_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_writable_folder(path: Path) -> None:
    """Raise BadInput if a file is in the way, or for a folder of the repository's own source, which an output would mix with."""
    if not _existing(path).is_dir():
        raise BadInput(f"output {path}: a file is in the way, name a folder")
    resolved = path.resolve()
    for init in ROOT.glob("*/__init__.py"):
        if init.parent in (resolved, *resolved.parents):
            raise BadInput(
                f"output {resolved}: {init.parent.name}/ holds this repository's source, name another folder"
            )


def check_writable_file(path: Path, flag: str) -> None:
    """Raise BadInput if no file can be written: `path` is a folder, or one of its parents is a file. Write nothing."""
    if path.is_dir():
        raise BadInput(f"{flag} {path} is a folder: name a file")
    if not (place := _existing(path.parent)).is_dir():
        raise BadInput(f"{flag} {path}: {place} is a file, name a folder")


def check_disk_space(output: Path, needed: int) -> int:
    """Return the free bytes on the disk of the folder `output`; raise BadInput if `needed` bytes do not fit."""
    free = shutil.disk_usage(_existing(output)).free
    if free < needed:
        raise BadInput(f"output {output}: {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
    return free


def _existing(path: Path) -> Path:
    """Return the path or its nearest parent that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def file_fingerprint(path: Path) -> str:
    """Return a hash of a file's size and of its first, middle and last MiB, which identifies weights independent of their path."""
    piece, size = 1 << 20, require_file(path).stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=12)
    with open(path, "rb") as file:
        for start in (0, size // 2, max(0, size - piece)):
            file.seek(start)
            digest.update(file.read(piece))
    return digest.hexdigest()


def load_tensors(path: Path, mapped: bool = False) -> Any:
    """Load a torch file on the CPU without running code in it; raise BadInput if it is truncated or holds code.

    With `mapped` (zip files only) the tensors stay in the file until they are used.
    """
    try:
        return torch.load(require_file(path), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise BadInput(f"{path} holds more than tensors (a pickle with code?): refused") from None
        raise BadInput(f"{path} is not a torch file or is truncated") from None
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, struct.error) as error:
        if getattr(error, "filename", None):  # such as no permission: the system's message is clear
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0][:120]
        raise BadInput(f"{path} is not a torch file or is truncated ({reason})") from None


def load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file and its metadata; raise BadInput if it is truncated."""
    try:
        with safe_open(require_file(path), framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise BadInput(f"{path} is not a safetensors file or is truncated ({error})") from None


def save_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, atomically; raise OSError if the disk is full, as every other writer does."""
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"could not write {path} (disk full?): {error}") from None
