"""Devices, precision and memory of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.cli import BadInput
from runtime.device import (
    AutoOnOff,
    Machine,
    Precision,
    allow_tf32,
    autocast,
    detect,
    resolve_precision,
    set_up,
    should_compile,
)
from runtime.files import (
    ROOT,
)


def machine(kind: str = "cpu", native_bf16: bool = False) -> Machine:
    return Machine(torch.device(kind), "test machine", native_bf16, compiler=False)


def test_detect_finds_this_machine() -> None:
    found = detect("cpu")
    assert found.device == torch.device("cpu")
    assert "cores" in found.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_detect_refuses_an_absent_cuda() -> None:
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
        ("auto", "cuda", False, "fp16"),
        ("auto", "mps", False, "fp32"),
        ("fp16", "cpu", False, "fp16"),
        ("bf16", "cpu", False, "bf16"),
        ("fp32", "cuda", True, "fp32"),
        ("tf32", "cuda", True, "tf32"),
    ],
)
def test_precision_is_as_asked_and_auto_takes_native_bf16(
    asked: Precision, kind: str, native: bool, expected: str
) -> None:
    assert resolve_precision(asked, machine(kind, native)) == expected


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast_computes_products_in_the_precision(precision: str, dtype: torch.dtype) -> None:
    x = torch.ones(2, 2)
    with autocast(torch.device("cpu"), precision):
        assert (x @ x).dtype == dtype
        assert (x + x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


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


@pytest.mark.parametrize("error", [TypeError("LoadLibrary() argument 1 must be str, not None"), OSError()])
def test_without_a_c_library_of_the_process_memory_is_left_alone(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows raises the first."""

    def refuse(name: str | None) -> None:
        raise error

    monkeypatch.setattr("ctypes.CDLL", refuse)
    assert set_up("fp32", machine()) == "fp32"


# ---------------------------------------------------------------- compiling

COMPILE = """
import torch
from runtime.cli import BadInput
from runtime.device import Machine, should_compile

for choice in ("auto", "on"):
    try:
        print(should_compile(choice, Machine(torch.device("cpu"), "", native_bf16=True, compiler=True)))
    except BadInput as error:
        print(error)
"""


@pytest.mark.slow
def test_an_unusable_compiler_is_a_warning_for_auto_and_one_line_for_on(tmp_path: Path) -> None:
    broken = {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CUDA_HOME": "/usr/local"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True, env=os.environ | broken, timeout=300
    )
    assert done.returncode == 0
    eager, refused = done.stdout.splitlines()
    assert eager == "False"
    assert refused.startswith("--compile on: the compiler does not work here (")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("warning: going on without torch.compile")


LARGE = """
import sys, torch
from dataclasses import dataclass
from runtime.cli import run_script
from runtime.device import Machine, should_compile

@dataclass
class Settings:
    compile: str = "auto"

def main(settings):
    network = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(20)])
    if should_compile(settings.compile, Machine(torch.device("cpu"), "", native_bf16=True, compiler=True)):
        network.compile()
    def fail(*_, **__):
        raise RuntimeError("CppCompileError: out of memory\\nand much more")
    from torch._inductor import compile_fx
    compile_fx.fx_codegen_and_compile = fail
    network(torch.ones(2, 4)).sum().backward()
    print(network[0].weight.grad.isfinite().all().item())

run_script(main, Settings, "A test.")
"""


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["auto", "on"])
def test_a_network_that_only_the_compiler_fails_for_runs_eagerly_with_auto(choice: str) -> None:
    command = [sys.executable, "-c", LARGE, "--compile", choice]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == ((0, "True\n") if choice == "auto" else (2, ""))
    assert lines[-1].startswith(
        "warning: going on without torch.compile, it fails for this network (" if choice == "auto"
        else "error: torch.compile fails for this network ("
    )  # fmt: skip
    assert "CppCompileError: out of memory" in lines[-1]
    assert len(lines) == 2, done.stderr


def test_a_training_repays_compiling_from_more_steps_on_where_steps_are_short() -> None:
    machines = {name: Machine(torch.device(name), "", native_bf16=True, compiler=True) for name in ("cpu", "cuda")}
    assert {name: machine.compile_steps for name, machine in machines.items()} == {"cpu": 500, "cuda": 2000}


@pytest.mark.parametrize(
    ("choice", "worthwhile", "native", "compiles"),
    [
        ("auto", True, True, True),
        ("auto", False, True, False),
        ("auto", True, False, False),
        ("on", False, False, True),
        ("off", True, True, False),
    ],
)
def test_auto_compiles_where_it_pays_and_says_so_first(
    choice: AutoOnOff,
    worthwhile: bool,
    native: bool,
    compiles: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("runtime.device.compile_error", lambda _: "")
    monkeypatch.setattr("runtime.device.go_on_eagerly_on_errors", lambda: None)
    with_compiler = Machine(torch.device("cpu"), "", native, compiler=True)
    assert should_compile(choice, with_compiler, worthwhile) == compiles
    assert ("--compile off skips" in capsys.readouterr().err) == compiles


@pytest.mark.parametrize("asked", ["auto", "fp32"])
def test_set_up_returns_the_resolved_precision(asked: Precision) -> None:
    assert set_up(asked, machine()) == "fp32"


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "77")
    with pytest.raises(BadInput, match="--device cuda:77"):
        detect("cuda")
