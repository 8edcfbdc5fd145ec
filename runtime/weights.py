"""What a file of weights is, judged by its content and not by its name.

`foreign_kind` names files that hold no tensors. `describe` names the model that tensors belong to, by their names.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from runtime.cli import log

LONGEST_HEADER = 100_000_000  # bytes, the limit of safetensors
TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # opens torch files from before 1.6, after the pickle protocol
UNPACK = "unpack it and name the file inside"
SIGNATURES = (
    (b"\x1f\x8b", f"a gzip archive: {UNPACK}"),
    (b"BZh", f"a bzip2 archive: {UNPACK}"),
    (b"\xfd7zXZ", f"an xz archive: {UNPACK}"),
    (b"7z\xbc\xaf", f"a 7z archive: {UNPACK}"),
    (b"Rar!", f"a RAR archive: {UNPACK}"),
    (b"\x89PNG", "a picture, not a file of tensors"),
    (b"\xff\xd8\xff", "a picture, not a file of tensors"),
    (b"RIFF", "a picture or a sound, not a file of tensors"),
    (b"GIF8", "a picture, not a file of tensors"),
    (b"%PDF", "a PDF document, not a file of tensors"),
    (b"GGUF", "a GGUF file, quantised weights that are not read here: name the original .safetensors or .ckpt"),
    (b"\x93NUMPY", "an array of numpy: save it with torch.save(torch.from_numpy(array), file)"),
    (b"\x89HDF", "an HDF5 file of Keras: name weights of PyTorch"),
)
STABLE_DIFFUSION = "a Stable Diffusion checkpoint"
KINDS = (  # (what it is, pattern of a tensor's name): the first entry with a match counts
    ("a LoRA, a change to a model: merge it into its model first (diffusers' fuse_lora)", r"lora_|\.lora\."),
    ("a LyCORIS, a change to a model: merge it into its model first", r"hada_w1|lokr_w1|\.oft_"),
    ("a ControlNet, an addition to a model", r"^control_model\.|controlnet_|input_hint_block"),
    ("an IP-Adapter, an addition to a model", r"^(ip_adapter|image_proj)\b"),
    ("an embedding of a token: name it with --embeddings", r"^(string_to_param|emb_params|clip_[gl]|<[^<>]+>)$"),
    ("Stable Diffusion XL", r"^conditioner\.embedders"),
    ("a Flux or Stable Diffusion 3 transformer", r"double_blocks\.|joint_blocks\."),
    (STABLE_DIFFUSION, r"^model\.diffusion_model\."),
    ("an autoencoder (VAE) alone", r"^(first_stage_model\.)?(en|de)coder\.conv_in\."),
    ("a CLIP under transformers' names", r"(^|\.)vision_model\."),
    ("a CLIP text encoder alone", r"^(text_model\.)?encoder\.layers\.|^cond_stage_model\."),
    ("a CLIP under open_clip's names", r"(^|\.)visual\.(transformer|proj|conv1|trunk)"),
    ("a U-Net under diffusers' names (name the folder of its pipeline)", r"^(down|up)_blocks\."),
    ("the face network of UNet.pt", r"(^|\.)down1\.weight$"),
    ("a P1 digit network", r"^conditioning\.\w+\."),
    ("a digit classifier", r"^(network|reference)\.|(^|\.)fc3\.weight$"),
    ("a ResNet", r"(^|\.)layer1\.0\.conv1\."),
)


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do: the header's length, then JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER


def foreign_kind(path: Path) -> str:
    """Return what a file without tensors is, and what to do; "" for torch and safetensors files, whole or truncated."""
    if is_safetensors(path):
        return ""
    with path.open("rb") as file:
        head = file.read(1024)
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if head.startswith(b"\x80"):
        plain = TORCH_MAGIC not in head[:64]
        return (
            "a pickle that torch.save did not write: save the tensors as .safetensors where it was made"
            if plain
            else ""
        )
    if head[257:262] == b"ustar":
        return f"a tar archive: {UNPACK}"
    if kind := next((kind for start, kind in SIGNATURES if head.startswith(start)), ""):
        return kind
    return _text_kind(head)


def zip_names(path: Path) -> list[str] | None:
    """Return the names of the files in a zip file, without folders; None if it is no zip file or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.rpartition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None


def _zip_kind(path: Path) -> str:
    if (names := zip_names(path)) is None:
        return ""  # a torch file that is truncated or damaged
    if "constants.pkl" in names:
        return "a TorchScript archive, which holds a program: save its state_dict() as .safetensors where it was made"
    inside = f"such as {names[0]}" if names else "which is empty"
    return "" if "data.pkl" in names else f"a zip archive of other files, {inside}: {UNPACK}"


def _text_kind(head: bytes) -> str:
    try:
        text = head.decode("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        if not error.start or error.start < len(head) - 3:  # a character may be cut at the end
            return ""
        text = head[: error.start].decode("utf-8-sig")
    text = text.strip()
    if not text or re.search(r"[\x00-\x08\x0e-\x1f]", text):
        return ""
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run git lfs pull in its repository, or download the file"
    if re.match(r"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!doctype html|html|head)", text, re.IGNORECASE | re.DOTALL):
        return "a web page, not the file itself: download it by the link of the file (/resolve/, not /blob/)"
    return f"a text, not a file of tensors, and begins with {text.splitlines()[0][:40]!r}: download the file again"


# ---------------------------------------------------------------- named tensors


def named_tensors(content: Any, path: Path, *markers: str) -> Any:
    """Return the state dict in `content`, loaded from `path`, that has a tensor with one of the names `markers`.

    It may lie in a dict such as {"model": ..}; a prefix such as `module.` is removed from its names.
    If no dict has such a tensor, return content["state_dict"] or else the content, unchanged.
    """
    states = {place: state for place, state in _dicts(content, "", 2) if _prefixes(state, markers)}
    if not states:
        return content.get("state_dict", content) if isinstance(content, dict) else content
    place, state = next(iter(states.items()))
    prefix, *others = _prefixes(state, markers)
    if len(states) > 1 or others:
        log(f"{path} holds {len(states) + len(others)} sets of weights: {place + prefix or 'the first'} is used")
    return {str(name)[len(prefix) :]: value for name, value in state.items() if str(name).startswith(prefix)}


def _dicts(content: Any, place: str, depth: int) -> Iterable[tuple[str, dict[Any, Any]]]:
    """Yield (place, dict) of a dict and of those in it, outer ones first."""
    if isinstance(content, dict):
        yield place, content
        for key, value in content.items() if depth else ():
            yield from _dicts(value, f"{place}{key}.", depth - 1)


def _prefixes(state: dict[Any, Any], markers: Iterable[str]) -> list[str]:
    """Return what precedes a marker in the keys of `state`, the shortest first."""
    names = [str(name) for name in state]
    ends = [name[: -len(marker)] for marker in markers for name in names if name.endswith(marker)]
    return sorted({prefix for prefix in ends if not prefix or prefix.endswith(".")}, key=len)


def describe(content: Any) -> str:
    """Return what the loaded content of a file is, by its type and names, such as "a LoRA, .."; "" for an unknown kind."""
    if isinstance(content, Tensor):
        return f"one tensor of shape {list(content.shape)}"
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    if isinstance(kind := content.get("kind"), str):
        return f"the state of an unfinished training ({kind})"
    names = [str(name) for _, state in _dicts(content, "", 1) for name in state]
    return next((kind for kind, pattern in KINDS if any(re.search(pattern, name) for name in names)), "")
