"""From the bytes of a body to a validated model, strictly, with a 400 that names the field."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from server.errors import ApiError, invalid

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_PARAM_CHARS = 200


class WireModel(BaseModel):
    """Strict types, finite floats; unknown fields are kept, so that they can be named to the client."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = ()  # known fields that are accepted, and do nothing


ModelT = TypeVar("ModelT", bound=WireModel)


def check_content_type(request: Request) -> None:
    """Raises the 415."""
    content_type = request.headers.get("content-type", "application/json")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The content type must be application/json.", code="wrong_content_type")


def parse_body(raw: bytes, model: type[ModelT], max_depth: int) -> ModelT:
    """The body as `model`; its values are nested at most `max_depth` deep. Raises ApiError (400)."""
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise invalid("The body must be a JSON object.", code="invalid_json")
    for name, item in value.items():
        if not _is_within(max_depth - 1, item):
            shown = name[:MAX_PARAM_CHARS]
            raise invalid(f"{shown}: the JSON is nested deeper than {max_depth} levels.", shown, "too_deep")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _from_validation(error) from None


def parse_json(raw: bytes) -> Any:
    """RFC 8259 without what Python adds or forgives: no NaN, no duplicate keys, no lone surrogates."""
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises on half a surrogate pair
    except UnicodeError:
        raise invalid("The body is not valid UTF-8 text.", code="invalid_json") from None
    except RecursionError:
        raise invalid("The JSON is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}", code="invalid_json") from None
    return value


def ignored_fields(body: WireModel) -> list[str]:
    """Names of the fields that the client sent and that mean nothing to this server."""
    idle = (name for name in body.WITHOUT_EFFECT if getattr(body, name) is not None)
    return sorted([*(body.model_extra or {}), *idle])


def _is_within(max_depth: int, value: Any) -> bool:
    """Whether arrays and objects lie in each other at most `max_depth` deep; level by level, for a
    recursion over what clients send is what this is there to prevent."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(max_depth):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    return not level


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _from_validation(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"])[:MAX_PARAM_CHARS]
    message = str(first["msg"]).removeprefix("Value error, ")
    if not param:
        return invalid(message)
    code = "missing_field" if first["type"] == "missing" else "invalid_value"
    return invalid(f"{param}: {message}", param, code)
