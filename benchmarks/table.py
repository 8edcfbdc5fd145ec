"""Runs every benchmark and puts what it found into one table: runs/bench/table/table.md and table.json. (make bench)

Only p3_large.py, which wants a GPU, isn't among them.

  python benchmarks/table.py                               all of them, one after the other; hours on two CPU cores
  python benchmarks/table.py --quick                       the same with few pictures, steps and repeats: minutes, rough figures
  python benchmarks/table.py --only p1_sampling p2_ddim    some
  python benchmarks/table.py --collect                     the table of what was measured before, without measuring

A benchmark that is done is kept while its command, code and input stay the same; --fresh measures again. One that fails is in the table
with its reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import repository_root  # noqa: F401  # isort: split

from runtime.cli import BadInput, log, run_script
from runtime.files import ROOT, output_folder, read_json, write_json
from runtime.steps import Outcome, Runner, Step, shown, write_text

RUNS = ROOT / "runs" / "bench"
CLIP, DIFFUSION = "runs/miniature/clip", "runs/miniature/stable_diffusion"
ASSEMBLE = (
    ("miniature/train_clip.py", "convert", "--output", CLIP),
    ("miniature/train_diffusion.py", "assemble", "--clip", CLIP, "--output", DIFFUSION),
)
Values = dict[str, list[float]]
"""What is measured -> every repeat."""


@dataclass(frozen=True)
class Settings:
    """Flags."""

    only: tuple[str, ...] = ()
    """Names of benchmarks; none: all."""
    collect: bool = False
    """Only makes the table of the records that are there."""
    quick: bool = False
    """Few pictures, steps and repeats, to see all of them work: what they measure so is rough."""
    fresh: bool = False
    """Measure again what was measured before."""
    output: Path | None = None
    """Folder for table.md, table.json and a folder per benchmark with its record; left out: runs/bench/table, or quick beside it."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its command without --output, what comes before, and the numbers in its record's metrics."""

    name: str
    command: tuple[str, ...]
    quick: str
    """Flags that make it short."""
    values: Callable[[dict[str, Any]], Values]
    before: tuple[tuple[str, ...], ...] = ()
    after: tuple[str, ...] = ()
    """Benchmarks whose results it reads."""
    vectors: str = ""
    """The flag that says where learned vectors lie."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    bench: str
    what: str
    mean: float
    spread: float
    repeats: int
    command: str
    machine: str
    started: str
    revision: str
    torch: str


# ---------------------------------------------------------------- what each record holds


def accuracy_values(metrics: dict[str, Any]) -> Values:
    """A row per seed, as drawn and with retries."""
    return {f"{way}: {name}": [row[name] for row in rows] for way, rows in metrics.items() for name in sorted(rows[0])}


def sampling_values(metrics: dict[str, Any]) -> Values:
    """Seconds, ratio, accuracy."""
    found = {"default sampler, s": metrics["default_s"], "DDPM, two passes, s": [metrics["ddpm_s"]]}
    accuracy = {f"accuracy, {name}": [statistics.mean(scores)] for name, scores in metrics["accuracy"].items()}
    return found | {"times faster": metrics["ratio"]} | accuracy


def training_values(metrics: dict[str, Any]) -> Values:
    """Speed of both ways."""
    speeds = {f"{name}, images/s": values for name, values in metrics["images_per_s"].items()}
    return speeds | {"times faster": metrics["ratio"]}


def ddim_values(metrics: dict[str, Any]) -> Values:
    """Per precision: seconds, memory, ratio, difference."""
    found: Values = {}
    for kind in ("fp32", "tf32", "bf16"):
        if kind in metrics:
            one = metrics[kind]
            keys = ("baseline_s", "ours_s", "baseline_gb", "ours_gb")
            found |= {f"{kind}: {key}": [row[key] for row in one["rows"]] for key in keys}
            found |= {f"{kind}: times faster": one["ratio"], f"{kind}: MSE on 0..255": [one["mse"]]}
    return found


def clip_values(metrics: dict[str, Any]) -> Values:
    """Speed of three ways, and of a second run."""
    speeds = {f"{name}, images/s": metrics["images_per_s"][name] for name in ("batched", "image", "pair")}
    ratios = {f"times faster than one {name} at a time": values for name, values in metrics["ratio"].items()}
    return speeds | ratios | {"second run, times faster": [metrics["first_s"] / metrics["cached_s"]]}


def inversion_values(metrics: dict[str, Any]) -> Values:
    """Seconds per step of both ways, gradient."""
    kind = metrics["precision"]
    found = {"plain, s per step, fp32": metrics["plain_s"], f"ours, s per step, {kind}": metrics["ours_s"]}
    found |= {"times faster": metrics["ratios"], "times faster, by processor time": metrics["cpu_ratios"]}
    return found | {"gradient, relative difference": [metrics["gradient_difference"]]}


def concept_values(metrics: dict[str, Any]) -> Values:
    """Share of right pictures per question, over concepts and seeds."""
    rates = metrics["rates"]
    return {f"{question}: {who}": shares for question, columns in rates.items() for who, shares in columns.items()}


def course_values(metrics: dict[str, Any]) -> Values:
    """Of the course's cases."""
    return {"share of cases passed": [float(case["passed"]) for case in metrics["cases"]]}


def composition_values(metrics: dict[str, Any]) -> Values:
    """A number per case and level."""
    return {f"{case}: {level}": [value] for case, levels in metrics.items() for level, value in levels.items()}


INVERSION = "benchmarks/p3_textual_inversion.py"
BENCHES = (
    Benchmark("p1_accuracy", ("benchmarks/p1_accuracy.py",), "--seeds 0 1 --count 2", accuracy_values),
    Benchmark("p1_sampling", ("benchmarks/p1_sampling.py",), "--count 1 --steps 20 --repeats 2", sampling_values),
    Benchmark("p1_training", ("benchmarks/p1_training.py",), "--steps 2 --rounds 2", training_values),
    Benchmark("p2_ddim", ("benchmarks/p2_ddim.py",), "--steps 1 --size 128 --repeats 2", ddim_values),
    Benchmark(
        "p3_clip",
        ("benchmarks/p3_clip.py",),
        "--count 32 --batched-count 16 --image-count 8 --pair-count 1 --repeats 1",
        clip_values,
    ),
    Benchmark("p3_speed", (INVERSION, "speed"), "--steps 2 --repeats 2", inversion_values, ASSEMBLE),
    Benchmark(
        "p3_concepts",
        (INVERSION, "concepts"),
        "--seeds 1 --more-vectors 2 --steps 20 --batch 4 --count 4",
        concept_values,
        ASSEMBLE,
        vectors="--folder",
    ),
    Benchmark(
        "p3_course",
        (INVERSION, "graded"),
        "--names fish relief --repeats 2",
        course_values,
        ASSEMBLE,
        ("p3_concepts",),
        "--concepts",
    ),
    Benchmark(
        "p3_composition",
        ("benchmarks/p3_composition.py",),
        "--count 3 --alone 5 --learn 20",
        composition_values,
        ASSEMBLE,
    ),
)


# ---------------------------------------------------------------- measuring


def with_data(bench: Benchmark, output: Path) -> Benchmark:
    """Training needs digits: those in hw2_data, else digits drawn by code."""
    if bench.name != "p1_training" or (ROOT / "hw2_data" / "digits").is_dir():
        return bench
    digits = output / "digits"
    make = ("hw2_data/prepare.py", "rendered", "--output", f"{digits}", "--overwrite")
    return replace(bench, command=(*bench.command, "--data", f"{digits}"), before=(make,))


def step_of(bench: Benchmark, output: Path) -> Step:
    """All of its commands. It reads any of the code and the weights that ship."""
    places = (bench.vectors, f"{output / 'p3_concepts' / 'vectors'}") if bench.vectors else ()
    measure = (*bench.command, *places, "--output", f"{record_of(bench, output)}")
    reads = (ROOT / "benchmarks", ROOT / "miniature", ROOT / "checkpoints", *ROOT.glob("P*.py"))
    return Step(bench.name, f"benchmark {bench.name}", (*bench.before, measure), reads, after=bench.after)


def record_of(bench: Benchmark, output: Path) -> Path:
    """Where its record lies."""
    return output / bench.name / "record.json"


def measure(benches: Sequence[Benchmark], output: Path, fresh: bool) -> dict[str, Outcome]:
    """Runs them in turn."""
    runner = Runner(output, len(benches), fresh)
    for bench in benches:
        step = step_of(with_data(bench, output), output)
        runner.run(replace(step, after=tuple(name for name in step.after if name in runner.outcomes)))
    return runner.outcomes


# ---------------------------------------------------------------- the table


def rows_of(bench: Benchmark, record: dict[str, Any]) -> list[Row]:
    """A row per number; the spread is the standard deviation over the repeats."""
    about = {name: str(record.get(name)) for name in ("machine", "started", "revision")}
    return [
        Row(
            bench=bench.name,
            what=what,
            mean=statistics.mean(values),
            spread=statistics.pstdev(values),
            repeats=len(values),
            command=shown(bench.command),
            torch=record["versions"]["torch"],
            **about,
        )
        for what, values in bench.values(record["metrics"]).items()
    ]


def markdown(rows: Sequence[Row], failed: dict[str, str]) -> str:
    """A section per benchmark: command, machine, versions, then its numbers."""
    lines = ["# Benchmarks", "", "Mean and standard deviation over the repeats (n)."]
    for name in dict.fromkeys(row.bench for row in rows):
        own = [row for row in rows if row.bench == name]
        first = own[0]
        about = f"{first.machine}, torch {first.torch}, revision {first.revision}, {first.started}"
        lines += [
            "",
            f"## {name}",
            "",
            f"`{first.command}`, {about}",
            "",
            "| what | mean | spread | n |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row.what} | {row.mean:.4g} | {f'{row.spread:.2g}' if row.repeats > 1 else '-'} | {row.repeats} |"
            for row in own
        ]
    for name, reason in failed.items():
        lines += ["", f"## {name}", "", f"Not measured: {reason}"]
    return "\n".join([*lines, ""])


def main(settings: Settings) -> None:
    """Measures, writes both tables, prints one; exit code 1 where a benchmark failed."""
    known = {bench.name: bench for bench in BENCHES}
    if unknown := [name for name in settings.only if name not in known]:
        raise BadInput(f"--only {unknown[0]}: known are {', '.join(known)}")
    benches = [known[name] for name in settings.only] or list(BENCHES)
    if settings.quick:
        benches = [replace(bench, command=(*bench.command, *bench.quick.split())) for bench in benches]
    folder = settings.output or RUNS / ("quick" if settings.quick else "table")
    output = output_folder(folder.resolve())
    outcomes = {} if settings.collect else measure(benches, output, settings.fresh)
    failed = {name: outcome.reason for name, outcome in outcomes.items() if not outcome.there}
    present = [bench for bench in benches if bench.name not in failed and record_of(bench, output).is_file()]
    if not present and not failed:
        raise BadInput(f"--collect: no record below {output}")
    rows = [row for bench in present for row in rows_of(bench, read_json(record_of(bench, output)))]
    write_json(output / "table.json", {"rows": [asdict(row) for row in rows], "failed": failed})
    write_text(output / "table.md", markdown(rows, failed))
    print(markdown(rows, failed))
    log(f"table: {output / 'table.md'} and table.json")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
