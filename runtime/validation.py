"""Validation of JSON and file headers by pydantic, whose errors become BadInput with one line."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter, ValidationError

from runtime.cli import BadInput

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Value = TypeVar("Value")
LONGEST_VALUE = 60  # characters of a wrong value in an error message


def validate(kind: type[Value], value: object, where: str) -> Value:
    """Return `value` as `kind`: a pydantic model, a dataclass, or a type such as dict[int, str].

    `where` names the file in the error. Raise BadInput for pydantic's first error, with the file, the key and the value.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise BadInput(_message(error.errors()[0], where)) from None


def validate_json(kind: type[Value], text: str, where: str) -> Value:
    """Parse JSON text, such as a header, and return it as `kind`; raise BadInput as `validate` does, and for invalid JSON."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not valid JSON: {error}") from None
    return validate(kind, content, where)


def _message(error: ErrorDetails, where: str) -> str:
    keys = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in error["loc"] if key != "[key]"]
    place = "".join(keys).removeprefix(".")
    place = f"{where}, {place}" if place else where
    if error["type"] == "value_error":  # raised by a validator, whose message is complete
        return f"{place}: {error['msg'].removeprefix('Value error, ')}"
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
        return f"{place} is not known here"
    rule = re.sub(r"^[A-Z]\w* should ", "must ", error["msg"])
    return f"{place}: {rule}, it is {_shortened(repr(error['input']))}"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} .."
