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

from contextualstory_jax.sampling.export_formats import FORMATS

if TYPE_CHECKING:
    from contextualstory_jax.studio.projects import Projects
    from contextualstory_jax.studio.studio import Studio
    from contextualstory_jax.studio.worker import Model, Worker

SENTENCES = ["Mia sits.", "Otto comes.", "They wave.", "Mia naps.", "Otto leaves."]


@pytest.fixture(scope="session", autouse=True)
def quick_gif() -> Iterator[None]:
    """Animations of a few bytes: their palettes take half the time in which a story is saved."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FORMATS, "gif", ("story.gif", lambda images, captions: b"GIF89a"))
        yield


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


@pytest.fixture(scope="module")
def shared_studio(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """A studio for tests that leave its stories as they are, or make their own."""
    from contextualstory_jax.studio.projects import Projects
    from contextualstory_jax.studio.studio import Studio
    from contextualstory_jax.studio.worker import Worker

    worker = Worker()
    yield Studio([model], Projects(tmp_path_factory.mktemp("projects")), worker)
    worker.close()


@pytest.fixture(scope="module")
def link(shared_studio: Studio) -> str:
    """A story of five frames, of seed 3, which no test changes."""
    from contextualstory_jax.studio.inputs import Settings

    link, job = shared_studio.generate("", SENTENCES, Settings(3, 2))
    assert job.done.wait(60) and not job.error, job.error
    return link


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
