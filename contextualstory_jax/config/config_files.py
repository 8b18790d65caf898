"""Reading a config: a Python file whose `get_config()` returns an `ml_collections.ConfigDict`."""

from __future__ import annotations

import ast
import contextlib
import copy
import runpy
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from contextualstory_jax.config.build import build
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.utils.errors import UserError, require

# An installed package holds its configs; in a checkout they lie beside the package.
CONFIGS = Path(__file__).parents[1] / "configs"
if not CONFIGS.is_dir():
    CONFIGS = CONFIGS.parents[1] / "configs"
PUBLISHED = {file.stem: file for file in sorted(CONFIGS.glob("*.py"))}
NAME_OR_FILE = f"a file, or one of {', '.join(PUBLISHED)}"  # for --help


def load_config(config: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A config of the package by its name, or one in a file, with overrides `key.key=value`.

    A config may build on another beside it, or on one of the package:
    `from configs.shapes import get_config`.

    Raises:
        UserError: There is no such config, a key is unknown, or a value is out of range.
    """
    path = PUBLISHED.get(str(config), Path(config))
    require(path.is_file(), f"no config {config}; --config takes {NAME_OR_FILE}")
    try:
        with _importable(path.resolve().parent):
            names = runpy.run_path(str(path))
            require("get_config" in names, f"{path} is not a config: it has no get_config()")
            values = names["get_config"]()
    except UserError:
        raise
    except Exception as error:  # a config is the user's own code
        raise UserError(f"{path} fails: {type(error).__name__}: {error}".splitlines()[0]) from error
    require(
        isinstance(values, ConfigDict | Mapping),
        f"{path} is not a config: its get_config() returns {type(values).__name__}, no ConfigDict",
    )
    return train_config(values, overrides)


def train_config(
    config: ConfigDict | Mapping[str, Any], overrides: Sequence[str] = ()
) -> TrainConfig:
    """Build a `TrainConfig` from a config's mapping, with overrides `key.key=value`.

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
    """Make a config's folder importable, and its files and the package's as `configs`."""
    path, kept = list(sys.path), _remove_configs()
    package = types.ModuleType("configs")
    package.__path__ = [str(folder), str(folder.parent / "configs"), str(CONFIGS)]
    sys.path.insert(0, str(folder.parent))
    sys.modules["configs"] = package
    try:
        yield
    finally:
        sys.path[:] = path
        _remove_configs()  # of another folder there may be others of the same names
        sys.modules.update(kept)


def _remove_configs() -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "configs"]
    return {name: sys.modules.pop(name) for name in names}


def _value(text: str) -> Any:
    """A Python literal where it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "null": None}.get(text, text)
