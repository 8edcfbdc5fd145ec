"""Pydantic's first error as one line: the file, the key, the rule and the value."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from runtime.cli import BadInput
from runtime.validation import validate, validate_json


class Box(BaseModel):
    model_config = ConfigDict(extra="forbid")
    side: Annotated[float, Field(gt=0, le=1)]
    corner: tuple[float, float] = (0, 0)

    @field_validator("corner")
    @classmethod
    def inside(cls, corner: tuple[float, float]) -> tuple[float, float]:
        if max(corner) > 1:
            raise ValueError("a corner lies outside of the image")
        return corner


def test_a_valid_value_is_returned_in_its_type() -> None:
    assert validate(Box, {"side": 1}, "b.json") == Box(side=1.0)
    assert validate(dict[int, str], {"3": "cat"}, "b.json") == {3: "cat"}


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Box, {"side": 2}, "b.json, side: must be less than or equal to 1, it is 2"),
        (Box, {}, "b.json, side is missing"),
        (Box, {"side": 1, "size": 3}, "b.json, size is not known here"),
        (Box, {"side": 1, "corner": [0, "x"]}, "b.json, corner[1]: must be a valid number, unable to parse"),
        (Box, {"side": 1, "corner": [0, 5]}, "b.json, corner: a corner lies outside of the image"),
        (list[Box], [{"side": 1}, {"side": None}], "b.json, [1].side: must be a valid number, it is None"),
        (dict[int, str], {"a": "cat"}, "b.json, a: must be a valid integer"),
        (dict[int, str], 7, "b.json: must be a valid dictionary, it is 7"),
    ],
)
def test_the_first_error_is_one_line(kind: Any, value: object, message: str) -> None:
    with pytest.raises(BadInput) as error:
        validate(kind, value, "b.json")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(BadInput, match=r"it is 'x{59} \.\.$"):
        validate(int, "x" * 200, "b.json")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "b.json is not valid JSON"), ("[]", "b.json: .* it is \\[\\]"), ("[" * 99999, "b.json")]
)
def test_text_that_is_no_json_is_one_line(text: str, message: str) -> None:
    assert validate_json(Box, '{"side": 1}', "b.json") == Box(side=1.0)
    with pytest.raises(BadInput, match=message) as error:
        validate_json(Box, text, "b.json")
    assert "\n" not in str(error.value)
