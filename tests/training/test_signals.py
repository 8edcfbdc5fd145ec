"""SIGINT, SIGTERM and SIGUSR1: the first one requests a stop, and the handlers before are restored."""

from __future__ import annotations

import os
import signal

import pytest

from runtime.interrupts import STOP_SIGNALS
from training.signals import stop_signals


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGINT])
def test_a_signal_requests_a_stop_and_raises_nothing(number: int) -> None:
    with stop_signals() as received:
        assert not received
        os.kill(os.getpid(), number)
        assert received


def test_a_second_interrupt_stops_at_once() -> None:
    with stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_still_waits_for_the_checkpoint() -> None:
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert received


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGINT])
def test_handlers_are_restored_even_after_an_error(number: int) -> None:
    before = signal.getsignal(number)
    during = []

    def fail() -> None:
        with stop_signals():
            during.append(signal.getsignal(number))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert signal.getsignal(number) == before != during[0]


def test_torchrun_sends_the_terminals_interrupt_again_which_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert received
