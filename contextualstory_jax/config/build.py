"""Config dataclasses built from plain mappings; unknown keys and values are refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from contextualstory_jax.utils.errors import UserError, require

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a config dataclass from a mapping.

    Nested mappings become nested dataclasses and lists tuples; a union of dataclasses is chosen by
    its `kind`. Raises `UserError` naming the dotted key that is unknown or has a value of the wrong
    type.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        known = ", ".join(sorted(hints))
        raise UserError(f"unknown config key {where}{unknown[0]}; known: {known}")
    return cls(
        **{name: _convert(hints[name], value, where + name) for name, value in values.items()}
    )


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Mapping):
        choices: list[Any] = [c for c in (args or (hint,)) if dataclasses.is_dataclass(c)]
        kinds = (
            {c.__dataclass_fields__["kind"].default: c for c in choices} if len(choices) > 1 else {}
        )
        if kinds:
            kind = value.get("kind", next(iter(kinds)))
            require(kind in kinds, f"{name}.kind must be one of {', '.join(kinds)}; got {kind!r}")
            return build(kinds[kind], value, f"{name}.")
        require(bool(choices), f"{name} must not be a mapping; got {dict(value)!r}")
        return build(choices[0], value, f"{name}.")
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _convert(option, value, name)
            except UserError:
                continue
    elif origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(args[0], v, f"{name}[{i}]") for i, v in enumerate(value))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif dataclasses.is_dataclass(hint) and isinstance(value, hint):
        return value
    elif hint is type(None) and value is None:
        return None
    elif isinstance(hint, type) and type(value) is hint:
        return value
    expected = (
        " or ".join(map(repr, args)) if origin is Literal else getattr(hint, "__name__", str(hint))
    )
    raise UserError(f"{name} must be {expected}; got {value!r}")


def dotted(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            dotted(value, f"{where}{key}.") if isinstance(value, Mapping) else {where + key: value}
        )
    return flat


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON reads them back: tuples are lists."""
    return json.loads(json.dumps(values))


def check_range(
    config: Any, where: str, names: tuple[str, ...], least: int, most: int | None = None
) -> None:
    """Raise `UserError` naming the first of a config's fields that is outside [least, most]."""
    for name in names:
        value = getattr(config, name)
        integer = config.__dataclass_fields__[name].type == "int"
        kind: Any = numbers.Integral if integer else numbers.Real
        number = isinstance(value, kind) and not isinstance(value, bool)
        noun = "an integer, " if integer else "a number, "
        require(
            number and least <= value < math.inf and (most is None or value <= most),
            f"{where}{name} must be "
            + (noun if not number else "" if math.isfinite(value) else "finite, ")
            + (f"at least {least}" if most is None else f"in [{least}, {most}]")
            + f"; got {value!r}",
        )


def check_pattern(where: str, pattern: str) -> None:
    """Raise `UserError` for an invalid regex."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression: {error}") from error
