"""The first import of every script in this folder: adds the repository's root to the import path, for any working folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runtime.interrupts  # noqa: E402, F401
