"""The exported generation program, run by JAX alone."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax import StoryPipeline, UserError
from contextualstory_jax.sampling.jax_export import export_generation

DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.mark.slow  # compiles in two processes
def test_the_documented_program_gives_the_same_bytes_in_another_process(
    tiny_checkpoint, tmp_path, monkeypatch
):
    writing, running = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(writing.replace("from_pretrained()", f"from_pretrained({str(tiny_checkpoint)!r})"), names)
    check = """
assert program.platforms == ("cpu", "cuda")
import sys
assert "contextualstory_jax" not in sys.modules
"""

    subprocess.run([sys.executable, "-c", running + check], check=True)

    found = np.load("images.npz")
    for output_type, array in (("np", found["images"]), ("latent", found["latents"])):
        expected = names["pipe"](names["sentences"], seed=0, output_type=output_type)
        np.testing.assert_array_equal(array[0], expected)


def test_without_flatbuffers_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UserError, match=r"flatbuffers is not installed; .* the extra \[export\]"):
        export_generation(StoryPipeline.__new__(StoryPipeline))
