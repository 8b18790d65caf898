"""Pickles and `.npy` files of published datasets, read as data without running code.

A pickle names functions for its reader to call. The original calls whatever is named
(`pickle.load`, `np.load(allow_pickle=True)`); this reader knows those that make containers,
strings, bytes, numbers and numpy arrays, and refuses every other by name. The sizes that a pickle
states, which numpy's own functions would trust, are checked first.
"""

from __future__ import annotations

import collections
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from contextualstory_jax.utils.errors import UserError
from contextualstory_jax.utils.files import check_file

KINDS = "?bBhHiIlLqQefdgFDGSUO"  # of dtype, that a pickle may have: numbers, strings, objects


def load_pickle(path: Path) -> Any:
    """Read a `.pkl` file.

    Strings of Python 2 are read as Latin-1, as the datasets' own readers do. Raises `UserError`
    where the file cannot be read, is broken, or holds more than plain data.
    """
    with _reading(path) as file:
        return _unpickle(file, path)


def load_npy(path: Path) -> np.ndarray:
    """Read the array in a `.npy` file, which may hold objects.

    Raises `UserError` where the file cannot be read, is broken, or holds more than plain data.
    """
    with _reading(path) as file:
        try:
            version = npy.read_magic(file)
            header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            _, _, dtype = header(file)
            if not dtype.hasobject:
                file.seek(0)
                return npy.read_array(file, allow_pickle=False)
        # A broken header or a short file raises almost anything.
        except Exception as error:
            raise UserError(f"{path} is not a complete .npy file; fetch it again") from error
        array = _unpickle(file, path)
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an .npy file without an array; fetch it again")
    return np.asarray(array)


def _reading(path: Path) -> BinaryIO:
    check_file(path, "fetch it again")
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _unpickle(file: BinaryIO, path: Path) -> Any:
    try:
        return _PlainUnpickler(file, path).load()
    except UserError:
        raise
    # A broken pickle raises almost anything.
    except Exception as error:
        raise UserError(f"{path} is not a complete pickle of plain data; fetch it again") from error


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        # Python 2's and numpy 1's names for modules that have others now.
        module = module_name.replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
        try:
            return PLAIN[f"{module}.{global_name}"]
        except KeyError:
            raise UserError(
                f"{self.path} is a pickle that asks for {module_name}.{global_name}, which is no "
                "plain data and was not run; fetch the file from a source you trust"
            ) from None


class _Dtype:
    """Stand-in for `np.dtype` while a pickle is read; of its state only the byte order counts."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(code)
        if self.dtype.char not in KINDS:
            raise ValueError(f"dtype {code!r}")

    def __setstate__(self, state: tuple) -> None:
        _, order, subdtype, names, fields, *_ = state
        if (subdtype, names, fields) != (None, None, None):
            raise ValueError("structured dtype")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array whose stated shape must agree with what a pickle holds for it."""

    def __setstate__(self, state: tuple, /) -> None:
        version, shape, stand_in, fortran, content = state
        dtype = stand_in.dtype
        length = len(content) if dtype.hasobject else len(content) / max(dtype.itemsize, 1)
        if length != math.prod(shape) or isinstance(content, list) != dtype.hasobject:
            raise ValueError(f"{length} elements for the shape {shape}")
        super().__setstate__((version, shape, dtype, fortran, content))

    def __reduce__(self) -> str | tuple:
        return np.asarray(self).__reduce__()  # written, it is an array like others


def _empty_array(*_: Any) -> np.ndarray:
    """For `numpy.core.multiarray._reconstruct`: the array that a state then fills."""
    return np.empty(0, np.int8).view(_Array)


def _scalar(stand_in: _Dtype, content: bytes | str) -> Any:
    """For `numpy.core.multiarray.scalar`."""
    content = content.encode("latin1") if isinstance(content, str) else content  # by Python 2
    (number,) = np.frombuffer(content, stand_in.dtype)
    return number


def _from_buffer(
    content: bytes | bytearray, stand_in: _Dtype, shape: tuple, order: str
) -> np.ndarray:
    """For `numpy.core.numeric._frombuffer`, of pickles of protocol 5."""
    return np.frombuffer(content, stand_in.dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """For `_codecs.encode`, by which old protocols write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"encoding {encoding!r}")
    return text.encode("latin1")


PLAIN: dict[str, Callable[..., Any]] = {
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytes": bytes,  # the empty ones of old protocols
    "builtins.bytearray": bytearray,
    "builtins.complex": complex,
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _encode,
    "numpy.ndarray": np.ndarray,  # as an argument of _reconstruct
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
}
