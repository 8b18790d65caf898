"""Turns each case into a test."""

import json
from pathlib import Path

import pytest

OWN = Path(__file__).parent / "cases"
# Of the complete UNets, which take the longest to compile.
SHORT_UNET = "unet_sv_train"
# They take minutes to compile, and cases of the same kinds stay among the slow ones.
HEAVY = (
    "gradient_sv_6x9",
    "gradient_sv_10x6",
    "gradient_sc_5x7",
    "gradient_frame_stride",
    "train_sc",
)


def find_cases(folder: Path) -> list[Path]:
    """What was run, case by case; a case of the published size lies in `full`."""
    return sorted(
        path for form in ("*.json", "*/case.json", "full/*.json") for path in folder.glob(form)
    )


def pytest_generate_tests(metafunc):
    if metafunc.function.__name__ == "test_case":
        chosen = metafunc.config.getoption("--parity-dir")
        folder = Path(chosen) if chosen else OWN
        cases = find_cases(folder)
        assert cases, f"no cases in {folder}"
        metafunc.parametrize(
            "case_path",
            [pytest.param(case, id=name(case), marks=marks(case)) for case in cases],
        )


def name(case: Path) -> str:
    """A case's own name: of its file, or of its folder."""
    return case.parent.name if case.stem == "case" else case.stem


def marks(case: Path) -> list[pytest.MarkDecorator]:
    """Of the project's own copies, those that take long are marked so."""
    if case.parent.name == "full" or name(case) in HEAVY and case.is_relative_to(OWN):
        return [pytest.mark.heavy]
    kind = json.loads(case.read_text())["kind"]
    is_long = kind in ("gradient", "train", "pipeline") or (
        kind == "unet" and name(case) != SHORT_UNET
    )
    return [pytest.mark.slow] if is_long and case.is_relative_to(OWN) else []
