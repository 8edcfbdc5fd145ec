"""What the libraries say by themselves, beside the scripts' own lines."""

from __future__ import annotations


def quiet_libraries() -> None:
    """No progress bars that flash by, and no tables of what a file holds beside the part that is wanted: who loads checks the
    loading report and says in one line what is wrong."""
    import diffusers  # both are slow to import, and few scripts need them
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
