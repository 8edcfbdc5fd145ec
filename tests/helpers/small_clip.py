"""A small open_clip model with random weights, as files, for the tests of zero-shot classification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from P3_clip_zeroshot import Settings, main
from zeroshot.dataset import LabelledImages, list_images

CPU = torch.device("cpu")
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}  # unlike the default, so that ignoring it shows
NAMES = ["apple", "oak_tree", "willow_tree", "streetcar", "bee", "sweet_pepper"]


def save_model(folder: Path, seed: int) -> None:
    """Save a random model in open_clip's folder form; weights large enough that images and prompts differ."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CONFIG)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    folder.mkdir()
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def save_archive(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Save the tensors as a TorchScript module with their names, as OpenAI published its models."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, torch.nn.Module())
            module = module.get_submodule(parent)
        module.register_buffer(leaf, tensor)
    torch.jit.script(root).save(path)


def run(tmp_path: Path, images: Path, clip: str, **flags: Any) -> dict[str, Any]:
    """Run the script's main with outputs below `tmp_path`; return record.json."""
    flags = {"images": images, "model": clip, "output": tmp_path / "out", "cache": tmp_path / "cache", **flags}
    main(Settings(**flags))
    record: dict[str, Any] = json.loads((flags["output"] / "record.json").read_text())
    return record


def images_of(folder: Path) -> LabelledImages:
    return list_images(folder, folder.parent / "id2label.json")


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())
