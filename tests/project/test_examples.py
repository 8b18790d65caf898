"""The notebook and the code of the API page run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from contextualstory_jax.sampling import pretrained

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def executed(name, tmp_path):
    """The outputs of a notebook's cells, executed in an empty folder."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def images(outputs):
    """The images among outputs."""
    return [output for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.slow
def test_the_quickstart_runs_and_shows_images(tmp_path):
    outputs = executed("quickstart.ipynb", tmp_path)

    assert len(images(outputs)) == 8
    assert "(2, 5, 32, 32, 3)" in str(outputs)


@pytest.mark.heavy
def test_the_notebook_about_evaluation_runs(tmp_path):
    outputs = executed("evaluate.ipynb", tmp_path)

    assert len(images(outputs)) == 2
    assert "character f1" in str(outputs)
    assert (tmp_path / "results" / "index.html").is_file()


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_a_notebook_is_committed_without_outputs_and_paths(name):
    text = (EXAMPLES / name).read_text()

    assert '"outputs": []' in text and '"image/png"' not in text
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)


@pytest.mark.slow
def test_the_api_pages_code_runs(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "SHIPPED", tiny_checkpoint)  # compiles in a tenth of the time
    text = (ROOT / "docs" / "api.md").read_text()
    found: dict = {}

    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(code, found)

    with Image.open("frame.png") as image:
        assert image.size == (16, 16)
    assert found["batch"].shape == (2, 5, 16, 16, 3)
    assert found["latents"].dtype == np.float32
    assert "step 3 of timestep" in capsys.readouterr().out
    norms = jax.tree.map(lambda leaf: float(np.abs(leaf).max()), found["gradient"])
    assert norms.keys() == found["pipe"].params["unet"].keys()
    assert (
        np.isfinite(list(norms.values())).all() and sum(norm > 0 for norm in norms.values()) > 100
    )
