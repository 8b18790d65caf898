"""Stories of the studio: their links, versions, and what a kill leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from contextualstory_jax.sampling.prompts import Story
from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.studio import projects as module
from contextualstory_jax.studio.projects import Projects
from contextualstory_jax.utils.errors import UserError


def story(level: int, frames: int = 2) -> SavedStory:
    images = np.full((frames, 16, 16, 3), level, np.uint8)
    sentences = tuple(f"Sentence {i}." for i in range(frames))
    return SavedStory(Story(sentences), images, None, (level,) * frames, {"path": None}, {})


def level(project) -> int:
    return int(project.read().images[0, 0, 0, 0])


def test_changes_are_undone_and_made_again(projects):
    project = projects.create()
    assert project.read() is None and not project.can_step(-1)
    for number in (1, 2, 3):
        project.save(story(number))

    project.step(-1)
    project.step(-1)
    assert level(project) == 1 and not project.can_step(-1)
    with pytest.raises(UserError, match="nothing to undo"):
        project.step(-1)
    project.step(1)
    assert level(project) == 2 and project.can_step(1)

    project.save(story(9))  # after which there is nothing to make again
    assert level(project) == 9 and not project.can_step(1)
    project.step(-1)
    assert level(project) == 2


def test_undo_brings_back_the_very_files(projects):
    project = projects.create()
    project.save(story(1, frames=3))
    before = {p.name: p.read_bytes() for p in project.folder.iterdir() if p.is_file()}
    project.save(story(2, frames=2))
    assert not (project.folder / "frame_2.png").exists()

    project.step(-1)

    assert {p.name: p.read_bytes() for p in project.folder.iterdir() if p.is_file()} == before


def test_equal_states_are_different_versions(projects):
    project = projects.create()
    for number in (1, 2, 1):
        project.save(story(number))

    project.step(-1)
    assert level(project) == 2
    project.step(-1)
    assert level(project) == 1 and not project.can_step(-1)


def test_old_versions_are_deleted(projects, monkeypatch):
    monkeypatch.setattr(module, "MOST_VERSIONS", 3)
    project = projects.create()
    for number in range(6):
        project.save(story(number))

    assert len(list((project.folder / ".versions").iterdir())) == 3
    project.step(-1)
    project.step(-1)
    assert level(project) == 3 and not project.can_step(-1)


def test_a_folder_that_generate_wrote_is_a_story_and_can_be_had_back(tmp_path):
    story(7).write(tmp_path / "out" / "bear")
    projects = Projects(tmp_path / "out")
    (project,) = projects.all()

    project.save(story(8))
    story(9).write(project.folder)  # by the command line, in its place
    assert level(project) == 9
    project.step(-1)
    assert level(project) == 8
    project.step(-1)
    assert level(project) == 7


def test_links_outlive_a_restart_and_are_of_one_folder(projects, tmp_path):
    project = projects.create()
    project.write_page(sentences=["a"])
    link = project.link

    assert Projects(projects.folder).find(link).folder == projects.folder / link.split("~")[0]
    with pytest.raises(UserError, match="no story with this link"):
        Projects(tmp_path / "others").find(link)
    assert (projects.folder / ".key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "name", ["..", "../other", "/etc", "a/../../b", ".key", "..%2f..", "a\0b", "", "ä", "a" * 300]
)
def test_a_link_never_leaves_the_folder(projects, name):
    (projects.folder.parent / "other").mkdir()

    for signature in ("", "0" * 32, projects._sign(name)):  # also with a right signature
        with pytest.raises(UserError, match="no story with this link"):
            projects.find(f"{name}~{signature}")


@pytest.mark.parametrize("link", [None, 5, [], "x", "~", "\ud800~\ud800"])
def test_what_is_no_link_is_refused(projects, link):
    with pytest.raises(UserError, match="no story with this link"):
        projects.find(link)


@pytest.mark.parametrize("calls", range(7))
def test_a_kill_while_saving_leaves_the_old_story_or_the_new(projects, monkeypatch, calls):
    class Killed(BaseException):
        pass

    project = projects.create()
    project.save(story(1))
    replace, left = Path.replace, calls

    def killed(path: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            project.save(story(2))

    again = Projects(projects.folder).find(project.link)
    assert level(again) in (1, 2)
    again.save(story(3))
    assert level(again) == 3
    again.step(-1)
    assert level(again) in (1, 2)


def test_what_a_killed_server_left_half_written_is_removed(projects):
    project = projects.create()
    project.write_page(sentences=["a"])
    project.save(story(1))
    half = [
        projects.folder / f".{project.folder.name}.123",
        project.folder / ".versions" / ".1.123",
    ]
    foreign = projects.folder / ".profile.d.5"
    for path in (*half, foreign):
        shutil.copytree(project.folder / ".versions" / "0", path)

    Projects(projects.folder)

    assert not any(path.exists() for path in half) and foreign.exists()
    assert level(project) == 1
