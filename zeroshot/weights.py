"""Which weights an open_clip model needs, where they lie, and whether they fit its activation. Nothing is loaded here.

A model is one of open_clip's architectures with weights (a tag or a file), a folder (local-dir:PATH), or a hub model (hf-hub:NAME).
"""

from __future__ import annotations

import difflib
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import open_clip
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf

from runtime.cli import BadInput, log
from runtime.files import ROOT, read_json, write_json
from runtime.hub import first_line, hub, hub_answers

PLACED = ROOT / "checkpoints" / "clip"  # weights of a tag that a user put there by hand
OPENAI_CACHE = Path("~/.cache/clip").expanduser()  # where open_clip and OpenAI's package keep plain downloads
LOCAL, HUB, TWIN = "local-dir:", "hf-hub:", "-quickgelu"
Activation = Literal["match", "named"]


@dataclass(frozen=True)
class Source:
    """What a user named, resolved to files; nothing is loaded. `model` is open_clip's name with the activation that will be used."""

    model: str
    tag: str | None
    """open_clip's tag, as named or known from the file's name; None: a file of unknown origin, or a whole model."""
    weights: Path
    """The file, or the folder of a whole model."""
    files: tuple[Path, ...]
    """Everything that decides what the model computes."""
    quick_gelu: bool = False
    """Use QuickGELU though the architecture has GELU."""
    online: bool = False
    """A tokenizer or a text tower may be fetched from the hub."""

    @property
    def label(self) -> str:
        """Model and weights as open_clip writes them, model:tag."""
        if self.model.startswith((LOCAL, HUB)):
            return self.model
        return f"{self.model}:{self.tag or self.weights}"

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The tag's transform where it is known, as arguments of open_clip's `create_model_and_transforms`."""
        tag = open_clip.get_pretrained_cfg(self.model, self.tag) if self.tag else {}
        names = {"mean": "image_mean", "std": "image_std", "interpolation": "image_interpolation"}
        names["resize_mode"] = "image_resize_mode"
        return {argument: tag[name] for name, argument in names.items() if name in tag}

    def identity(self, memory: Path) -> str:
        """A hash of all that decides the features: architecture, activation, transform, and the content of every file."""
        known = None if self.model.startswith((LOCAL, HUB)) else open_clip.get_model_config(self.model)
        parts = (known, self.quick_gelu, self.preprocessing, open_clip.__version__)
        return hashlib.sha256(repr((parts, self.digests(memory))).encode()).hexdigest()

    def digests(self, memory: Path) -> dict[str, str]:
        """File name -> sha256."""
        return {path.name: file_digest(path, memory) for path in self.files}


def file_digest(path: Path, memory: Path) -> str:
    """sha256 of the file, remembered in the json `memory` by path, size and time, because weights are large."""
    status = path.stat()
    key = f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}"
    known = read_json(memory) if memory.is_file() else {}
    if key not in known:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        known[key] = digest.hexdigest()
        write_json(memory, known)
    return str(known[key])


# ---------------------------------------------------------------- from names to files


def resolve(model: str, weights: str | None, activation: Activation = "match", download: bool = False) -> Source:
    """The files of a model. Raises BadInput for unknown names (the nearest are offered), absent weights (with where to get and
    put them), and a hub that doesn't answer. Only with `download` is a network used, and only for what isn't on this machine."""
    if model.startswith((LOCAL, HUB)):
        if weights:
            raise BadInput(f"--weights {weights}: {model} brings its own weights, leave --weights out")
        return _folder(model) if model.startswith(LOCAL) else _hub_model(model, download)
    model = _architecture(model)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not weights:
        raise BadInput(f"--model {model} needs --weights: a file or one of {', '.join(tags) or '(no tags known)'}")
    known = open_clip.get_pretrained_cfg(model, weights)
    if known:
        tag: str | None = weights.lower().replace("-", "_")
        path = find_weights(model, str(tag)) or _download(model, str(tag), known, download)
    elif Path(weights).is_file():
        path = Path(weights)
        tag = tag_of_file(model, path)
    else:
        near = difflib.get_close_matches(weights, tags, 3, 0.4) or tags
        raise BadInput(
            f"--weights {weights} is neither a file nor a tag of {model}; nearest: {', '.join(near) or 'none known'}"
        )
    model, force = matching_activation(model, tag, path, keep=activation == "named")
    return Source(model, tag, path, (path,), force, download and bool(known) and needs_hub(model))


def _architecture(model: str) -> str:
    """open_clip's name of an architecture; ViT-B/32 is ViT-B-32. Raises BadInput with the nearest names."""
    name, known = model.replace("/", "-"), open_clip.list_models()
    if name in known:
        return name
    by_lower = {k.lower(): k for k in known}
    near = [by_lower[k] for k in difflib.get_close_matches(name.lower(), by_lower, 3, 0.3)]
    raise BadInput(
        f"--model {model} is not known to open_clip; nearest: {', '.join(near) or ', '.join(known[:5])}"
        f" (a folder is {LOCAL}PATH, a hub model {HUB}NAME)"
    )


def _folder(model: str) -> Source:
    folder = Path(model.removeprefix(LOCAL))
    if not folder.is_dir():
        raise BadInput(f"--model {model}: {folder} is not a folder")
    config = folder / HF_CONFIG_NAME
    if not isinstance(read_json(config), dict) or "model_cfg" not in read_json(config):
        raise BadInput(f"--model {model}: {config} has no model_cfg, so it is not an open_clip model")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
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
        why = first_line(error) if online else absent
        raise BadInput(
            f"--model {model}: {why}; where there is a network, download it and pass its folder as {LOCAL}PATH"
        ) from None
    return Source(model, None, weights, (config, weights), online=online)


def find_weights(model: str, tag: str) -> Path | None:
    """The weights of a tag on this machine: placed by hand, in the hub's cache, or in ~/.cache/clip."""
    known = open_clip.get_pretrained_cfg(model, tag)
    for name in (model, _plain(model), _plain(model) + TWIN):  # the two variants share their weights
        for suffix in (".safetensors", ".bin", ".pt"):
            if (PLACED / f"{name}.{tag}{suffix}").is_file():
                return PLACED / f"{name}.{tag}{suffix}"
    repository, _, file = known.get("hf_hub", "").rpartition("/")
    for name in (file.rsplit(".", 1)[0] + ".safetensors", file) if file else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        found = huggingface_hub.try_to_load_from_cache(repository, name) if repository else None
        if isinstance(found, str):
            return Path(found)
    url = known.get("url", "").rsplit("/", 1)[-1]
    return OPENAI_CACHE / url if url and (OPENAI_CACHE / url).is_file() else None


def _download(model: str, tag: str, known: dict[str, Any], allowed: bool) -> Path:
    """The tag's file from where open_clip has it; raises BadInput that says where to get it and where to put it."""
    repository, _, file = known.get("hf_hub", "").rpartition("/")
    url = known.get("url", "")
    if repository:
        url = f"{huggingface_hub.constants.ENDPOINT}/{repository}/resolve/main/{file or HF_SAFE_WEIGHTS_NAME}"
    place = PLACED / f"{model}.{tag}{Path(url).suffix}"
    reason = f"--weights {tag} downloads them"
    if allowed:
        reason = "the network doesn't answer"
        try:
            if not repository or hub_answers():
                log(f"downloading {url}")
                return Path(download_pretrained(known))
        except (OSError, RuntimeError, ValueError) as error:
            reason = f"the download failed ({first_line(error)})"
    raise BadInput(
        f"the weights {tag} of {model} are not on this machine: {reason};"
        f" by hand, get {url} and place it as {place} (or name it with --weights FILE)"
    )


def needs_hub(model: str) -> bool:
    """True for architectures whose text tower or tokenizer open_clip takes from the hub."""
    config = open_clip.get_model_config(model)
    return any(name in config["text_cfg"] for name in ("hf_model_name", "hf_tokenizer_name"))


# ---------------------------------------------------------------- the activation


def _plain(model: str) -> str:
    return model.removesuffix(TWIN)


def tag_of_file(model: str, path: Path) -> str | None:
    """The tag that a file holds, told by the name under which it is published, cached or placed; None: unknown."""
    for name in (model, _plain(model) + TWIN, _plain(model)):
        for tag in open_clip.list_pretrained_tags_by_model(name):
            known = open_clip.get_pretrained_cfg(name, tag)
            repository = known.get("hf_hub", "").rpartition("/")[0].replace("/", "--")
            published = known.get("url", "").rsplit("/", 1)[-1]
            placed = path.stem in (f"{name}.{tag}", f"{_plain(name)}.{tag}")
            if placed or path.name == published or (repository and f"models--{repository}" in path.parts):
                return tag
    return None


def matching_activation(model: str, tag: str | None, path: Path, keep: bool = False) -> tuple[str, bool]:
    """(model, whether to force QuickGELU), so that the activation is the one the weights were trained with. What open_clip's
    list and OpenAI's own archives tell is named and put right, unless `keep`; of an unknown file only the doubt is named."""
    has = open_clip.get_model_config(model).get("quick_gelu", False)
    known = open_clip.get_pretrained_cfg(model, tag) or open_clip.get_pretrained_cfg(_plain(model), tag) if tag else {}
    wanted = known.get("quick_gelu", False) if known else is_openai_archive(path)
    if wanted and not has:
        _tell_mismatch(model, "GELU", tag or path.name, "QuickGELU", keep)
        return model, not keep
    if known and has and not wanted and model.endswith(TWIN):
        _tell_mismatch(model, "QuickGELU", str(tag), "GELU", keep)
        return model if keep else _plain(model), False
    if not known and not wanted and (has or _plain(model) + TWIN in open_clip.list_models()):
        log(
            f"warning: nothing tells whether {path} was trained with {'QuickGELU' if has else 'GELU'}, which {model} has;"
            f" weights by OpenAI, MetaCLIP and DFN want {_plain(model)}{TWIN}, the wrong one costs some points"
        )
    return model, False


def _tell_mismatch(model: str, has: str, weights: str, wanted: str, keep: bool) -> None:
    done = (
        f"{has} is kept, as --activation named says" if keep else f"{wanted} is used (--activation named keeps {has})"
    )
    log(f"warning: {model} has {has} but {weights} was trained with {wanted}: {done}")


def is_openai_archive(path: Path) -> bool:
    """True for OpenAI's own files (ViT-B-32.pt): TorchScript archives, all of them with QuickGELU."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
