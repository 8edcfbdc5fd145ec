"""Files that are whole or absent, checks of paths, and safe reading."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runtime.cli import BadInput
from runtime.files import (
    ROOT,
    atomic,
    check_disk_space,
    check_writable_file,
    check_writable_folder,
    list_files,
    load_safetensors,
    load_tensors,
    output_folder,
    read_json,
    read_text,
    require_file,
    save_safetensors,
    visible,
    write_json,
)

FullDisk = Callable[[int], AbstractContextManager[None]]


def save_safetensors_of(path: Path) -> None:
    save_safetensors(path, {"x": torch.zeros(5000)}, {})


def torch_save(path: Path) -> None:
    with atomic(path) as temporary:
        torch.save(torch.zeros(5000), temporary)


def write_text(path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text("x" * 5000)


def fail_while_writing(path: Path, error: type[BaseException]) -> None:
    with atomic(path) as temporary:
        temporary.write_text("new")
        raise error


def test_atomic_replaces_the_old_file_on_success(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new"


def test_atomic_brings_all_bytes_to_the_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut, the name must not lead to a file whose content was never written."""
    synced: list[tuple[int, int]] = []

    def record_fsync(handle: int) -> None:
        synced.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def check_replace(source: Path, target: Path) -> None:
        assert synced == [(source.stat().st_ino, 3)]
        assert target.read_text() == "old"
        synced.clear()
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", check_replace)
    (tmp_path / "a.txt").write_text("old")
    with atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert not synced


def test_atomic_keeps_the_old_file_on_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError):
        fail_while_writing(tmp_path / "a.txt", ZeroDivisionError)
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_atomic_leaves_no_temporary_file_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail_while_writing(tmp_path / "a.txt", error)
    assert list(tmp_path.iterdir()) == []


def test_atomic_leaves_no_temporary_file_after_success(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_atomic_writes_next_to_the_target_with_its_suffix(tmp_path: Path) -> None:
    with atomic(tmp_path / "a.png") as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".png")


def test_atomic_makes_the_folder(tmp_path: Path) -> None:
    with atomic(tmp_path / "b" / "c" / "a.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "b" / "c" / "a.txt").read_text() == "new"


def test_files_are_flushed_in_a_way_that_windows_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(file: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("os.fsync", flush)
    write_json(tmp_path / "a.json", [1])
    assert read_json(tmp_path / "a.json") == [1]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_atomic_files_have_the_permissions_of_ordinary_ones(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, full_disk: FullDisk) -> None:
    write_json(tmp_path / "a.json", "old")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write_json(tmp_path / "a.json", "x" * 5000)
    assert read_json(tmp_path / "a.json") == "old"


def test_json_is_read_back_unchanged(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, None], "text": "größer", "b": {"c": True}}
    write_json(tmp_path / "a.json", values)
    assert read_json(tmp_path / "a.json") == values


def test_read_json_names_the_line_of_a_syntax_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n  "a": 1,\n  oops\n}')
    with pytest.raises(BadInput, match=r"a\.json is not valid JSON: .*line 3"):
        read_json(tmp_path / "a.json")


def test_read_json_refuses_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_texts_may_begin_with_a_byte_order_mark(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.json").write_bytes(mark + b'{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert read_text(tmp_path / "a.json") == '{"a": 1}'


def test_read_text_refuses_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match=r"a\.txt is not a text in UTF-8"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("text", ['{"1": "cat", "1": "dog"}', '[{"a": {"1": 0, "1": 0}}]'])
def test_read_json_names_a_doubled_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadInput, match=r"a\.json is not valid JSON: the key '1' stands in one object twice"):
        read_json(tmp_path / "a.json")


def test_a_listing_holds_visible_files_of_a_suffix_and_no_folders(tmp_path: Path) -> None:
    for name in ("01.pt", "00.PT", "._00.pt", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "02.pt").mkdir()
    (tmp_path / "03.pt").symlink_to("nowhere.pt")  # reading it is an error, so that it isn't left out silently
    assert [path.name for path in list_files(tmp_path, {".pt"})] == ["00.PT", "01.pt", "03.pt"]
    assert [path.name for path in visible(tmp_path)] == ["00.PT", "01.pt", "02.pt", "03.pt", "notes.txt"]


def test_require_file_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no\.pt does not exist; train one first"):
        require_file(tmp_path / "no.pt", "train one first")


def test_require_file_tells_a_folder_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a folder, not a file"):
        require_file(tmp_path)


def test_output_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "a" / "b c").is_dir()


def test_output_folder_may_exist(tmp_path: Path) -> None:
    assert output_folder(tmp_path) == tmp_path


def test_output_folders_that_stay_empty_are_removed_at_exit(tmp_path: Path) -> None:
    """A command that is refused after its folder was made leaves nothing."""
    (tmp_path / "existing").mkdir()
    names = ("new/empty", "new/deep/empty", "full", "existing")
    script = "from runtime.files import output_folder\nfrom pathlib import Path\n" + "".join(
        f"output_folder(Path({str(tmp_path / name)!r}))\n" for name in names
    )
    script += (
        f"Path({str(tmp_path / 'full/file')!r}).touch()\nassert Path({str(tmp_path / 'new/deep/empty')!r}).is_dir()"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"existing", "full", "full/file"}


@pytest.mark.parametrize("inside", ["file", "file/below"])
def test_output_folder_refuses_a_file_in_the_way(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=f"{inside}: a file is in the way"):
        output_folder(tmp_path / inside)


@pytest.mark.parametrize("path", ["digits", "faces/out", "runtime/../faces/a/b"])
def test_an_output_inside_a_source_package_is_one_line_and_leaves_nothing(path: str) -> None:
    target, package = ROOT / path, "digits" if path == "digits" else "faces"
    with pytest.raises(
        BadInput, match=f"^--output {target.resolve()}: {package}/ holds this repository's source, name another"
    ):
        output_folder(target)
    assert target.exists() == (path == "digits")


def test_a_relative_output_is_refused_in_the_repository_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable_folder(Path("digits"))
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput, match="digits/ holds this repository's source"):
        check_writable_folder(Path("digits"))


@pytest.mark.parametrize("name", ["out", "runs", "hw2_data/digits"])
def test_folders_without_source_may_be_outputs(name: str) -> None:
    check_writable_folder(ROOT / name)


def test_a_file_is_writable_unless_it_is_a_folder_or_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable_file(tmp_path / "new" / "record.json", "--record")
    with pytest.raises(BadInput, match="^--record .* is a folder: name a file$"):
        check_writable_file(tmp_path, "--record")
    with pytest.raises(BadInput, match="^--record .*file is a file, name a folder$"):
        check_writable_file(tmp_path / "file" / "record.json", "--record")
    assert not (tmp_path / "new").exists()


def refuse_to_create(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied", "/tmp/hidden")


def test_a_place_without_permission_is_named_by_its_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", refuse_to_create)  # permission bits don't bind root
    with pytest.raises(BadInput, match=f"^--grid {tmp_path}/a.png can't be written .Permission denied.: name another"):
        check_writable_file(tmp_path / "a.png", "--grid")
    with pytest.raises(BadInput, match=f"^--run {tmp_path}/new can't be written"):
        output_folder(tmp_path / "new", "--run")
    assert not (tmp_path / "new").exists()


def test_checking_a_place_leaves_nothing(tmp_path: Path) -> None:
    check_writable_file(tmp_path / "a.json", "--record")
    check_writable_folder(tmp_path / "b" / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_name_too_long_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="^--record .*File name too long"):
        check_writable_file(tmp_path / ("a" * 300), "--record")
    with pytest.raises(BadInput, match="^--output .*File name too long"):
        check_writable_folder(tmp_path / ("a" * 300) / "b")


# ---------------------------------------------------------------- links, pipes, devices


@pytest.mark.parametrize("target", ["there.json", "new.json", "sub/new.json"])
def test_a_link_is_followed_to_its_target(tmp_path: Path, target: str) -> None:
    (tmp_path / "there.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    check_writable_file(link, "--record")
    write_json(link, 1)
    assert link.is_symlink()
    assert read_json(tmp_path / target) == 1


def test_a_link_to_a_missing_folder_makes_that_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real/out")
    output_folder(tmp_path / "link")
    assert (tmp_path / "real" / "out").is_dir()


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(BadInput, match="^--output .*leads to itself"):
        output_folder(tmp_path / "a")
    with pytest.raises(BadInput, match="^--record .*leads to itself"):
        check_writable_file(tmp_path / "a", "--record")
    with pytest.raises(OSError, match="Too many levels"):
        write_json(tmp_path / "a", 1)


def test_a_pipe_with_a_reader_is_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "fifo"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        code = "import sys, pathlib; from runtime.files import *; path = pathlib.Path(sys.argv[1]);"
        code += "check_writable_file(path, '--record'); write_json(path, {'a': 1})"
        while subprocess.run([sys.executable, "-c", code, pipe], cwd=ROOT, capture_output=True).returncode:
            time.sleep(0.1)  # until the reader is there
        assert reader.communicate()[0] == b'{\n  "a": 1\n}\n'
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_pipe_without_a_reader_is_refused_and_never_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadInput, match="^--record .*: nobody reads this pipe, name a file"):
        check_writable_file(tmp_path / "fifo", "--record")
    with pytest.raises(OSError, match="fifo"):
        write_json(tmp_path / "fifo", 1)


def test_an_open_files_number_is_appended_to(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("w") as log:
        print("before", file=log, flush=True)
        write_json(Path(f"/dev/fd/{log.fileno()}"), 1)
    assert (tmp_path / "log.txt").read_text() == "before\n1\n"


@pytest.mark.parametrize("write", [save_safetensors_of, torch_save, write_text], ids=lambda write: write.__name__)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(
    write: Callable[[Path], None], tmp_path: Path, full_disk: FullDisk
) -> None:
    path = tmp_path / "a.bin"
    path.write_text("old")
    with full_disk(1000), pytest.raises(OSError, match=str(path)) as error:
        write(path)
    assert f".{path.stem}-" not in str(error.value)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])


def test_a_lack_of_disk_space_is_named_before_the_work(tmp_path: Path) -> None:
    free = check_disk_space(tmp_path / "out", 1)
    with pytest.raises(BadInput, match="MB are needed, .* MB are free"):
        check_disk_space(tmp_path / "out", 2 * free)


def test_safetensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    save_file({"w": torch.arange(3)}, tmp_path / "a.safetensors", {"key": "value"})
    tensors, metadata = load_safetensors(tmp_path / "a.safetensors")
    assert (tensors["w"].tolist(), metadata) == ([0, 1, 2], {"key": "value"})


@pytest.mark.parametrize("size", [0, 4, 30, -1])
def test_truncated_safetensors_are_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadInput, match=r"a\.safetensors is not a safetensors file or is truncated"):
        load_safetensors(path)


@pytest.mark.parametrize("content", [b"", b"not a torch file\n", b"\x80\x02a.", b"PK\x03\x04" + bytes(50)])
def test_files_that_are_no_torch_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.pt"):
        load_tensors(tmp_path / "a.pt")


def test_json_is_indented_and_ends_with_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1], "path": Path("x")})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    1\n  ],\n  "path": "x"\n}\n'
