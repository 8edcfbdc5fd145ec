"""Files of the miniature's classifiers: weights (matrices in fp16), and a JSON header with kind, layout, possible answers and origin."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from digits.classifier import round_weights
from runtime.cli import BadInput
from runtime.files import load_safetensors, save_safetensors

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class ClassifierFormat:
    """The header of one classifier's files, and the wording of the errors that refuse other files."""

    kind: str
    answers: dict[str, Any]
    """Entries of the header that a file must have to be loaded: the questions and their possible answers."""
    name: str
    """The classifier in error messages, such as "judge of the miniature"."""
    other_answers: str
    """What a file with other answers was trained on, in error messages, such as "another vocabulary"."""
    command: str
    """The command that makes such a file."""

    def save(self, path: Path, network: nn.Module, layout: Any, origin: dict[str, Any]) -> None:
        """Write one safetensors file. `layout` is the network's config dataclass, `origin` says how it was trained."""
        header = {"kind": self.kind, "model": asdict(layout), **self.answers, "origin": origin}
        save_safetensors(path, round_weights(network), {"judge": json.dumps(header)})

    def load(self, path: Path, build: Callable[[dict[str, Any]], Network]) -> Network:
        """Return the network that `build` makes from the stored layout, with the stored weights.

        Raise BadInput for a file of another kind, other answers, or weights that don't fit.
        """
        tensors, metadata = load_safetensors(path)
        try:
            header = json.loads(metadata.get("judge", "{}"))
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("kind") != self.kind:
            raise BadInput(f"{path} is no {self.name}: {self.command} makes one")
        if {name: header.get(name) for name in self.answers} != json.loads(json.dumps(self.answers)):
            raise BadInput(f"{path} was trained on {self.other_answers}: {self.command} makes a new one")
        try:
            network = build({k: tuple(v) if isinstance(v, list) else v for k, v in header["model"].items()})
            network.load_state_dict(tensors)
        except (KeyError, AttributeError, TypeError, ValueError):
            raise BadInput(f"{path}: no {self.name} has the layout in its header") from None
        except RuntimeError as error:
            raise BadInput(f"{path}: {str(error).splitlines()[-1].strip()[:200]}") from None
        return network
