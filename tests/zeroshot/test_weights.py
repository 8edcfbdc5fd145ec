"""Places of weights, the activation they want, and equal results from every form of a model."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from small_clip import CPU, NAMES, images_of, run, save_archive

from P3_clip_zeroshot import PRESETS, Settings, main
from runtime.cli import BadInput
from zeroshot import weights
from zeroshot.features import encode_all
from zeroshot.model import load
from zeroshot.prompts import fillers, templates_of
from zeroshot.weights import Source, find_weights, needs_quick_gelu, resolve


def test_a_weights_file_on_an_architecture_equals_the_whole_folder(
    tiny_clip: str, tiny_weights: Path, labelled: Path
) -> None:
    from_file, images = load(resolve("tiny-clip", str(tiny_weights)), CPU), images_of(labelled)
    whole = load(resolve(tiny_clip, None), CPU)
    prompts = fillers(templates_of("single"), "raw")
    assert torch.equal(from_file.classifier(NAMES, prompts).weight, whole.classifier(NAMES, prompts).weight)
    assert not torch.equal(encode_all(from_file, images, 8, 1), encode_all(whole, images, 8, 1))  # its transform


def test_openais_archive_is_read_without_pickle(tiny_weights: Path, tmp_path: Path) -> None:
    """A TorchScript file in half precision, as ViT-B-32.pt is; QuickGELU is used."""
    halves = {name: tensor.half() for name, tensor in load_file(tiny_weights).items()}
    save_archive(tmp_path / "tiny.pt", halves | {"input_resolution": torch.tensor(48)})
    source = resolve("tiny-clip", str(tmp_path / "tiny.pt"))
    assert source.quick_gelu
    ours = load(source, CPU)
    assert all(torch.equal(tensor, halves[name].float()) for name, tensor in ours.model.state_dict().items())
    assert type(ours.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_weights_of_a_tag_are_found_where_a_user_put_them(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "WEIGHTS", tmp_path)
    assert find_weights("ViT-B-32", "openai") is None
    placed = tmp_path / "ViT-B-32.openai.safetensors"
    placed.write_bytes(tiny_weights.read_bytes())
    assert find_weights("ViT-B-32", "openai") == placed
    assert find_weights("ViT-B-32-quickgelu", "openai") == placed
    source = resolve("ViT-B/32", "openai")
    assert (source.model, source.tag, source.weights, source.quick_gelu) == ("ViT-B-32", "openai", placed, True)
    assert source.label == "ViT-B-32:openai"


@pytest.fixture
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights in any place where they are looked for, and a hub at an address where nobody answers."""
    monkeypatch.setattr(weights, "WEIGHTS", tmp_path)
    monkeypatch.setattr(weights, "OPENAI_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


def test_weights_of_a_tag_are_found_in_the_caches(nothing_here: Path, tiny_weights: Path) -> None:
    """OpenAI's package writes plain files, the hub's client a folder per repository; the hub's cache comes first."""
    plain = nothing_here / "ViT-B-32.pt"
    plain.write_bytes(tiny_weights.read_bytes())
    assert find_weights("ViT-B-32", "openai") == plain
    repository = nothing_here / "models--timm--vit_base_patch32_clip_224.openai"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1")
    cached = repository / "snapshots" / "1" / "open_clip_model.safetensors"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(tiny_weights.read_bytes())
    assert find_weights("ViT-B-32", "openai") == cached


@pytest.mark.parametrize(("download", "why"), [(False, "--weights openai"), (True, "the network doesn't answer")])
def test_absent_weights_are_one_line_with_place_and_origin(download: bool, why: str, nothing_here: Path) -> None:
    with pytest.raises(BadInput) as error:
        resolve("ViT-B-32", "openai", download=download)
    message = str(error.value)
    assert why in message
    assert "timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors" in message
    assert str(nothing_here / "ViT-B-32.openai.safetensors") in message
    assert "\n" not in message


@pytest.mark.usefixtures("nothing_here")
def test_no_network_is_asked_unless_it_is_named() -> None:
    with pytest.raises(BadInput, match="--weights openai downloads"):
        resolve("ViT-B-32", "openai")


@pytest.mark.parametrize("download", [False, True])
def test_an_absent_hub_model_is_one_line(download: bool, nothing_here: Path) -> None:
    with pytest.raises(BadInput, match="hf-hub:some/model: it is not on this machine") as error:
        resolve("hf-hub:some/model", None, download=download)
    assert "local-dir:PATH" in str(error.value)


@pytest.mark.parametrize(("download", "answers"), [(False, True), (True, False), (True, True)])
def test_a_hub_model_is_fetched_only_if_wanted_and_the_hub_answers(
    download: bool, answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network the cache still serves; a tokenizer may be fetched where the model was."""
    requests: list[tuple[tuple[str, ...], bool]] = []

    def fetch(*names: str) -> str:
        requests.append((names, huggingface_hub.constants.HF_HUB_OFFLINE))
        return str(tmp_path / (names[1] if len(names) > 1 else "weights.safetensors"))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "hub_answers", lambda: answers)
    monkeypatch.setattr(weights, "download_pretrained_from_hf", fetch)
    source, online = resolve("hf-hub:some/model", None, download=download), download and answers
    config, file = tmp_path / "open_clip_config.json", tmp_path / "weights.safetensors"
    assert requests == [(("some/model", "open_clip_config.json"), not online), (("some/model",), not online)]
    assert source == Source("hf-hub:some/model", None, file, (config, file), online=online)


def test_a_bare_command_and_a_local_model_use_no_network(
    nothing_here: Path, tiny_clip: str, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    with pytest.raises(BadInput, match="weights openai of ViT-B-32 are not on this machine"):
        main(Settings(images=labelled, cache=nothing_here / "cache"))
    assert run(nothing_here, labelled, tiny_clip)["metrics"]["pictures"] == 30


@pytest.mark.parametrize(
    ("model", "tag", "forced", "message"),
    [
        ("ViT-B-32", "openai", True, "ViT-B-32 has GELU but openai was trained with QuickGELU: QuickGELU is used"),
        ("ViT-B-32-quickgelu", "openai", False, ""),
        ("ViT-B-32", "laion2b_s34b_b79k", False, ""),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", False, ""),
        ("ViT-B-32", None, False, "warning: nothing tells"),
        ("ViT-B-32-quickgelu", None, False, "warning: nothing tells"),
        ("EVA02-L-14", "merged2b_s4b_b131k", False, ""),
    ],
)
def test_the_activation_follows_the_weights_and_a_mismatch_is_named(
    model: str, tag: str | None, forced: bool, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert needs_quick_gelu(model, tag, tmp_path / "w.pt") == forced
    output = capsys.readouterr().err
    assert (message in output) if message else not output


@pytest.mark.parametrize(
    ("precision", "inside"), [("fp32", "fp32"), ("tf32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_open_clip_is_handed_the_precision_and_loads_no_text_tower(
    precision: str, inside: str, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text tower from the hub would be downloaded, and then replaced by the weights."""
    calls: list[dict[str, Any]] = []
    create = open_clip.create_model_and_transforms

    def recorded(*names: Any, **options: Any) -> Any:
        calls.append(options)
        return create(*names, **options)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", recorded)
    clip = load(resolve("tiny-clip", str(tiny_weights)), CPU, precision)
    options = {"precision": inside, "device": CPU, "force_quick_gelu": False, "pretrained_text": False}
    assert calls == [options]
    assert (clip.device, clip.mean.shape, clip.std.shape) == (CPU, (3, 1, 1), (3, 1, 1))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("https://huggingface.co/x \n can't be reached", "its tokenizer or text tower is not on this machine: "),
        ("no  such\ntensor" + "x" * 300, "no such tensor" + "x" * 226 + "$"),
    ],
)
def test_a_model_that_open_clip_cannot_load_is_one_line_with_the_reason(
    message: str, reason: str, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", fail)
    with pytest.raises(BadInput, match=rf"--model tiny-clip can't be loaded from .*: {reason}"):
        load(resolve("tiny-clip", str(tiny_weights)), CPU)


def test_presets_are_tags_that_open_clip_knows() -> None:
    assert {(config.model, config.weights) for config in PRESETS.values()} <= set(open_clip.list_pretrained())


def test_a_forced_activation_is_that_of_the_quickgelu_variant(tiny_weights: Path, labelled: Path) -> None:
    source = resolve("tiny-clip", str(tiny_weights))
    forced = load(Source("tiny-clip", None, tiny_weights, (tiny_weights,), quick_gelu=True), CPU)
    variant = load(resolve("tiny-clip-quickgelu", str(tiny_weights)), CPU)
    images = images_of(labelled)
    left, right, plain = (encode_all(m, images, 8, 1) for m in (forced, variant, load(source, CPU)))
    assert torch.equal(left, right)
    assert not torch.allclose(left, plain, atol=1e-4)


def test_weights_of_another_architecture_are_named(tiny_weights: Path, labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the file is of another architecture"):
        run(tmp_path, labelled, "RN50", weights=str(tiny_weights))
    (tmp_path / "bad.pt").write_bytes(b"junk")
    with pytest.raises(BadInput, match=r"bad\.pt is a text"):
        run(tmp_path, labelled, "tiny-clip", weights=str(tmp_path / "bad.pt"))


@pytest.mark.parametrize("wrap", ["lightning", "model", "module", "torch as safetensors", "safetensors as bin"])
def test_weights_in_wrappers_under_prefixes_and_other_suffixes_are_read(
    tiny_weights: Path, tmp_path: Path, wrap: str
) -> None:
    state: dict[str, Any] = load_file(tiny_weights)
    path = tmp_path / ("w.safetensors" if wrap == "torch as safetensors" else "w.bin")
    if wrap == "safetensors as bin":
        path.write_bytes(tiny_weights.read_bytes())
    else:
        prefix = {"lightning": "model.", "module": "module."}.get(wrap, "")
        named = {prefix + name: value for name, value in state.items()}
        torch.save({{"lightning": "state_dict", "model": "model"}.get(wrap, "state_dict"): named, "epoch": 1}, path)
    loaded = load(resolve("tiny-clip", str(path)), CPU).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("vision_model.post_layernorm.bias", "a CLIP under transformers' names"), ("x.lora_up.weight", "a LoRA")],
)
def test_weights_under_other_names_are_called_what_they_are(
    tmp_path: Path, tiny_clip: str, name: str, kind: str
) -> None:
    torch.save({name: torch.zeros(2), "logit_scale": torch.ones(1)}, tmp_path / "w.bin")
    with pytest.raises(BadInput, match=rf"w\.bin is {kind}.*open_clip"):
        load(resolve("tiny-clip", str(tmp_path / "w.bin")), CPU)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_pointer_in_the_place_of_a_folders_weights_is_named(tiny_weights: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_weights.parent, tmp_path / "clip")
    (tmp_path / "clip" / tiny_weights.name).unlink()
    (tmp_path / "clip" / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BadInput, match=rf"{name} is a Git LFS pointer"):
        load(resolve(f"local-dir:{tmp_path / 'clip'}", None), CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_are_not_finite_are_named_and_no_precision_is_blamed(
    tiny_weights: Path, tmp_path: Path, precision: str
) -> None:
    state = load_file(tiny_weights)
    state["visual.proj"][0, 0] = torch.nan
    torch.save(state, tmp_path / "w.bin")
    with pytest.raises(BadInput, match=r"w\.bin, visual\.proj holds values that are NaN"):
        load(resolve("tiny-clip", str(tmp_path / "w.bin")), CPU, precision)
