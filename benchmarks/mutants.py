"""Mutation testing: change one expression of the code (a mutant) and run the tests that reach it. One of them must fail.

  python benchmarks/mutants.py                    200 mutants, two hours on two cores; continues where it was stopped
  python benchmarks/mutants.py --only diffusion   those of one room (folder of code)
  python benchmarks/mutants.py --survivors        those that no test has noticed, again (after writing tests)

Bodies of functions are mutated: operators, numbers, conditions, statements that are calls, swapped or omitted arguments.
Texts, messages, logging and types are not. `mutmut` was tried first. It replaces functions by trampolines that look for
its settings in the working folder, but many tests here start scripts as commands from other folders.
"""

from __future__ import annotations

import ast
import collections
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import repository_root  # noqa: F401  # isort: split

from benchmarks.mutation_operators import changes
from runtime.cli import progress_bar, run_script

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "runs" / "mutants"
EQUIVALENT = ROOT / "benchmarks" / "mutants_equivalent.json"  # key -> why no test can notice it
ROOMS = ("diffusion", "training", "runtime", "digits", "faces", "zeroshot", "concepts")


@dataclass(frozen=True)
class Settings:
    """Settings of a mutation run."""

    count: int = 200
    """Mutants in the sample."""
    seed: int = 0
    only: str = ""
    """Mutate only files whose path starts with this. Empty = all."""
    survivors: bool = False
    """Test the survivors of earlier runs again."""
    jobs: int = os.cpu_count() or 1
    """Mutants tested at a time."""
    seconds: float = 120
    """Limit of test seconds per mutant. Tests named after the mutated file come first, then the fastest. Their file also runs whole."""


class Mutant(NamedTuple):
    """One change: bytes `start` to `end` of a file become `text`. The key stays the same when other lines change."""

    path: str
    line: int
    start: int
    end: int
    text: str
    key: str


def mutants_of(path: str) -> Iterator[Mutant]:
    source, seen = (ROOT / path).read_bytes(), collections.Counter[str]()
    starts = [0, *(match.end() for match in re.finditer(b"\n", source))]
    for function, line, node, text in changes(ast.parse(source)):
        start, end = (
            starts[node.lineno - 1] + node.col_offset,
            starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0),
        )
        key = f"{path}:{function}: {' '.join(source[start:end].decode().split())} -> {text}"
        seen[key] += 1
        yield Mutant(path, line, start, end, text, f"{key} #{seen[key]}")


def copy_of_tree() -> Path:
    tree = Path(tempfile.mkdtemp(prefix="mutants-"))
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (tree / ".venv").symlink_to(ROOT / ".venv")
    return tree


def run_tests(tree: Path, *arguments: str) -> str:
    """Run pytest in `tree`; return what it printed. Raise RuntimeError if it could not even start."""
    command = [sys.executable, "-m", "pytest", "--timeout=300", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, cwd=tree, stdout=-1, stderr=-2, text=True, errors="replace", env=environment)
    if run.returncode in (4, 5):  # a usage error, or no tests: the saved names are old
        raise RuntimeError(f"{run.stdout[-2000:]}")
    return run.stdout if run.returncode >= 0 else f"ERROR pytest ended by signal {-run.returncode}"


def tests_by_line(jobs: int) -> tuple[dict[str, dict[str, list[str]]], dict[str, float]]:
    """Return {file: {line: tests that reach it}} and {test: seconds} as saved by the last run.

    If a test file is newer, run all tests first, in `jobs` processes. Scripts that tests start count, too.
    """
    saved, newest = STATE / "tests.json", max(path.stat().st_mtime for path in ROOT.glob("tests/**/*.py"))
    if not saved.exists() or saved.stat().st_mtime < newest:
        import coverage  # by its name it would stand above repository_root, which comes first

        print("first, all tests: which one reaches which line", flush=True)
        tree, seconds = copy_of_tree(), collections.defaultdict[str, float](float)
        reached: dict[str, dict[str, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
        config = f"[run]\nparallel = true\nsource = {tree}\ndata_file = {STATE}/coverage\ncontext = ${{PYTEST_CURRENT_TEST-}}\n"
        (STATE / "coveragerc").write_text(config)
        os.environ["COVERAGE_PROCESS_START"] = str(STATE / "coveragerc")  # tests/conftest.py names the test
        files = sorted(str(path.relative_to(tree)) for path in tree.glob("tests/**/test_*.py"))
        with ThreadPoolExecutor(jobs) as pool:
            runs = list(pool.map(lambda job: run_tests(tree, *files[job::jobs], "-vvv", "--durations=0"), range(jobs)))
        del os.environ["COVERAGE_PROCESS_START"]
        (STATE / "tests.log").write_text(output := "".join(runs))
        for time, test in re.findall(r"^([\d.]+)s (?:setup|call) +(.+)$", output, re.MULTILINE):
            seconds[test] += float(time)
        for test in re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE):
            seconds[test] = float("inf")  # it fails without a mutant and could notice nothing
        for file in STATE.glob("coverage.*"):
            (data := coverage.CoverageData(str(file))).read()
            for path in data.measured_files():
                for line, contexts in data.contexts_by_lineno(path).items():
                    tests = {re.sub(r" \(\w+\)$", "", context.rpartition("|")[2]) for context in contexts}
                    reached[str(Path(path).relative_to(tree))][str(line)] |= tests & seconds.keys()
            file.unlink()
        shutil.rmtree(tree)
        saved.write_text(json.dumps([reached, seconds], default=sorted))
    reached_lists, test_seconds = json.loads(saved.read_text())
    return reached_lists, test_seconds


def choose_tests(mutant: Mutant, tests: list[str], seconds: dict[str, float], limit: float) -> Iterator[str]:
    name = f"test_{Path(mutant.path).stem}.py"
    for test in sorted(tests, key=lambda test: (name not in test, seconds[test])):
        if seconds[test] < limit:
            limit -= seconds[test]
            yield test


def main(settings: Settings) -> None:
    STATE.mkdir(parents=True, exist_ok=True)
    reached, seconds = tests_by_line(settings.jobs)
    files = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    paths = sorted(str(path.relative_to(ROOT)) for path in files)
    mutants = [mutant for path in paths if path.startswith(settings.only) for mutant in mutants_of(path)]
    # ordered by a hash: the sample stays nearly the same when the code changes
    mutants.sort(key=lambda mutant: hashlib.sha256(f"{settings.seed} {mutant.key}".encode()).digest())
    equivalent = json.loads(EQUIVALENT.read_text())
    sample = [mutant for mutant in mutants[: settings.count] if mutant.key not in equivalent]

    file = STATE / "results.json"
    results: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    if settings.survivors:
        results = {key: outcome for key, outcome in results.items() if outcome != "survived"}
    todo = [mutant for mutant in sample if mutant.key not in results]
    trees = queue.SimpleQueue[Path]()
    for _ in range(settings.jobs):
        trees.put(copy_of_tree())

    def test(mutant: Mutant) -> None:
        tree, source = trees.get(), (ROOT / mutant.path).read_bytes()
        (tree / mutant.path).write_bytes(source[: mutant.start] + mutant.text.encode() + source[mutant.end :])
        reaching = reached.get(mutant.path, {}).get(str(mutant.line), [])
        tests = list(choose_tests(mutant, reaching, seconds, settings.seconds))
        tests += [str(path.relative_to(ROOT)) for path in ROOT.glob(f"tests/**/test_{Path(mutant.path).stem}.py")]
        output = run_tests(tree, "-x", *tests) if tests else ""
        failed = re.search(r"^(FAILED|ERROR) .*", output, re.MULTILINE)
        results[mutant.key] = failed[0] if failed else "survived"
        file.write_text(json.dumps(results, indent=1))
        (tree / mutant.path).write_bytes(source)
        trees.put(tree)
        bar.update()

    with progress_bar(len(todo), "mutants", "mutant") as bar, ThreadPoolExecutor(settings.jobs) as pool:
        list(pool.map(test, todo))
    while not trees.empty():
        shutil.rmtree(trees.get())
    report(sample, results, min(settings.count, len(mutants)) - len(sample))


def report(sample: list[Mutant], results: dict[str, str], equivalent: int) -> None:
    """Print the survivors, then the share killed per room; `equivalent` mutants were left out."""
    rooms = collections.defaultdict[str, list[bool]](list)
    for mutant in sample:
        killed = results[mutant.key] != "survived"
        rooms[mutant.path.split("/")[0] if "/" in mutant.path else "scripts"].append(killed)
        if not killed:
            print(f"survived: {mutant.path}:{mutant.line} {mutant.key.partition(':')[2]}")
    rooms["all"] = sum(rooms.values(), [])
    print("\n| room | mutants | killed | share |\n| --- | --- | --- | --- |")
    for room, outcomes in rooms.items():
        print(f"| {room} | {len(outcomes)} | {sum(outcomes)} | {sum(outcomes) / len(outcomes):.2f} |")
    print(f"\ncalled equivalent and left out: {equivalent}, each with its reason in benchmarks/mutants_equivalent.json")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
