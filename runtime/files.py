"""Atomic writes, checks of paths, and safe reading of JSON and tensor files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
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
    """Yield a temporary path next to `path`; on success it replaces `path`, on any error `path` stays unchanged.

    A link is followed to its target; devices and pipes are written into. A failure, such as a full disk, is an OSError that names `path`.
    """
    stream, target = _is_stream(path), Path(os.path.realpath(path))
    temporary = None
    try:
        if target.is_dir() or target.is_symlink():  # a link that is left leads to itself
            raise OSError(errno.EISDIR if target.is_dir() else errno.ELOOP, "")
        if not stream:
            target.parent.mkdir(parents=True, exist_ok=True)
        place = None if stream else target.parent
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=place)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        if stream:
            with open(_open_stream(path), "wb") as output:
                output.write(temporary.read_bytes())
            return
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files
        os.replace(temporary, target)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(target)) and temporary:
            raise  # of another file, read while this one was written
        raise _named(error, path) from None
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|unexpected pos", str(error)):
            raise
        raise OSError(f"could not write {path} (disk full?): {str(error).splitlines()[0]}") from None
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def _named(error: OSError, path: Path) -> OSError:
    """Return the error about `path`, not about the temporary file."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OSError(error.errno or errno.EIO, reason, str(path))


def _is_stream(path: Path) -> bool:
    """Return whether the path is a device, a pipe or an open file's number, which must not be replaced by a file."""
    special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    return special or str(path.absolute()).startswith(("/dev/fd/", "/dev/std", "/proc/"))


def _open_stream(path: Path) -> int:
    """Open for writing; raise OSError at once for a pipe that nobody reads, where an ordinary open would wait forever."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(handle, True)
    return handle


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON, atomically; values that JSON lacks become text."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, default=str) + "\n")


def read_text(path: Path) -> str:
    """Read UTF-8 without the byte order mark that some editors put first; raise BadInput for a file that is no text."""
    try:
        return require_file(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not a text in UTF-8: {error}") from None


def read_json(path: Path) -> Any:
    """Parse a JSON file; raise BadInput with the line of a syntax error."""
    try:
        return json.loads(require_file(path).read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from None


def require_file(path: Path, hint: str = "") -> Path:
    """Return `path` if it is a file; else raise BadInput that ends with the hint."""
    if not Path(path).is_file():
        kind = "is a folder, not a file" if Path(path).is_dir() else "does not exist"
        raise BadInput(f"{path} {kind}" + (f"; {hint}" if hint else ""))
    return Path(path)


def output_folder(path: Path, flag: str = "--output") -> Path:
    """Create the folder; raise BadInput as `check_writable_folder` does."""
    check_writable_folder(path, flag)
    Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)
    return path


def check_writable_folder(path: Path, flag: str = "--output") -> None:
    """Raise BadInput if no file can be written there, or for a folder of this repository's source, which an output would mix with."""
    resolved = Path(os.path.realpath(path))
    for init in ROOT.glob("*/__init__.py"):
        if init.parent in (resolved, *resolved.parents):
            raise BadInput(
                f"{flag} {resolved}: {init.parent.name}/ holds this repository's source, name another folder"
            )
    _try_to_write(resolved, f"{flag} {path}", "a file is in the way, name a folder")


def check_writable_file(path: Path, flag: str) -> None:
    """Raise BadInput if no file can be written there; leave nothing. Devices and pipes with a reader are fine."""
    if os.path.isdir(path):
        raise BadInput(f"{flag} {path} is a folder: name a file")
    if _is_stream(path):
        try:
            _open_stream(path)  # stays open: a reader would take its closing for the end
        except OSError as error:
            nobody = error.errno == errno.ENXIO
            raise BadInput(
                f"{flag} {path}: {'nobody reads this pipe' if nobody else error.strerror}, name a file"
            ) from None
        return
    target = Path(os.path.realpath(path))
    if os.path.islink(target):
        raise BadInput(f"{flag} {path} is a link that leads to itself: name a file")
    _try_to_write(target.parent, f"{flag} {path}", "{} is a file, name a folder", target.name)


def _try_to_write(folder: Path, what: str, in_the_way: str, name: str = "") -> None:
    """Raise BadInput unless a file can be created in the folder or, before that exists, in its nearest parent."""
    try:
        place = _existing(folder)
        if not place.is_dir():
            raise BadInput(f"{what}: {in_the_way.format(place)}")
        tempfile.TemporaryFile(dir=place).close()  # permission bits alone don't say it: read-only mounts, root
        (place / name).exists()  # raises OSError for a name too long
    except OSError as error:
        raise BadInput(f"{what} can't be written ({error.strerror}): name another place") from None


def check_disk_space(output: Path, needed: int) -> int:
    """Return the free bytes on the disk of the folder `output`; raise BadInput if `needed` bytes do not fit."""
    free = shutil.disk_usage(_existing(output)).free
    if free < needed:
        raise BadInput(f"--output {output}: {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
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
    """Write a safetensors file, atomically."""
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata)
