"""hw2_2.sh and P2_ddim.py as a grader and a user run them: the contract's files, the course's rule, one line for bad input."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from diffusers.models.unets.unet_2d import UNet2DModel
from PIL import Image
from torch import Tensor

from benchmarks.plain_p2 import PlainFaceUNet, plain_homework_ddim
from digits.sampling import CHECKPOINT as DIGITS
from faces.models import SHIPPED_FACES
from faces.noises import SEEDS, Noise, parse_seeds, save_noises
from faces.sampling import compare, psnr, to_image
from P1_model import Network, load_network, save_network
from P2_ddim import Settings, main
from runtime.cli import BadInput
from runtime.files import ROOT, load_safetensors, save_safetensors
from runtime.images import save_image
from runtime.seeds import derived_seed


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def write_noises(folder: Path, names: str, side: int = 16) -> Path:
    """Write one NN.pt [1,3,side,side] per name, as the course does."""
    folder.mkdir(parents=True)
    for name in names.split():
        seed = int.from_bytes(name.encode(), "big")
        torch.save(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed)), folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small UNet2DModel whose output follows its input closely, so that rounding does not grow over the steps."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **kinds)
    for parameter in unet.conv_out.parameters():
        parameter.data.mul_(0.2)
    folder = tmp_path_factory.mktemp("small")
    unet.save_pretrained(folder)
    return folder


@pytest.fixture
def run(small: Path, tmp_path: Path) -> Any:
    """`run(out="a", **flags)` draws with the small model in few steps and returns {stem: pixels}."""

    def draw(out: str = "out", **flags: Any) -> dict[str, np.ndarray]:
        given = {"model": str(small), "output": tmp_path / out, "steps": 4, "record": tmp_path / "record.json", **flags}
        main(Settings(**given))
        return pixels(given["output"])

    return draw


# ---------------------------------------------------------------- the contract


@pytest.mark.slow
def test_the_grading_script_reproduces_an_independent_network_and_rule(course_unet: Path, tmp_path: Path) -> None:
    """50 steps of the full-size network from real .pt files: names, sizes, and at most one grey level."""
    noise = write_noises(tmp_path / "the noise", "07", side=32)
    command = ["bash", str(ROOT / "hw2_2.sh"), "the noise/", "my out/", str(course_unet)]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "my out").iterdir()) == ["07.png"]
    plain = PlainFaceUNet()
    plain.load_state_dict(torch.load(course_unet, weights_only=True))
    x = torch.cat([torch.load(path, weights_only=True) for path in sorted(noise.iterdir())])
    with torch.inference_mode():
        expected = plain_homework_ddim(plain, x).double()
    low, high = expected.amin((1, 2, 3), keepdim=True), expected.amax((1, 2, 3), keepdim=True)
    wanted = ((expected - low) / (high - low) * 255 + 0.5).floor().permute(0, 2, 3, 1).numpy()
    found = np.stack(list(pixels(tmp_path / "my out").values()))
    assert found.shape == (1, 32, 32, 3)
    assert np.abs(found - wanted).max() <= 1
    assert np.square(found - wanted).mean() <= 0.0072


@pytest.mark.slow
def test_batch_1_equals_batch_2_on_the_full_size_network(course_unet: Path, tmp_path: Path) -> None:
    noise = write_noises(tmp_path / "noise", "00 01", side=32)
    for batch in (1, 2):
        options: dict[str, Any] = {"steps": 6, "batch": batch, "eta": 0.5, "record": tmp_path / "record.json"}
        main(Settings(noise=noise, model=str(course_unet), output=tmp_path / str(batch), **options))
    one, two = pixels(tmp_path / "1"), pixels(tmp_path / "2")
    assert max(np.abs(one[stem] - two[stem]).max() for stem in one) <= 1


@pytest.mark.parametrize("arguments", [[], ["noise", "out"], ["noise", "", "UNet.pt"], ["a", "b", "c", "d"]])
def test_the_grading_script_tells_its_usage(arguments: list[str]) -> None:
    done = subprocess.run(["bash", str(ROOT / "hw2_2.sh"), *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "usage: bash hw2_2.sh NOISE_FOLDER OUTPUT_FOLDER UNET_PT" in done.stderr


# ---------------------------------------------------------------- every picture stands for itself


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_another_batch_changes_no_picture_by_more_than_one_grey_level(run: Any, eta: float) -> None:
    one, three = run("one", seeds="0-4", batch=1, eta=eta), run("three", seeds="0-4", batch=3, eta=eta)
    assert list(one) == ["00", "01", "02", "03", "04"]
    assert max(np.abs(one[stem] - three[stem]).max() for stem in one) <= 1


def test_a_part_of_the_job_gives_the_same_pictures(run: Any) -> None:
    every, some = run("every", seeds="0-4", eta=1.0), run("some", seeds="3,1", eta=1.0)
    assert set(some) == {"01", "03"}
    assert max(np.abs(every[stem] - some[stem]).max() for stem in some) <= 1


def test_saved_noises_give_the_same_pictures_as_their_seeds(run: Any, tmp_path: Path) -> None:
    seeded = run("seeded", seeds="0-2", eta=0.7, save_noise=tmp_path / "noise")
    given = run("given", noise=tmp_path / "noise", eta=0.7)
    assert seeded.keys() == given.keys()
    assert all(np.array_equal(seeded[stem], given[stem]) for stem in seeded)
    assert torch.load(tmp_path / "noise" / "00.pt", weights_only=True).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_may_have_any_float_type_and_no_batch_dimension(run: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.randn(3, 16, 16).to(dtype)
    (tmp_path / "noise").mkdir()
    torch.save(x, tmp_path / "noise" / "05.pt")
    save_noises(tmp_path / "float", [Noise("05", x.float())])
    assert np.array_equal(run("a", noise=tmp_path / "noise")["05"], run("b", noise=tmp_path / "float")["05"])


# ---------------------------------------------------------------- every flag, against a plain loop


@pytest.fixture
def p1(tiny_network: Network, tmp_path: Path) -> str:
    """Write a P1 checkpoint of T = 20, whose own guidance is 2.5."""
    save_network(tmp_path / "p1.safetensors", replace(tiny_network, sampler={"guidance": 2.5}))
    return str(tmp_path / "p1.safetensors")


def plain_picture(x: Tensor, stem: str, **flags: Any) -> np.ndarray:
    """Return the picture that one noise [C,H,W] becomes, by a plain loop over one image alone."""
    values: dict[str, Any] = vars(Settings()) | {"steps": 4} | flags
    if Path(values["model"]).is_dir():
        unet, total = UNet2DModel.from_pretrained(values["model"]), 1000
        alpha_bars = (1 - torch.linspace(1e-4, 0.02, total, dtype=torch.float64)).cumprod(0)
    else:
        network = load_network(Path(values["model"]), torch.device("cpu"))
        unet, total, alpha_bars = network.unet, len(network.schedule), network.schedule.alpha_bar
    digit = torch.tensor([10 if values["digit"] is None else values["digit"]])
    domain = torch.tensor([["mnistm", "svhn", "any"].index(values["domain"])])
    scale = 2.5 if values["guidance"] is None else values["guidance"]
    rule, steps = values["rule"], values["steps"]
    visited = [k * (total // steps) + (rule == "homework") for k in reversed(range(steps))]
    if rule == "trailing":
        visited = [round(total - k * total / steps) - 1 for k in range(steps)]
    stream = torch.Generator().manual_seed(derived_seed(values["seed"], *stem.encode()))

    x = x[None]
    for t, t_prev in zip(visited, [*visited[1:], -1], strict=True):
        with torch.inference_mode():
            if isinstance(unet, UNet2DModel):
                output = unet(x, t).sample
            else:
                output, uncond = (unet(x, torch.tensor([t]), d, domain) for d in (digit, torch.tensor([10])))
                output = output if values["digit"] is None else uncond + scale * (output - uncond)
        now = float(alpha_bars[t])
        before = float(alpha_bars[t_prev]) if t_prev >= 0 else float(alpha_bars[0]) if rule == "homework" else 1.0
        signal, noise_share = math.sqrt(now), math.sqrt(1 - now)
        if isinstance(unet, UNet2DModel):
            x0, eps = (x - noise_share * output) / signal, output
        else:  # v
            x0, eps = signal * x - noise_share * output, noise_share * x + signal * output
        x0 = x0 if rule == "ddim" else x0.clamp(-1, 1)
        sigma = values["eta"] * math.sqrt((1 - before) / (1 - now) * (1 - now / before))
        fresh = torch.randn(x.shape[1:], generator=stream) if sigma else 0
        x = math.sqrt(before) * x0 + math.sqrt(max(0, 1 - before - sigma**2)) * eps + sigma * fresh
    low, high = (float(x.min()), float(x.max())) if values["to_uint8"] == "minmax" else (-1.0, 1.0)
    grey = ((x.clamp(low, high) - low) / (high - low) * 255 + 0.5).floor()
    return grey[0].permute(1, 2, 0).numpy().astype(int)


def noise_of(seed: int, side: int = 16) -> Tensor:
    return torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_picture_has_the_start_of_its_seed_and_the_stream_of_its_name(run: Any, small: Path, eta: float) -> None:
    drawn = run(seeds="3,11-12", eta=eta, seed=9)
    assert list(drawn) == ["03", "11", "12"]
    for stem, picture in drawn.items():
        expected = plain_picture(noise_of(int(stem)), stem, model=str(small), eta=eta, seed=9)
        assert np.abs(picture - expected).max() <= 1


# flag: (flags that are given as well, its value)
DECIDES_PICTURES: dict[str, tuple[dict[str, Any], Any]] = {
    "steps": ({"model": "p1"}, 7), "rule": ({"model": "p1"}, "trailing"), "to_uint8": ({"model": "p1"}, "clamp"),
    "eta": ({"model": "p1"}, 0.6), "seed": ({"model": "p1", "eta": 1.0}, 5), "size": ({}, 24), "seeds": ({}, "8"),
    "noise": ({}, "folder"), "model": ({}, "p1"), "digit": ({"model": "p1"}, 3),
    "domain": ({"model": "p1", "digit": 3}, "svhn"), "guidance": ({"model": "p1", "digit": 3}, -1.0),
}  # fmt: skip


@pytest.mark.parametrize("flag", DECIDES_PICTURES)
def test_every_flag_that_decides_the_picture_does_what_a_plain_loop_does_with_it(
    flag: str, run: Any, small: Path, p1: str, tmp_path: Path
) -> None:
    others, value = DECIDES_PICTURES[flag]
    usual = {"model": str(small), "seeds": "0"} | others
    pictures, sides = [], []
    for name, flags in {"usual": usual, "changed": usual | {flag: value}}.items():
        if flags["model"] == "p1":
            flags["model"] = p1
        side = flags.get("size", 28 if flags["model"] == p1 else 16)
        seed = int(flags["seeds"])
        noise = noise_of(seed, side)
        if "noise" in flags:
            seed, noise = 41, noise_of(77)
            save_noises(tmp_path / "folder", [Noise("41", noise)])
            flags = flags | {"noise": tmp_path / "folder", "seeds": SEEDS}
        drawn = run(name, **flags)
        expected = plain_picture(noise, f"{seed:02d}", **flags)
        assert list(drawn) == [f"{seed:02d}"]
        assert np.abs(drawn[f"{seed:02d}"] - expected).max() <= 1
        pictures.append(expected)
        sides.append(side)
    assert sides[0] != sides[1] or np.abs(pictures[0] - pictures[1]).max() > 5


@pytest.mark.parametrize("rule", ["homework", "ddim", "diffusers", "trailing"])
@pytest.mark.parametrize("to_uint8", ["minmax", "clamp"])
def test_every_rule_and_range_is_that_of_the_plain_loop(run: Any, p1: str, rule: str, to_uint8: str) -> None:
    flags = {"model": p1, "rule": rule, "to_uint8": to_uint8}
    expected = plain_picture(noise_of(0, 28), "00", **flags)
    assert np.abs(run(seeds="0", **flags)["00"] - expected).max() <= 1


@pytest.mark.parametrize(("precision", "most"), [("bf16", 20), ("fp16", 1)])
def test_half_precision_gives_nearly_the_same_picture(run: Any, precision: str, most: float) -> None:
    one, other = run("fp32", seeds="0")["00"], run("half", seeds="0", precision=precision)["00"]
    assert 0 < np.square(one - other).mean() < most


def test_a_compiled_network_is_compiled_once_and_draws_the_same(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr("faces.sampling.should_compile", lambda choice, machine: choice == "on")
    monkeypatch.setattr(UNet2DModel, "compile", lambda self: compiled.append(self))
    one, other = run("off", seeds="0")["00"], run("on", seeds="0", compile="on")["00"]
    assert len(compiled) == 1
    assert np.array_equal(one, other)


# ---------------------------------------------------------------- pictures and comparison


def test_minmax_spans_0_to_255_and_rounds_to_the_nearest() -> None:
    image = torch.tensor([-3.0, -3 + 4 * 0.4 / 255, -3 + 4 * 0.6 / 255, 1.0]).view(1, 2, 2)
    assert to_image(image, "minmax").flatten().tolist() == [0, 0, 1, 255]


def test_clamp_maps_minus_1_to_0_and_1_to_255() -> None:
    assert to_image(torch.tensor([[[-2.0, -1.0, 0.0, 1.0, 2.0]]]), "clamp").flatten().tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]


def test_a_picture_of_one_value_is_black_not_nan() -> None:
    assert not to_image(torch.full((3, 2, 2), 0.3), "minmax").any()


@pytest.mark.parametrize(("off", "passes"), [(4, True), (5, False)])
def test_the_bar_is_a_mean_squared_error_below_20(off: int, passes: bool) -> None:
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    assert compare(image + off, image) == {"mse": off**2, "largest": off, "pass": passes}


def test_a_reference_gives_a_table_and_a_record(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("truth", seeds="0-2")
    run("again", seeds="0-2", reference=tmp_path / "truth")
    table = json.loads((tmp_path / "record.json").read_text())["metrics"]["reference"]
    assert table == {stem: {"mse": 0.0, "largest": 0.0, "pass": True} for stem in ("00", "01", "02")}
    printed = capsys.readouterr().out
    assert printed.count("PASS") == 3
    assert "3 of 3 pass" in printed


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("7", [7]), ("3, 5-6", [3, 5, 6])])
def test_seeds_are_numbers_and_ranges(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


def test_at_most_100_000_seeds_are_taken_over_all_ranges() -> None:
    assert len(parse_seeds("5,10-100008")) == 100_000
    for text in ("5,10-100009", "0-100000"):
        with pytest.raises(BadInput, match="at most 100,000 at once"):
            parse_seeds(text)


@pytest.mark.parametrize(
    "text", ["", "a", "3-1", "1-", "-1", "1,,2", "1.5", "4,4", "0-99999999999", "1" * 22, "9" * 5000]
)
def test_other_seeds_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--seeds"):
        parse_seeds(text)


def nan() -> Tensor:
    x = torch.zeros(3, 16, 16)
    x[0, 0, 0] = math.nan
    return x


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.randn(2, 3, 16, 16), r"01.pt: \[2, 3, 16, 16\]"),
        (torch.randn(1, 1, 16, 16), r"01.pt: \[1, 1, 16, 16\]"),
        (torch.randn(3, 15, 16), "01.pt.*multiples of 2"),
        (torch.randn(3, 32, 32), r"01.pt: \[3, 32, 32\], but 00.pt is \[3, 16, 16\]"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), "01.pt: holds torch.uint8"),
        (nan(), "01.pt: holds 1 values that are NaN"),
        ({"noise": torch.zeros(3, 16, 16)}, "01.pt: holds dict"),
    ],
)
def test_a_noise_that_does_not_fit_is_named(run: Any, tmp_path: Path, content: Any, message: str) -> None:
    noise = write_noises(tmp_path / "noise", "00")
    torch.save(content, noise / "01.pt")
    with pytest.raises(BadInput, match=message):
        run(noise=noise)
    assert not (tmp_path / "out").exists()


def test_what_file_browsers_leave_in_a_folder_of_noises_is_skipped(run: Any, tmp_path: Path) -> None:
    noise = write_noises(tmp_path / "noise", "00 01")
    (noise / "01.pt").rename(noise / "01.PT")
    (noise / "._00.pt").write_bytes(b"\0\5\26\7 Mac OS X")
    (noise / "Thumbs.db").write_bytes(b"\xd0\xcf")
    (noise / "02.pt").mkdir()
    assert list(run(noise=noise)) == ["00", "01"]


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", b"<html>", b""])
def test_a_damaged_noise_of_a_fitting_name_stops_the_run(run: Any, tmp_path: Path, content: bytes) -> None:
    noise = write_noises(tmp_path / "noise", "00")
    (noise / "01.pt").write_bytes(content)
    with pytest.raises(BadInput, match=r"01\.pt is "):
        run(noise=noise)


def test_two_noises_of_one_image_are_named(run: Any, tmp_path: Path) -> None:
    noise = write_noises(tmp_path / "noise", "00")
    (noise / "00.PT").write_bytes((noise / "00.pt").read_bytes())
    with pytest.raises(BadInput, match="differ in their suffix only"):
        run(noise=noise)


@pytest.mark.parametrize("kind", ["gradient", "parameter", "fp8", "fp64"])
def test_a_noise_of_another_kind_of_tensor_is_read(run: Any, tmp_path: Path, kind: str) -> None:
    noise = write_noises(tmp_path / "noise", "00")
    x = torch.load(noise / "00.pt", weights_only=True)
    content = {
        "gradient": x.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(x),
        "fp8": x.to(torch.float8_e4m3fn),
        "fp64": x.double(),
    }[kind]
    torch.save(content, noise / "00.pt")
    assert list(run(noise=noise)) == ["00"]


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_a_noise_without_dense_values_is_named(run: Any, tmp_path: Path, kind: str) -> None:
    noise = write_noises(tmp_path / "noise", "00")
    x = torch.zeros(1, 3, 16, 16)
    torch.save(x.to_sparse() if kind == "sparse" else x.to("meta"), noise / "00.pt")
    with pytest.raises(BadInput, match=rf"00\.pt: its tensor is .*{kind}"):
        run(noise=noise)


def test_a_noise_with_code_is_refused(run: Any, tmp_path: Path) -> None:
    noise = write_noises(tmp_path / "noise", "00")
    torch.save(Path("/tmp"), noise / "01.pt")
    with pytest.raises(BadInput, match=r"01.pt.*refused"):
        run(noise=noise)


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_without_noises_is_named(run: Any, tmp_path: Path, make: bool) -> None:
    if make:
        (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty: no"):
        run(noise=tmp_path / "empty")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eta": 1.1}, "--eta 1.1"),
        ({"eta": math.nan}, "--eta nan"),
        ({"eta": 0.5, "rule": "bdia"}, "--eta 0.5: rule bdia"),
        ({"steps": 0}, "--steps: 0"),
        ({"steps": 1000}, "--steps: 1000.*homework"),
        ({"batch": -1}, "--batch -1"),
        ({"size": 17}, "--size 17"),
        ({"noise": Path("folder"), "size": 16}, "--noise folder and --size 16"),
        ({"noise": Path("folder"), "seeds": "5"}, "--noise folder and --seeds 5"),
        ({"size": -16}, "--size -16"),
        ({"digit": 3}, "--digit"),
        ({"device": "tpu9"}, "--device tpu9"),
    ],
)
def test_flags_that_make_no_sense_are_named(run: Any, tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run(**flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("guidance", [math.nan, math.inf, 1e38])
def test_numbers_that_break_the_images_write_none(guidance: float, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"model": str(DIGITS), "digit": 3, "seeds": "0", "steps": 4}
    with pytest.raises(BadInput, match="--guidance|NaN"):
        main(Settings(output=tmp_path, record=tmp_path / "record.json", guidance=guidance, **flags))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flag", "target"), [("noise", "output"), ("noise", "save_noise"), ("reference", "output")])
def test_nothing_is_written_among_what_was_given(run: Any, tmp_path: Path, flag: str, target: str) -> None:
    folder = write_noises(tmp_path / "given", "00")
    before = (folder / "00.pt").read_bytes()
    with pytest.raises(BadInput, match="the same folder as"):
        run(**{flag: folder, target: tmp_path / "x" / ".." / "given"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"00.pt": before}


def test_a_noise_without_a_reference_is_named_before_anything_is_drawn(run: Any, tmp_path: Path) -> None:
    run("truth", seeds="0")
    with pytest.raises(BadInput, match="01.png"):
        run("again", seeds="0-1", reference=tmp_path / "truth")
    assert not (tmp_path / "again").exists()


def test_a_reference_of_another_size_is_named(run: Any, tmp_path: Path) -> None:
    run("truth", seeds="0", size=32)
    with pytest.raises(BadInput, match="00.png: 32x32, the noise makes 16x16"):
        run("again", seeds="0", reference=tmp_path / "truth")


def test_an_output_that_is_a_file_is_named(run: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(BadInput, match="a file is in the way"):
        run()
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("flag", "place"), [("record", "file/record.json"), ("save_noise", "file/noises"), ("output", "file/out")]
)
def test_places_that_cannot_be_written_are_named_before_the_work(
    run: Any, tmp_path: Path, flag: str, place: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=f"^--{flag.replace('_', '-')} {tmp_path / place}: .* name a folder$"):
        run(**{"seeds": "0", "output": tmp_path / "out", flag: tmp_path / place})
    assert not (tmp_path / "out").exists()


def test_a_default_record_that_cannot_be_written_is_a_warning(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(Settings, "record", tmp_path / "file" / "record.json")
    assert list(run(seeds="0", record=Settings.record)) == ["00"]
    assert "warning: no record of this run" in capsys.readouterr().err


def test_pictures_that_are_finished_stay_when_a_later_one_fails(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_the_third(path: Path, image: Tensor) -> None:
        if path.stem == "02":
            raise KeyboardInterrupt
        save_image(path, image)

    monkeypatch.setattr("P2_ddim.save_image", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(seeds="0-3", batch=1)
    assert list(pixels(tmp_path / "out")) == ["00", "01"]


# ---------------------------------------------------------------- pictures into noises


def write_pictures(folder: Path, names: str, width: int = 16, height: int = 16) -> Path:
    """Write one picture of smooth colours per name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names.split():
        seed = int.from_bytes(name.encode()[:4], "big")
        coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
        pixels = (smooth * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / name)
    return folder


def noises_of(folder: Path) -> dict[str, Tensor]:
    return {path.stem: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}


@pytest.mark.parametrize("model", ["small", "p1"])
def test_pictures_come_back_to_the_bit_from_the_pairs_of_the_exact_rule(
    run: Any, small: Path, p1: str, tmp_path: Path, model: str
) -> None:
    source, digit = (str(small), None) if model == "small" else (p1, 3)
    side = 16 if model == "small" else 28
    photos = write_pictures(tmp_path / "photos", "anna.png 01.bmp", side, side)
    assert not run("noise", model=source, digit=digit, invert=photos, steps=10)
    written = sorted(path.name for path in (tmp_path / "noise").iterdir())
    assert written == ["01.pair.safetensors", "01.pt", "anna.pair.safetensors", "anna.pt"]
    guidance = None if digit is None else 1.0
    flags: dict[str, Any] = {"model": source, "digit": digit, "guidance": guidance, "steps": 10, "to_uint8": "clamp"}
    drawn = run("again", noise=tmp_path / "noise", rule="bdia", **flags)
    for stem, suffix in (("anna", "png"), ("01", "bmp")):
        picture = np.asarray(Image.open(photos / f"{stem}.{suffix}")).astype(int)
        assert np.array_equal(drawn[stem], picture)


@pytest.mark.parametrize(("precision", "warns"), [("fp32", False), ("bf16", True)])
def test_a_precision_in_which_the_exact_rule_is_not_exact_is_a_warning(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str, warns: bool
) -> None:
    run("noise", invert=write_pictures(tmp_path / "photos", "a.png"), steps=2, precision=precision)
    assert ("warning: --precision bf16: the way back" in capsys.readouterr().err) == warns


def test_the_plain_rule_leaves_noises_without_pairs_that_lead_nearly_back(run: Any, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"model": str(SHIPPED_FACES), "rule": "ddim", "steps": 100}
    faces = run("faces", seeds="0", to_uint8="clamp", **flags)
    run("noise", invert=tmp_path / "faces", **flags)
    assert [path.name for path in (tmp_path / "noise").iterdir()] == ["00.pt"]
    again = run("again", noise=tmp_path / "noise", to_uint8="clamp", **flags)
    assert 20 < psnr(np.square(again["00"] - faces["00"]).mean()) < math.inf


@pytest.mark.parametrize("rule", ["ddim", "bdia"])
def test_an_inverted_noise_is_that_of_a_plain_loop(run: Any, small: Path, tmp_path: Path, rule: str) -> None:
    """The picture, as x / 127.5 - 1, is the state at alpha_bar[0]; no clamp."""
    photos = write_pictures(tmp_path / "photos", "a.png")
    run("noise", invert=photos, rule=rule, steps=4)
    unet = UNet2DModel.from_pretrained(small)
    alpha_bars = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def move(x: Tensor, eps: Tensor, t: int, target: int) -> Tensor:
        now, then = float(alpha_bars[t]), float(alpha_bars[target])
        x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        return math.sqrt(then) * x0 + math.sqrt(1 - then) * eps

    times = [0, 1, 251, 501, 751] if rule == "bdia" else [0, 250, 500, 750]
    x = torch.from_numpy(np.array(Image.open(photos / "a.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    states = [x]
    with torch.inference_mode():
        for k, (t, after) in enumerate(zip(times, times[1:], strict=False)):
            eps = unet(states[-1], t).sample
            step = move(states[-1], eps, t, after)
            if rule == "bdia" and k:
                step = states[-2] + step - move(states[-1], eps, t, times[k - 1])
            states.append(step)
    torch.testing.assert_close(noises_of(tmp_path / "noise")["a"], states[-1], rtol=1e-4, atol=1e-4)
    if rule == "bdia":
        pair, facts = load_safetensors(tmp_path / "noise" / "a.pair.safetensors")
        torch.testing.assert_close(pair["x_next"], states[-2][0], rtol=1e-4, atol=1e-4)
        assert torch.equal(pair["x_T"], noises_of(tmp_path / "noise")["a"][0])
        assert facts == {"steps": "4", "timesteps": "751 501"}


def test_another_batch_inverts_to_nearly_the_same_noise(run: Any, tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", "a.png b.png c.png d.png e.png")
    run("one", invert=photos, batch=1)
    run("two", invert=photos, batch=2)
    one, two = noises_of(tmp_path / "one"), noises_of(tmp_path / "two")
    assert len(one) == 5
    for stem, x in one.items():
        torch.testing.assert_close(two[stem], x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("width", "height", "kept", "flags"),
    [(32, 16, (8, 0, 24, 16), {}), (16, 24, (0, 4, 16, 20), {}), (48, 32, (8, 0, 40, 32), {"size": 32})],
)
def test_the_middle_of_a_picture_of_another_size_is_resized_with_one_line(
    run: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    width: int,
    height: int,
    kept: tuple[int, int, int, int],
    flags: dict[str, Any],
) -> None:
    photos = write_pictures(tmp_path / "photos", "a.png", width, height)
    run("noise", invert=photos, steps=10, **flags)
    side = flags.get("size", 16)
    message = f"{photos / 'a.png'}: {width}x{height}, its middle is resized to {side}x{side}\n"
    assert (message in capsys.readouterr().err) == ((width, height) != (side, side))
    middle = np.asarray(Image.open(photos / "a.png").crop(kept)).astype(int)
    drawn = run("again", noise=tmp_path / "noise", rule="bdia", steps=10, to_uint8="clamp")["a"]
    assert np.abs(drawn - middle).max() <= 1


def test_grey_pictures_are_read_as_colour(run: Any, tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", "a.png")
    Image.open(photos / "a.png").convert("L").save(photos / "a.png")
    run("noise", invert=photos)
    assert noises_of(tmp_path / "noise")["a"].shape == (1, 3, 16, 16)


def test_the_command_that_draws_the_pictures_again_is_printed_last(
    run: Any, p1: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_pictures(tmp_path / "photos", "a.png", 28, 28)
    run("my noise", model=p1, invert=photos, digit=3, domain="svhn")
    script, *command = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("python ")[2])
    assert script == "P2_ddim.py"
    settings = tyro.cli(Settings, args=command)
    expected: dict[str, Any] = {"noise": tmp_path / "my noise", "rule": "bdia", "to_uint8": "clamp", "model": p1}
    expected |= {"steps": 4, "digit": 3, "domain": "svhn", "guidance": 1.0}
    assert settings == Settings(**expected)


def test_a_pair_is_read_by_its_rule_alone(run: Any, tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", "a.png")
    run("noise", invert=photos)
    with_pair = run("with", noise=tmp_path / "noise", rule="homework")
    (tmp_path / "noise" / "a.pair.safetensors").unlink()
    assert np.array_equal(run("without", noise=tmp_path / "noise", rule="homework")["a"], with_pair["a"])
    assert list(run("alone", noise=tmp_path / "noise", rule="bdia")) == ["a"]


def test_pairs_are_saved_with_their_noises(run: Any, tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", "a.png")
    run("noise", invert=photos)
    run("again", noise=tmp_path / "noise", rule="bdia", save_noise=tmp_path / "copy")
    assert torch.equal(noises_of(tmp_path / "copy")["a"], noises_of(tmp_path / "noise")["a"])
    (states, facts), (copied, copied_facts) = (
        load_safetensors(tmp_path / name / "a.pair.safetensors") for name in ("noise", "copy")
    )
    assert facts == copied_facts
    assert all(torch.equal(copied[name], states[name]) for name in ("x_T", "x_next"))


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        ("none", {"steps": 5}, r"a.pair.safetensors: has .*'steps': '4'.* this run has .*'steps': '5'"),
        ("missing", {}, "b.pair.safetensors does not exist"),
        ("other noise", {}, "a.pair.safetensors: its x_T is not that of a.pt"),
        ("other tensors", {}, r"a.pair.safetensors: holds no x_T and x_next of shape \[3, 16, 16\]"),
        ("nan", {}, "a.pair.safetensors: holds values that are NaN"),
        ("text", {}, "a.pair.safetensors is a text"),
    ],
)
def test_a_pair_that_does_not_fit_is_named(
    run: Any, tmp_path: Path, damage: str, flags: dict[str, Any], message: str
) -> None:
    run("noise", invert=write_pictures(tmp_path / "photos", "a.png b.png"))
    pair = tmp_path / "noise" / "a.pair.safetensors"
    states, facts = load_safetensors(pair)
    if damage == "missing":
        (tmp_path / "noise" / "b.pair.safetensors").unlink()
    elif damage == "text":
        pair.write_text("hello")
    elif damage == "other noise":
        save_noises(tmp_path / "noise", [Noise("a", noise_of(5))])
    else:
        states |= {
            "nan": {"x_next": torch.full((3, 16, 16), math.nan)},
            "other tensors": {"x_next": torch.zeros(3)},
        }.get(damage, {})
        save_safetensors(pair, states, facts)
    with pytest.raises(BadInput, match=message):
        run("again", noise=tmp_path / "noise", rule="bdia", **flags)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eta": 0.5}, "--eta 0.5 and --invert: fresh noise"),
        ({"eta": math.nan}, "--eta nan"),
        ({"rule": "trailing"}, "--rule trailing clamps x0"),
        ({"rule": "diffusers"}, "--rule diffusers clamps x0"),
        ({"seeds": "3"}, "--seeds 3 and --invert"),
        ({"noise": Path("folder")}, "--noise and --invert"),
        ({"mix": "0=1"}, "--mix and --invert"),
        ({"reference": Path("folder")}, "--reference and --invert"),
        ({"save_noise": Path("folder")}, "--save-noise and --invert"),
        ({"export": Path("folder")}, "--export and --invert"),
        ({"guidance": 2.0}, "--guidance 2.0: inversion runs at guidance 1"),
        ({"size": 17}, "--size 17: height and width must be multiples of 2"),
        ({"steps": 0}, "--steps: 0"),
        ({"invert": Path("none")}, "--invert none: no such folder"),
    ],
)
def test_flags_that_inversion_has_no_use_for_are_named(
    run: Any, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    photos = write_pictures(tmp_path / "photos", "a.png")
    with pytest.raises(BadInput, match=message):
        run(**{"invert": photos, **flags})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "--invert .*photos: no picture there"),
        ("a.png a.webp", "a.webp and a.png would give one noise|a.png and a.webp would give one noise"),
        ("text.png", "text.png is not a readable picture"),
        ("b.pt", "no picture there"),
    ],
)
def test_a_folder_without_usable_pictures_is_named(run: Any, tmp_path: Path, names: str, message: str) -> None:
    (tmp_path / "photos").mkdir()
    for name in names.split():
        if name.startswith("a."):
            write_pictures(tmp_path / "photos", name)
        else:
            (tmp_path / "photos" / name).write_text("hello")
    with pytest.raises(BadInput, match=message):
        run(invert=tmp_path / "photos")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_of_pictures_is_named(run: Any, tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", "a.png")
    with pytest.raises(BadInput, match="a.png: a file, name its folder"):
        run(invert=photos / "a.png")


def test_noises_are_not_written_among_the_pictures(run: Any, tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "out", "a.png")
    with pytest.raises(BadInput, match="the same folder as --invert"):
        run(invert=photos)


def test_a_model_of_other_channels_takes_no_pictures(run: Any, tmp_path: Path) -> None:
    grey = UNet2DModel(16, 1, 1, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), layers_per_block=1)  # fmt: skip
    grey.save_pretrained(tmp_path / "grey")
    photos = write_pictures(tmp_path / "photos", "a.png")
    with pytest.raises(BadInput, match=r"a.png: a picture has 3 channels, --model .*grey takes 1"):
        run(model=str(tmp_path / "grey"), invert=photos)


# ---------------------------------------------------------------- the mean of noises


def test_a_mix_draws_one_image_from_the_renormalised_mean(run: Any, small: Path, tmp_path: Path) -> None:
    drawn = run(seeds="0-3", mix="0=0.5, 01=0.3,3=0.2", save_noise=tmp_path / "noise")
    expected = (0.5 * noise_of(0) + 0.3 * noise_of(1) + 0.2 * noise_of(3)) / math.sqrt(0.38)
    torch.testing.assert_close(noises_of(tmp_path / "noise")["mix"][0], expected)
    assert list(drawn) == ["mix"]
    assert np.abs(drawn["mix"] - plain_picture(expected, "mix", model=str(small))).max() <= 1


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("", "is no NOISE=WEIGHT"),
        ("0", "'0' is no NOISE=WEIGHT"),
        ("0=0.5,", "'' is no NOISE=WEIGHT"),
        ("0=a", "'0=a' is no NOISE=WEIGHT"),
        ("0=0.5,7=0.5", "no noise '7' among 00, 01, 02"),
        ("0=0.5,00=0.5", "names noise 00 twice"),
        ("0=0.5,1=-0.5", "weight of noise 1 must be a number from zero on"),
        ("0=nan,1=1", "weight of noise 0 must be"),
        ("0=inf,1=1", "weight of noise 0 must be"),
        ("0=0,1=0", "all weights are zero"),
    ],
)
def test_weights_that_do_not_fit_are_named(run: Any, tmp_path: Path, mix: str, message: str) -> None:
    with pytest.raises(BadInput, match=f"--mix {mix}.*{message}"):
        run(seeds="0-2", mix=mix)
    assert not (tmp_path / "out").exists()


def test_an_exported_model_draws_the_same_pictures_and_exporting_draws_none(
    run: Any, small: Path, tmp_path: Path
) -> None:
    assert not run("none", export=tmp_path / "exported")
    one, other = run("one", seeds="0")["00"], run("other", seeds="0", model=str(tmp_path / "exported"))["00"]
    assert np.array_equal(one, other)


HELD_BY = {
    "output": test_a_part_of_the_job_gives_the_same_pictures,
    "batch": test_another_batch_changes_no_picture_by_more_than_one_grey_level,
    "precision": test_half_precision_gives_nearly_the_same_picture,
    "compile": test_a_compiled_network_is_compiled_once_and_draws_the_same,
    "device": test_flags_that_make_no_sense_are_named,
    "reference": test_a_reference_gives_a_table_and_a_record,
    "save_noise": test_saved_noises_give_the_same_pictures_as_their_seeds,
    "export": test_an_exported_model_draws_the_same_pictures_and_exporting_draws_none,
    "record": test_a_reference_gives_a_table_and_a_record,
    "invert": test_an_inverted_noise_is_that_of_a_plain_loop,
    "mix": test_a_mix_draws_one_image_from_the_renormalised_mean,
}


def test_the_effect_of_every_flag_is_tested() -> None:
    assert {*DECIDES_PICTURES, *HELD_BY} == {field.name for field in fields(Settings)}
