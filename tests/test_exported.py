"""The exported generation program, run by JAX alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from contextualstory_jax import StoryPipeline, UserError
from contextualstory_jax.exported import export_generation, generation_arrays

SENTENCES = ("A cat sits.", "It runs.", "It jumps.", "It eats.", "It sleeps.")
# As docs/export.md has it, but for the names of files.
RUN = """
import sys
from pathlib import Path
import jax
import numpy as np

program = jax.export.deserialize(Path("generation.jaxexport").read_bytes())
assert program.platforms == ("cpu", "cuda")
weights, request = (dict(np.load(file)) for file in ("weights.npz", "request.npz"))
images, latents = program.call(weights, request)
np.savez("images.npz", images=images, latents=latents)
assert "contextualstory_jax" not in sys.modules
"""


@pytest.mark.slow  # compiles in two processes
def test_an_exported_program_gives_the_same_bytes_in_another_process(tiny_checkpoint, tmp_path):
    pipeline = StoryPipeline.load(tiny_checkpoint)
    (tmp_path / "generation.jaxexport").write_bytes(export_generation(pipeline))
    weights, request = generation_arrays(pipeline, SENTENCES, seed=3)
    np.savez(tmp_path / "weights.npz", **weights)
    np.savez(tmp_path / "request.npz", **request)

    subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, check=True)

    images = np.load(tmp_path / "images.npz")
    np.testing.assert_array_equal(images["images"][0], pipeline(SENTENCES, seed=3))
    expected = pipeline(SENTENCES, seed=3, output_type="latent")
    np.testing.assert_allclose(images["latents"][0], expected, atol=1e-5)


def test_without_flatbuffers_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UserError, match=r"flatbuffers is not installed; .* the extra \[export\]"):
        export_generation(None)
