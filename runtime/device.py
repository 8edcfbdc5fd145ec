"""The device, and what the machine can do: bf16 in hardware, torch.compile, fast memory formats."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from torch import nn

from runtime.cli import BadInput, log

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF = ("bf16", "fp16")
AutoOnOff = Literal["auto", "on", "off"]
Network = TypeVar("Network", bound=nn.Module)
Device = Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:N or mps.")]


@dataclass(frozen=True)
class Machine:
    """The device in use, and whether it has bf16 in hardware and torch.compile has its compiler."""

    device: torch.device
    name: str
    native_bf16: bool
    compiler: bool

    @property
    def compile_steps(self) -> int:
        """Smallest number of training steps that repays compiling; larger on CUDA, where steps are shorter."""
        return 2000 if self.device.type == "cuda" else 500


def detect(device: str = "auto") -> Machine:
    """Return the Machine for `device`: auto, cpu, cuda, cuda:N or mps. auto is cuda if available, else cpu.

    With cuda, each process that torchrun starts takes its own GPU (LOCAL_RANK). Raise BadInput for a device that does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device}: {str(error).splitlines()[0]}") from None
    if chosen.type == "cuda":
        native, name = torch.cuda.is_bf16_supported(False), torch.cuda.get_device_name(chosen)
    else:
        native = chosen.type == "cpu" and cpu_has_bf16()
        name = f"{processor_name()}, {len_cores()} cores"
    return Machine(chosen, name, native, has_compiler())


def cpu_has_bf16() -> bool:
    """Return whether bf16 is computed in hardware; emulated, it is about five times slower than fp32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def has_compiler() -> bool:
    """Return whether there are a C++ compiler and Python's headers, which torch.compile needs on a CPU."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def len_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """Return the model name from Linux's /proc/cpuinfo, else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def resolve_precision(precision: Precision, machine: Machine) -> str:
    """Return fp32, tf32, bf16 or fp16; auto is bf16 where it is native, else fp16 on CUDA, else fp32.

    Raise BadInput for tf32 without CUDA.
    """
    if precision == "tf32" and machine.device.type != "cuda":
        raise BadInput(f"--precision tf32 needs a CUDA device, this is {machine.device}")
    if precision == "auto":
        return "bf16" if machine.native_bf16 else "fp16" if machine.device.type == "cuda" else "fp32"
    return precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which matrix products and convolutions compute in bf16 or fp16; for fp32 and tf32 it does nothing."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision in HALF)


def allow_tf32(allowed: bool) -> None:
    """Switch TF32 on or off, for convolutions too: there cuDNN uses it by default."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in fp32 inside the block, also within an autocast block or where TF32 is on."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def set_up(precision: Precision, machine: Machine, training: bool = False) -> str:
    """Return the resolved precision, and set the process up: TF32 on for tf32 only, `keep_freed_memory` on a CPU.

    `training` turns off the fused attention kernel on a CPU in bf16 or fp16. In bf16 its backward pass is six times slower than in fp32.
    """
    resolved = resolve_precision(precision, machine)
    allow_tf32(resolved == "tf32")
    if machine.device.type == "cpu":
        keep_freed_memory(True)
        torch.backends.cuda.enable_flash_sdp(not (training and resolved in HALF))  # applies to CPUs too
    return resolved


def keep_freed_memory(keep: bool) -> None:
    """Make the C library keep freed memory for the next tensor, or not (its default); without glibc do nothing.

    Returning large blocks to the system and faulting them in again took a third of the time of sampling 256x256 images.
    """
    trim_threshold, mmap_max = -1, -4  # mallopt's numbers in malloc.h
    try:
        library = ctypes.CDLL(None)
    except (TypeError, OSError):  # Windows has no library without a name
        return
    if hasattr(library, "mallopt"):
        library.mallopt(trim_threshold, -1 if keep else 128 * 1024)
        library.mallopt(mmap_max, 0 if keep else 65536)


def should_compile(choice: AutoOnOff, machine: Machine, worthwhile: bool = True) -> bool:
    """Return whether to use torch.compile. auto = on CUDA and on CPUs with bf16 in hardware, with a compiler and `worthwhile`.

    On other CPUs the gain does not repay the minute of compiling. `worthwhile`: the run is long enough to repay it.
    If the compiler fails on a tiny function, auto returns False with a warning. "on" raises BadInput if it fails or is absent.
    """
    if choice == "on" and not machine.compiler:
        raise BadInput("--compile on: no C++ compiler with Python's headers found")
    pays = worthwhile and machine.compiler and (machine.device.type == "cuda" or machine.native_bf16)
    if choice == "off" or choice == "auto" and not pays:
        return False
    if reason := compile_error(machine.device):
        if choice == "on":
            raise BadInput(f"--compile on: the compiler does not work here ({reason})")
        log(f"warning: going on without torch.compile, the compiler does not work here ({reason})")
        return False
    log("the first step compiles, for about a minute; --compile off skips that")
    if choice == "auto":
        go_on_eagerly_on_errors()
    return True


def compile_error(device: torch.device) -> str:
    """Return why torch.compile fails for a tiny function, in one line; "" if it works."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a CUDA_HOME without a GPU
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # dynamo's, inductor's, and the loader's for a folder without run permission
        return _reason(error)
    return ""


def _reason(error: BaseException | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(".  ")[0]


def go_on_eagerly_on_errors() -> None:
    """From now on, run a network eagerly if torch.compile fails for it, with one warning and no traceback."""
    import torch._dynamo  # slow to import

    def go_on(record: logging.LogRecord) -> bool:
        if record.exc_info and not torch._dynamo.config.disable:  # else torch tries every part of the network
            torch._dynamo.config.disable = True
            log(f"warning: going on without torch.compile, it fails for this network ({_reason(record.exc_info[1])})")
        return not record.exc_info

    torch._dynamo.config.suppress_errors = True
    logging.getLogger("torch._dynamo.convert_frame").addFilter(go_on)


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the format that trains fastest: contiguous on CPUs, where channels_last slows group norm's backward pass."""
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


def to_channels_last(network: Network, device: torch.device | str, dtype: torch.dtype | None = None) -> Network:
    """Move a network in place to a device and dtype, with weights in channels_last: the fastest format for inference."""
    return _to(network, device, dtype, torch.channels_last)


def to_training_device(network: Network, device: torch.device) -> Network:
    """Move a network in place to a device, with weights in the format that trains fastest there."""
    return _to(network, device, None, memory_format(device))


def _to(network: Network, device: torch.device | str, dtype: torch.dtype | None, form: torch.memory_format) -> Network:
    move: Any = nn.Module.to  # torch's types lack memory_format; diffusers' own `to` warns of half precision
    move(network, device, dtype, memory_format=form)
    return network
