"""Both sides of what depends on the device, on stand-ins (listed in docs/architecture.md)."""

from __future__ import annotations

import types
from pathlib import Path

import jax
import pytest

from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.training.metric_writers import NoWriter
from contextualstory_jax.training.progress import Progress, device_memory
from contextualstory_jax.utils.errors import UserError
from scripts.benchmark import main as benchmark
from scripts.benchmarks.measuring import Machine

RECIPE = Path(__file__).parents[1] / "helpers" / "tiny_config.py"
GIB = 2**30


def device(kind: str, stats: dict[str, int] | None = None) -> types.SimpleNamespace:
    """A device as far as progress and the benchmark look at it."""
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        (None, {}),  # a CPU's
        ({"bytes_in_use": GIB}, {"memory": 1}),
        (
            {"bytes_in_use": GIB, "peak_bytes_in_use": 2 * GIB, "bytes_limit": 3 * GIB},
            {"memory": 1, "peak_memory": 2},
        ),
    ],
)
def test_memory_is_logged_where_the_device_counts_it(monkeypatch, stats, expected):
    monkeypatch.setattr(jax, "local_devices", lambda: [device("any", stats)])

    assert device_memory() == expected


@pytest.mark.parametrize(("kind", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)])
def test_utilisation_is_of_devices_whose_peak_is_known(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "local_devices", lambda: [device(kind)])
    monkeypatch.setattr(jax, "device_count", lambda: 8)

    progress = Progress(load_config(RECIPE, ["compute_dtype=bfloat16"]), NoWriter(), 0, flops=1)

    assert progress._peak == (peak and 8 * peak)


def machine(device: types.SimpleNamespace) -> Machine:
    return Machine(device, "bfloat16", rate=1e12, rounds=1, warm_ups=0)


def test_the_benchmark_knows_published_peaks_and_measures_others():
    known, unknown = machine(device("NVIDIA H100 80GB HBM3")), machine(device("cpu"))

    assert (known.peak, unknown.peak) == (989e12, 1e12)
    assert (known.about()["published peak"], unknown.about()["published peak"]) == (
        "989 TFLOP/s",
        "none",
    )
    assert known.floor(1e12, 3.35e12) == pytest.approx(2)  # and then to move the bytes
    assert unknown.floor(1e12, 3.35e12) == pytest.approx(1)


def test_the_benchmark_s_memory_is_the_device_s_or_the_process_s():
    gpu, cpu = machine(device("any", {"peak_bytes_in_use": 5e9})), machine(device("cpu"))

    assert gpu.peak_memory().what == "peak memory of the device"
    assert gpu.peak_memory().seen == [5]
    assert cpu.peak_memory().what == "peak memory of this process"


@pytest.mark.parametrize(("backend", "suite"), [("cpu", "cpu"), ("gpu", "gpu"), ("tpu", "gpu")])
def test_the_benchmark_s_suite_is_the_device_s(monkeypatch, backend, suite):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    with pytest.raises(UserError, match=f"suite {suite} has no nothing"):
        benchmark(["--only", "nothing"])
