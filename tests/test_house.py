"""The layout's own rules (CONTRIBUTING.md): who may import whom, one place for each thing, quick start-up."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from source_files import PYTHON_FILES

from runtime.files import ROOT

MODULES = {"P1_dataloader", "P1_model"}  # at the top, and not run
ROOMS = {
    "diffusion": set(),
    "runtime": set(),
    "training": {"runtime"},
    "P1_model": {"diffusion", "training", "runtime"},
    "P1_dataloader": {"P1_model", "runtime"},
    "digits": {"diffusion", "training", "runtime", "P1_model", "P1_dataloader"},
    "faces": {"diffusion", "training", "runtime", "P1_model"},
    "zeroshot": {"diffusion", "training", "runtime"},
    "concepts": {"diffusion", "training", "runtime"},
    "pages": {"runtime", "concepts"},  # concepts: the course's file formats
}
FOLDERS = {"benchmarks", "hw2_data", "miniature"}
SLOW = {
    "accelerate", "diffusers", "huggingface_hub", "matplotlib", "open_clip", "pandas", "scipy", "tensorboard", "timm",
    "torch._dynamo", "torchvision", "transformers",
}  # fmt: skip
SOURCES = [path for path in PYTHON_FILES if path.relative_to(ROOT).parts[0] != "tests"]
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in MODULES)


def imports_of(tree: ast.AST) -> set[str]:
    """Return the modules that a file names in import statements."""
    nodes = list(ast.walk(tree))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_what_lies_at_the_top_is_run() -> None:
    tops = {path.stem for path in ROOT.glob("*.py") if "__main__" not in path.read_text()}
    assert tops == MODULES
    assert len(list(ROOT.glob("*.py"))) <= 14


def test_no_script_is_imported() -> None:
    for path, tree in TREES.items():
        assert not imports_of(tree) & set(SCRIPTS), path


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    ours = set(ROOMS) | FOLDERS
    for path, tree in TREES.items():
        if path.relative_to(ROOT).parts[0].removesuffix(".py") == room:
            imported = {name.split(".")[0] for name in imports_of(tree)} & ours
            assert imported <= ROOMS[room] | {room}, path


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    edges = {
        room: {
            name.split(".")[0]
            for path, tree in TREES.items()
            if path.relative_to(ROOT).parts[0].removesuffix(".py") == room
            for name in imports_of(tree)
        }
        & set(ROOMS) - {room}
        for room in ROOMS
    }
    while leaves := [room for room, targets in edges.items() if not targets & set(edges)]:
        for room in leaves:
            del edges[room]
    assert not edges


def test_only_the_folders_of_scripts_change_the_import_path() -> None:
    places = {path.relative_to(ROOT).as_posix() for path in SOURCES if "sys.path.insert" in path.read_text()}
    assert places == {f"{folder}/repository_root.py" for folder in FOLDERS}


def test_signals_timesteps_and_resuming_have_one_place() -> None:
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in SOURCES}
    assert [
        name for name, text in texts.items() if "with stop_signals()" in text and name != "training/signals.py"
    ] == ["training/loop.py"]
    assert [name for name, text in texts.items() if re.search(r"stratified\(\) \*", text)] == ["training/draws.py"]
    assert not [name for name, text in texts.items() if "def _resume" in text]


def test_a_class_name_means_one_thing() -> None:
    names = Counter(
        node.name
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name != "Settings"
    )
    assert not [name for name, count in names.items() if count > 1]


def test_attributes_are_created_in_init() -> None:
    outside = []
    for path, tree in TREES.items():
        for kind in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
            methods = [node for node in kind.body if isinstance(node, ast.FunctionDef)]
            fields = {
                node.target.id
                for node in kind.body
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            }
            assigned = {method.name: attributes_set(method) for method in methods}
            created = assigned.get("__init__", set()) | fields
            outside += [
                f"{path.name}: {kind.name}.{name}" for method in methods for name in assigned[method.name] - created
            ]
    assert not outside


def attributes_set(method: ast.FunctionDef) -> set[str]:
    """Return the names of `self`'s attributes that a method assigns."""
    return {
        node.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def test_type_ignores_are_rare() -> None:
    assert sum(path.read_text().count("# type: ignore") for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]) <= 13


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SCRIPTS, "miniature/world", "hw2_data/prepare"])
def test_help_is_answered_before_anything_slow_is_imported(script: str) -> None:
    command = (
        "import runpy, sys\n"
        f"sys.argv = [{str(ROOT / script)!r} + '.py', '--help']\n"
        f"sys.path.insert(0, {str((ROOT / script).parent)!r})\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as leaving:\n    assert not leaving.code\n"
        f"print('slow:', *sorted({SLOW!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "slow:", script


def test_no_path_of_a_machine_is_in_the_sources() -> None:
    for path in [*SOURCES, *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        assert str(Path.home()) not in path.read_text().replace("~", ""), path
