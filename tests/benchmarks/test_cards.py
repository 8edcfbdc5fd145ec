"""The table of cards: docs/gpu.md shows what the script prints, and its counts are those of formulas and of what was measured."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.cards import CARDS, META, Card, Command, Work, commands, count, one_digit, table
from runtime.files import ROOT

ROWS = {
    "`P1_training.py`": "p1-training-whole",
    "`P1_training.py --preset large`": "p1-training-gpu",
    "`hw2_1.sh`": "p1-1000-digits-gpu",
}
INVERSION = ("inversion-speed-gpu", "inversion-memory-gpu")


@pytest.fixture(scope="module")
def entries() -> list[Command]:
    return commands()


def test_the_page_shows_what_the_script_prints(entries: list[Command]) -> None:
    assert table(entries) in (ROOT / "docs" / "gpu.md").read_text()


def test_what_is_marked_as_measured_stands_in_the_results(entries: list[Command]) -> None:
    results = (ROOT / "docs" / "results.md").read_text()
    measured = {entry.line: entry.measured for entry in entries if entry.measured != "-"}
    for line, figures in measured.items():
        names = (ROWS[line],) if line in ROWS else INVERSION
        rows = " ".join(re.findall(rf"^\| `(?:{'|'.join(names)})` .*$", results, re.M))
        assert all(number in rows for number in re.findall(r"[\d.,]*\d", figures)), f"{line}: {figures}"
    assert len(measured) == 4


def test_counts_agree_with_what_is_known_of_the_networks(entries: list[Command]) -> None:
    """The course's network takes 496 GFLOP a step; textual inversion took 5.35 GB, with the libraries' work space."""
    *_, faces, inversion, _ = entries
    assert faces.work.flops / (10 * 50) == pytest.approx(496e9, rel=0.01)
    assert 0.9 * 5.35 < inversion.memory(4) < 5.35


def test_a_product_is_counted_by_its_formula() -> None:
    """[4,8] x [8,16]; a view moves nothing; the first result is freed before the second is made."""
    a, b = torch.empty(4, 8, device=META), torch.empty(8, 16, device=META)
    product = Work(2 * 4 * 8 * 16, 4 * (4 * 8 + 8 * 16 + 4 * 16), 4 * 4 * 16)
    assert count(lambda: (a @ b).view(16, 4)) == product
    assert count(lambda: [a @ b for _ in range(1)][0] * 0 + 0).memory == 2 * product.memory


def test_attention_keeps_no_matrix_of_weights() -> None:
    q = torch.empty(1, 1, 64, 8, device=META)
    work = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert work.flops == 2 * 2 * 64 * 64 * 8
    assert work.memory < 4 * 64 * 64


def test_the_backward_pass_holds_what_the_forward_pass_saved() -> None:
    layers = [torch.nn.Linear(8, 8, bias=False, device=META) for _ in range(3)]
    x, size = torch.empty(100, 8, device=META), 4 * 100 * 8
    network = torch.nn.Sequential(*layers)
    forward, both = count(lambda: network(x)), count(lambda: network(x), backward=True)
    assert forward.memory == 2 * size  # a layer's input and output
    assert both.memory >= 3 * size
    assert both.flops == (3 + 3 + 2) * 2 * 100 * 8 * 8  # forward, the weights' gradients, the inputs' but the first's


SLOW_CARD = Card("slow", 8, half=10, fp32=1, bandwidth=100)


def test_minutes_are_the_larger_limit_over_the_measured_efficiency() -> None:
    h100 = CARDS[-1]
    measured = Command("", Work(989e12, 0, 0), 1, 0, half=True, seconds=4.0)
    assert measured.efficiency() == pytest.approx(0.25)  # a second at the H100's peak took four
    assert measured.limit(SLOW_CARD) == pytest.approx(98.9)
    assert Command("", Work(1e12, 1e12, 0), 1, 0, half=False).limit(SLOW_CARD) == pytest.approx(10)  # the bandwidth
    like = Command("", Work(0, 2 * h100.bandwidth * 1e9, 0), 1, 0, half=True, like=measured)
    assert like.efficiency() == measured.efficiency()
    rows = table([measured, Command("", Work(60 * 67e12, 0, 0), 1, 0, half=False)]).splitlines()
    assert rows[2 + 5].split(" | ")[5] == "0.07"
    assert rows[-1].split(" | ")[5] == "at least 1"


def test_the_batch_is_halved_until_it_fits() -> None:
    entry = Command("", Work(0, 0, memory=16e9), 512, fixed=1e9, half=True)
    assert entry.memory(512) == 17
    assert entry.fitting_batch(SLOW_CARD) == 128  # 5 GB; 256 would take 9, of 7.2 GB that are free


@pytest.mark.parametrize(("value", "text"), [(247.0, "200"), (0.0826, "0.08"), (9.7, "10"), (1.0, "1")])
def test_a_computed_number_has_one_digit(value: float, text: str) -> None:
    assert one_digit(value) == text
