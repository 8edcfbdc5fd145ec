"""The loop of every training: it continues where it stopped, refuses other facts, saves nothing broken and stops on a signal."""

from __future__ import annotations

import ast
import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.cli import BadInput
from runtime.device import detect
from runtime.files import ROOT
from runtime.record import Record
from training.ema import Ema
from training.loop import LoopConfig, Trained, TrainingRun
from training.schedule import LearningRate

CONSTANT = LearningRate(0.1, 0, 0.0)


@dataclass(frozen=True)
class Settings:
    """The settings of a script, for the record."""

    seed: int = 0


def make_run(folder: Path, steps: int, facts: dict[str, Any] | None = None, **changes: Any) -> TrainingRun:
    """Return a run that fits one weight to 1 by gradient descent from 0."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    optimizer = torch.optim.SGD(network.parameters(), 1.0, momentum=0.9)
    config = replace(LoopConfig("test", folder, steps, 1, CONSTANT, log_every=1, save_every=2), **changes)
    record = Record(Settings(), detect("cpu"))
    return TrainingRun(config, facts or {}, Trained(network, optimizer, Ema(network, 0.5)), record)


def loss_of(run: TrainingRun) -> Tensor:
    weight = next(run.trained.network.parameters())
    return ((weight - 1) ** 2).sum()


def weight_of(run: TrainingRun) -> float:
    return next(run.trained.network.parameters()).item()


def train(run: TrainingRun, stop_at: int | None = None) -> TrainingRun:
    for step in run:
        run.update(loss_of(run))
        if step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
    return run


def test_every_step_comes_once_and_in_order(tmp_path: Path) -> None:
    run, steps = make_run(tmp_path, 5), []
    for step in run:
        steps.append(step)
        run.update(loss_of(run))
    assert steps == [0, 1, 2, 3, 4]
    assert run.done


def test_an_interrupt_after_the_last_step_ends_as_a_stopped_run_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(make_run(tmp_path, 3))
    with pytest.raises(SystemExit, match="130"), run.last_work():
        raise KeyboardInterrupt
    assert "stopped at step 3; the same command goes on from" in capsys.readouterr().err
    assert json.loads((tmp_path / "record.json").read_text())["metrics"]["step"] == 3
    again = train(make_run(tmp_path, 3))
    with again.last_work():
        pass
    again.finish()
    assert weight_of(again) == weight_of(run)


def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save, calls = make_run(tmp_path, 3, save_every=10), TrainingRun.save, []

    def slow_save(self: TrainingRun) -> None:
        calls.append(self.step)
        if len(calls) == 2:  # after the last step's own
            os.kill(os.getpid(), signal.SIGINT)
        save(self)

    monkeypatch.setattr(TrainingRun, "save", slow_save)
    with pytest.raises(SystemExit, match="130"):
        train(run)
    assert calls == [3, 3]
    assert make_run(tmp_path, 3).step == 3


def test_a_finished_run_keeps_what_it_measured_when_its_command_is_repeated(tmp_path: Path) -> None:
    """Also in another precision, in which no step is taken."""

    def metrics(**changes: Any) -> dict[str, Any]:
        train(make_run(tmp_path, 4, **changes)).finish()
        return dict(json.loads((tmp_path / "record.json").read_text())["metrics"])

    first = metrics(precision="fp16")
    assert {"loss", "images_per_s", "loss_scale", "skipped_steps"} <= first.keys()
    assert first["steps_by_precision"] == {"fp16": 4}
    assert metrics(precision="fp16") == metrics(precision="fp32") == first
    train(longer := make_run(tmp_path, 6, precision="fp32"))
    assert longer.precisions == {"fp16": 4, "fp32": 2}


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = train(make_run(tmp_path / "whole", 9))
    stopped = train(make_run(tmp_path / "parts", 9), stop_at=4)
    assert stopped.step == 4
    with pytest.raises(SystemExit, match="130"):
        stopped.finish()
    parts = train(make_run(tmp_path / "parts", 9))
    assert parts.resumed
    for one, other in zip(whole.trained.parts().values(), parts.trained.parts().values(), strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_the_scripts_plain_values_survive_a_stop(tmp_path: Path) -> None:
    run = make_run(tmp_path, 4)
    run.history["scores"] = [0.5]
    train(run, stop_at=2)
    assert make_run(tmp_path, 4).history == {"scores": [0.5]}


def test_more_steps_are_fine_and_fewer_are_refused(tmp_path: Path) -> None:
    train(make_run(tmp_path, 4))
    assert train(make_run(tmp_path, 6)).step == 6
    with pytest.raises(BadInput, match="steps 6, not 5"):
        make_run(tmp_path, 5)


@pytest.mark.parametrize(
    ("facts", "message"),
    [({"lr": 1, "data": [1, 2]}, "lr 2, not 1"), ({"lr": 2, "data": [1, 3]}, r"data \[1, 2\], not \[1, 3\]")],
)
def test_another_fact_is_one_line_with_both_values_and_a_way_on(
    tmp_path: Path, facts: dict[str, Any], message: str
) -> None:
    train(make_run(tmp_path, 4, {"lr": 2, "data": (1, 2)}))
    assert make_run(tmp_path, 4, {"lr": 2, "data": (1, 2)}).done
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(BadInput, match=f"checkpoint.pt was trained with {message}: .* --run OTHER") as error:
        make_run(tmp_path, 4, facts, elsewhere="--run OTHER")
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_another_kind_layout_or_version_is_refused(tmp_path: Path) -> None:
    train(make_run(tmp_path, 2))
    with pytest.raises(BadInput, match="is not a checkpoint of other"):
        make_run(tmp_path, 2, kind="other")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["parts"]["model"] = nn.Linear(2, 2).state_dict()
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(
        BadInput, match="checkpoint.pt is of another layout or damaged: move it away, or give --output OTHER"
    ):
        make_run(tmp_path, 2)
    torch.save({"kind": "test", "step": 2}, tmp_path / "checkpoint.pt")
    with pytest.raises(BadInput, match="earlier version"):
        make_run(tmp_path, 2)


def test_a_stopped_run_reports_the_loss_up_to_its_stop(tmp_path: Path) -> None:
    run = train(make_run(tmp_path, 9, log_every=100, save_every=100), stop_at=2)
    assert run.step == 2
    assert run.record.metrics["loss"] > 0


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, 9)

    def go() -> None:
        for step in run:
            run.update(loss_of(run) * (float("nan") if step == 4 else 1))

    with pytest.raises(BadInput, match=r"the loss is nan at step 5: .*checkpoint.pt keeps the last good state"):
        go()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


def test_several_losses_add_their_gradients_and_are_computed_one_by_one(tmp_path: Path) -> None:
    events: list[str] = []

    def losses(run: TrainingRun) -> Iterator[Tensor]:
        for part in ("first", "second"):
            events.append(part)
            yield loss_of(run) / 2
            grad = next(run.trained.network.parameters()).grad
            events.append(f"{part} propagated: {grad is not None}")

    run, plain = make_run(tmp_path / "parts", 1), train(make_run(tmp_path / "plain", 1))
    for _ in run:
        run.update(losses(run))
    assert events == ["first", "first propagated: True", "second", "second propagated: True"]
    assert weight_of(run) == weight_of(plain)


def test_constraints_apply_between_the_optimizer_and_the_average(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1)

    def cap() -> None:
        with torch.no_grad():
            next(run.trained.network.parameters()).clamp_(max=0.05)

    for _ in run:
        run.update(loss_of(run), after_step=cap)
    assert run.trained.ema is not None
    averaged = next(run.trained.ema.module.parameters())
    assert weight_of(run) == pytest.approx(0.05)
    assert averaged.item() == pytest.approx(0.05)


def test_the_gradient_norm_is_capped(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, max_grad_norm=0.5)
    for _ in run:
        run.update(loss_of(run))  # the gradient is -2
    assert weight_of(run) == pytest.approx(0.5 * 0.1)


def test_the_learning_rate_is_that_of_the_step(tmp_path: Path) -> None:
    run, rates = make_run(tmp_path, 4, lr=LearningRate(0.4, 4, 0.0)), []
    for _ in run:
        run.update(loss_of(run))
        rates.append(run.trained.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_every_counts_steps_and_the_last_one(tmp_path: Path) -> None:
    run, due, never = make_run(tmp_path, 7), [], []
    for _ in run:
        run.update(loss_of(run))
        due += [run.step] * run.every(3)
        never += [run.step] * run.every(0)
    assert due == [3, 6, 7]
    assert never == [7]


def test_of_a_compiled_run_the_first_step_is_timed_apart_in_every_process_that_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no part of the speed, from which the time to go is computed: after the second step here."""
    plain = train(make_run(tmp_path / "plain", 3))
    assert "first_step" not in plain.record.timings
    run = make_run(tmp_path / "compiled", 3, compiled=True)
    seen = []
    for _ in run:
        run.update(loss_of(run))
        seen.append(run.record.timings.get("first_step"))
    assert seen[0] is not None
    assert seen == [seen[0]] * 3
    stderr = capsys.readouterr().err
    assert [step for step in (1, 2, 3) if f"step {step}: loss" in stderr.partition("compiled: ")[2]] == [2]
    again = make_run(tmp_path / "compiled", 4, compiled=True)
    del again.record.timings["first_step"]
    assert "first_step" in train(again).record.timings


def test_a_reading_shows_loss_speed_and_rate_and_the_first_one_tells_the_time_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1,200 steps of 4 images, 2 a second, take 40 minutes; a resumed run tells it again."""
    shown: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr("training.loop.TrainingLog.read", lambda self: (0.5, 2.0))
    monkeypatch.setattr("training.loop.TrainingLog.show", lambda self, step, **values: shown.append((step, values)))
    train(make_run(tmp_path, 1202, batch=4), stop_at=2)
    stderr = capsys.readouterr().err
    assert stderr.count("step 1: loss 0.5000, 2 images/s, about 40 minutes to go") == stderr.count("to go") == 1
    assert shown[:2] == [(step, {"loss": 0.5, "images_s": 2.0, "lr": 0.1}) for step in (1, 2)]
    train(make_run(tmp_path, 1202, batch=4), stop_at=4)
    assert "step 3: loss 0.5000, 2 images/s, about 40 minutes to go" in capsys.readouterr().err


def test_the_end_writes_a_record(tmp_path: Path) -> None:
    train(make_run(tmp_path, 3)).finish(accuracy=0.5)
    metrics = json.loads((tmp_path / "record.json").read_text())["metrics"]
    assert {"step": 3, "processes": 1, "accuracy": 0.5}.items() <= metrics.items()
    assert metrics["loss"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_the_work_of_the_last_step_ends_the_run_with_its_checkpoint(
    tmp_path: Path, number: int
) -> None:
    run = make_run(tmp_path, 3)

    def go() -> None:
        for step in run:
            run.update(loss_of(run))
            if step == 2:  # a long grading follows the last update
                os.kill(os.getpid(), number)

    with pytest.raises(SystemExit, match="130"):
        go()
    assert (tmp_path / "record.json").is_file()
    again = make_run(tmp_path, 3)
    assert again.done
    again.finish()


def test_without_a_checkpoint_a_broken_loss_names_no_file(tmp_path: Path) -> None:
    run = make_run(tmp_path, 9)

    def go() -> None:
        for _ in run:
            run.update(loss_of(run) * float("nan"))

    with pytest.raises(BadInput, match="the loss is nan at step 1: stopped; nothing is written") as error:
        go()
    assert "checkpoint" not in str(error.value)
    assert not (tmp_path / "checkpoint.pt").exists()


# ---------------------------------------------------------------- fp16


def train_with_overflow(run: TrainingRun, stop_at: int | None = None) -> TrainingRun:
    """Let the gradients of step 1 overflow."""
    for step in run:
        run.update(loss_of(run) * (float("inf") if step == 1 else 1))
        if step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
    return run


@pytest.mark.parametrize("max_grad_norm", [float("inf"), 0.5])
def test_scaling_the_loss_changes_neither_gradients_nor_their_clipping(tmp_path: Path, max_grad_norm: float) -> None:
    """Powers of two scale exactly."""
    plain, scaled = (
        train(make_run(tmp_path / precision, 5, precision=precision, max_grad_norm=max_grad_norm))
        for precision in ("fp32", "fp16")
    )
    assert plain.trained.network.state_dict() == scaled.trained.network.state_dict()


def test_in_fp16_gradients_far_below_its_range_train_as_in_fp32(tmp_path: Path) -> None:
    """The loss is a millionth, so that unscaled gradients would round to zero."""
    moves = []
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 1))
        start = nn.utils.parameters_to_vector(network.parameters()).detach()
        x = torch.randn(32, 8)
        config = LoopConfig(
            "test", tmp_path / precision, 20, 32, LearningRate(1e5, 0, 0.0), log_every=5, precision=precision
        )
        trained = Trained(network, torch.optim.SGD(network.parameters()))
        run = TrainingRun(config, {}, trained, Record(Settings(), detect("cpu")))
        for _ in run:
            with run.autocast():
                output = network(x)
                assert output.dtype == dtype
                loss = (output.float() - x.sum(1, keepdim=True)).square().mean()
            run.update(loss * 1e-6)
        assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
        moves.append(nn.utils.parameters_to_vector(network.parameters()).detach() - start)
    exact, half = moves
    assert exact.norm() > 0.5
    assert (half - exact).norm() < 0.01 * exact.norm()


def test_an_overflow_changes_nothing_but_the_step_number_and_is_counted_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[dict[str, float]] = []
    monkeypatch.setattr("training.loop.TrainingLog.show", lambda self, step, **values: shown.append(values))
    run, states, rates = make_run(tmp_path, 4, precision="fp16", lr=LearningRate(0.4, 4, 0.0)), [], []
    constrained: list[int] = []
    for step in run:
        loss = loss_of(run) * (float("inf") if step == 1 else 1)
        run.update(loss, after_step=partial(constrained.append, step))
        states.append({name: copy.deepcopy(part.state_dict()) for name, part in run.trained.parts().items()})
        states[-1]["optimizer"].pop("param_groups")
        rates.append(run.trained.optimizer.param_groups[0]["lr"])
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert states[2]["model"] != states[1]["model"]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert constrained == [0, 2, 3]
    assert [(values["skipped_steps"], values["loss_scale"]) for values in shown] == [(0, 2**16), (1, 2**15), (1, 2**15)]
    assert all(values["loss"] < 1.1 for values in shown)
    run.finish()
    assert "1 of 4 steps skipped: their gradients overflowed in fp16" in capsys.readouterr().err
    assert run.record.metrics["skipped_steps"] == 1


def test_a_stopped_run_in_fp16_goes_on_to_the_same_weights_and_scale(tmp_path: Path) -> None:
    whole = train_with_overflow(make_run(tmp_path / "whole", 9, precision="fp16"))
    train_with_overflow(make_run(tmp_path / "parts", 9, precision="fp16"), stop_at=4)
    parts = train_with_overflow(make_run(tmp_path / "parts", 9, precision="fp16"))
    assert parts.resumed
    for one, other in zip(whole.trained.parts().values(), parts.trained.parts().values(), strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert parts.scaler.state_dict() == whole.scaler.state_dict()
    assert (parts.scaler.get_scale(), parts.scaler.skipped) == (2**15, 1)


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "bf16")])
def test_a_run_may_go_on_in_another_precision(tmp_path: Path, before: str, after: str) -> None:
    train(make_run(tmp_path / "changed", 3, precision=before))
    parts = torch.load(tmp_path / "changed" / "checkpoint.pt", weights_only=True)["parts"]
    assert set(parts) == {"model", "optimizer", "ema"} | ({"scaler"} if before == "fp16" else set())
    changed = train(make_run(tmp_path / "changed", 6, precision=after))
    assert weight_of(changed) == weight_of(train(make_run(tmp_path / "whole", 6)))


def test_gradients_that_keep_overflowing_stop_the_run_in_one_line(tmp_path: Path) -> None:
    train(make_run(tmp_path, 2, precision="fp16"))
    run = make_run(tmp_path, 99, precision="fp16")

    def go() -> None:
        for _ in run:
            run.update(loss_of(run) * float("nan"))

    with pytest.raises(
        BadInput, match="in fp16 the gradients overflow at step 19: stopped; .* --precision fp32"
    ) as error:
        go()
    assert "\n" not in str(error.value)
    assert "checkpoint.pt keeps the last good state" in str(error.value)
    assert weight_of(make_run(tmp_path, 99)) == weight_of(run)


def run_in_two_processes(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script that gets `folder` as its argument, and can import this module."""
    (folder / "two.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return subprocess.run(
        [*command, str(folder / "two.py"), str(folder)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


TWO_PROCESSES = """
import os, signal, sys
from pathlib import Path
from accelerate import Accelerator
from test_loop import CONSTANT, LoopConfig, Record, Settings, Trained, TrainingRun, detect, nn, torch

accelerator, folder = Accelerator(cpu=True), Path(sys.argv[1])
network = nn.Linear(1, 1)
optimizer = torch.optim.SGD(network.parameters(), 0.1)
model, optimizer = accelerator.prepare(network, optimizer)
config = LoopConfig("test", folder, 1000, 2, CONSTANT)
run = TrainingRun(config, {}, Trained(network, optimizer), Record(Settings(), detect("cpu")), accelerator)
for step in run:
    run.update(model(torch.ones(1, 1)).square().sum())
    if step == 4 and accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
(folder / f"rank{accelerator.process_index}").write_text(str(run.step))
run.finish()
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(tmp_path: Path) -> None:
    done = run_in_two_processes(TWO_PROCESSES, tmp_path)
    assert "gloo" not in done.stderr
    assert "stopped at step 5" in done.stderr
    assert {(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)} == {"5"}
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 5


OVERFLOW_IN_ONE = """
import sys
from pathlib import Path
from accelerate import Accelerator
from test_loop import CONSTANT, LoopConfig, Record, Settings, Trained, TrainingRun, detect, nn, torch

accelerator, folder = Accelerator(cpu=True), Path(sys.argv[1])
results = []
for wrapped in (True, False):
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    model, optimizer = network, torch.optim.SGD(network.parameters(), 0.1)
    if wrapped:
        model, optimizer = accelerator.prepare(network, optimizer)
    config = LoopConfig("test", folder / str(wrapped), 4, 2, CONSTANT, precision="fp16", show=False)
    trained = Trained(network, optimizer, average_gradients=not wrapped)
    run = TrainingRun(config, {}, trained, Record(Settings(), detect("cpu")), accelerator)
    for step in run:
        factor = float("inf") if (step, accelerator.process_index) == (1, 1) else 1
        run.update((model(torch.ones(1, 1)) - 1).square().sum() * factor)
    results.append((run.scaler.skipped, network.weight.item()))
(folder / f"rank{accelerator.process_index}").write_text(repr(results))
run.finish()  # ends the process group
"""


@pytest.mark.slow
def test_an_overflow_in_one_process_skips_the_step_in_all(tmp_path: Path) -> None:
    """With gradients that DDP averages, and with those that the loop does: three steps of a tenth of twice the distance to 1."""
    done = run_in_two_processes(OVERFLOW_IN_ONE, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in (0, 1):
        results = ast.literal_eval((tmp_path / f"rank{rank}").read_text())
        assert [skipped for skipped, _ in results] == [1, 1]
        assert [weight for _, weight in results] == pytest.approx([1 - 0.8**3] * 2)
