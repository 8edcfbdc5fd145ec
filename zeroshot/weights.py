"""The files of an open_clip model: which it needs, where they are, and which activation they need. Nothing is loaded here.

A model is one of open_clip's architectures with weights, a folder (local-dir:PATH), or a hub model (hf-hub:NAME). Weights are a file, or a
tag: open_clip's name for published weights.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf

from runtime.cli import BadInput, log
from runtime.files import ROOT, read_json, visible
from runtime.hub import first_line, hub, hub_answers
from runtime.weights import zip_names

WEIGHTS = ROOT / "checkpoints" / "clip"  # files named MODEL.TAG.safetensors (or .bin, .pth, .pt), placed by hand
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
OPENAI_CACHE = Path("~/.cache/clip").expanduser()  # plain downloads of open_clip and of OpenAI's package
LOCAL, HUB, TWIN = "local-dir:", "hf-hub:", "-quickgelu"


@dataclass(frozen=True)
class Source:
    """A model's name, resolved to files. `model` is open_clip's name."""

    model: str
    tag: str | None
    """Tag of the weights; None = they are a file, or belong to a folder or hub model."""
    weights: Path
    """The file of the weights; the folder for local-dir:PATH."""
    files: tuple[Path, ...]
    """All files that decide what the model computes."""
    quick_gelu: bool = False
    """Use QuickGELU although the architecture has GELU."""
    online: bool = False
    """Whether open_clip may fetch a tokenizer or a text tower from the hub."""

    @property
    def label(self) -> str:
        """The model's name in logs and results: model:tag or model:file; of a folder or hub model only its name."""
        if self.model.startswith((LOCAL, HUB)):
            return self.model
        return f"{self.model}:{self.tag or self.weights}"

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The tag's image transform, as arguments of open_clip's `create_model_and_transforms`; empty without a tag."""
        config = open_clip.get_pretrained_cfg(self.model, self.tag) if self.tag else {}
        names = ("mean", "std", "interpolation", "resize_mode")
        return {f"image_{name}": config[name] for name in names if name in config}

    @cached_property
    def digests(self) -> dict[str, str]:
        """File name -> sha256."""
        digests = {}
        for path in self.files:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while part := file.read(1 << 24):
                    digest.update(part)
            digests[path.name] = digest.hexdigest()
        return digests

    @cached_property
    def identity(self) -> str:
        """A hash of all that decides the features: architecture, activation, transform, and the content of every file."""
        config = None if self.model.startswith((LOCAL, HUB)) else open_clip.get_model_config(self.model)
        parts = (config, self.quick_gelu, self.preprocessing, open_clip.__version__)
        return hashlib.sha256(repr((parts, self.digests)).encode()).hexdigest()


# ---------------------------------------------------------------- from names to files


def resolve(model: str, weights: str | None, download: bool = False) -> Source:
    """Find the files of a model. `weights` is a tag or a file; None for a folder or hub model.

    The network is used only with `download`, and only for files that are not on this machine.
    Raise BadInput for an unknown name (the message gives the nearest known one), for absent weights (it says where to get and put them),
    and if the hub doesn't answer.
    """
    if model.startswith((LOCAL, HUB)):
        if weights:
            raise BadInput(f"--weights {weights}: {model} brings its own weights, leave --weights out")
        return _folder(model) if model.startswith(LOCAL) else _hub_model(model, download)

    model = _architecture(model)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not weights:
        raise BadInput(f"--model {model} needs --weights: a file or one of {', '.join(tags) or '(no tags known)'}")
    tag = weights.lower().replace("-", "_")
    if tag in tags:
        path = find_weights(model, tag) or _download(model, tag, download)
        # open_clip takes the text tower or tokenizer of these from the hub
        hub_text = {"hf_model_name", "hf_tokenizer_name"} & open_clip.get_model_config(model)["text_cfg"].keys()
        online = download and bool(hub_text)
        return Source(model, tag, path, (path,), needs_quick_gelu(model, tag, path), online)
    if not Path(weights).is_file():
        near = ", ".join(difflib.get_close_matches(weights, tags, 3, 0.4) or tags) or "none known"
        raise BadInput(f"--weights {weights} is neither a file nor a tag of {model}; nearest: {near}")
    path = Path(weights)
    return Source(model, None, path, (path,), needs_quick_gelu(model, None, path))


def _architecture(model: str) -> str:
    """Return open_clip's name of an architecture, ViT-B-32 for ViT-B/32. Raise BadInput with the nearest names if it has none."""
    name, models = model.replace("/", "-"), open_clip.list_models()
    if name in models:
        return name
    by_lower = {model.lower(): model for model in models}
    near = [by_lower[key] for key in difflib.get_close_matches(name.lower(), by_lower, 3, 0.3)] or models[:5]
    raise BadInput(
        f"--model {model} is not known to open_clip; nearest: {', '.join(near)}"
        f" (a folder is {LOCAL}PATH, a hub model {HUB}NAME)"
    )


def _folder(model: str) -> Source:
    folder = Path(model.removeprefix(LOCAL))
    if not folder.is_dir():
        raise BadInput(f"--model {model}: {folder} is not a folder")
    config = read_json(folder / HF_CONFIG_NAME)
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise BadInput(f"--model {model}: {folder / HF_CONFIG_NAME} has no model_cfg, so it is not an open_clip model")
    files = [path for path in visible(folder) if path.is_file()]
    if not any(path.suffix in (".safetensors", ".bin", ".pth") for path in files):
        raise BadInput(f"--model {model}: no weights in {folder}, wanted {HF_SAFE_WEIGHTS_NAME}")
    return Source(model, None, folder, tuple(files))


def _hub_model(model: str, download: bool) -> Source:
    name = model.removeprefix(HUB)
    online = download and hub_answers()
    try:
        with hub(online):
            config = Path(download_pretrained_from_hf(name, HF_CONFIG_NAME))
            weights = Path(download_pretrained_from_hf(name))
    except (OSError, ValueError) as error:
        absent = "it is not on this machine" + (" and the hub doesn't answer" if download else "")
        reason = first_line(error) if online else absent
        raise BadInput(
            f"--model {model}: {reason}; where there is a network, download it and pass its folder as {LOCAL}PATH"
        ) from None
    return Source(model, None, weights, (config, weights), online=online)


def find_weights(model: str, tag: str) -> Path | None:
    """Return the file of a tag's weights if it is on this machine, else None.

    Places are checkpoints/clip (files placed by hand), the hub's cache, and ~/.cache/clip.
    """
    plain = model.removesuffix(TWIN)
    for path in (WEIGHTS / f"{name}.{tag}{suffix}" for name in (plain, plain + TWIN) for suffix in SUFFIXES):
        if path.is_file():
            return path
    config = open_clip.get_pretrained_cfg(model, tag)
    url = config.get("url", "")
    with hub(online=False), contextlib.suppress(OSError):
        return Path(download_pretrained(config | {"url": ""}))  # offline, it only looks into the hub's cache
    cached = OPENAI_CACHE / Path(url).name
    return cached if cached.is_file() else None


def _download(model: str, tag: str, allowed: bool) -> Path:
    """Fetch the tag's file as open_clip does. If it fails or isn't `allowed`, raise BadInput with where to get and put the file."""
    config = open_clip.get_pretrained_cfg(model, tag)
    repository, _, name = config["hf_hub"].rpartition("/")
    url = f"{huggingface_hub.constants.ENDPOINT}/{repository}/resolve/main/{name or HF_SAFE_WEIGHTS_NAME}"
    reason = f"--weights {tag} downloads them"
    if allowed:
        reason = "the network doesn't answer"
        try:
            if hub_answers():
                log(f"downloading {url}")
                return Path(download_pretrained(config))
        except (OSError, RuntimeError, ValueError) as error:
            reason = f"the download failed ({first_line(error)})"
    raise BadInput(
        f"the weights {tag} of {model} are not on this machine: {reason};"
        f" by hand, get {url} and place it as {WEIGHTS / f'{model}.{tag}{Path(url).suffix}'}"
    )


# ---------------------------------------------------------------- the activation


def needs_quick_gelu(model: str, tag: str | None, path: Path) -> bool:
    """Return whether weights were trained with QuickGELU while the architecture has GELU. open_clip itself only warns.

    open_clip's list decides for a tag; the archive format of OpenAI's own files means True.
    For other files it is False, and a warning is logged if that may be wrong.
    """
    has = open_clip.get_model_config(model).get("quick_gelu", False)
    wants = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False) if tag else is_openai_archive(path)
    if wants and not has:
        log(f"warning: {model} has GELU but {tag or path.name} was trained with QuickGELU: QuickGELU is used")
        return True
    plain = model.removesuffix(TWIN)
    if not tag and not wants and (has or plain + TWIN in open_clip.list_models()):
        log(
            f"warning: nothing tells whether {path} was trained with {'QuickGELU' if has else 'GELU'}, which {model} has;"
            f" weights by OpenAI, MetaCLIP and DFN want {plain}{TWIN}, the wrong one costs some points"
        )
    return False


def is_openai_archive(path: Path) -> bool:
    """Return whether the file is one of OpenAI's own (ViT-B-32.pt): a TorchScript archive, always with QuickGELU."""
    return path.is_file() and "constants.pkl" in (zip_names(path) or ())
