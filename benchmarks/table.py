"""Run the benchmarks and write one table of their results, runs/bench/table/table.md and table.json: make bench, make gpu.

  python benchmarks/table.py                               all of them in turn; hours on two CPU cores
  python benchmarks/table.py --quick                       the same with few images, steps and repeats: minutes, rough figures
  python benchmarks/table.py --only p1_sampling p2_ddim    these two
  python benchmarks/table.py --collect                     the table of earlier measurements, without measuring
  python benchmarks/table.py --results docs/results.md     also writes it into that file, between its two marks
  python benchmarks/table.py --gpu                         what a GPU measures in at most eight minutes, the most important first
  python benchmarks/table.py --gpu --device cpu --quick --minutes 2      a rehearsal without a GPU

A finished benchmark is kept while its command, code and inputs stay the same; --fresh measures again. The table is written after every
benchmark. For one that failed or was stopped at its time limit, it has the reason, and the numbers up to then.
"""

from __future__ import annotations

import re
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import repository_root  # noqa: F401  # isort: split

from runtime.cli import BadInput, check_positive, log, run_script
from runtime.device import Device, detect
from runtime.files import ROOT, atomic, output_folder, read_json, read_text, write_json
from runtime.steps import Command, Runner, Step, command_line

RUNS = ROOT / "runs" / "bench"
CLIP, DIFFUSION = "runs/miniature/clip", "runs/miniature/stable_diffusion"
ASSEMBLE = (
    f"miniature/train_clip.py convert --output {CLIP}",
    f"miniature/train_diffusion.py assemble --clip {CLIP} --output {DIFFUSION}",
)
MARKS = "<!-- make bench -->\n", "<!-- end of make bench -->\n"  # around the table in docs/results.md
GRACE = 20  # seconds kept for start-up and for a benchmark that is slow to stop; none is started with less


@dataclass(frozen=True)
class Settings:
    """Settings of the table."""

    only: tuple[str, ...] = ()
    """Names of benchmarks. Empty = all."""
    collect: bool = False
    """Only write the table of the records that exist."""
    quick: bool = False
    """Few images, steps and repeats, to see that all of them run. The figures are rough."""
    gpu: bool = False
    """Run the benchmarks for a GPU instead, each with its time limit."""
    minutes: float = 8.0
    """Time limit of --gpu in minutes, for all benchmarks together."""
    device: Device = "cuda"
    """Device of --gpu."""
    fresh: bool = False
    """Measure again what was measured before."""
    output: Path | None = None
    """Folder for table.md, table.json and a folder per benchmark. None = table, quick or gpu below runs/bench."""
    results: Path | None = None
    """Markdown file whose lines between <!-- make bench --> and <!-- end of make bench --> become the table."""


@dataclass(frozen=True)
class Measurement:
    """A benchmark of the table; "{output}" in its commands stands for the table's folder."""

    name: str
    command: str
    quick: str
    """Flags that --quick adds."""
    setup: tuple[str, ...] = ()
    """Commands to run first."""
    after: tuple[str, ...] = ()
    """Benchmarks whose results it reads."""
    seconds: float | None = None
    """Time limit. None = no limit."""


INVERSION = "benchmarks/p3_textual_inversion.py"
VECTORS = "{output}/p3_concepts/vectors"
ENTRIES = (
    Measurement("p1_accuracy", "benchmarks/p1_accuracy.py", "--seeds 0 1 --count 2"),
    Measurement("p1_sampling", "benchmarks/p1_sampling.py", "--count 1 --steps 20 --repeats 2"),
    Measurement("p1_training", "benchmarks/p1_training.py", "--steps 2 --rounds 2"),
    Measurement("p2_ddim", "benchmarks/p2_ddim.py", "--steps 1 --size 128 --repeats 2"),
    Measurement(
        "p3_clip", "benchmarks/p3_clip.py", "--count 32 --batched-count 16 --image-count 8 --pair-count 1 --repeats 1"
    ),
    Measurement("p3_speed", f"{INVERSION} speed", "--steps 2 --repeats 2", ASSEMBLE),
    Measurement(
        "p3_concepts",
        f"{INVERSION} concepts --folder {VECTORS}",
        "--seeds 1 --more-vectors 2 --steps 20 --batch 4 --count 4",
        ASSEMBLE,
    ),
    Measurement(
        "p3_course",
        f"{INVERSION} graded --concepts {VECTORS}",
        "--names fish relief --repeats 2",
        ASSEMBLE,
        after=("p3_concepts",),
    ),
    Measurement("p3_composition", "benchmarks/p3_composition.py", "--count 3 --alone 5 --learn 20", ASSEMBLE),
)
GPU_SPEED = f"{INVERSION} speed --model random-v1 --init dog --batch 4 --steps 5 --repeats 3 --compile off"
GPU_ENTRIES = (  # in order of worth; none needs a network
    Measurement("p1_training", "benchmarks/p1_training.py --preset large", "--preset tiny --rounds 1", seconds=150),
    Measurement(
        "p1_digits", "benchmarks/p1_sampling.py --count 50 --steps 2 --repeats 5", "--count 1 --repeats 2", seconds=60
    ),
    Measurement("p2_ddim", "benchmarks/p2_ddim.py", "--count 1 --steps 1 --size 64 --repeats 1", seconds=120),
    Measurement(
        "p3_speed",
        f"{GPU_SPEED} --precisions auto fp32 fp16",
        f"--model {DIFFUSION} --init object --steps 2 --repeats 2 --precisions auto fp32",
        seconds=150,
    ),
    Measurement(
        "p1_precisions",
        "benchmarks/p1_training.py --preset large --precisions auto fp32 fp16 --compile off --rounds 3",
        "--preset tiny --rounds 1 --steps 2",
        seconds=60,
    ),
    Measurement("p1_time", "benchmarks/p1_time.py", "--accuracy 0 --steps 2 --batch 8 --eval-count 1", seconds=150),
    Measurement("p1_sampling", "benchmarks/p1_sampling.py", "--count 1 --steps 20 --repeats 2", seconds=60),
    Measurement(
        "p3_large", "benchmarks/p3_composition.py --large", f"--model {DIFFUSION} --steps 2 --repeats 1", seconds=120
    ),
)


def select(settings: Settings, output: Path) -> list[Measurement]:
    """Return the requested benchmarks with their commands complete. Raises BadInput for an unknown name."""
    entries = {entry.name: entry for entry in (GPU_ENTRIES if settings.gpu else ENTRIES)}
    if unknown := [name for name in settings.only if name not in entries]:
        raise BadInput(f"--only {unknown[0]}: known are {', '.join(entries)}")
    selected = []
    for name in settings.only or entries:
        command, setup = entries[name].command, entries[name].setup
        trains = command.startswith("benchmarks/p1_training.py")
        if trains and not (ROOT / "hw2_data" / "digits").is_dir():  # a few digits drawn by code, for speed alone
            setup += ("hw2_data/prepare.py rendered --count 600 --output {output}/digits --overwrite",)
            command += " --data {output}/digits"
        if settings.quick:
            command += f" {entries[name].quick}"
            setup = setup or (ASSEMBLE if DIFFUSION in command else ())
        if settings.gpu:
            command += f" --device {settings.device}"
        folder = shlex.quote(str(output))
        filled = [line.format(output=folder) for line in (*setup, command)]
        selected.append(replace(entries[name], command=filled[-1], setup=tuple(filled[:-1])))
    return selected


def step_of(entry: Measurement, output: Path) -> Step:
    """Return the step that measures. It runs again when code or shipped weights change."""
    setup = [tuple(shlex.split(line)) for line in entry.setup]
    measure: Command = (*shlex.split(entry.command), "--record", output / entry.name / "record.json")
    inputs = (ROOT / "benchmarks", ROOT / "miniature", ROOT / "checkpoints", *ROOT.glob("P*.py"))
    return Step(entry.name, f"benchmark {entry.name}", (*setup, measure), inputs, entry.after)


def rows_of(entry: Measurement, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per measured quantity; the spread is the standard deviation over the repeats."""
    facts = {name: str(record.get(name)) for name in ("machine", "started", "revision")}
    facts |= {"command": command_line(shlex.split(entry.command)), "torch": record["versions"]["torch"]}
    return [
        {
            "bench": entry.name,
            "what": what,
            "mean": statistics.mean(values),
            "spread": statistics.pstdev(values),
            "repeats": len(values),
            **facts,
        }
        for what, values in record["metrics"].get("repeats", {}).items()
    ]


def markdown(rows: Sequence[Mapping[str, Any]], failed: Mapping[str, str]) -> str:
    """Return a section per benchmark: command, machine and versions, its numbers, and why it did not finish if it `failed`."""
    lines = ["# Benchmarks", "", "Mean and standard deviation over the repeats (n)."]
    for name in dict.fromkeys([*(row["bench"] for row in rows), *failed]):
        lines += ["", f"## {name}", ""]
        if own := [row for row in rows if row["bench"] == name]:
            about = "`{command}`, {machine}, torch {torch}, revision {revision}, {started}".format(**own[0])
            lines += [about, "", "| what | mean | spread | n |", "| --- | --- | --- | --- |"]
        for row in own:
            spread = f"{row['spread']:.2g}" if row["repeats"] > 1 else "-"
            lines.append(f"| {row['what']} | {row['mean']:.4g} | {spread} | {row['repeats']} |")
        if name in failed:
            lines += [*([""] if own else []), f"Not {'finished' if own else 'measured'}: {failed[name]}"]
    return "\n".join([*lines, ""])


def write_table(entries: Sequence[Measurement], output: Path, failed: Mapping[str, str]) -> str:
    """Write table.json and table.md of the records that exist; return the text of table.md."""
    records = [(entry, output / entry.name / "record.json") for entry in entries]
    rows = [row for entry, path in records if path.is_file() for row in rows_of(entry, read_json(path))]
    write_json(output / "table.json", {"rows": rows, "failed": failed})
    text = markdown(rows, failed)
    with atomic(output / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def around_the_table(results: Path) -> tuple[str, str]:
    """Return the text up to the first of MARKS and from the second on, with both. Raises BadInput if one is absent or repeated."""
    text = read_text(results)
    if [text.count(mark) for mark in MARKS] != [1, 1] or text.index(MARKS[0]) > text.index(MARKS[1]):
        raise BadInput(
            f"--results {results}: needs one line {MARKS[0].strip()} and, after it, one line {MARKS[1].strip()}"
        )
    before, rest = text.split(MARKS[0])
    return before + MARKS[0], MARKS[1] + rest.split(MARKS[1])[1]


def write_into(results: Path, table: str) -> None:
    """Replace the lines between MARKS by the table without its title, headings a level lower."""
    before, after = around_the_table(results)
    sections = re.sub("^#", "##", table.partition("\n\n")[2], flags=re.M)
    with atomic(results) as temporary:
        temporary.write_text(f"{before}\n{sections}\n{after}", encoding="utf-8")


def main(settings: Settings) -> None:
    """Measure, write the table after every benchmark, print it. Exit code 1 if a benchmark failed."""
    check_positive(settings, "minutes")
    default = RUNS / ("gpu" if settings.gpu else "quick" if settings.quick else "table")
    folder = (settings.output or default).resolve()
    if settings.results:
        around_the_table(settings.results)
    entries = select(settings, folder)
    if settings.gpu and not settings.collect:
        detect(settings.device)
    output = output_folder(folder)
    if settings.collect and not any((output / entry.name / "record.json").is_file() for entry in entries):
        raise BadInput(f"--collect: no record below {output}")

    runner, failed = Runner(output, len(entries), settings.fresh), {}
    end = time.monotonic() + 60 * settings.minutes - GRACE
    for entry in () if settings.collect else entries:
        left = end - time.monotonic()
        limit = min(entry.seconds, left) if settings.gpu and entry.seconds else None
        if limit is not None and limit < GRACE:
            failed[entry.name] = f"no time left of {settings.minutes:g} minutes"
        else:
            step = step_of(entry, output)
            step = replace(step, after=tuple(name for name in step.after if name in runner.outcomes))
            if reason := runner.run(step, limit).reason:
                failed[entry.name] = reason
        write_table(entries, output, failed)

    print(text := write_table(entries, output, failed))
    if settings.results:
        write_into(settings.results, text)
    log(f"table: {output / 'table.md'} and table.json")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
