"""Model hubs and the libraries that reach them: whether a hub answers, and what their errors and logs say."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator

import huggingface_hub


def hub_answers() -> bool:
    """One quick question to the hub: its own client tries again for most of a minute."""
    constants = huggingface_hub.constants
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10)
    except urllib.error.HTTPError:
        return not constants.HF_HUB_OFFLINE  # refused, but it answers
    except OSError:
        return False
    return not constants.HF_HUB_OFFLINE


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def quiet_libraries() -> None:
    """No progress bars that flash by, and no tables of what a file holds beside the part that is wanted: who loads checks the
    loading report and says in one line what is wrong."""
    import diffusers  # both are slow to import, and few scripts need them
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@contextlib.contextmanager
def hub(online: bool) -> Iterator[None]:
    """Within the block nothing is fetched from the hub unless `online`; what is in its cache is found either way."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not online
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
