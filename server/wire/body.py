"""From the bytes of a body to a validated model, strictly, with a 400 that names the field."""

from __future__ import annotations

import difflib
import json
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from server.errors import ApiError, invalid
from server.wire.foreign_fields import ForeignFields

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import ModelWrapValidatorHandler
    from starlette.requests import Request

MAX_PARAM_CHARS = 200
HINT_LIKENESS = 0.8  # how much of a misspelt name must be right for a hint


class WireModel(BaseModel):
    """Strict types, finite floats, and no field but its own and those that `FOREIGN` lets pass."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    FOREIGN: ClassVar[ForeignFields] = ForeignFields()

    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def ignored(self) -> tuple[str, ...]:
        """Harmless fields that the client sent and that mean nothing to this server."""
        return self._ignored

    @model_validator(mode="wrap")
    @classmethod
    def _set_foreign_fields_aside(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        own = _own_names(cls)
        foreign = [name for name in value if name not in own] if isinstance(value, dict) else []
        if not foreign:
            return handler(value)
        ignored = tuple(name for name in foreign if cls._is_ignored(name, value[name]))
        model = handler({name: item for name, item in value.items() if name in own})
        model._ignored = ignored
        return model

    @classmethod
    def _is_ignored(cls, name: str, value: Any) -> bool:
        """False: it asks for nothing. Raises the error of a field that may not be dropped."""
        if name in cls.FOREIGN.harmless:
            return value is not None
        refused = cls.FOREIGN.refused.get(name)
        if refused is None:
            taken = _own_names(cls) | cls.FOREIGN.harmless
            near = _nearest(name, taken) or _nearest(name, cls.FOREIGN.refused)
            hint = f"; did you mean {near}?" if near else ""
            raise field_error(name, f"this field is not known{hint}", "unknown_parameter")
        if not refused.asks_nothing(value):
            raise field_error(name, str(refused), "unsupported_parameter")
        return False


ModelT = TypeVar("ModelT", bound=WireModel)


@cache
def _own_names(model: type[WireModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in model.model_fields.items())


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """However it is written: maxTokens is near max_tokens."""
    spelt = {each.replace("_", ""): each for each in known}
    plain = name[:MAX_PARAM_CHARS].lower().replace("_", "").replace("-", "")
    near = difflib.get_close_matches(plain, spelt, 1, HINT_LIKENESS)
    return spelt[near[0]] if near else None


def field_error(name: str, message: str, code: str = "invalid_value") -> PydanticCustomError:
    """For validators of a whole object: it names one of its fields."""
    return PydanticCustomError("field", "{message}", {"field": name, "message": message, "code": code})


def check_content_type(request: Request) -> None:
    """Raises the 415."""
    content_type = request.headers.get("content-type", "application/json")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The content type must be application/json.", code="wrong_content_type")


def parse_body(raw: bytes, model: type[ModelT], max_depth: int) -> ModelT:
    """The body as `model`; its values are nested at most `max_depth` deep. Raises ApiError (400)."""
    return validate(parse_object(raw, max_depth), model)


def parse_object(raw: bytes, max_depth: int) -> dict[str, Any]:
    """A JSON object, whose values are nested at most `max_depth` deep. Raises ApiError (400)."""
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise invalid("The body must be a JSON object.", code="invalid_json")
    for name, item in value.items():
        if not _is_within(max_depth - 1, item):
            shown = name[:MAX_PARAM_CHARS]
            raise invalid(f"{shown}: the JSON is nested deeper than {max_depth} levels.", shown, "too_deep")
    return value


def validate(value: dict[str, Any], model: type[ModelT]) -> ModelT:
    """Raises ApiError (400)."""
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
    about = first.get("ctx", {}) if first["type"] == "field" else {}
    path = (*first["loc"], *([about["field"]] if about else ()))
    param = ".".join(str(part) for part in path)[:MAX_PARAM_CHARS]
    code = about.get("code") or ("missing_field" if first["type"] == "missing" else "invalid_value")
    message = str(first["msg"]).removeprefix("Value error, ")
    return invalid(f"{param}: {message}" if about else message, param or None, code)
