"""What runtime/ promises: exit codes, files that are whole or absent, seeds, batches, records, pictures and devices."""

from __future__ import annotations

import json
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from runtime.batches import even_batch, in_batches
from runtime.cli import BadInput, log, progress
from runtime.device import Machine, Precision, allow_tf32, detect, resolve_precision, set_up
from runtime.distributed import sharing
from runtime.files import (
    ROOT,
    atomic,
    load_safetensors,
    load_tensors,
    output_folder,
    read_json,
    require_file,
    write_json,
)
from runtime.images import image_grid, save_image
from runtime.record import Record
from runtime.seeds import derived_seed

FullDisk = Callable[[int], AbstractContextManager[None]]

# ---------------------------------------------------------------- scripts

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
    """A script whose main ends with `body`, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "DEBUG"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT.format(body=body), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_script_that_succeeds_exits_with_0_and_an_empty_stderr() -> None:
    done = run("pass", "--size", "5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise BadInput('x.csv, row 3: bad')", 2, "error: x.csv, row 3: bad\n"),
        ("open('no/such/file')", 2, "error: [Errno 2] No such file or directory: 'no/such/file'\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
    ],
    ids=["bad input", "OSError", "interrupt"],
)
def test_an_error_is_one_line_and_an_exit_code(body: str, code: int, line: str) -> None:
    done = run(body)
    assert (done.returncode, done.stderr) == (code, line)


def test_an_error_has_a_line_of_its_own_after_a_progress_bar() -> None:
    done = run("bar = progress(['a.png', 'b.png'], 'reading'); bar.update(); raise BadInput('a.png: bad')")
    assert "reading: " in done.stderr
    assert done.stderr.endswith("\nerror: a.png: bad\n")


def test_a_bad_flag_exits_with_2_and_names_itself() -> None:
    done = run("pass", "--sise", "5")
    assert done.returncode == 2
    assert "--sise" in done.stderr


def test_a_bug_keeps_its_traceback() -> None:
    done = run("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


# ---------------------------------------------------------------- files


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


def test_atomic_writes_beside_the_target_with_its_suffix(tmp_path: Path) -> None:
    with atomic(tmp_path / "a.png") as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".png")


def test_atomic_makes_the_folder(tmp_path: Path) -> None:
    with atomic(tmp_path / "b" / "c" / "a.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "b" / "c" / "a.txt").read_text() == "new"


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


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("inside", ["file", "file/below"])
def test_output_folder_refuses_a_file_in_the_way(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=f"{inside}: a file is in the way"):
        output_folder(tmp_path / inside)


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


# ---------------------------------------------------------------- seeds and batches


@pytest.mark.parametrize(
    ("key", "seed"),
    [((0,), 7210762507766007076), ((0, 0, 3, 49), 8954498028786423518), ((2024, 1, 9, 7), 8021369162835155518)],
)
def test_derived_seeds_never_change(key: tuple[int, ...], seed: int) -> None:
    assert derived_seed(*key) == seed


def test_derived_seeds_differ_within_and_between_runs() -> None:
    keys = [(s, d, c, i) for s in range(2) for d in range(2) for c in range(10) for i in range(50)]
    assert len({derived_seed(*key) for key in keys}) == len(keys)


def test_derived_seeds_depend_on_the_order_of_the_key() -> None:
    assert derived_seed(1, 2) != derived_seed(2, 1)


@pytest.mark.parametrize("others", [((1,), (1, 0)), ((2**32,), (0, 1))], ids=["trailing zero", "large number"])
def test_derived_seeds_of_other_tuples_differ_whatever_their_length(others: tuple[tuple[int, ...], ...]) -> None:
    assert derived_seed(*others[0]) != derived_seed(*others[1])


def test_derived_seeds_of_numpys_integers_are_those_of_pythons() -> None:
    assert derived_seed(*np.array([1, 2])) == derived_seed(1, 2)


def test_derived_seeds_fit_a_torch_generator() -> None:
    seeds = [derived_seed(0, index) for index in range(1000)]
    assert 0 <= min(seeds) < max(seeds) < 2**63
    torch.Generator().manual_seed(max(seeds))


def test_last_batch_is_padded_with_its_last_item_for_the_work_alone() -> None:
    assert list(in_batches("".join, "abcde", 3)) == [(["a", "b", "c"], "abc"), (["d", "e"], "dee")]


@pytest.mark.parametrize(("items", "batches"), [("ab", [(["a", "b"], "ab")]), ("", [])])
def test_full_batches_and_no_items_need_no_padding(items: str, batches: list[object]) -> None:
    assert list(in_batches("".join, items, 2)) == batches


class SmallMemory:
    """Work that fits in memory only `most` at once, and fails as the given device does."""

    def __init__(self, most: int, error: Exception):
        self.most, self.error, self.sizes = most, error, []

    def __call__(self, items: list[str]) -> str:
        self.sizes.append(len(items))
        if len(items) > self.most:
            raise self.error
        return "".join(items)


CPU_ALLOCATOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried .."
)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), CPU_ALLOCATOR])
def test_a_batch_is_halved_when_memory_runs_out_and_nothing_is_done_twice(error: Exception) -> None:
    work = SmallMemory(3, error)
    assert [items for items, _ in in_batches(work, "abcdefgh", 8)] == [list("ab"), list("cd"), list("ef"), list("gh")]
    assert work.sizes == [8, 4, 2, 2, 2, 2]


def test_one_item_that_does_not_fit_is_bad_input() -> None:
    with pytest.raises(BadInput, match="out of memory"):
        list(in_batches(SmallMemory(0, MemoryError()), "ab", 2))


def test_other_errors_of_the_work_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(SmallMemory(0, RuntimeError("shapes differ")), "ab", 2))


@pytest.mark.parametrize(("count", "most", "batch"), [(10, 4, 4), (10, 8, 5), (8, 4, 4), (1, 10**9, 1), (5, 1, 1)])
def test_even_batch_spreads_the_items_over_as_few_calls(count: int, most: int, batch: int) -> None:
    assert even_batch(count, most) == batch


# ---------------------------------------------------------------- records


@dataclass(frozen=True)
class Settings:
    seed: int = 4
    output: Path = Path("out")


def machine(kind: str = "cpu", native_bf16: bool = False) -> Machine:
    return Machine(torch.device(kind), "test machine", native_bf16, compiler=False)


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, object]:
    """A record as it lies on the disk."""
    record = Record(Settings(), machine())
    for _ in range(2):
        with record.timed("drawing"):
            pass
    record.timings["training"] = 1.23456
    record.metrics["accuracy"] = 0.5
    record.save(tmp_path / "record.json")
    return json.loads((tmp_path / "record.json").read_text())


def test_record_holds_what_a_run_is_judged_by(saved: dict[str, object]) -> None:
    assert set(saved) == {
        *("script", "command", "started", "settings", "seed", "device"),
        *("machine", "versions", "revision", "timings_s", "metrics"),
    }


def test_record_keeps_settings_seed_and_metrics(saved: dict[str, object]) -> None:
    assert saved["settings"] == {"seed": 4, "output": "out"}
    assert (saved["seed"], saved["metrics"], saved["device"]) == (4, {"accuracy": 0.5}, "cpu")


def test_record_rounds_its_seconds_to_milliseconds(saved: dict[str, dict[str, float]]) -> None:
    assert saved["timings_s"]["training"] == 1.235


def test_record_names_the_versions(saved: dict[str, dict[str, str]]) -> None:
    assert saved["versions"]["torch"] == torch.__version__.split("+")[0]


def test_timed_adds_up_and_counts_failed_blocks_too() -> None:
    record = Record(Settings(), machine(), timings={"work": 10.0})
    with pytest.raises(ZeroDivisionError), record.timed("work"):
        raise ZeroDivisionError
    assert 10.0 < record.timings["work"] < 11.0


# ---------------------------------------------------------------- pictures


def some_pictures(count: int, size: int = 28) -> torch.Tensor:
    values = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return torch.from_numpy(values)


def test_saved_picture_has_its_pixels(tmp_path: Path) -> None:
    picture = some_pictures(1)[0]
    save_image(tmp_path / "a.png", picture)
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode == "RGB"
        assert np.array_equal(np.asarray(file), picture.permute(1, 2, 0).numpy())


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name, some_pictures(1)[0])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_grid_has_room_for_pictures_and_gaps() -> None:
    grid = image_grid(some_pictures(6, size=4), columns=3, scale=2, gap=1)
    assert (grid.dtype, tuple(grid.shape)) == (torch.uint8, (3, 2 * (8 + 1) + 1, 3 * (8 + 1) + 1))


def test_grid_is_filled_row_by_row_and_enlarged_without_smoothing() -> None:
    images = some_pictures(6, size=4)
    grid = image_grid(images, columns=3, scale=2, gap=1)
    fourth = grid[:, 10:18, 1:9]
    assert torch.equal(fourth, images[3].repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_grid_is_white_between_the_pictures() -> None:
    grid = image_grid(some_pictures(6, size=4), columns=3, gap=1)
    assert bool((grid[:, :, [0, 5, 10, 15]] == 255).all())


# ---------------------------------------------------------------- devices


def test_detect_finds_this_machine() -> None:
    found = detect("cpu")
    assert found.device == torch.device("cpu")
    assert "cores" in found.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_detect_refuses_cuda_where_there_is_none() -> None:
    with pytest.raises(BadInput, match="--device cuda: ."):
        detect("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert detect("auto").device.type == "cpu"


def test_detect_refuses_a_device_that_does_not_exist() -> None:
    with pytest.raises(BadInput, match="--device abacus: ."):
        detect("abacus")


@pytest.mark.parametrize(
    ("asked", "kind", "native", "expected"),
    [
        ("auto", "cpu", False, "fp32"),
        ("auto", "cpu", True, "bf16"),
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp32"),
        ("bf16", "cpu", False, "bf16"),
        ("fp32", "cuda", True, "fp32"),
        ("tf32", "cuda", True, "tf32"),
    ],
)
def test_precision_is_as_asked_and_auto_takes_native_bf16(asked: str, kind: str, native: bool, expected: str) -> None:
    assert resolve_precision(asked, machine(kind, native)) == expected


def test_tf32_needs_cuda() -> None:
    with pytest.raises(BadInput, match="--precision tf32 needs a CUDA device, this is cpu"):
        resolve_precision("tf32", machine())


def test_tf32_is_switched_for_convolutions_too() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (True, False):
            allow_tf32(allowed)
            assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (allowed, allowed)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


PAGE_FAULTS = """
import resource, torch
from runtime.device import keep_freed_memory

keep_freed_memory({kept})
torch.zeros(256, 2**18)  # kept memory has to be there first
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.zeros(64, 2**18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_memory_is_used_again_instead_of_fetched_page_by_page() -> None:
    kept, dropped = (
        int(subprocess.check_output([sys.executable, "-c", PAGE_FAULTS.format(kept=kept)], cwd=ROOT, timeout=120))
        for kept in (True, False)
    )
    assert kept < dropped / 4


@pytest.mark.parametrize("asked", ["auto", "fp32"])
def test_set_up_returns_the_resolved_precision(asked: Precision) -> None:
    assert set_up(asked, machine()) == "fp32"


# ---------------------------------------------------------------- several processes


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "77")
    with pytest.raises(BadInput, match="--device cuda:77"):
        detect("cuda")


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        log(f"from {rank}")
        list(progress([1], f"bar {rank}"))
    said = capsys.readouterr().err
    assert "from 0" in said
    assert "bar 0" in said
    assert "from 1" not in said
    assert "bar 1" not in said


def test_a_process_alone_gathers_what_it_has() -> None:
    with sharing() as shard:
        assert (shard.main, shard.world, shard.gather([1, 2])) == (True, 1, [1, 2])
