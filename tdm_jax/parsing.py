"""From a mapping, as a configuration or a JSON file holds it, to a frozen dataclass, checked."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from tdm_jax.errors import InputError, unknown

T = TypeVar("T")
_WORDS = {
    bool: ("true or false", "truth values"),
    dict: ("a mapping", "mappings"),
    float: ("a number", "numbers"),
    int: ("an integer", "integers"),
    str: ("a string", "strings"),
}


def parse(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Builds a dataclass, and those inside it; what `values` lacks gets its default.

    An integer serves as a float and a list as a tuple. Fields annotated as `X | None` may be None.

    Args:
      kind: the dataclass.
      values: by the names of its fields.
      prefix: of the keys in messages, such as "data.".

    Raises:
      InputError: a key is unknown or missing, or a value has another type; the key is named.
    """
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # T stands for dataclasses
    known = {prefix + field.name: field for field in fields}
    for name in values:
        if prefix + name not in known:
            raise unknown("configuration key", prefix + name, known)
    for key, field in known.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise InputError(f"{key} is missing; expected {_describe(hints[field.name])}")
    return kind(**{n: _convert(hints[n], value, prefix + n) for n, value in values.items()})


def known(kind: type, values: Mapping[str, Any], prefix: str = "") -> tuple[dict, list[str]]:
    """What of `values` a dataclass has fields for, and the keys of the rest."""
    hints, kept, rest = typing.get_type_hints(kind), {}, []
    for name, value in values.items():
        if name not in hints:
            rest.append(prefix + name)
        elif dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            kept[name], inside = known(hints[name], value, f"{prefix}{name}.")
            rest += inside
        else:
            kept[name] = value
    return kept, rest


def _convert(hint: Any, value: Any, key: str) -> Any:
    parts = typing.get_args(hint)
    if type(None) in parts:
        if value is None:
            return None
        kind, parts = parts[0], typing.get_args(parts[0])
    else:
        kind = hint
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return parse(kind, value, f"{key}.")
    if parts and isinstance(value, tuple | list):
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_convert(inner, item, f"{key}[{i}]") for i, (inner, item) in pairs)
    elif kind is float and type(value) is int:
        return float(value)
    elif not parts and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{key}: got {value!r}, expected {_describe(hint)}")


def _describe(hint: Any) -> str:
    parts = typing.get_args(hint)
    if type(None) in parts:
        return f"{_describe(parts[0])} or None"
    if parts:
        return f"a {'tuple' if parts[-1] is ... else 'pair'} of {_WORDS[parts[0]][1]}"
    return _WORDS.get(hint, ("a mapping",))[0]
