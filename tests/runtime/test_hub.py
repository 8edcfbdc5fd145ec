"""The hub: one short request tells whether it answers, and nothing is fetched where that is not wanted."""

from __future__ import annotations

import urllib.error
from contextlib import suppress
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from runtime.hub import first_line, hub, hub_answers, is_hub_name, only_variant

REFUSED = urllib.error.HTTPError("http://hub", 404, "not found", Message(), None)


@pytest.mark.parametrize(
    ("outcome", "answers"),
    [(None, True), (REFUSED, True), (urllib.error.URLError("no route"), False), (TimeoutError(), False)],
)
def test_the_hub_answers_if_there_is_a_server_with_any_status(
    outcome: Exception | None, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request without a body, for ten seconds at most: users wait for it."""
    requests: list[tuple[str, str, float]] = []

    def urlopen(request: Any, timeout: float) -> None:
        requests.append((request.full_url, request.get_method(), timeout))
        if outcome:
            raise outcome

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub")
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert hub_answers() is answers
    assert requests == [("http://hub", "HEAD", 10)]


def test_offline_there_is_no_hub_and_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a request"))
    assert hub_answers() is False


@pytest.mark.parametrize(
    ("before", "online", "offline_inside"),
    [(False, False, True), (False, True, False), (True, False, True), (True, True, True)],
)
def test_a_block_is_offline_unless_both_user_and_caller_want_the_network(
    before: bool, online: bool, offline_inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", before)
    with suppress(ZeroDivisionError), hub(online):
        assert constants.HF_HUB_OFFLINE is offline_inside
        raise ZeroDivisionError
    assert constants.HF_HUB_OFFLINE is before


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("owner/name", True),
        ("o-w_n.er/na.me-1", True),
        ("name", False),
        ("a/b/c", False),
        ("./name", False),
        ("/a", False),
    ],
)
def test_a_hub_name_is_owner_and_name(name: str, known: bool) -> None:
    assert is_hub_name(name) is known


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["a.fp16.bin", "b.fp16.bin"], {"variant": "fp16"}),
        (["a.fp16.bin", "a.bin"], {}),
        (["a.bin"], {}),
        ([], {}),
    ],
)
def test_the_variant_is_named_only_if_there_is_no_other(names: list[str], variant: dict[str, str]) -> None:
    assert only_variant([Path(name) for name in names]) == variant


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 300), "x" * 200),
        (RuntimeError("use\nweights_only=False"), "the weights are damaged, or hold more than tensors"),
    ],
)
def test_an_error_becomes_its_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
