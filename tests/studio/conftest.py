"""A studio with the tiny model, which all tests here share."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from contextualstory_jax.studio.projects import Projects
    from contextualstory_jax.studio.studio import Studio
    from contextualstory_jax.studio.worker import Model, Worker

SENTENCES = ["Mia sits.", "Otto comes.", "They wave.", "Mia naps.", "Otto leaves."]


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Path) -> Model:
    from contextualstory_jax.studio.worker import Model

    return Model(str(tiny_checkpoint))


@pytest.fixture
def worker() -> Iterator[Worker]:
    from contextualstory_jax.studio.worker import Worker

    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def projects(tmp_path: Path) -> Projects:
    from contextualstory_jax.studio.projects import Projects

    return Projects(tmp_path / "projects")


@pytest.fixture
def studio(model: Model, worker: Worker, projects: Projects) -> Studio:
    from contextualstory_jax.studio.studio import Studio

    return Studio([model], projects, worker)


@pytest.fixture(scope="session")
def image_url() -> str:
    """A red image of 20 x 16 pixels as a data URL."""
    file = io.BytesIO()
    Image.fromarray(np.full((16, 20, 3), (200, 10, 10), np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
