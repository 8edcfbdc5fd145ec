"""What training/ promises: draws, rate, averaged weights, signals and checkpoints."""

from __future__ import annotations

import math
import os
import pickle
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.cli import BadInput
from training.checkpoint import load_state, save_state
from training.draws import Draws, process_rows
from training.ema import Ema
from training.log import TrainingLog
from training.schedule import lr_factor
from training.signals import StopSignals

CPU = torch.device("cpu")
BATCH = 12
FullDisk = Callable[[int], AbstractContextManager[None]]


# ---------------------------------------------------------------- draws


def drawn(seed: int = 0, step: int = 0, rank: int = 0, world: int = 1) -> list[Tensor]:
    """What one process draws in one step, as training does: uniforms, strata, noise."""
    draws = Draws(seed, step, process_rows(BATCH, rank, world), BATCH, CPU)
    return [draws.uniform(), draws.stratified(), draws.normal(3, 4), draws.uniform()]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_draw_what_one_draws_alone(world: int) -> None:
    parts = zip(*[drawn(rank=rank, world=world) for rank in range(world)], strict=True)
    assert all(torch.equal(torch.cat(part), whole) for part, whole in zip(parts, drawn(), strict=True))


def test_the_same_seed_and_step_draw_the_same() -> None:
    assert all(torch.equal(a, b) for a, b in zip(drawn(3, 5), drawn(3, 5), strict=True))


@pytest.mark.parametrize(("seed", "step"), [(1, 0), (0, 1)])
def test_another_seed_or_step_draws_something_else(seed: int, step: int) -> None:
    assert not any(torch.equal(a, b) for a, b in zip(drawn(), drawn(seed, step), strict=True))


def test_successive_draws_of_a_step_differ() -> None:
    first, _, _, second = drawn()
    assert not torch.equal(first, second)


def test_stratified_has_one_number_in_each_stratum() -> None:
    draws = Draws(0, 0, slice(0, 1000), 1000, CPU)
    assert (draws.stratified() * 1000).long().tolist() == list(range(1000))


def test_stratified_is_random_inside_the_strata() -> None:
    inside = (Draws(0, 0, slice(0, 1000), 1000, CPU).stratified() * 1000) % 1
    assert float(inside.std()) == pytest.approx(1 / math.sqrt(12), rel=0.1)


def test_uniform_and_normal_have_their_distributions() -> None:
    draws = Draws(0, 0, slice(0, 20_000), 20_000, CPU)
    uniform, normal = draws.uniform(), draws.normal()
    found = [float(v) for v in (uniform.mean(), uniform.var(), normal.mean(), normal.var())]
    assert found == pytest.approx([0.5, 1 / 12, 0, 1], abs=0.03)


def test_process_rows_cover_the_batch_without_overlap() -> None:
    rows = [row for rank in range(4) for row in range(BATCH)[process_rows(BATCH, rank, 4)]]
    assert rows == list(range(BATCH))


def test_process_rows_refuse_a_batch_that_does_not_divide() -> None:
    with pytest.raises(BadInput, match="--batch 10 does not divide by 4"):
        process_rows(10, 0, 4)


# ---------------------------------------------------------------- rate


def test_rate_rises_linearly_over_the_warmup() -> None:
    assert [lr_factor(step, 100, 4, 0.5) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_rate_stays_until_the_decay_begins() -> None:
    assert {lr_factor(step, 100, 4, 0.5) for step in range(3, 51)} == {1.0}


@pytest.mark.parametrize(("shape", "expected"), [("linear", 0.8), ("cosine", 0.5 - 0.5 * math.cos(0.8 * math.pi))])
def test_rate_falls_in_the_chosen_shape(shape: Any, expected: float) -> None:
    assert lr_factor(60, 100, 4, 0.5, shape) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_rate_ends_at_zero(shape: Any) -> None:
    assert lr_factor(100, 100, 4, 0.5, shape) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_rate_is_above_zero_at_the_last_step_that_is_taken(shape: Any) -> None:
    assert 0 < lr_factor(99, 100, 4, 0.5, shape) < 0.05


def test_rate_without_decay_stays_to_the_end() -> None:
    assert lr_factor(99, 100, 4, 0.0) == 1.0


def test_rate_without_warmup_starts_at_one() -> None:
    assert lr_factor(0, 100, 0, 0.5) == 1.0


def test_rate_of_a_decay_inside_the_warmup_takes_both() -> None:
    assert lr_factor(50, 100, 100, 1.0) == pytest.approx(0.51 * 0.5)


# ---------------------------------------------------------------- averaged weights


def averaged(values: list[float], decay: float) -> float:
    """The average after `update_parameters` at each of the values of a network with one weight."""
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, decay)
    for value in values:
        nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
    return float(ema.module.weight)


def test_first_update_copies_the_weights() -> None:
    assert averaged([3.0], 0.999) == 3.0


@pytest.mark.parametrize(("update", "factor"), [(1, 2 / 11), (2, 3 / 12), (5, 6 / 15)])
def test_warmup_factor_of_update_n_is_1_plus_n_over_10_plus_n(update: int, factor: float) -> None:
    assert averaged([1.0] * update + [0.0], 0.999) == pytest.approx(factor)


def test_long_runs_average_with_the_decay_that_was_asked_for() -> None:
    assert averaged([1.0] * 100 + [0.0] * 3, 0.5) == pytest.approx(0.5**3)


def test_average_equals_a_loop_by_hand() -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(0)).tolist()
    expected = values[0]
    for n, value in enumerate(values[1:], start=1):
        factor = min(0.9, (1 + n) / (10 + n))
        expected = factor * expected + (1 - factor) * value
    assert averaged(values, 0.9) == pytest.approx(expected, abs=1e-5)


def test_average_copies_buffers() -> None:
    model = nn.BatchNorm1d(2)
    ema = Ema(model, 0.9)
    model.running_mean.fill_(4.0)
    ema.update_parameters(model)
    assert ema.module.running_mean.tolist() == [4.0, 4.0]


def test_average_leaves_the_model_alone_and_takes_no_gradient() -> None:
    model = nn.Linear(1, 1)
    ema = Ema(model, 0.9)
    assert [p.requires_grad for p in model.parameters()] == [True, True]
    assert [p.requires_grad for p in ema.parameters()] == [False, False]


def test_average_goes_on_where_it_stopped() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, 0.999)
    ema.load_state_dict({"n_averaged": torch.tensor(41), "module.weight": torch.ones(1, 1)})
    nn.init.zeros_(model.weight)
    ema.update_parameters(model)
    assert float(ema.module.weight) == pytest.approx(42 / 51)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_and_raises_nothing(number: int) -> None:
    with StopSignals() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked


def test_a_second_interrupt_stops_at_once() -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_still_waits_for_the_checkpoint() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_handlers_are_restored_even_after_an_error(number: int) -> None:
    before, seen = signal.getsignal(number), []

    def fail() -> None:
        with StopSignals():
            seen.append(signal.getsignal(number))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert signal.getsignal(number) == before != seen[0]


# ---------------------------------------------------------------- checkpoints

STATE = {
    "kind": "test",
    "step": 3,
    "history": [{"accuracy": 0.5}],
    "model": {"w": torch.arange(6.0).view(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
}


class Evil:
    """Unpickles by making a folder: a stand-in for any code in a pickle."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal tensors under "model", equal values elsewhere."""
    torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=0)
    assert {**found, "model": None} == {**expected, "model": None}


def assert_untouched(path: Path) -> None:
    """The first state is still there, alone in its folder."""
    assert_same(load_state(path, "test"), STATE)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_state(tmp_path / "c.pt", STATE)
    assert_same(load_state(tmp_path / "c.pt", "test"), STATE)


def test_optimizer_state_comes_back_and_trains_on_alike(tmp_path: Path) -> None:
    def trained(steps: int, path: Path | None = None) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        for step in range(steps):
            if path and step == 2:
                save_state(path, {"kind": "test", "m": model.state_dict(), "o": optimizer.state_dict()})
                state = load_state(path, "test")
                model, optimizer = nn.Linear(2, 2), None
                model.load_state_dict(state["m"])
                optimizer = torch.optim.AdamW(model.parameters(), 0.1)
                optimizer.load_state_dict(state["o"])
            model(torch.ones(1, 2) * step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    assert torch.equal(trained(4).weight, trained(4, tmp_path / "c.pt").weight)


def test_state_that_does_not_fit_on_the_disk_leaves_the_old_one(tmp_path: Path, full_disk: FullDisk) -> None:
    save_state(tmp_path / "c.pt", STATE)
    with full_disk(50_000), pytest.raises(OSError, match="could not write .*c.pt"):
        save_state(tmp_path / "c.pt", STATE | {"big": torch.ones(100_000)})
    assert_untouched(tmp_path / "c.pt")


def test_state_that_cannot_be_saved_leaves_the_old_one(tmp_path: Path) -> None:
    save_state(tmp_path / "c.pt", STATE)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_state(tmp_path / "c.pt", STATE | {"function": lambda: None})
    assert_untouched(tmp_path / "c.pt")


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path, modern: bool) -> None:
    path, trap = tmp_path / "c.pt", tmp_path / "executed"
    torch.save({"kind": "test", "model": Evil(trap)}, path, _use_new_zipfile_serialization=modern)
    with pytest.raises(BadInput, match="c.pt holds more than tensors"):
        load_state(path, "test")
    assert not trap.exists()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_a_truncated_file_is_named(tmp_path: Path, modern: bool, share: float) -> None:
    path = tmp_path / "c.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=modern)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(BadInput, match="c.pt"):
        load_state(path, "test")


@pytest.mark.parametrize("state", [STATE | {"kind": "other"}, {"w": torch.ones(1)}, torch.ones(1)])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(BadInput, match="c.pt is not a checkpoint of test"):
        load_state(tmp_path / "c.pt", "test")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="c.pt does not exist"):
        load_state(tmp_path / "c.pt", "test")


# ---------------------------------------------------------------- log


def test_log_reads_the_mean_loss_since_the_last_reading(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, "test", 0, 4, main=False)
    means = []
    for pair in ((1.0, 2.0), (5.0, 7.0)):
        for loss in pair:
            log.add(torch.tensor(loss), images=8)
        means.append(log.read()[0])
    log.close()
    assert means == [1.5, 6.0]
