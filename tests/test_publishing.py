"""What code hosts and the model hub read: the citation, the workflow, and the front matter of the weights' cards."""

from __future__ import annotations

import importlib
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.files import ROOT, read_json

CARDS = ROOT / "checkpoints"
WEIGHTS = sorted(path.relative_to(CARDS) for path in CARDS.rglob("*.safetensors"))
LICENSES = {"mit", "cc-by-4.0", "other"}
TASKS = {"image-classification", "zero-shot-image-classification", "unconditional-image-generation"}
LAYOUTS = {"diffusers": "**/config.json", "open_clip": "open_clip_config.json"}  # what a library's loader looks for


def card_of(weights: Path) -> Path:
    """Return the card of a weight file: the one of the same name, or the README of the folder that is uploaded whole."""
    folders = [CARDS / folder for folder in weights.parents]
    places = [(CARDS / weights).with_suffix(".md"), *(folder / "README.md" for folder in folders)]
    return next(place for place in places if place.is_file())


def test_the_citation_has_what_its_format_needs_and_nothing_that_does_not_exist() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == (ROOT / "README.md").read_text().splitlines()[0].removeprefix("# ")
    assert citation["authors"] == [{"name": "The contributors"}]
    assert (ROOT / "LICENSE").read_text().startswith(f"{citation['license']} License")
    assert not {"doi", "identifiers", "url", "repository", "repository-code", "version"} & set(citation)


def test_the_workflow_calls_the_same_script_as_every_other_ci() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow[True] == ["push", "pull_request"]  # YAML reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    checkout, python, run = job["steps"]
    assert checkout["uses"].startswith("actions/checkout@")
    assert run == {"run": ".ci/run"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert python["with"]["cache"] == "pip"
    assert {path.name for path in ROOT.glob(python["with"]["cache-dependency-path"])} >= {"requirements.txt"}
    oldest, newest = re.findall(r"\((3, \d+)\)", (ROOT / "Makefile").read_text())[:2]
    assert f"({oldest})" <= f"({python['with']['python-version'].replace('.', ', ')})" <= f"({newest})"


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_weights_card_has_front_matter_that_the_hub_reads(weights: Path) -> None:
    from huggingface_hub import ModelCard

    path = card_of(weights)
    card: Any = ModelCard.load(path)  # raises for invalid front matter
    values = card.data.to_dict()
    assert set(values) <= {"license", "license_name", "library_name", "pipeline_tag", "tags"}
    assert values["license"] in LICENSES
    assert (values["license"] == "other") == ("license_name" in values)
    assert values.get("pipeline_tag", "image-classification") in TASKS
    assert values["tags"] == [tag.lower() for tag in values["tags"]]
    assert card.text.strip().startswith("# ")
    if library := values.get("library_name"):
        assert list(path.parent.glob(LAYOUTS[library]))
    if values.get("pipeline_tag") == "unconditional-image-generation":
        assert read_json(path.parent / "model_index.json")["_class_name"] == "DDIMPipeline"


def test_weights_made_of_restricted_data_are_not_given_the_repositorys_licence() -> None:
    from huggingface_hub import ModelCard

    for weights in WEIGHTS:
        card: Any = ModelCard.load(card_of(weights))
        assert ("research" in card.text) == (card.data.license == "other"), weights


def test_the_lines_that_upload_weights_are_commands_of_the_installed_hub() -> None:
    lines = re.findall(r"^hf upload .*$", (ROOT / "docs" / "extending.md").read_text(), re.M)
    commands = [shlex.split(command) for line in lines for command in line.split(" && ")]
    assert len(commands) == 3
    (script,) = entry_points(group="console_scripts", name="hf")
    assert importlib.util.find_spec(script.module)
    assert importlib.util.find_spec(f"{script.module.rpartition('.')[0]}.upload")
    for _, _, repository, source, *target in commands:
        assert repository.startswith("USER/")
        assert (ROOT / source).exists()
        assert target in ([], ["README.md"])
        assert target or source.endswith(".safetensors") or (ROOT / source / "README.md").is_file()
