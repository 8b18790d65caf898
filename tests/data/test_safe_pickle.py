"""Pickles of downloads are read as data: what they would run is refused by name."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax.data.safe_pickle import load_npy, load_pickle
from contextualstory_jax.testing.published_folders import Hostile, save_object, write_hostile
from contextualstory_jax.utils.errors import UserError

PLAIN = {
    "text": ["pororo", "é", b"bytes", ("a", 1, 2.5, None, True, 1j)],
    "sets": {1, 2} | {frozenset({3})},
    "ordered": collections.OrderedDict(a=1),
    "scalars": [np.int64(7), np.float32(0.5), np.bool_(True)],
}
ARRAYS = {
    "numbers": np.arange(6, dtype=">i2").reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "bytes": np.array([b"ab", b"cde"]),
    "text": np.array(["ab", "cdé"]),
    "objects": np.array([[1], ["two", None], {}], dtype=object),
    "none": np.zeros((0, 4)),
}


def refusal(call, path: Path) -> str:
    """The one line by which a file is refused."""
    with pytest.raises(UserError) as caught:
        call(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_and_arrays_of_every_protocol_are_read(protocol, tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps({"plain": PLAIN, "arrays": ARRAYS}, protocol))
    read = load_pickle(path)
    assert read["plain"] == PLAIN
    for name, array in ARRAYS.items():
        assert read["arrays"][name].dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(read["arrays"][name], array)


def test_arrays_that_were_read_can_be_pickled_again(tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(ARRAYS, 2))
    again = pickle.loads(pickle.dumps(load_pickle(path)))
    assert {type(array) for array in again.values()} == {np.ndarray}
    np.testing.assert_array_equal(again["numbers"], ARRAYS["numbers"])


def test_pickles_of_python_2_and_numpy_1_are_read(tmp_path):
    # As Python 2.7 with numpy 1.16 writes {"a\xe9": array([1, 0], "u1"), "s": set([3])}
    # at protocol 2; by hand.
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x02\x85cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x02\x01\x00tb"
    )
    path = tmp_path / "python2.pkl"
    path.write_bytes(b"\x80\x02}(U\x02a\xe9" + array + b"U\x01sc__builtin__\nset\n]K\x03a\x85Ru.")
    read = load_pickle(path)
    np.testing.assert_array_equal(read["aé"], np.array([1, 0], np.uint8))
    assert read["s"] == {3}


@pytest.mark.parametrize("name", ARRAYS)
def test_npy_files_are_read_with_objects_and_without(name, tmp_path):
    path = tmp_path / "array.npy"
    np.save(path, ARRAYS[name])
    read = load_npy(path)
    assert type(read) is np.ndarray and read.dtype == ARRAYS[name].dtype
    np.testing.assert_array_equal(read, ARRAYS[name])


def test_a_dictionary_in_an_npy_file_is_read(tmp_path):
    path = tmp_path / "dictionary.npy"
    save_object(path, PLAIN)
    assert load_npy(path).item() == PLAIN


@pytest.mark.parametrize(("name", "load"), [("x.npy", load_npy), ("x.pkl", load_pickle)])
def test_a_hostile_file_is_refused_by_name_and_not_run(name, load, tmp_path):
    marker = tmp_path / "it ran"
    path = write_hostile(tmp_path / name, marker)
    assert "builtins.exec" in refusal(load, path)
    assert not marker.exists()

    np.load(path, allow_pickle=True)  # the file is hostile indeed
    assert marker.exists()


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"c__builtin__\neval\n(S'1'\ntR.", "__builtin__.eval"),
        (b"(S'true'\nios\nsystem\n.", "os.system"),
        (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "numpy.core.multiarray.fromfile"),
        (b"ccollections\ndefaultdict\n.", "collections.defaultdict"),
        (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.", "builtins.getattr"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.", "OrderedDict.__init__"),
    ],
)
def test_other_globals_are_refused_by_name(code, named, tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(code)
    assert named in refusal(load_pickle, path)


def test_objects_inside_object_arrays_are_refused(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.array([1, Hostile(tmp_path / "it ran")], dtype=object))
    assert "builtins.exec" in refusal(load_npy, path)


def forged(dtype: np.dtype, shape: tuple, content: object) -> bytes:
    """A pickle of an array whose state is none that numpy would write."""

    class Forged:
        def __reduce__(self):
            state = (1, shape, dtype, False, content)
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state

    return pickle.dumps(Forged())


@pytest.mark.parametrize(
    "code",
    [
        forged(np.dtype("i4"), (1000,), b"\0" * 4),
        forged(np.dtype(object), (1000,), [None]),
        forged(np.dtype(object), (1,), b"\x41" * 8),
        forged(np.dtype("i4"), (1,), [b"\0"] * 4),
        forged(np.dtype([("a", "i4")]), (1,), b"\0" * 4),
        pickle.dumps(PLAIN)[:-20],
        b"",
        b"no pickle",
    ],
    ids=["short", "few objects", "addresses", "list", "structured", "cut", "empty", "text"],
)
def test_broken_and_forged_pickles_are_refused(code, tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(code)
    assert "not a complete pickle" in refusal(load_pickle, path)


def test_broken_npy_files_are_refused(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.arange(100))
    whole = path.read_bytes()
    for content in (b"", b"no array", whole[:50], whole[:-1]):
        path.write_bytes(content)
        assert "not a complete .npy file" in refusal(load_npy, path)
    save_object(path, PLAIN)
    path.write_bytes(path.read_bytes()[:-9])
    assert "not a complete pickle" in refusal(load_npy, path)


def test_a_missing_file_is_named(tmp_path):
    assert "No such file" in refusal(load_npy, tmp_path / "none.npy")
    assert "No such file" in refusal(load_pickle, tmp_path / "none.pkl")
