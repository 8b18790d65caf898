"""Published folders with something wrong in them: the command that prepares them names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from contextualstory_jax.commands import prepare
from contextualstory_jax.testing.published_folders import write_flintstones, write_pororo
from contextualstory_jax.utils.errors import UserError
from tests.hostile.dataset_cases import FLINTSTONES, PORORO, DatasetCase


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both datasets, to be copied."""
    folder = tmp_path_factory.mktemp("published")
    episodes = {"Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep1": 21}
    ids = {"train": range(15), "val": [15], "test": [16]}
    write_pororo(folder / "pororo", episodes=episodes, ids=ids, strips=True, size=4)
    write_flintstones(folder / "flintstones", size=4)
    return folder


def prepared(dataset: str, case: DatasetCase, published: Path, folder: Path, capsys) -> str:
    """What the command says of a changed dataset, in all."""
    source = shutil.copytree(published / dataset, folder / "source")
    case.change(source)
    arguments = ["--source", str(source), "--out", str(folder / "out"), "--size", "16"]
    try:
        prepare.main([dataset, *arguments, "--workers", "1", *case.arguments])
        error = ""
    except UserError as refused:
        error = str(refused)
    assert "\n" not in error
    assert bool(error) == bool(case.says)
    assert (folder / "out").exists() != bool(error)
    return capsys.readouterr().out + error


@pytest.mark.parametrize("case", PORORO, ids=lambda case: case.name)
def test_a_pororo_folder(case, published, tmp_path, capsys):
    said = prepared("pororo", case, published, tmp_path, capsys)

    assert all(word in said for word in case.says)


@pytest.mark.parametrize("case", FLINTSTONES, ids=lambda case: case.name)
def test_a_flintstones_folder(case, published, tmp_path, capsys):
    said = prepared("flintstones", case, published, tmp_path, capsys)

    assert all(word in said for word in case.says)
