"""Packages that metrics are compared with, in a folder of their own.

`.ci/run` installs them into `.venv/metric-packages` without their dependencies, of which some have
a CUDA build of PyTorch. On PYTHONPATH they are found too.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / ".venv" / "metric-packages"
_operators = []


def package(name: str) -> ModuleType:
    """A package. Skips the test module where it is not installed."""
    torch = pytest.importorskip("torch")
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if not _operators:
        # torchvision's wheel has them in a library for CUDA; its import asks for them.
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.append(library)
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not in {FOLDER}: .ci/run installs it", allow_module_level=True)
    return importlib.import_module(name)


def within(what: str, error: float, bound: float) -> None:
    """Assert that an error is within its bound; `pytest -rP` shows it."""
    print(f"{what}: {error:.2g}, at most {bound:g}")
    assert error <= bound
