"""Access to Hugging Face's model hub, and the libraries that load from it. They are slow to import: functions import them."""

from __future__ import annotations

import contextlib
import logging
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path


def is_hub_name(name: str) -> bool:
    """Return whether `name` has the form of a hub repository, owner/name. A relative path can have it too."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def hub_answers() -> bool:
    """Return whether the hub answers one request within 10 s; its client library would retry for most of a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10)
    except urllib.error.HTTPError:
        return True  # the request is refused, so there is a server
    except OSError:
        return False
    return True


@contextlib.contextmanager
def hub(online: bool) -> Iterator[None]:
    """Let libraries download from the hub within the block only if `online`. Files in its cache are found either way."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not online
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def only_variant(files: Sequence[Path]) -> dict[str, str]:
    """Return {"variant": "fp16"}, for `from_pretrained`, if all of a folder's weight files are of this variant, else {}."""
    return {"variant": "fp16"} if files and all(".fp16" in file.name for file in files) else {}


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type. torch's advice to load unsafely is replaced by the cause."""
    if "weights_only" in str(error):
        return "the weights are damaged, or hold more than tensors"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def quiet_libraries() -> None:
    """Silence progress bars and loading reports of diffusers and transformers; the loaders here check what was loaded.

    This also hides diffusers' error line on weights in .bin files, which are read safely all the same.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity(logging.CRITICAL)

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
