"""Files that are written atomically."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest

from contextualstory_jax.sampling.output import read_latents, write_latents
from contextualstory_jax.utils.atomic import atomic_path, check_writable, write_json
from contextualstory_jax.utils.errors import UserError


def test_what_fails_on_the_way_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as temporary:
        temporary.mkdir()
        (temporary / "frame_0.png").write_text("half")
        raise ZeroDivisionError

    assert list(tmp_path.iterdir()) == []


def test_json_and_latents_come_back(tmp_path):
    latents = np.ones((1, 5, 2, 2, 3), np.float32)

    write_json(tmp_path / "stories.json", {"sentence": "Ein Bär."})
    write_latents(tmp_path / "latents", latents)

    assert json.loads((tmp_path / "stories.json").read_text("utf-8")) == {"sentence": "Ein Bär."}
    np.testing.assert_array_equal(read_latents(tmp_path / "latents"), latents)


def test_files_have_the_permissions_of_any_other(tmp_path):
    (tmp_path / "other").touch()
    write_json(tmp_path / "stories.json", {})

    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}

    assert len(modes) == 1


def test_a_place_that_cannot_be_written_is_named_and_nothing_made(tmp_path):
    (tmp_path / "file").write_text("mine")

    with pytest.raises(UserError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot write .*out"):
        write_json(tmp_path / "file" / "out", {})
    check_writable(tmp_path / "not" / "yet")

    assert [path.name for path in tmp_path.iterdir()] == ["file"]
