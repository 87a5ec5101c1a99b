"""JSON, in and out: read through a pydantic model, written without NaN and infinity, which the format does not have.

Everything read from a disk or a bucket goes through `validate` or `read`: strict types, bounds, finite numbers, no more
than 200 levels, no lone surrogates. Anything else is a one-line error that names the file and the key.
"""

import json
import math
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from erann_dist.errors import UserError

T = TypeVar("T")

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, le=10**15)]
Seconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]  # durations, and times since 1970
Number = Annotated[float, Field(ge=-1e39, le=1e39, allow_inf_nan=False)]  # the range of a float32
# A value that may have been infinite or NaN, and then is null in the file. For checks only: the result is not used.
Measured = Annotated[Number, BeforeValidator(lambda value: 0.0 if value is None else value)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Scalar = None | bool | Annotated[int, Field(ge=-(2**63), lt=2**63)] | Number | str
# The name of a file or a folder, or a path.
Name = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
Word = Annotated[str, Field(max_length=100, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]  # such as a version


class Record(BaseModel):
    """The content of a JSON file. Unknown keys, perhaps of a later version, are ignored."""

    model_config = STRICT


def dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def loads(data: bytes | str) -> Any:
    """Any JSON. Raises ValueError, in one line. NaN and infinity, which other programs write, become null."""
    return _finite(from_json(data))


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(model: Any) -> TypeAdapter[Any]:
    if model not in _ADAPTERS:
        _ADAPTERS[model] = TypeAdapter(model)
    return _ADAPTERS[model]


def validate(model: type[T], data: bytes | str) -> T:
    """A JSON text validated as the model. Raises ValueError, in one line: which key, what is wrong."""
    try:
        found: T = _adapter(model).validate_json(data, strict=True)
    except ValidationError as error:
        raise ValueError(explain(error)) from error
    return found


def read(model: type[T], data: bytes, where: str, advice: str) -> T:
    """The same for a file. Raises UserError: where, what is wrong, what to do."""
    try:
        return validate(model, data)
    except ValueError as error:
        raise UserError(f"{where}: damaged ({error}); {advice}") from error


def explain(error: ValidationError) -> str:
    """The first problem, or all missing keys, in one short line."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    if missing := sorted({_key(each["loc"]) for each in errors if each["type"] == "missing"}):
        return f"missing {', '.join(missing[:20])}"
    first = errors[0]
    return ": ".join(filter(None, [_key(first["loc"]), first["msg"].removeprefix("Value error, ")]))


def _key(location: tuple[int | str, ...]) -> str:
    """A key, which may come from the file, in printable form."""
    key = ".".join(map(str, location))
    return key[:100] if key.isprintable() else ascii(key[:100])
