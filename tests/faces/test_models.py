"""The models of P2: UNet.pt is diffusers' network, models are recognised by content, other files are named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.plain_p2 import PlainFaceUNet
from diffusion.schedule import cosine, linear
from faces.course_unet import CONFIG, course_layout, load_course_unet
from faces.models import Labels, Model, export, load_model
from P1_model import Network, save_network
from runtime.cli import BadInput

CPU = torch.device("cpu")
FP32 = torch.float32


def load(source: Path | str, **labels: Any) -> Model:
    return load_model(str(source), CPU, FP32, Labels(**labels))


def small_unet(**more: Any) -> UNet2DModel:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet: UNet2DModel = UNet2DModel(**{**options, **kinds, **more})
    return unet


# ---------------------------------------------------------------- UNet.pt


def test_the_layout_has_the_courses_tensors_and_parameters() -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in UNet2DModel(**CONFIG).state_dict().items()}
    layout = course_layout(shapes)
    assert len(layout) + 1 == 427  # one buffer
    assert sum(shape.numel() for shape, _ in layout.values()) == 113_673_219
    assert sorted(target for _, targets in layout.values() for target in targets) == sorted(shapes)


@pytest.mark.parametrize("t", [981, 501, 1])
def test_one_step_equals_an_independent_network_on_the_same_input(course_unet: Path, t: int) -> None:
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(t))
    plain = PlainFaceUNet()
    plain.load_state_dict(torch.load(course_unet, weights_only=True))
    with torch.inference_mode():
        expected = plain(x, torch.tensor([t]))
        found = load(course_unet).denoiser(1)(x, t)
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


def change(state: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    """Return the state with one tensor replaced, added or (None) removed."""
    changed = {**state, name: value}
    return {k: v for k, v in changed.items() if v is not None}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("up23.resblocks.skip.weight", None, "lacks 1 tensor.*up23.resblocks.skip.weight"),
        ("label.weight", torch.zeros(3), "unknown 1 tensor.*label.weight"),
        (
            "down14.attention.qkv.weight",
            torch.zeros(512, 512, 1, 1),
            r"down14.attention.qkv.weight is \[512, 512, 1, 1\]",
        ),
        ("out.2.bias", torch.tensor([0.0, float("nan"), 0.0]), "out.2.bias.*NaN"),
        ("out.2.bias", torch.zeros(3, dtype=torch.int64), "out.2.bias.*integers"),
        ("time.0.inv_freq", torch.ones(64), "other frequencies"),
    ],
)
def test_a_file_that_differs_in_one_tensor_names_it(
    course_unet: Path, tmp_path: Path, name: str, value: Tensor | None, message: str
) -> None:
    state = torch.load(course_unet, weights_only=True, mmap=True)
    path = tmp_path / "UNet.pt"
    torch.save(change(state, name, value), path)
    with pytest.raises(BadInput, match=message):
        load_course_unet(path)
    path.unlink()


def test_a_truncated_file_is_refused(course_unet: Path, tmp_path: Path) -> None:
    path = tmp_path / "UNet.pt"
    with course_unet.open("rb") as whole:
        path.write_bytes(whole.read(1_000_000))
    with pytest.raises(BadInput, match="truncated"):
        load(path)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"down1.weight": Code()}, tmp_path / "UNet.pt")
    with pytest.raises(BadInput, match="refused"):
        load(tmp_path / "UNet.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "kind"),
    [([torch.zeros(3)], "a list"), (torch.zeros(3), "one tensor"), ({1: 2}, "a dict"), (3, "a int")],
)
def test_another_object_than_a_state_dict_is_named(tmp_path: Path, content: Any, kind: str) -> None:
    torch.save(content, tmp_path / "UNet.pt")
    with pytest.raises(BadInput, match=kind):
        load(tmp_path / "UNet.pt")


def test_a_wrapped_unet_pt_is_read_under_any_name(course_unet: Path, tmp_path: Path) -> None:
    state = torch.load(course_unet, weights_only=True, mmap=True)
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, tmp_path / "face")
    loaded = load(tmp_path / "face").network.state_dict()
    (tmp_path / "face").unlink()
    assert all(torch.equal(loaded[name], value) for name, value in load(course_unet).network.state_dict().items())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_of_something_else_are_called_what_they_are(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    state = {"lora_unet_mid_block.lora_down.weight": torch.zeros(2)}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    with pytest.raises(BadInput, match=rf"w\.{suffix} is a LoRA, .*not the bare state dict of UNet.pt"):
        load(path)


def test_an_exported_model_is_a_pipeline_of_the_very_same_weights_and_rule(course_unet: Path, tmp_path: Path) -> None:
    model = load(course_unet)
    export(model, tmp_path / "face")
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "face", local_files_only=True)
    loaded = load(tmp_path / "face")
    state = model.network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.network.state_dict().items())
    assert [loaded.schedule.alpha_bar_at(t) for t in range(1000)] == [
        model.schedule.alpha_bar_at(t) for t in range(1000)
    ]
    pipeline.scheduler.set_timesteps(50)
    assert pipeline.scheduler.timesteps[[0, -1]].tolist() == [981, 1]
    assert float(pipeline.scheduler.final_alpha_cumprod) == pytest.approx(0.9999)


def test_an_exported_model_keeps_a_schedule_that_is_not_the_default(tmp_path: Path) -> None:
    small_unet().save_pretrained(tmp_path / "small")
    model = replace(load(tmp_path / "small"), schedule=cosine(1000))
    export(model, tmp_path / "face")
    assert load(tmp_path / "face").schedule.alpha_bar.tolist() == pytest.approx(
        cosine(1000).alpha_bar.tolist(), rel=1e-4
    )


def test_export_does_not_write_into_a_folder_with_files(tmp_path: Path) -> None:
    small_unet().save_pretrained(tmp_path / "small")
    with pytest.raises(BadInput, match="not empty"):
        export(load(tmp_path / "small"), tmp_path)


# ---------------------------------------------------------------- diffusers folders


@pytest.mark.parametrize("unet_in", [".", "unet"])
@pytest.mark.parametrize("scheduler_in", [".", "scheduler"])
def test_a_folder_is_known_whether_flat_or_nested_and_brings_its_schedule(
    tmp_path: Path, unet_in: str, scheduler_in: str
) -> None:
    small_unet().save_pretrained(tmp_path / unet_in)
    DDPMScheduler(500, 1e-3, 0.03, prediction_type="v_prediction").save_pretrained(tmp_path / scheduler_in)
    model = load(tmp_path)
    assert torch.equal(model.schedule.alpha_bar, linear(500, 1e-3, 0.03).alpha_bar)
    assert model.schedule.prediction == "v"
    assert (model.shape, model.stride) == ((3, 16, 16), 2)


def test_a_schedule_that_is_not_linear_comes_from_diffusers(tmp_path: Path) -> None:
    small_unet().save_pretrained(tmp_path)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.save_pretrained(tmp_path)
    torch.testing.assert_close(
        load(tmp_path).schedule.alpha_bar.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7
    )


def test_a_folder_without_a_scheduler_gets_the_courses_schedule(tmp_path: Path) -> None:
    small_unet().save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).schedule.alpha_bar, linear(1000).alpha_bar)


def test_a_folder_computes_what_its_network_does(tmp_path: Path) -> None:
    unet = small_unet()
    unet.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(load(tmp_path).denoiser(2)(x, 7), unet(x, 7).sample)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"])
def test_a_folder_of_another_form_of_weights_is_read_without_a_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = small_unet()
    unet.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    lines: list[str] = []
    monkeypatch.setattr(logging.Logger, "callHandlers", lambda _, record: lines.append(record.getMessage()))
    save = torch.save if name.endswith("bin") else save_file
    save(unet.state_dict(), tmp_path / name)
    load(tmp_path)
    assert lines == []


def test_a_face_network_computes_in_its_precision_and_gives_float32(tmp_path: Path) -> None:
    small_unet().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.bfloat16}
    kernels = [parameter for parameter in model.network.parameters() if parameter.dim() == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model.denoiser(1)(x, 7)
        torch.testing.assert_close(output, load(tmp_path).denoiser(1)(x, 7), rtol=0.05, atol=0.05)
    assert output.dtype == torch.float32


def test_a_folder_of_another_class_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(BadInput, match="AutoencoderKL"):
        load(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no config.json"):
        load(tmp_path)


def test_a_folder_without_weights_is_named_in_one_line(tmp_path: Path) -> None:
    small_unet().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadInput, match=str(tmp_path)) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_pointer_in_the_place_of_weights_is_named(tmp_path: Path, suffix: str) -> None:
    small_unet().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / f"diffusion_pytorch_model.{suffix}").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BadInput, match=rf"diffusion_pytorch_model\.{suffix} is a Git LFS pointer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "config.json holds list, not an object"),
        ("scheduler_config.json", "3", "scheduler_config.json holds int, not an object"),
        ("scheduler_config.json", '{"beta_start": "low"}', "scheduler_config.json makes no schedule"),
        ("scheduler_config.json", '{"num_train_timesteps": -1}', "scheduler_config.json makes no schedule"),
    ],
)
def test_a_configuration_of_other_types_is_one_line(tmp_path: Path, file: str, content: str, message: str) -> None:
    small_unet().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(BadInput, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_lack_a_tensor_are_not_filled_at_random(tmp_path: Path) -> None:
    small_unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(BadInput):
        load(tmp_path)


def test_a_learned_variance_is_refused(tmp_path: Path) -> None:
    small_unet(out_channels=6).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="6 channels"):
        load(tmp_path)


def test_a_prediction_of_another_kind_is_refused(tmp_path: Path) -> None:
    small_unet().save_pretrained(tmp_path)
    DDPMScheduler(prediction_type="sample").save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="sample"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((3, 16, 32), True),
        ((3, 2, 2), True),
        ((3, 15, 32), False),
        ((3, 16, 33), False),
        ((3, 0, 16), False),
        ((3, 16, 0), False),
        ((1, 16, 16), False),
        ((3, 16), False),
        ((1, 3, 16, 16), False),
    ],
)
def test_a_face_networks_sides_are_multiples_of_its_downsampling(
    shape: tuple[int, ...], fits: bool, tmp_path: Path
) -> None:
    small_unet().save_pretrained(tmp_path)
    assert (load(tmp_path).shape_error(shape) == "") == fits


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_hub_repository_is_fetched_with_other_weights_only_if_it_has_no_safetensors(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in for the hub fetches the files of the patterns that are named."""
    patterns: list[list[str]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/faces"
        patterns.append(allow_patterns)
        if f"*.{suffix}" in allow_patterns:
            small_unet().save_pretrained(tmp_path, safe_serialization=suffix == "safetensors")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load("someone/faces").shape == (3, 16, 16)
    tried = [["*.json", "*.safetensors"], ["*.json", "*.bin"]]
    assert patterns == tried[: 1 if suffix == "safetensors" else 2]


@pytest.mark.parametrize("name", ["nowhere", "nowhere/UNet.pt", "/nowhere/face", "a/b/c", "x/model.safetensors"])
def test_a_missing_file_is_never_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: pytest.fail(f"{name}: looked for on the hub")
    )
    with pytest.raises(BadInput, match="does not exist"):
        load(name)


def test_a_hub_name_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="the hub did not give it") as error:
        load("nobody/no-such-model")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- P1 checkpoints


@pytest.fixture
def digits(tiny_network: Network, tmp_path: Path) -> Path:
    save_network(tmp_path / "anything", tiny_network)
    return tmp_path / "anything"


def test_a_p1_checkpoint_is_known_by_content_and_brings_its_schedule(digits: Path, tiny_network: Network) -> None:
    model = load(digits)
    assert torch.equal(model.schedule.alpha_bar, tiny_network.schedule.alpha_bar)
    assert model.shape == (3, 28, 28)
    assert [model.shape_error(shape) == "" for shape in ((3, 28, 28), (3, 56, 56), (28, 28))] == [True, False, False]


def test_digit_domain_and_guidance_reach_the_network(digits: Path, tiny_network: Network) -> None:
    x, nothing = torch.randn(2, 3, 28, 28), torch.tensor([10, 10])
    digit, domain = torch.tensor([4, 4]), torch.tensor([1, 1])
    found = load(digits, digit=4, domain="svhn", guidance=3.0).denoiser(2)(x, 9)
    cond, uncond = (tiny_network(x, 9, (d, domain)) for d in (digit, nothing))
    torch.testing.assert_close(found, uncond + 3 * (cond - uncond), rtol=1e-4, atol=1e-5)


def test_a_distilled_checkpoint_gets_the_guidance_scale_in_one_call(tmp_path: Path, distilled_network: Network) -> None:
    save_network(path := tmp_path / "distilled.safetensors", distilled_network)
    x, digit, domain = torch.randn(2, 3, 28, 28), torch.tensor([4, 4]), torch.tensor([1, 1])
    expected = distilled_network(x, 9, (digit, domain), 3.0)
    torch.testing.assert_close(
        load(path, digit=4, domain="svhn", guidance=3.0).denoiser(2)(x, 9), expected, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(BadInput, match="--guidance 5.5: this checkpoint is distilled"):
        load(path, digit=4, guidance=5.5)


def test_without_labels_it_is_not_conditioned(digits: Path, tiny_network: Network) -> None:
    x = torch.randn(1, 3, 28, 28)
    expected = tiny_network(x, 9, (torch.tensor([10]), torch.tensor([2])))
    torch.testing.assert_close(load(digits).denoiser(1)(x, 9), expected)


def test_a_digit_out_of_range_is_refused(digits: Path) -> None:
    with pytest.raises(BadInput, match="--digit 10"):
        load(digits, digit=10)


def test_labels_for_a_face_model_are_refused(tmp_path: Path) -> None:
    small_unet().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="--digit"):
        load(tmp_path, digit=3)


def test_a_p1_checkpoint_cannot_be_exported(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="only face models"):
        export(load(digits), tmp_path / "out")
