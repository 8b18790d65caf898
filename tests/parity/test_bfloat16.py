"""In bfloat16, as accelerators compute: the original's modules and UNets within what it can hold.

A bfloat16 has 8 significant bits; layers add their roundings up (docs/parity.md has the figures).
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from contextualstory_jax.testing.parity_cases import (
    COMPARE,
    UNET_TOLERANCE,
    Case,
    compare,
    relative_error,
)
from tests.parity.conftest import OWN, SHORT_UNET, find_cases, name

MODULES, UNETS = 2e-2, 6e-2
SLOW, HEAVY = pytest.mark.slow, pytest.mark.heavy

# Visualization's training pass, and continuation with all guidance.
UNET_CASES = (SHORT_UNET, "unet_sc_sample_both")
CASES = [
    pytest.param(path, id=name(path), marks=HEAVY if name(path) == SHORT_UNET else SLOW)
    for path in find_cases(OWN)
    if (kind := json.loads(path.read_text())["kind"]) in COMPARE
    and (kind != "unet" or name(path) in UNET_CASES)
]


@pytest.mark.parametrize("path", CASES)
def test_bfloat16_is_as_close_as_its_rounding(path: Path) -> None:
    with jax.default_matmul_precision("default"):
        for found in compare(Case(path, jnp.bfloat16)):
            tolerance = UNETS if found.tolerance == UNET_TOLERANCE else MODULES
            assert relative_error(found.ours, found.theirs) <= tolerance, found.what
