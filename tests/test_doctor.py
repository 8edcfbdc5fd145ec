"""The doctor: what is there, what isn't, and times in minutes that follow from what was measured."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import doctor
from digits.recipes import RECIPES
from digits.sampling import DigitSampler
from runtime.device import AutoOnOff, Machine, detect, resolve_precision
from runtime.files import ROOT

ELSEWHERE = Machine(torch.device("meta"), "a device that computes nothing", False, False)


def test_files_are_found_or_absent_and_times_are_in_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "face" / "noise").mkdir(parents=True)
    (tmp_path / "digits" / "svhn").mkdir(parents=True)
    drawn: list[tuple[int, int]] = []

    def expected(sampler: DigitSampler, count: int) -> float:
        drawn.append((sampler.batch, count))
        return 270.0

    monkeypatch.setattr(DigitSampler, "expected_seconds", expected)
    monkeypatch.setattr(doctor, "face_minutes", lambda _: 33.0)
    monkeypatch.setattr(doctor, "training_minutes", lambda machine, preset, compiled: {"cpu": 240.0}[preset])
    doctor.main(doctor.Settings(data=tmp_path, device="cpu", compile="off"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device   cpu: ")
    data = {line.split()[1]: line.split()[2] for line in lines if line.startswith("data ")}
    assert {name for name, state in data.items() if state == "found"} == {"face/noise", "digits/svhn"}
    assert set(data) == set(doctor.DATA)
    for name, file in doctor.WEIGHTS.items():
        size = (ROOT / "checkpoints" / file).stat().st_size / 1e6
        assert f"weights  {name:24s}{size:.1f} MB" in lines
    times = {" ".join(line.split()[:-2]): line.split("minutes")[0].split()[-1] for line in lines if "hw2_1.sh" in line}
    assert times == {"bash hw2_1.sh out": "4.5"}
    assert drawn == [(100, 1000)]  # the script's batch on a CPU, and the grader's images
    assert [line.split("minutes")[0].split()[-1] for line in lines if "hw2_2.sh" in line] == ["33"]
    assert [line.split("minutes")[0].split()[-1] for line in lines if "P1_training.py" in line] == ["240"]
    assert f"(preset cpu, {resolve_precision('auto', detect('cpu'))}, eager)" in lines[-1]


def test_the_training_is_measured_compiled_where_the_training_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, measured = [], []

    def should_compile(choice: str, machine: Machine, worthwhile: bool) -> bool:
        asked.append((choice, worthwhile))
        return choice == "on"

    def training_minutes(machine: Machine, preset: str, compiled: bool) -> float:
        measured.append(compiled)
        return 1.0

    monkeypatch.setattr(doctor, "should_compile", should_compile)
    monkeypatch.setattr(doctor, "face_minutes", lambda _: 33.0)
    monkeypatch.setattr(DigitSampler, "expected_seconds", lambda *_: 270.0)
    monkeypatch.setattr(doctor, "training_minutes", training_minutes)
    choices: tuple[AutoOnOff, ...] = ("on", "auto")
    for choice in choices:
        doctor.main(doctor.Settings(device="cpu", compile=choice))
    assert asked == [("on", True), ("auto", True)]  # thousands of steps are worth the minute
    assert measured == [True, False]


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_training_step_is_measured_in_the_precision_of_auto(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = set()
    monkeypatch.setattr(doctor, "seconds", lambda work, device: work() or 0.5)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: types.add(output.dtype) if isinstance(module, torch.nn.Conv2d) else None
    )
    try:
        doctor.training_minutes(Machine(torch.device("cpu"), "", native, False), "tiny", compiled=False)
    finally:
        hook.remove()
    assert types == {dtype}


SMI = "GPU 0: Tesla T4 (UUID: GPU-1)\nGPU 1: Tesla V100 (UUID: GPU-2)\n"
OLD = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your driver"


@pytest.mark.parametrize(
    ("listed", "cuda", "error", "expected"),
    [
        ("", None, "", ""),
        (
            SMI,
            None,
            "",
            f"Tesla T4: torch {torch.__version__} is built without CUDA; install one from pytorch.org that has it",
        ),
        (SMI, "13.0", OLD, "Tesla T4: The NVIDIA driver on your system is too old (found version 11040)."),
        (SMI, "13.0", "", ""),
    ],
)
def test_a_gpu_that_this_torch_cannot_use_is_named_with_the_reason(
    listed: str, cuda: str | None, error: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = torch.ones

    def on_gpu(count: int, device: str) -> Tensor:
        assert device == "cuda"
        if error:
            raise RuntimeError(error)
        return ones(count)

    monkeypatch.setattr("doctor.shutil.which", lambda _: "nvidia-smi")
    monkeypatch.setattr("doctor.subprocess.run", lambda *_, **__: SimpleNamespace(stdout=listed))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "ones", on_gpu)
    assert doctor.unusable_gpu() == expected


def test_without_nvidias_driver_no_gpu_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doctor.shutil.which", lambda _: None)
    assert doctor.unusable_gpu() == ""


def test_where_the_gpu_is_unusable_the_cpu_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "unusable_gpu", lambda: "Tesla T4: too old a driver")
    monkeypatch.setattr("runtime.device.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor, "face_minutes", lambda _: 33.0)
    monkeypatch.setattr(DigitSampler, "expected_seconds", lambda *_: 270.0)
    monkeypatch.setattr(doctor, "training_minutes", lambda *_: 1.0)
    doctor.main(doctor.Settings(compile="off"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device   cpu: ")
    assert lines[1] == "gpu      not usable: Tesla T4: too old a driver"


def test_minutes_are_scaled_up_from_measured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.5 s for a step of at most 16 images; 0.5 s for one layer of 19.3 GFLOP."""
    monkeypatch.setattr(doctor, "seconds", lambda work, device: 0.5)
    recipe, machine = RECIPES["tiny"], detect("cpu")
    share = recipe.batch / min(16, recipe.batch)
    assert doctor.training_minutes(machine, "tiny", compiled=False) == pytest.approx(0.5 * share * recipe.steps / 60)
    layer = 2 * 9 * 128**2 * 256**2 / 1e9
    assert doctor.face_minutes(machine) == pytest.approx(0.5 * (496 / layer) * 50 * 10 / 60)


class Recorder(torch.nn.Module):
    """A network that records the shapes that it is called with."""

    calls: ClassVar[list[list[tuple[int, ...]]]] = []

    def __init__(self, config: object):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        assert {tensor.device.type for tensor in (x, *labels)} == {"meta"}
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert {label.dtype for label in labels} == {torch.long}
        self.calls.append([tuple(tensor.shape) for tensor in (x, *labels)])
        return x * self.weight


@pytest.mark.parametrize(("preset", "batch"), [("gpu", 16), ("tiny", min(16, RECIPES["tiny"].batch))])
def test_a_training_step_is_measured_on_the_device_and_a_cpu_gets_16_images_at_most(
    preset: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "UNet", Recorder)
    monkeypatch.setattr(doctor, "autocast", lambda *_: nullcontext())  # there is none for such a device
    monkeypatch.setattr(doctor, "seconds", lambda work, device: work() or 0.5)
    monkeypatch.setattr(Recorder, "calls", [])
    doctor.training_minutes(ELSEWHERE, preset, compiled=False)
    assert Recorder.calls == [[(batch, 3, 28, 28), *[(batch,)] * 3]]


def test_a_face_network_is_measured_by_a_layer_of_128_channels_on_256x256(monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[Tensor] = []
    inputs: list[Any] = []
    convolve = F.conv2d

    def timed(work: Any, device: Any) -> float:
        layers.append(work())
        return 0.5

    def recorded(*x: Any, **more: Any) -> Tensor:
        inputs.append((x, more))
        return convolve(*x, **more)

    monkeypatch.setattr(doctor, "seconds", timed)
    monkeypatch.setattr(F, "conv2d", recorded)
    doctor.face_minutes(ELSEWHERE)
    ((x, kernel), more) = inputs[0]
    assert (tuple(x.shape), tuple(kernel.shape), more) == ((1, 128, 256, 256), (128, 128, 3, 3), {"padding": 1})
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert {layers[0].device.type, x.device.type, kernel.device.type} == {"meta"}


def test_the_mean_time_of_three_calls_leaves_out_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    durations = iter([100.0, 1.0, 2.0, 6.0])

    def work() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr("doctor.time.perf_counter", lambda: clock[0])
    assert doctor.seconds(work, detect("cpu").device) == pytest.approx(3.0)
