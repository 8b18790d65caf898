"""Turns each case file into a test."""

import json
from pathlib import Path

import pytest


def pytest_generate_tests(metafunc):
    if metafunc.function.__name__ == "test_case":
        chosen = metafunc.config.getoption("--parity-dir")
        folder = Path(chosen) if chosen else Path(__file__).parent / "cases"
        cases = sorted(folder.glob("*.json"))
        assert cases, f"no cases (*.json) in {folder}"
        metafunc.parametrize(
            "case_path",
            [
                pytest.param(case, id=case.stem, marks=() if chosen else own_marks(case))
                for case in cases
            ],
        )


def own_marks(case: Path) -> list[pytest.MarkDecorator]:
    """A training step takes a minute to compile: of the project's own copies, a long test."""
    return [pytest.mark.slow] if json.loads(case.read_text())["kind"] == "train" else []
