"""Atomic writes, checks of paths, and safe reading of JSON and tensor files."""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.cli import BadInput
from runtime.weights import foreign_kind, is_safetensors

ROOT = Path(__file__).resolve().parents[1]  # the repository


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success it replaces `path`, on any error `path` stays unchanged.

    Creates missing folders. A link is followed to its target; devices and pipes are written into, not replaced.
    A failure, such as a full disk, is an OSError that names `path`.
    """
    stream, target = _is_stream(path), Path(os.path.realpath(path))
    temporary = None
    try:
        if target.is_dir() or target.is_symlink():  # realpath leaves only links that lead to themselves
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
        with open(temporary, "r+b") as written:  # Windows refuses to flush a file that is open for reading only
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files
        os.replace(temporary, target)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(target)) and temporary:
            raise  # about another file, which was read while this one was written
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
    """Read a UTF-8 file without its byte order mark, if any; raise BadInput if it is absent or no text."""
    try:
        return require_file(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not a text in UTF-8: {error}") from None


def read_json(path: Path) -> Any:
    """Parse a JSON file; raise BadInput if it is absent, for a syntax error, and for a key twice in an object."""
    try:
        return json.loads(require_file(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_single_keys)
    except (ValueError, RecursionError) as error:  # of the parser, the encoding, and doubled keys
        raise BadInput(f"{path} is not valid JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object, such as a configuration; raise BadInput as `read_json` does."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds {type(content).__name__}, not an object with names")
    return content


def _single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raise ValueError if a key occurs twice, since one value would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        doubled = next(key for key in values if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {doubled!r} stands in one object twice")
    return values


def require_file(path: Path, hint: str = "") -> Path:
    """Return `path` if it is a file; else raise BadInput that ends with the hint."""
    if not Path(path).is_file():
        kind = "is a folder, not a file" if Path(path).is_dir() else "does not exist"
        raise BadInput(f"{path} {kind}" + (f"; {hint}" if hint else ""))
    return Path(path)


def output_folder(path: Path, flag: str = "--output") -> Path:
    """Create the folder and return `path`; raise BadInput as `check_writable_folder` does.

    A folder that was created here and is still empty when the process ends is removed.
    """
    check_writable_folder(path, flag)
    resolved = Path(os.path.realpath(path))
    missing = [folder for folder in (resolved, *resolved.parents) if not folder.exists()]
    resolved.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        atexit.register(_remove_if_empty, folder)  # these run in reverse: a folder before its parent
    return path


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_writable_folder(path: Path, flag: str = "--output") -> None:
    """Raise BadInput if no file can be written in this folder, or if it lies in this repository's source. Create nothing."""
    resolved = Path(os.path.realpath(path))
    if os.path.islink(resolved):
        raise BadInput(f"{flag} {path} is a link that leads to itself: name a folder")
    for init in ROOT.glob("*/__init__.py"):
        if init.parent in (resolved, *resolved.parents):
            raise BadInput(
                f"{flag} {resolved}: {init.parent.name}/ holds this repository's source, name another folder"
            )
    _try_to_write(resolved, f"{flag} {path}", "a file is in the way, name a folder")


def check_writable_file(path: Path, flag: str, suffixes: Collection[str] = ()) -> None:
    """Raise BadInput if no file can be written at this path; create nothing. Devices and pipes with a reader are fine.

    With `suffixes`, also refuse a file that exists with another suffix: an image must not replace weights, for example.
    """
    if os.path.isdir(path):
        raise BadInput(f"{flag} {path} is a folder: name a file")
    if suffixes and os.path.isfile(path) and path.suffix.lower() not in suffixes:
        raise BadInput(f"{flag} {path} is another file that would be lost: name a {' or '.join(suffixes)} file")
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
        tempfile.TemporaryFile(dir=place).close()  # permission bits alone don't show it: read-only mounts, root
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
    """Return a hash of a file's size and of its first, middle and last MiB; its path and name do not count."""
    piece, size = 1 << 20, require_file(path).stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=12)
    with open(path, "rb") as file:
        for start in (0, size // 2, max(0, size - piece)):
            file.seek(start)
            digest.update(file.read(piece))
    return digest.hexdigest()


def load_tensors(path: Path, mapped: bool = False) -> Any:
    """Return the content of a torch or safetensors file, on the CPU, without running code in it.

    The content decides which of both it is, not the suffix. Tensors do not require gradients.
    `mapped` maps a torch file into memory: its tensors are read when they are used.
    Raise BadInput for a file of another kind, which is named, a truncated file, code, and tensors that are not dense numbers.
    """
    if is_safetensors(require_file(path)):
        return load_safetensors(path)[0]
    if kind := foreign_kind(path):
        raise BadInput(f"{path} is {kind}")
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # torch's, on protocols and sparse tensors
            # torch.load trusts the suffix of a path, but maps only paths
            mapped = mapped and path.suffix != ".safetensors" and zipfile.is_zipfile(path)
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch's reader raises errors of many classes for a damaged file
        if getattr(error, "filename", None):  # such as no permission: the system's message is clear
            raise
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):  # it advises unsafe loading
            _refuse_code(path, str(error))
            raise BadInput(f"{path} is not a torch file or is truncated") from None
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0][:120]
        raise BadInput(f"{path} is not a torch file or is truncated ({reason})") from None
    try:
        _check_plain(path, content)
    except RecursionError:
        raise BadInput(f"{path} holds a structure that contains itself, not tensors") from None
    return content


def _refuse_code(path: Path, message: str) -> None:
    """Raise BadInput, naming what a pickle would call, if torch refused the file for that."""
    refused = re.findall(r"(?:GLOBAL|global|class) ([\w.]+\.[\w.]+)", message)
    with contextlib.suppress(Exception):  # only zip files have a list, and only whole ones
        refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or refused
    if not refused:
        return
    if all(name.startswith("numpy") for name in refused):
        raise BadInput(
            f"{path} is refused: it calls {refused[0]} for arrays of numpy; save them as tensors (torch.from_numpy)"
        )
    raise BadInput(
        f"{path} is refused: besides tensors it calls {', '.join(refused[:3])}, which may run anything;"
        " if you trust it, save its state_dict as .safetensors where it was made"
    )


def _check_plain(path: Path, content: Any, name: str = "") -> None:
    """Raise BadInput for tensors in `content` that are sparse, quantized or the like. Set requires_grad False on the others, in place."""
    if isinstance(content, torch.Tensor):
        odd = {
            "sparse": content.layout != torch.strided,
            "nested": content.is_nested,
            "quantised": content.is_quantized,
        }
        odd["without values (meta)"] = content.is_meta
        if kind := next((kind for kind, applies in odd.items() if applies), ""):
            raise BadInput(f"{path}: {name or 'its tensor'} is {kind}; save it as a dense tensor of numbers")
        content.requires_grad_(False)
    elif isinstance(content, dict):
        for key, value in content.items():
            _check_plain(path, value, f"{name}.{key}".removeprefix("."))
    elif isinstance(content, list | tuple):
        for value in content:
            _check_plain(path, value, name)


def load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file; raise BadInput if it is truncated or a file of another kind."""
    if kind := foreign_kind(require_file(path)):
        raise BadInput(f"{path} is {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        if zipfile.is_zipfile(path):
            raise BadInput(f"{path} is a torch file, a safetensors file is needed") from None
        raise BadInput(f"{path} is not a safetensors file or is truncated ({error})") from None


WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
JUNK = {"thumbs.db", "desktop.ini"}  # of Windows; hidden names such as `._00.pt` and .DS_Store are macOS's


def foreign_file(folder: Path) -> str:
    """Return "PATH is KIND" for a folder's first file with a suffix of weights that holds no tensors; "" if there is none."""
    kinds = {path: foreign_kind(path) for path in list_files(folder, WEIGHTS) if path.is_file()}
    return next((f"{path} is {kind}" for path, kind in kinds.items() if kind), "")


def header_error(path: Path) -> str:
    """Return why a file of weights can't be read, as far as it shows without reading tensors; "" if nothing is wrong."""
    if kind := foreign_kind(path):
        return f"{path} is {kind}"
    with path.open("rb") as file:
        whole_only = file.read(1) == b"\x80"  # torch's form before zip files has no header
    try:
        if is_safetensors(path):
            with safe_open(path, framework="pt"):
                pass  # opening checks that the file has the length that its header says
        elif not whole_only:
            load_safetensors(path) if path.suffix.lower() == ".safetensors" else load_tensors(path, mapped=True)
    except (SafetensorError, BadInput) as error:
        return f"{path.name}: {error}" if isinstance(error, SafetensorError) else str(error)
    return ""


def visible(folder: Path) -> list[Path]:
    """Return the entries of a folder, sorted by name, without hidden ones and those that file browsers leave there."""
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name.lower() not in JUNK)


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the `visible` files of a folder, without subfolders, that have one of these lower-case suffixes in any case."""
    return [path for path in visible(folder) if path.suffix.lower() in suffixes and not path.is_dir()]


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file without reading its tensors, {} for a file of another kind."""
    if not is_safetensors(require_file(path)):
        return {}
    with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
        return file.metadata() or {}
    return {}


def save_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, atomically."""
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata)
