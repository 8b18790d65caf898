"""A studio whose model takes no time, and one of the tiny model for tests of its bytes."""

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


@pytest.fixture(scope="module", autouse=True)
def quick_gif() -> Iterator[None]:
    """Animations of a few bytes: their palettes take half the time in which a story is saved."""
    from contextualstory_jax.sampling.export_formats import FORMATS

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FORMATS, "gif", ("story.gif", lambda images, captions: b"GIF89a"))
        yield


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Path) -> Model:
    from contextualstory_jax.studio.worker import Model

    return Model(str(tiny_checkpoint))


@pytest.fixture(scope="session")
def quick_model(tiny_checkpoint: Path) -> Model:
    """A model of which nothing is compiled."""
    from contextualstory_jax.studio.worker import Model
    from tests.helpers.studio import QuickPipeline

    model = Model(str(tiny_checkpoint))
    model.__dict__["pipeline"] = QuickPipeline()
    return model


@pytest.fixture
def worker() -> Iterator[Worker]:
    from contextualstory_jax.studio.worker import Worker

    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def shared_studio(quick_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """A studio for tests that leave its stories as they are, or make their own."""
    from contextualstory_jax.studio.projects import Projects
    from contextualstory_jax.studio.studio import Studio
    from contextualstory_jax.studio.worker import Worker

    worker = Worker()
    yield Studio([quick_model], Projects(tmp_path_factory.mktemp("projects")), worker)
    worker.close()


@pytest.fixture(scope="module")
def link(shared_studio: Studio) -> str:
    """A story of five frames, of seed 3, which no test changes."""
    from tests.helpers.studio import made

    return made(shared_studio)[0]


@pytest.fixture
def projects(tmp_path: Path) -> Projects:
    from contextualstory_jax.studio.projects import Projects

    return Projects(tmp_path / "projects")


@pytest.fixture
def studio(quick_model: Model, worker: Worker, projects: Projects) -> Studio:
    from contextualstory_jax.studio.studio import Studio

    return Studio([quick_model], projects, worker)


@pytest.fixture(scope="session")
def image_url() -> str:
    """A red image of 20 x 16 pixels as a data URL."""
    file = io.BytesIO()
    Image.fromarray(np.full((16, 20, 3), (200, 10, 10), np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
