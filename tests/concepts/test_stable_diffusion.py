"""Stable Diffusion in folders and single files: loaded whole or not at all, offline, and no file's code is run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from open_clip.tokenizer import SimpleTokenizer
from original_layout import Call, hollow, layout, pretended, save_lightning, save_sparse, weight
from safetensors.torch import load_file, save_file
from small_pipeline import save_pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from concepts.sampling import SamplerConfig, StableDiffusionSampler
from concepts.single_file import make_scheduler, make_tokenizer
from concepts.stable_diffusion import KINDS, WITHOUT, ModelDims, check_model, load_pipeline, load_tokenizer
from miniature.diffusion_parts import make_unet
from runtime.cli import BadInput

CPU = torch.device("cpu")
UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"
CROSS = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches the hub: it is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("concepts.stable_diffusion.hub_answers", lambda: False)


def load(model: Path | str, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    return load_pipeline(str(model), CPU, dtype)


def test_an_image_whose_decoding_overflows_in_fp16_is_decoded_in_fp32(tmp_path: Path) -> None:
    """Of the other image the decoder stays in fp16; the second latent exceeds its range."""
    pipe = load(save_pipeline(tmp_path), torch.float16)
    sampler = StableDiffusionSampler(pipe, SamplerConfig())
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents[1] *= 1e6
    images = sampler.decode(latents)
    assert pipe.vae.dtype == torch.float16
    half = sampler.decode(latents[:1])
    pipe.vae.float()
    exact = sampler.decode(latents)
    assert torch.equal(images[1], exact[1])
    assert (images[0].int() - half[0].int()).abs().max() <= 1
    assert not torch.equal(images[0], exact[0])


def refused(model: Path | str, message: str) -> None:
    """By both, in one line."""
    for ask in (check_model, load):
        with pytest.raises(BadInput, match=message) as error:
            ask(str(model))
        assert "\n" not in str(error.value)


def weights(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for part in KINDS for name, value in getattr(pipe, part).state_dict().items()}


def assert_ready(pipe: StableDiffusionPipeline, dtype: torch.dtype) -> None:
    """All on the device in one dtype, frozen, eval, without filter."""
    for part in KINDS:
        module = getattr(pipe, part)
        assert not module.training
        assert {(p.dtype, p.device, p.requires_grad) for p in module.parameters()} == {(dtype, CPU, False)}
        assert {buffer.device for buffer in module.buffers()} <= {CPU}
    assert pipe.safety_checker is None
    assert pipe._progress_bar_config["disable"]


# ---------------------------------------------------------------- single files


@pytest.fixture
def full_size(tmp_path: Path) -> Iterator[Path]:
    """All of Stable Diffusion v1 in random fp16, as Lightning leaves it: 2 GB."""
    path = tmp_path / "sd-v1-4.ckpt"
    save_lightning(path, {original: weight(original, shape) for *_, original, shape in layout()})
    yield path
    path.unlink()


@pytest.mark.slow
def test_a_full_size_lightning_checkpoint_gives_every_tensor_its_place(full_size: Path) -> None:
    start = time.perf_counter()
    check_model(str(full_size))
    assert time.perf_counter() - start < 10
    pipe = load(full_size, torch.float16)
    assert_ready(pipe, torch.float16)
    loaded, places = weights(pipe), list(layout())
    assert {f"{part}.{name}" for part, name, *_ in places} == set(loaded)
    for part, name, original, shape in places:
        assert torch.equal(loaded[f"{part}.{name}"].flatten(), weight(original, shape).flatten()), original


@pytest.mark.slow
def test_a_full_size_safetensors_file_loads_in_another_dtype(tmp_path: Path) -> None:
    path = tmp_path / "v1.safetensors"
    save_sparse(path, hollow())
    pipe = load(path, torch.bfloat16)
    path.unlink()  # what is loaded does not hang on the file
    assert_ready(pipe, torch.bfloat16)
    assert not any(value.any() for value in weights(pipe).values())


def test_the_layout_is_stable_diffusion_v1s() -> None:
    tensors = hollow()
    assert len(tensors) == 1130
    assert sum(tensor.numel() for tensor in tensors.values()) == 859_520_964 + 83_653_863 + 123_060_480
    for name, shape in {  # as published
        UNET_IN: (320, 4, 3, 3),
        CROSS: (320, 768),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "first_stage_model.encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    }.items():
        assert tuple(tensors[name].shape) == shape


def test_a_check_takes_any_file_of_the_layout(tmp_path: Path) -> None:
    tensors = hollow()
    save_lightning(tmp_path / "model.ckpt", tensors)
    torch.save(tensors, tmp_path / "plain.bin")
    save_sparse(tmp_path / "v1.safetensors", tensors)
    bare = {name.replace("transformer.text_model.", "transformer."): value for name, value in tensors.items()}
    torch.save({"state_dict": bare}, tmp_path / "bare.ckpt", _use_new_zipfile_serialization=False)
    for file in tmp_path.iterdir():
        check_model(str(file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UNET_IN: (320, 9, 3, 3)}, "no Stable Diffusion v1 but inpainting"),
        ({CROSS: (320, 1024)}, "no Stable Diffusion v1 but v2"),
        ({UNET_IN: (320,)}, "laid out otherwise"),
        ({"model.diffusion_model.middle_block.0.in_layers.0.bias": None}, "unet lacks mid_block.resnets.0.norm1.bias$"),
        ({"first_stage_model.quant_conv.weight": (8, 8, 1)}, r"vae has quant_conv.weight of shape \[8, 8, 1\], not \[8, 8, 1, 1\]"),
        ({"cond_stage_model.transformer.text_model.extra": (1,)}, "text_encoder has an unknown extra"),
    ],
)  # fmt: skip
def test_a_file_that_differs_is_named_with_what_differs(
    tmp_path: Path, changes: dict[str, tuple[int, ...] | None], message: str
) -> None:
    tensors = hollow()
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = torch.zeros(1).expand(shape)
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", f"model.ckpt is .*{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(3)}, "its unet lacks conv_in.weight, and 685 more"),
        ({"state_dict": 3}, "holds int, not named tensors"),
        ([torch.zeros(3)], "holds list"),
    ],
)
def test_other_torch_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", message)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("control_model.time_embed.0.weight", "a ControlNet"),
        ("decoder.conv_in.weight", "an autoencoder .VAE. alone"),
        ("<new1>", "an embedding of a token"),
        ("emb_params", "an embedding of a token"),
        ("conditioner.embedders.0.transformer.weight", "Stable Diffusion XL"),
        ("down_blocks.0.resnets.0.conv1.weight", "a U-Net under diffusers' names"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_another_kind_of_weights_is_called_what_it_is(tmp_path: Path, name: str, kind: str, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    save_file({name: torch.zeros(4, 4)}, path) if suffix == "safetensors" else torch.save({name: torch.zeros(4)}, path)
    refused(path, rf"w\.{suffix} is no Stable Diffusion v1 but {kind}")


@pytest.mark.parametrize(
    "content",
    [{"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 768)}}, {"kind": "P3 x", "step": 1}],
)
def test_an_embedding_and_a_training_state_are_called_what_they_are(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "w.pt")
    refused(
        tmp_path / "w.pt", r"w\.pt is no Stable Diffusion v1 but (an embedding|the state of an unfinished training)"
    )


@pytest.mark.parametrize(("prefix", "part"), [("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")])
def test_a_file_that_lacks_a_part_says_which(tmp_path: Path, prefix: str, part: str) -> None:
    tensors = {name: value for name, value in hollow().items() if not name.startswith(prefix)}
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", f"model.ckpt is a Stable Diffusion v1 without its {part}; name a whole file")


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_wrapped_weights_are_read(tmp_path: Path, wrapper: str) -> None:
    tensors = {f"module.{name}": value for name, value in hollow().items()}
    torch.save({wrapper: tensors, "epoch": 3}, tmp_path / "model.ckpt")
    check_model(str(tmp_path / "model.ckpt"))


def test_a_folder_of_one_part_or_a_lora_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    refused(tmp_path, "no model_index.json there, so this is no diffusers pipeline but a ControlNetModel; give")
    (tmp_path / "config.json").unlink()
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    refused(tmp_path, "no diffusers pipeline but a LoRA; give")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    tensors = hollow()
    tensors[UNET_IN] = torch.zeros(1, dtype=torch.int8).expand(320, 4, 3, 3)
    torch.save(tensors, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", "unet has conv_in.weight as torch.int8")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["state_dict", "callbacks"])
def test_a_malicious_file_is_refused_and_not_run(tmp_path: Path, zipped: bool, place: str) -> None:
    content: dict[str, Any] = {"state_dict": hollow()}
    content.setdefault(place, {})["harmless"] = Call(os.system, f"touch {tmp_path / 'ran'}")
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "model.ckpt", "model.ckpt.*refused")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "function", [eval, exec, getattr, torch.load, shutil.rmtree, pytest.main], ids=lambda function: function.__name__
)
def test_no_other_name_is_let_through(tmp_path: Path, function: Callable[..., object]) -> None:
    torch.save({"state_dict": hollow(), "more": Call(function, str(tmp_path))}, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", f"calls .*{function.__name__}.*save its state_dict as .safetensors")


def test_other_names_of_the_same_modules_are_refused(tmp_path: Path) -> None:
    for path in ("pytorch_lightning.callbacks.model_checkpoint.Other", "numpy.core.multiarray._reconstruct"):
        with pretended(path) as (kind,):
            torch.save({"state_dict": hollow(), "more": kind}, tmp_path / "model.ckpt")
        refused(tmp_path / "model.ckpt", f"calls {path}")


def test_nothing_stays_allowed_afterwards(tmp_path: Path) -> None:
    save_lightning(tmp_path / "model.ckpt", hollow())
    before = set(torch.serialization.get_safe_globals())
    check_model(str(tmp_path / "model.ckpt"))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("name", ["model.ckpt", "v1.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    tensors = {key: torch.zeros(3, dtype=torch.float16) for key in hollow()}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    os.truncate(path, int(path.stat().st_size * share))
    refused(path, f"{name} is not a .* file or is truncated")


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", b"PK\3\4"]
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.ckpt").write_bytes(content)
    refused(tmp_path / "model.ckpt", "model.ckpt is (not a torch file|a web page|a Git LFS pointer)")


# ---------------------------------------------------------------- what single files lack


def test_the_tokenizer_gives_clips_ids() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("a photo of a cat", padding="max_length", max_length=77).input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    original = SimpleTokenizer()
    for text in ("It's 20% off, café naïve!! 🐱 <new1>", "  Many   SPACES\nlines", "日本語", "x" * 40, "don't; 1234.5"):
        assert tokenizer(text).input_ids == [49406, *original.encode(text), 49407]


def test_an_added_token_comes_after_all_others() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new1>"])
    assert tokenizer("a <new1> dog").input_ids == [49406, 320, 49408, 1929, 49407]


def test_the_schedule_is_stable_diffusion_v1s() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scheduler = make_scheduler()
    assert torch.allclose(scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-5)
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(50)
    assert ddim.timesteps[[0, -1]].tolist() == [981, 1]
    assert ddim.final_alpha_cumprod == ddim.alphas_cumprod[0]


# ---------------------------------------------------------------- sizes


def test_sizes_follow_from_the_configurations(small: Path) -> None:
    """Without any, they are those of v1, which draws 512 pixels in steps of 64."""
    dims = ModelDims.of({}, {})
    assert (dims.text_width, dims.latent_channels) == (768, 4)
    assert [dims.latent_shape(size) for size in (None, 512, 768, 64)] == [
        (4, 64, 64),
        (4, 64, 64),
        (4, 96, 96),
        (4, 8, 8),
    ]
    for size in (0, 32, 500, 736):
        with pytest.raises(BadInput, match=f"--size {size}: must be a multiple of 64"):
            dims.latent_shape(size)
    own = check_model(str(small))
    assert own is not None
    assert own == ModelDims(text_width=32, latent_channels=4, latent_size=8, vae_scale=2, size_multiple=2)
    assert own.latent_shape(20) == (4, 10, 10)


# ---------------------------------------------------------------- folders


def small_pipeline() -> StableDiffusionPipeline:
    """Random weights; the miniature's U-Net, an autoencoder with attention as Stable Diffusion's."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, sample_size=16)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    parts: dict[str, Any] = {
        "unet": make_unet((16, 32), 32, side=8),
        "vae": vae,
        "text_encoder": CLIPTextModel(config),
        "tokenizer": make_tokenizer(),
        "scheduler": make_scheduler(),
    }
    return StableDiffusionPipeline(**parts, **WITHOUT)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "pipe"))


def test_a_folder_of_fp16_variants_is_read(small: Path, folder: Path) -> None:
    for part in KINDS:
        file = next((folder / part).glob("*.safetensors"))
        file.rename(file.with_suffix(".fp16.safetensors"))
    check_model(str(folder))
    loaded = weights(load(folder))
    assert all(torch.equal(loaded[name], value) for name, value in weights(load(small)).items())


def to_bin(part: Path) -> Path:
    """Replace a part's safetensors by the same weights in torch's form."""
    file = next(part.glob("*.safetensors"))
    stem = "pytorch_model" if part.name == "text_encoder" else "diffusion_pytorch_model"
    torch.save(load_file(file), part / f"{stem}.bin")
    file.unlink()
    return part / f"{stem}.bin"


def test_a_folder_of_bin_files_is_read_without_a_line(
    small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logging.Logger, "callHandlers", lambda _, record: lines.append(record.getMessage()))
    for part in KINDS:
        to_bin(folder / part)
    check_model(str(folder))
    loaded = weights(load(folder))
    assert all(torch.equal(loaded[name], value) for name, value in weights(load(small)).items())
    assert lines == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
            "model.bin is a Git LFS pointer",
        ),
        (lambda file: os.truncate(file, 999), "model.bin is not a torch file or is truncated"),
        (lambda file: file.write_bytes(b""), "model.bin is not a torch file or is truncated"),
        (lambda file: torch.save({"a": Call(os.system, "true")}, file), "besides tensors it calls"),
    ],
    ids=["pointer", "truncated", "empty", "code"],
)
def test_a_dry_run_looks_into_bin_files(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(to_bin(folder / "unet"))
    with pytest.raises(BadInput, match=f"its unet is unreadable .*{message}") as error:
        check_model(str(folder))
    assert "\n" not in str(error.value)


def test_a_pointer_that_no_one_loads_stops_nothing(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    check_model(str(folder))
    load(folder)


@pytest.mark.parametrize("variants", [[None], ["fp16"], [None, "fp16"]])
def test_a_hub_repository_of_fp16_variants_only_is_read(
    variants: list[str | None], small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in for the hub fetches the files of the variant that is named, as diffusers does."""
    requested = []

    def download(name: str, variant: str | None = None, **_: Any) -> Path:
        requested.append(variant)
        for part in KINDS:
            for file in (folder / part).glob("*.safetensors"):
                file.unlink()
            file = next((small / part).glob("*.safetensors"))
            if variant in variants:
                shutil.copy(file, folder / part / f"{file.stem}{'.fp16' if variant else ''}.safetensors")
        return folder

    monkeypatch.setattr(StableDiffusionPipeline, "download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: folder / "model_index.json")
    loaded = weights(load("someone/small"))
    assert all(torch.equal(loaded[name], value) for name, value in weights(load(small)).items())
    assert requested == ([None] if None in variants else [None, "fp16"])


@pytest.mark.parametrize("answers", [True, False])
def test_files_come_from_the_hub_if_it_answers_else_from_its_cache(
    answers: bool, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Index and weights; a hub that does not answer would be tried for most of a minute."""
    local: list[bool] = []

    def get(*_: Any, local_files_only: bool, **__: Any) -> Path:
        local.append(local_files_only)
        return small if len(local) > 1 else small / "model_index.json"

    monkeypatch.setattr("concepts.stable_diffusion.hub_answers", lambda: answers)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", get)
    monkeypatch.setattr(StableDiffusionPipeline, "download", get)
    load("someone/small")
    assert local == [not answers] * 2


@pytest.mark.parametrize(
    ("answers", "reason"), [(True, r"\(404\)"), (False, r"\(it is not in the cache, and the hub does not answer\)")]
)
def test_what_the_hub_does_not_give_is_named_with_its_reason(
    answers: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(*_: Any, **__: Any) -> Path:
        raise OSError("404\nmore")

    monkeypatch.setattr("concepts.stable_diffusion.hub_answers", lambda: answers)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", get)
    refused("someone/small", f"the hub did not give it {reason}")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_saved_folder_loads_and_draws(small: Path) -> None:
    check_model(str(small))
    pipe = load(small)
    assert_ready(pipe, torch.float32)
    loaded = weights(pipe)
    assert all(torch.equal(loaded[name], value) for name, value in weights(small_pipeline()).items())
    assert pipe.scheduler.config.steps_offset == 1
    output: Any = pipe("a cat", num_inference_steps=2, height=16, width=16, output_type="np")
    assert output.images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", [torch.float16, torch.float32])
def test_a_folder_comes_in_one_dtype_from_any_other(tmp_path: Path, saved: torch.dtype, dtype: torch.dtype) -> None:
    original = small_pipeline().to(saved)
    original.save_pretrained(tmp_path / "pipe")
    pipe = load(tmp_path / "pipe", dtype)
    assert_ready(pipe, dtype)
    loaded = weights(pipe)
    assert all(torch.equal(loaded[name], value.to(dtype)) for name, value in weights(original).items())


def test_names_of_older_folders_are_understood(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name}": value for name, value in load_file(file).items()}
    save_file({**old, "text_model.embeddings.position_ids": torch.arange(77)[None]}, file, {"format": "pt"})
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = load_file(file)
    for new, before in renamed.items():
        old = {name.replace(f".{new}.", f".{before}."): value for name, value in old.items()}
    save_file(old, file, {"format": "pt"})
    loaded = weights(load(folder))
    assert all(torch.equal(loaded[name], value) for name, value in weights(small_pipeline()).items())


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "has UNet2DModel as unet, UNet2DConditionModel is"),
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "has VQModel as vae, AutoencoderKL is needed"),
        ("model_index.json", {"text_encoder": [None, None]}, "has no text_encoder"),
        ("unet/config.json", {"in_channels": 9}, "unet takes 9 channels, 4 are needed .made for inpainting"),
        ("unet/config.json", {"cross_attention_dim": 64}, "reads text 64 wide, its text_encoder writes 32"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "predicts 'v_prediction', only epsilon"),
    ],
)  # fmt: skip
def test_a_folder_of_another_kind_is_refused(folder: Path, file: str, changes: dict[str, Any], message: str) -> None:
    edit(folder / file, **changes)
    refused(folder, f"--model .*pipe.*{message}")


def test_a_folder_with_the_published_ones_filter_loads_without_it(folder: Path) -> None:
    more = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    edit(folder / "model_index.json", **more, feature_extractor=["transformers", "CLIPImageProcessor"])
    edit(folder / "model_index.json", requires_safety_checker=True)
    assert_ready(load(folder), torch.float32)


def test_code_in_a_folder_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "scheduler" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    edit(folder / "model_index.json", scheduler=["own", "Own"])
    with pytest.raises(BadInput, match="--model .*pipe"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_with_code_in_a_folder_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    for file in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        (folder / f"{file}.safetensors").unlink()
        bin_file = folder / file.replace("/model", "/pytorch_model")
        torch.save({"conv_in.weight": Call(os.system, f"touch {tmp_path / 'ran'}")}, f"{bin_file}.bin")
        with pytest.raises(BadInput, match="--model .*pipe.*unreadable"):
            load(folder)
        assert not (tmp_path / "ran").exists()


def test_a_folder_of_a_single_network_is_refused(tmp_path: Path) -> None:
    UNet2DModel(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",)).save_pretrained(tmp_path)  # fmt: skip
    refused(tmp_path, "no model_index.json")


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("unet/diffusion_pytorch_model.safetensors", Path.unlink, "unet is unreadable"),
        ("vae/diffusion_pytorch_model.safetensors", lambda path: os.truncate(path, 999), "vae is unreadable"),
        ("text_encoder/model.safetensors", lambda path: os.truncate(path, 999), "text_encoder is unreadable"),
        (
            "unet/diffusion_pytorch_model.safetensors",
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
            "unet is unreadable .*diffusion_pytorch_model.safetensors is a Git LFS pointer",
        ),
        ("tokenizer/tokenizer_config.json", lambda path: shutil.rmtree(path.parent), "no vocab.json or tokenizer.json"),
        ("tokenizer/tokenizer.json", lambda path: path.write_text("{"), "tokenizer"),
        ("scheduler/scheduler_config.json", Path.unlink, "scheduler_config.json does not exist"),
        ("unet/config.json", lambda path: path.write_text("{"), "config.json is not valid JSON"),
    ],
)
def test_unreadable_weights_of_a_folder_are_named(
    folder: Path, file: str, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder / file)
    for ask in (load, check_model) if file != "tokenizer/tokenizer.json" else (load, load_tokenizer):
        with pytest.raises(BadInput, match=f"pipe.*{message}") as error:
            ask(str(folder))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", KINDS)
def test_a_folder_that_lacks_a_tensor_is_not_filled_at_random(folder: Path, part: str) -> None:
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(BadInput, match=f"1 missing tensors in {part}, such as .*{name}"):
        load(folder)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("model", ["nowhere", "runs/absent/folder", "absent/model.ckpt", "absent.safetensors"])
def test_what_is_neither_there_nor_a_hub_name_is_refused_by_name(model: str) -> None:
    refused(
        model, f"--model {model} does not exist: give a diffusers folder, a hub name such as CompVis/.*-v-1-4-original"
    )


def test_a_hub_name_offline_is_refused_by_name() -> None:
    refused("nobody/nothing-v1.4", "--model nobody/nothing-v1.4: no such file or folder here.*hub does not answer")
