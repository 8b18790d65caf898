"""What every test shares: the CPU, no network, and compiled programs kept from run to run."""

from __future__ import annotations

import os

import pytest

# Before any test module imports JAX. The number of devices is left alone: a test that needs
# several starts a process of its own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    # Here and not in tests/parity: pytest knows an option only from the conftest files it reads
    # at start-up.
    parser.addoption(
        "--parity-dir",
        action="store",
        default=None,
        help="run every parity case in this folder instead of the project's own copies",
    )


def pytest_configure(config: pytest.Config) -> None:
    # In the environment, so that the processes tests start use it too.
    cache = config.cache.mkdir("jax")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
