"""What the machine can do: its device, bf16 in hardware, and whether torch.compile has a compiler."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from torch import nn

from runtime.cli import BadInput

Precision = Literal["auto", "fp32", "tf32", "bf16"]
AutoOnOff = Literal["auto", "on", "off"]
Network = TypeVar("Network", bound=nn.Module)
Device = Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:N or mps.")]


@dataclass(frozen=True)
class Machine:
    """The device in use and what it is good for."""

    device: torch.device
    name: str
    native_bf16: bool
    compiler: bool


def detect(device: str = "auto") -> Machine:
    """The machine as it is; `device` is auto, cpu, cuda, cuda:N or mps. Of several processes on a machine each takes its own GPU.
    Raises BadInput when it isn't there."""
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
    """True where bf16 is computed in hardware; elsewhere torch emulates it, about five times slower than fp32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def has_compiler() -> bool:
    """torch.compile on a CPU needs a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def len_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The model name where Linux tells it, else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def resolve_precision(asked: Precision, machine: Machine) -> str:
    """fp32, tf32 or bf16; auto takes bf16 only where it is native. Raises BadInput for tf32 without CUDA."""
    if asked == "tf32" and machine.device.type != "cuda":
        raise BadInput(f"--precision tf32 needs a CUDA device, this is {machine.device}")
    if asked == "auto":
        return "bf16" if machine.native_bf16 else "fp32"
    return asked


def allow_tf32(allowed: bool) -> None:
    """cuDNN uses TF32 unless told otherwise, so plain fp32 has to switch it off for convolutions too."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def set_up(asked: Precision, machine: Machine, training: bool = False) -> str:
    """Resolves the precision and readies the process for it: TF32 on CUDA, freed memory kept on a CPU. `training` has attention computed
    in plain steps where the fused kernel is slow backward: in bf16 on a CPU, six times slower than in fp32."""
    precision = resolve_precision(asked, machine)
    allow_tf32(precision == "tf32")
    if machine.device.type == "cpu":
        keep_freed_memory(True)
        torch.backends.cuda.enable_flash_sdp(not (training and precision == "bf16"))  # the switch counts for CPUs too
    return precision


def keep_freed_memory(kept: bool) -> None:
    """Has the C library keep freed memory for the next tensor. Handing large blocks back and getting them anew, page by page, cost a third
    of the time of 256x256 pictures. Does nothing where the C library isn't glibc."""
    trim_threshold, mmap_max = -1, -4  # mallopt's numbers in malloc.h
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(trim_threshold, -1 if kept else 128 * 1024)
        library.mallopt(mmap_max, 0 if kept else 65536)


def should_compile(asked: AutoOnOff, machine: Machine) -> bool:
    """auto compiles on CUDA and on CPUs with bf16; in fp32 on a CPU no clear gain pays for the minute that compiling takes."""
    if asked == "on" and not machine.compiler:
        raise BadInput("--compile on: no C++ compiler with Python's headers found")
    pays = machine.device.type == "cuda" or machine.native_bf16
    return machine.compiler and (asked == "on" or asked == "auto" and pays)


def memory_format(device: torch.device) -> torch.memory_format:
    """For training: on CPUs group normalisation goes backward several times slower in channels_last, which costs more than convolutions
    gain."""
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


def to_channels_last(network: Network, device: torch.device | str, dtype: torch.dtype | None = None) -> Network:
    """Move a network to a device, its weights in channels_last, which GPUs and CPUs sample fastest in."""
    return _to(network, device, dtype, torch.channels_last)


def to_training_device(network: Network, device: torch.device) -> Network:
    """Move a network to a device, its weights in the memory format that trains fastest there."""
    return _to(network, device, None, memory_format(device))


def _to(network: Network, device: torch.device | str, dtype: torch.dtype | None, form: torch.memory_format) -> Network:
    move: Any = nn.Module.to  # torch's types lack memory_format; diffusers' own `to` warns of half precision
    move(network, device, dtype, memory_format=form)
    return network
