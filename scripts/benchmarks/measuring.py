"""Measuring: contenders take turns, medians with spread, beside a floor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from contextualstory_jax.models.flops import DEVICES, peak_flops

MANY = 10  # rounds
Task = Callable[[], float]  # does something once and gives the seconds that it took


class Row(NamedTuple):
    """A line of the table."""

    what: str
    seen: list[float]
    unit: str = "s"
    floor: float | None = None  # what the device could do at best, in the same unit
    mfu: float | None = None  # operations of the method, as a share of the device's peak
    times_ours: float | None = None  # of the original: its median over ours

    @property
    def median(self) -> float:
        return statistics.median(self.seen)

    def values(self) -> dict[str, Any]:
        """The values for the JSON file."""
        return {**self._asdict(), "median": self.median}

    def cells(self) -> list[str]:
        """The cells for the table."""
        spread = f"{min(self.seen):.3g}..{max(self.seen):.3g}" if len(self.seen) > 1 else ""
        return [
            self.what,
            f"{self.median:.3g} {self.unit}",
            spread,
            "" if self.floor is None else f"{self.floor:.3g} {self.unit}",
            "" if self.mfu is None else f"{self.mfu:.1%}",
            "" if self.times_ours is None else f"{self.times_ours:.2f}",
        ]


COLUMNS = ("what", "median", "min..max", "floor", "MFU", "times ours")


class Machine(NamedTuple):
    """One device, and how it is measured on."""

    device: Any
    dtype: str  # to compute in
    rate: float  # operations a second of a large matrix product, measured
    rounds: int
    warm_ups: int

    @classmethod
    def of(cls, device: Any, dtype: str, rounds: int, warm_ups: int) -> Machine:
        """A device, its rate measured."""
        return cls(device, dtype, matmul_rate(dtype), rounds, warm_ups)

    def about(self) -> dict[str, str]:
        """Conditions to publish with the figures."""
        kind = self.device.device_kind
        published = peak_flops(kind, self.dtype)
        return {
            "device": f"{kind} ({os.cpu_count()} cores)",
            "dtype": self.dtype,
            "matmul": f"{self.rate / 1e12:.3g} TFLOP/s",
            "published peak": f"{published / 1e12:.4g} TFLOP/s" if published else "none",
            **versions(),
        }

    @property
    def peak(self) -> float:
        """Peak operations a second for MFU: the published peak, else the measured rate."""
        return peak_flops(self.device.device_kind, self.dtype) or self.rate

    def floor(self, flops: float, num_bytes: float = 0) -> float:
        """Seconds for `flops` operations at the measured rate, and then to move `num_bytes`."""
        known = DEVICES.get(self.device.device_kind)
        return flops / self.rate + (num_bytes / known.bandwidth if known else 0)

    def times(
        self, what: str, contenders: Mapping[str, Task], flops: float, num_bytes: float = 0
    ) -> Iterator[Row]:
        """A line for each contender, ours, `""`, the first; all take turns, quick ones more often.

        Args: what the method needs, however it is computed: `flops`, and `num_bytes` that are moved
        while nothing is computed.
        """
        for _ in range(self.warm_ups):
            for task in contenders.values():
                task()
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        spent = 0.0
        while len(seconds[""]) < self.rounds or (spent < 3 and len(seconds[""]) < MANY):
            for name, task in contenders.items():
                seconds[name].append(task())
                spent += seconds[name][-1]
        for name, values in seconds.items():
            median = statistics.median(values)
            yield Row(
                what=f"{what}: {name}" if name else what,
                seen=values,
                floor=self.floor(flops, num_bytes),
                mfu=flops / median / self.peak,
                times_ours=median / statistics.median(seconds[""]) if name else None,
            )

    def peak_memory(self) -> Row:
        """The most memory held so far: the device's or, of a CPU, this process's."""
        stats = self.device.memory_stats()
        if stats:
            return Row("peak memory of the device", [stats["peak_bytes_in_use"] / 1e9], "GB")
        (line,) = (
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM:")
        )
        return Row("peak memory of this process", [int(line.split()[1]) * 1024 / 1e9], "GB")


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def timed(run: Callable[[], Any]) -> Task:
    """A task of something that JAX computes."""

    def task() -> float:
        began = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - began

    return task


def matmul_rate(dtype: str) -> float:
    """Operations a second of a matrix product that is large for the device; the best of some."""
    product = jax.jit(lambda x: x @ x)
    size, seconds = 512, 0.0
    while seconds < 0.1 and size < 16384:
        size *= 2
        x = jax.random.normal(jax.random.key(0), (size, size), dtype)  # zeros and ones draw less
        seconds = min(timed(lambda x=x: product(x))() for _ in range(4))
    return 2 * size**3 / seconds


class Compiled(NamedTuple):
    """A program, and the seconds to make it: from nothing, and with the cache on disk filled."""

    program: jax.stages.Compiled
    cold: float
    warm: float

    def rows(self, what: str) -> list[Row]:
        return [
            Row(f"{what}: compile", [self.cold]),
            Row(f"{what}: compile, from the cache", [self.warm]),
        ]


def compile_twice(lower: Callable[[], jax.stages.Lowered]) -> Compiled:
    """Trace and compile, forget, and do it again; the cache on disk must be empty of it."""
    seconds = []
    for _ in range(2):
        jax.clear_caches()
        began = time.perf_counter()
        program = lower().compile()
        seconds.append(time.perf_counter() - began)
    return Compiled(program, *seconds)
