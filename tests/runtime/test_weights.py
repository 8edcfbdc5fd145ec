"""What a file of weights really is: every kind is called by its name, in one line, by every reader."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from concepts.single_file import read_tensors
from digits.classifier import load_classifier
from faces.course_unet import load_course_unet
from P1_model import load_network
from runtime.cli import BadInput
from runtime.files import load_safetensors, load_tensors
from runtime.weights import describe, named_tensors

CPU = torch.device("cpu")
READERS: dict[str, Callable[[Path], object]] = {
    "tensors": load_tensors,
    "safetensors": load_safetensors,
    "P1 network": lambda path: load_network(path, CPU),
    "classifier": lambda path: load_classifier(path, CPU),
    "UNet.pt": load_course_unet,
    "Stable Diffusion": read_tensors,
}


def zipped(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "x")
    return content.getvalue()


def torch_file(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


FOREIGN = {  # content: what it is called
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
        "a Git LFS pointer.* git lfs pull",
    ),
    "lfs of Windows": (b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\r\n", "a Git LFS pointer"),
    "page": (b"<!DOCTYPE html><html><title>Sign in</title>", "a web page"),
    "page with blanks": (b"\n\n  <HTML lang=en>", "a web page"),
    "xhtml": (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "">', "a web page"),
    "text": (b"Entry not found", "a text.*'Entry not found'"),
    "json": (b'{"error": "no access"}', "a text.*no access"),
    "other scripts": ("文件不存在。".encode() * 200, "a text"),
    "utf-16": ("Access denied".encode("utf-16"), "a text.*'Access denied'"),
    "zip": (zipped("photo.png"), "a zip archive of other files, such as photo.png"),
    "npz": (zipped("arr_0.npy"), "a zip archive of other files, such as arr_0.npy"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "a zip archive of other files, which is empty"),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "a gzip archive: unpack it"),
    "tar": (bytes([7] * 257) + b"ustar\0" + bytes(900), "a tar archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(60), "a 7z archive"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(60), "a picture"),
    "gguf": (b"GGUF" + bytes(60), "a GGUF file"),
    "npy": (b"\x93NUMPY\x01" + bytes(60), "an array of numpy"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(60), "an HDF5 file"),
    "pickle": (pickle.dumps({"w": 1}), "a pickle that torch.save did not write"),
    "torchscript": (zipped("model/constants.pkl"), "a TorchScript archive"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_called_what_it_is(tmp_path: Path, kind: str, suffix: str, reader: str) -> None:
    content, message = FOREIGN[kind]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=rf"weights{suffix} is {message}") as error:
        READERS[reader](path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a torch file or is truncated"),
        (bytes(600), "is not a torch file or is truncated"),
        (b"PK\x03\x04" + bytes(50), "is not a torch file or is truncated"),
        (torch_file({"w": torch.ones(999)})[:-60], "is not a torch file or is truncated"),
        (torch_file({"w": torch.ones(9)}).replace(b"PK\1\2", b"PK\1\7"), "is not a torch file or is truncated"),
        (torch_file({"w": torch.ones(9)}, _use_new_zipfile_serialization=False)[:-5], "is not a torch file or is trunc"),
        (save({"w": torch.ones(9)})[:-5], "is not a safetensors file or is truncated"),
        (torch_file(np.ones(3)), "is refused: it calls numpy.* for arrays of numpy"),
        (torch_file(nn.Linear(2, 2)), "is refused: besides tensors it calls torch.nn.modules.linear.Linear"),
        (torch_file(nn.Linear(2, 2), _use_new_zipfile_serialization=False), "is refused: besides tensors it calls torch.nn"),
        (torch_file(torch.eye(3).to_sparse()), "its tensor is sparse"),
        (torch_file({"a": {"w": torch.eye(3).to_sparse()}}), "a.w is sparse"),
        (torch_file([torch.zeros(3, device="meta")]), "its tensor is without values"),
    ],
)  # fmt: skip
def test_a_damaged_or_odd_torch_file_is_named_without_torchs_advice(
    tmp_path: Path, content: bytes, message: str, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(BadInput, match=rf"w\.pt:? {message}") as error:
        load_tensors(tmp_path / "w.pt")
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not recwarn.list


def test_a_structure_that_contains_itself_is_named(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": torch.ones(1)}
    content["self"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(BadInput, match=r"w\.pt holds a structure that contains itself"):
        load_tensors(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "", ".PTH"])
@pytest.mark.parametrize("content", [save({"w": torch.ones(3)}), torch_file({"w": torch.ones(3, requires_grad=True)})])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_content_decides_and_not_the_suffix(tmp_path: Path, content: bytes, suffix: str, mapped: bool) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    tensor = load_tensors(path, mapped)["w"]
    assert (tensor.tolist(), tensor.requires_grad) == ([1, 1, 1], False)


def test_a_torch_file_in_the_place_of_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(torch_file({"w": torch.ones(3)}))
    with pytest.raises(BadInput, match=r"w\.safetensors is a torch file, a safetensors file is needed"):
        load_safetensors(tmp_path / "w.safetensors")


# ---------------------------------------------------------------- named tensors

STATE = {"down1.weight": torch.ones(2), "out.2.bias": torch.zeros(1)}


@pytest.mark.parametrize("wrapper", ["{}", "state_dict", "model", "module", "ema", "net/params"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.unet."])
def test_wrappers_and_prefixes_are_read(wrapper: str, prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    content: Any = {prefix + name: value for name, value in STATE.items()}
    for key in () if wrapper == "{}" else wrapper.split("/"):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    assert named_tensors(content, Path("w.pt"), "down1.weight") == STATE
    assert not capsys.readouterr().err


def test_of_several_sets_of_weights_the_one_that_is_used_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    content = {"model": STATE, "ema": {name: -value for name, value in STATE.items()}}
    assert named_tensors(content, Path("w.pt"), "down1.weight") == STATE
    assert capsys.readouterr().err == "w.pt holds 2 sets of weights: model. is used\n"


@pytest.mark.parametrize("content", [{"a": torch.ones(1)}, {"state_dict": {"a": torch.ones(1)}}])
def test_other_names_are_returned_for_the_callers_check(content: dict[str, Any]) -> None:
    assert list(named_tensors(content, Path("w.pt"), "down1.weight")) == ["a"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora.up.weight", "a LoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "a LoRA|a LyCORIS"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("encoder.conv_in.weight", "an autoencoder"),
        ("first_stage_model.decoder.conv_in.weight", "an autoencoder"),
        ("emb_params", "an embedding"),
        ("clip_g", "an embedding"),
        ("<new1>", "an embedding"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "Stable Diffusion XL"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a Stable Diffusion checkpoint"),
        ("vision_model.embeddings.class_embedding", "a CLIP under transformers' names"),
        ("text_model.encoder.layers.0.layer_norm1.bias", "a CLIP text encoder"),
        ("visual.conv1.weight", "a CLIP under open_clip's names"),
        ("down_blocks.0.resnets.0.conv1.weight", "a U-Net under diffusers' names"),
        ("down1.weight", "the face network of UNet.pt"),
        ("fc3.weight", "a digit classifier"),
        ("layer1.0.conv1.weight", "a ResNet"),
        ("something.else", "$"),
    ],
)
def test_weights_are_described_by_their_names(name: str, kind: str) -> None:
    for content in ({name: torch.ones(2)}, {"state_dict": {name: torch.ones(2)}}):
        assert re.match(kind, describe(content)), describe(content)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (torch.ones(3, 2), "one tensor of shape [3, 2]"),
        ([1], "a list"),
        ({"kind": "P1 training", "step": 3}, "the state of an unfinished training (P1 training)"),
        ({"string_to_param": nn.ParameterDict()}, "an embedding of a token: name it with --embeddings"),
    ],
)
def test_other_content_is_described_by_its_type(content: Tensor | list[int] | dict[str, object], kind: str) -> None:
    assert describe(content) == kind
