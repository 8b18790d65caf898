"""Reading a recipe: a Python file whose `get_config()` returns an `ml_collections.ConfigDict`."""

from __future__ import annotations

import ast
import contextlib
import copy
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from contextualstory_jax.config import build, require
from contextualstory_jax.errors import UserError
from contextualstory_jax.recipe_config import TrainConfig


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The recipe in a file, with overrides `key.key=value` applied.

    A recipe may build on its neighbours: `from configs.shapes import get_config`. Raises
    `UserError` where the file is missing or no recipe, a key is unknown, or a value is out of
    range.
    """
    require(Path(path).is_file(), f"no recipe {path}; configs/ holds the recipes there are")
    try:
        with _importable(Path(path).resolve().parent.parent):
            names = runpy.run_path(str(path))
            require("get_config" in names, f"{path} is not a recipe: it has no get_config()")
            config = names["get_config"]()
    except UserError:
        raise
    except Exception as error:  # a recipe is the user's own code
        raise UserError(f"{path} fails: {type(error).__name__}: {error}".splitlines()[0]) from error
    require(
        isinstance(config, ConfigDict | Mapping),
        f"{path} is not a recipe: its get_config() returns {type(config).__name__}, no ConfigDict",
    )
    return train_config(config, overrides)


def train_config(
    config: ConfigDict | Mapping[str, Any], overrides: Sequence[str] = ()
) -> TrainConfig:
    """A recipe's mapping, with overrides `key.key=value`, as the dataclass that code uses.

    Raises `UserError` where a key is unknown or a value is out of range.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else copy.deepcopy(dict(config))
    for override in overrides:
        key, separator, text = override.partition("=")
        require(
            bool(separator) and bool(key), f"override {override!r} is not of the form key=value"
        )
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            require(isinstance(inner, dict), f"config key {key}: {parent} holds no keys")
        inner[last] = _value(text)
    return build(TrainConfig, values)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let code import from a folder, whatever the working directory."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _value(text: str) -> Any:
    """A Python literal where it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "null": None}.get(text, text)
