"""The small CLIP as files: open_clip's folder, which is stored, and transformers' `CLIPModel`, which is derived from it.

CLIP takes a prompt's feature at its end token. Old code takes the largest id of the prompt for that token (open_clip's `pool_type`
"argmax", transformers with `eos_token_id` 2). A token added by textual inversion breaks this, because its id is larger. Here both forms
store the end token's id (open_clip: `pool_type` "eos" and `eos_id`; transformers: `text_config.eos_token_id`). Prompts with added
tokens therefore have the right features in both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from miniature.scenery.scenes import SIDE
from miniature.scenery.vocabulary import LENGTH, save_tokenizer
from runtime.cli import BadInput, check_positive
from runtime.files import ROOT, load_safetensors, output_folder, read_json, require_file, save_safetensors, write_json

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

SHIPPED = ROOT / "checkpoints" / "miniature" / "clip"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"  # open_clip's names
HALF = 0.5  # mean and standard deviation of the preprocessing: inputs of networks are in -1..1
PREPROCESSING = {"mean": [HALF] * 3, "std": [HALF] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


@dataclass(frozen=True)
class ClipSize:
    """Widths and depths of the two towers."""

    embedding: int = 128
    """Dimensions of the space that images and prompts share."""
    vision_width: int = 128
    vision_layers: int = 4
    text_width: int = 128
    """Channels of the text tower, and of the text input of a U-Net that it conditions."""
    text_layers: int = 3
    patch: int = 8
    """Side of a patch in pixels; must divide 64."""
    head: int = 32
    """Channels per attention head."""

    def __post_init__(self) -> None:
        """Raise BadInput for a size that is not positive, a patch that does not divide 64, and a width that is no multiple of `head`."""
        check_positive(self, *vars(self))
        if SIDE % self.patch:
            raise BadInput(f"--patch {self.patch}: must divide {SIDE}")
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % self.head:
                raise BadInput(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be a multiple of --head {self.head}"
                )


def model_config(size: ClipSize, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """Return open_clip's `model_cfg`. It has exact GELU, which is faster than QuickGELU, and the tokenizer of the model's folder."""
    vision = {"image_size": SIDE, "patch_size": size.patch, "width": size.vision_width, "layers": size.vision_layers}
    vocabulary = {"vocab_size": len(tokenizer), "eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    text = {
        "context_length": LENGTH,
        **vocabulary,
        "hf_tokenizer_name": ".",  # any name makes open_clip read the tokenizer from the folder
        "width": size.text_width,
        "heads": size.text_width // size.head,
        "layers": size.text_layers,
        "pool_type": "eos",
    }
    towers = {"vision_cfg": vision | {"head_width": size.head}, "text_cfg": text}
    return {"embed_dim": size.embedding, "quick_gelu": False, **towers}


# ---------------------------------------------------------------- open_clip's folder


class SmallClip(NamedTuple):
    """A loaded folder: the model, its tokenizer and its configuration."""

    model: Any  # open_clip.CLIP, evaluation mode, no gradients
    tokenizer: CLIPTokenizer
    config: dict[str, Any]  # model_cfg
    preprocessing: dict[str, Any]


def round_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights in fp16, as the file stores them."""
    return {name: value.half() for name, value in model.state_dict().items()}


def save_clip(folder: Path, model: torch.nn.Module, config: dict[str, Any], origin: dict[str, Any]) -> None:
    """Write config, fp16 weights and tokenizer files, each whole or not at all; `origin` says how the model was trained."""
    output_folder(folder)
    save_tokenizer(folder)
    save_safetensors(folder / WEIGHTS, round_weights(model), {"format": "pt", "origin": json.dumps(origin)})
    write_json(folder / CONFIG, {"model_cfg": config, "preprocess_cfg": PREPROCESSING})


def load_clip(folder: Path = SHIPPED) -> SmallClip:
    """Return an open_clip folder's model, in fp32 on the CPU, and its tokenizer; raise BadInput for another folder."""
    import open_clip
    from transformers import CLIPTokenizer

    hint = "train one: python miniature/train_clip.py train"
    config = read_json(require_file(folder / CONFIG, hint))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        require_file(folder / name, hint)
    weights, _ = load_safetensors(folder / WEIGHTS)
    try:
        model = open_clip.CLIP(**config["model_cfg"])
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, KeyError) as error:
        raise BadInput(f"{folder}: {CONFIG} and {WEIGHTS} don't fit ({str(error).splitlines()[0][:120]})") from None
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return SmallClip(
        model.eval().requires_grad_(False), tokenizer, config["model_cfg"], config.get("preprocess_cfg", {})
    )


# ---------------------------------------------------------------- transformers


def transformers_config(config: dict[str, Any]) -> CLIPConfig:
    """Return transformers' configuration for open_clip's `model_cfg`.

    Raise BadInput unless it is a vision transformer with GELU and a text tower that pools at the end token.
    """
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    vision, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(vision.get("layers"), int) or text.get("pool_type") != "eos" or config.get("quick_gelu"):
        raise BadInput(
            "only a vision transformer with GELU and a text tower that pools at the end token can be converted"
        )

    def shape(tower: dict[str, Any], heads: int) -> dict[str, Any]:
        width = {"hidden_size": tower["width"], "intermediate_size": 4 * tower["width"]}
        depth = {"num_hidden_layers": tower["layers"], "num_attention_heads": heads}
        return {**width, **depth, "projection_dim": config["embed_dim"], "hidden_act": "gelu", "layer_norm_eps": 1e-5}

    text_config = CLIPTextConfig(
        vocab_size=text["vocab_size"],
        max_position_embeddings=text["context_length"],
        bos_token_id=text["eos_id"] - 1,
        eos_token_id=text["eos_id"],
        pad_token_id=text["pad_id"],
        **shape(text, text["heads"]),
    )
    vision_config = CLIPVisionConfig(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        **shape(vision, vision["width"] // vision["head_width"]),
    )
    return CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=config["embed_dim"])


BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # so spelled in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}


def transformers_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip's tensors by transformers' names. Projections are transposed. Joint tensors of query, key and value are split."""
    state_dict: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in OUTSIDE:
            state_dict[OUTSIDE[name]] = value
            continue
        if name in PROJECTIONS:
            state_dict[PROJECTIONS[name]] = value.T.contiguous()
            continue
        tower, _, inside = name.partition("transformer.resblocks.")  # [visual.]transformer.resblocks.N.MODULE.KIND
        layer, _, rest = inside.partition(".")
        module, _, kind = rest.rpartition(".")
        prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{layer}."
        if module == "attn":  # in_proj_weight, in_proj_bias
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                state_dict[f"{prefix}self_attn.{part}_proj.{kind.removeprefix('in_proj_')}"] = tensor.clone()
        else:
            state_dict[f"{prefix}{BLOCK[module]}.{kind}"] = value
    return state_dict


def to_transformers(clip: SmallClip) -> CLIPModel:
    """Return the same network as a `CLIPModel` in fp32; its `text_model` is the text encoder of the miniature's Stable Diffusion."""
    from transformers import CLIPModel

    model: Any = CLIPModel(transformers_config(clip.config))
    model.load_state_dict(transformers_weights(clip.model.state_dict()))
    network: CLIPModel = model.eval().requires_grad_(False)
    return network


def make_processor(clip: SmallClip) -> CLIPProcessor:
    """Return open_clip's image preprocessing and the tokenizer as transformers' `CLIPProcessor`."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    side = clip.config["vision_cfg"]["image_size"]
    images = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=clip.preprocessing["mean"],
        image_std=clip.preprocessing["std"],
    )
    return CLIPProcessor(images, clip.tokenizer)


def convert(folder: Path, output: Path) -> None:
    """Convert an open_clip folder to a transformers folder of model and processor."""
    clip = load_clip(folder)
    output_folder(output)
    to_transformers(clip).save_pretrained(output)
    make_processor(clip).save_pretrained(output)
